"""A bundle as the server takes it: whole, and where keys are required signed by one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dualtoken_deploy.bundle.signature import check_signature
from dualtoken_deploy.bundle.store import Bundle


def open_bundle(path: str | os.PathLike[str], signers: Sequence[Path]) -> Bundle:
    """`signers`: public keys; none: no signature is asked for. Raises BundleError, InputError, MissingError."""
    bundle = Bundle.open(path)
    if signers:
        check_signature(bundle, signers)
    return bundle
