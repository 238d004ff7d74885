"""What a request can meet. No status codes here: each transport has its own table.

DualTokenError
└── ServeError
    ├── BadRequest     does not fit the protocol or the model's contract
    ├── TooLarge       more bytes than the contract can use
    ├── Unsupported    an encoding of the body that this server does not read
    ├── TooSlow        the body did not arrive in time
    ├── NotFound       no such model, version or path
    ├── Denied         no API key, or a wrong one
    ├── Forbidden      switched off here, or asked for by another site's page
    ├── Overloaded     the queue is full; the same request may succeed later
    ├── Unavailable    the server drains, or no worker of the model is up
    ├── ModelFailed    the runtime failed or its process died
    └── ModelHung      the runtime did not answer in time; its process was replaced
"""

from __future__ import annotations

from dualtoken_deploy.errors import DualTokenError


class ServeError(DualTokenError):
    """Base of everything that answers a request with something other than a result."""


class BadRequest(ServeError):
    pass


class TooLarge(ServeError):
    pass


class Unsupported(ServeError):
    pass


class TooSlow(ServeError):
    pass


class NotFound(ServeError):
    pass


class Denied(ServeError):
    pass


class Forbidden(ServeError):
    pass


class Overloaded(ServeError):
    pass


class Unavailable(ServeError):
    pass


class ModelFailed(ServeError):
    pass


class ModelHung(ServeError):
    pass
