"""A bundle with other small files or another manifest: written beside it, and then in its place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import (
    DOCUMENTS,
    MANIFEST,
    SIGNATURE,
    Bundle,
    Describe,
    new_folder,
    sha256,
    write_manifest,
)
from dualtoken_deploy.bundle.trust import check_trusted, remember
from dualtoken_deploy.errors import BundleError


def change(bundle: Bundle, manifest: Manifest, files: Mapping[str, bytes], describe: Describe | None) -> bool:
    """Writes `manifest` with the hashes of `files`, which take the place of those of their names, and of the documents,
    which stay as they are without `describe`.

    The model is not touched, and the bundle is whole at every moment. Returns whether it has a signature, which is of
    what was before. Raises OutputError.
    """
    try:
        check_trusted(bundle.manifest, str(bundle.path))
        own = True
    except BundleError:
        own = False  # what was not made here stays what it is
    target = Path(os.path.abspath(bundle.path))
    replaced = (*files, *(() if describe is None else DOCUMENTS))
    with new_folder(target, force=True) as folder:
        for path in sorted(target.iterdir()):
            if path.name not in (MANIFEST, *replaced):
                _copy(path, folder / path.name)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        kept = {name: digest for name, digest in manifest.files.items() if name not in replaced}
        hashes = {**kept, **{name: sha256(folder / name) for name in files}}
        complete = write_manifest(folder, replace(manifest, files=hashes), describe)
        if own:
            remember(complete)
    return os.path.lexists(target / SIGNATURE)


def _copy(source: Path, place: Path) -> None:
    """A second name for each file where the file system has those: an artifact may be large, and is not changed."""
    if source.is_dir():
        shutil.copytree(source, place, copy_function=_link)
    else:
        _link(str(source), str(place))


def _link(source: str, place: str) -> str:
    try:
        os.link(source, place, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, place)
    return place
