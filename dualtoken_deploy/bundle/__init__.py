"""A bundle: the folder that an app developer takes away, what it says of itself, and how it is written and verified."""

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle

__all__ = ["Bundle", "Manifest"]
