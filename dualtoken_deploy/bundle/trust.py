"""Bundles whose use runs code of whoever made them: run here only where this user made them, or said so.

AOTInductor packages are native code, and so is part of some TensorRT engines; of a bundle of a user's model the
manifest names the Python that makes eager again. A hash in the manifest is no proof: who changes a file changes the
hash as well. What this user made is remembered in the cache, by the hashes of all that runs: wherever the bundle is
copied to, and whatever a later version writes into manifests. The note lies in the cache of all programs even where
DUALTOKEN_CACHE names another one, so that a shell that sets it knows what one without made, and the other way round.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dualtoken_deploy.bundle.decode import plain
from dualtoken_deploy.errors import BundleError, OutputError
from dualtoken_deploy.files import OURS, cache_folder, is_file, user_cache

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.manifest import Manifest

ALLOW = "DUALTOKEN_ALLOW_NATIVE"  # in the environment, so that workers know as well


def permit_native(allowed: bool = True) -> None:
    """What --allow-native does: for this process, and those that it starts, every bundle's code may run."""
    if allowed:
        os.environ[ALLOW] = "1"


def remember(manifest: Manifest) -> None:
    """Notes that this user made a bundle. Where no cache can be written its use will be refused, which is said."""
    for place in _places(manifest):
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()


def check_trusted(manifest: Manifest, what: str) -> None:
    """Raises BundleError where the bundle was not made here by this user and nobody allowed it. `what` would run."""
    if not manifest.files or os.environ.get(ALLOW) == "1":  # without files: a draft of this process, not yet written
        return
    if not any(is_file(place) for place in _places(manifest)):
        raise BundleError(
            f"{what}, and no note in the cache says that you made this bundle here; give --allow-native "
            f"(or {ALLOW}=1) if you trust who made it"
        )


def _places(manifest: Manifest) -> list[Path]:
    """Where the note of a bundle is, or would be."""
    text = json.dumps([manifest.target, dict(manifest.files), plain(manifest.origin)], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()
    found: dict[Path, None] = {}
    for folder in (cache_folder, lambda: user_cache() / OURS):
        with suppress(OutputError):
            found[folder() / "made" / name] = None
    return list(found)
