"""Bundles whose use runs code of whoever made them: run here only where this user made them, or said so.

AOTInductor packages are native code, and so is part of some TensorRT engines; of a bundle of a user's model the
manifest names the Python that makes eager again. A hash in the manifest is no proof: who changes a file changes the
hash as well. What this user made is remembered in the cache, by the hash of the manifest, which has those of the files.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dualtoken_deploy.errors import BundleError, OutputError
from dualtoken_deploy.files import cache_folder

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.manifest import Manifest

ALLOW = "DUALTOKEN_ALLOW_NATIVE"  # in the environment, so that workers know as well


def permit_native(allowed: bool = True) -> None:
    """What --allow-native does: for this process, and those that it starts, every bundle's code may run."""
    if allowed:
        os.environ[ALLOW] = "1"


def remember(manifest: Manifest) -> None:
    """Notes that this user made a bundle. Where the cache cannot be written its use will be refused, which is said."""
    try:
        place = _place(manifest)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    except (OSError, OutputError):
        return


def check_trusted(manifest: Manifest, what: str) -> None:
    """Raises BundleError where the bundle was not made here by this user and nobody allowed it. `what` would run."""
    if not manifest.files or os.environ.get(ALLOW) == "1":  # without files: a draft of this process, not yet written
        return
    try:
        known = _place(manifest).is_file()
    except (OSError, OutputError):
        known = False
    if not known:
        raise BundleError(
            f"{what}, and no note in the cache says that you made this bundle here; give --allow-native "
            f"(or {ALLOW}=1) if you trust who made it"
        )


def _place(manifest: Manifest) -> Path:
    text = json.dumps(manifest.to_json(), sort_keys=True)
    return cache_folder() / "made" / hashlib.sha256(text.encode()).hexdigest()
