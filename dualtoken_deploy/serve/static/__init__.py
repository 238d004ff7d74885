"""The page and its documentation: a few files of this package, served from memory, with nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

KINDS: Mapping[str, str] = MappingProxyType(
    {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
)
# The page may load and ask only this server; a photograph is shown from memory (blob:).
HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
)


def read(name: str) -> tuple[bytes, str]:
    """Content and media type of one of this folder's files."""
    return resources.files(__name__).joinpath(name).read_bytes(), KINDS[name.rpartition(".")[2]]
