"""Other names for the classes of a bundle that is there already."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.labels import check_labels, format_labels, read_labels
from dualtoken_deploy.bundle.store import LABELS, MANIFEST, SIGNATURE, Bundle, new_folder, sha256
from dualtoken_deploy.bundle.trust import check_trusted, remember
from dualtoken_deploy.errors import BundleError, InputError, UsageError
from dualtoken_deploy.targets.table import get_target


@dataclass(frozen=True)
class Relabelled:
    """`changed`: how many names are others than before; `signed`: the bundle's signature is of what was before."""

    bundle: str
    classes: int
    changed: int
    signed: bool

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def relabel(bundle: Bundle | str | Path, labels: str | Path | Sequence[str]) -> Relabelled:
    """Gives the classes of a bundle other names, in a file or as they are: labels.txt and its hash in the manifest.

    The model is not touched, and the bundle is whole at every moment. Raises UsageError where the artifact holds the
    names itself, InputError on names that are not as many as the classes, BundleError, OutputError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest, before = opened.manifest, opened.labels
    names = read_labels(Path(labels)) if isinstance(labels, (str, Path)) else tuple(labels)
    check_labels(names, "labels")
    if get_target(manifest.target).labels_inside and manifest.dense is None:
        raise UsageError(
            f"{opened.path} is for {manifest.target}, whose file holds the class names itself; export it anew with "
            "--labels"
        )
    if len(names) != len(before):
        raise InputError(
            f"{labels} has {len(names)} names, and {opened.path} {len(before)} classes; give one name each"
        )
    try:
        check_trusted(manifest, str(opened.path))
        own = True
    except BundleError:
        own = False  # what was not made here stays what it is
    target = Path(os.path.abspath(opened.path))
    with new_folder(target, force=True) as folder:
        for path in sorted(target.iterdir()):
            if path.name not in (LABELS, MANIFEST):
                _copy(path, folder / path.name)
        (folder / LABELS).write_bytes(format_labels(names))
        files = {**manifest.files, LABELS: sha256(folder / LABELS)}
        text = json.dumps(replace(manifest, files=files).to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / MANIFEST).write_bytes(f"{text}\n".encode())
        if own:
            remember(replace(manifest, files=files))
    changed = sum(a != b for a, b in zip(before, names, strict=True))
    return Relabelled(str(opened.path), len(names), changed, os.path.lexists(target / SIGNATURE))


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
