"""Other names for the classes of a bundle that is there already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.change import change
from dualtoken_deploy.bundle.labels import check_labels, format_labels, read_labels
from dualtoken_deploy.bundle.store import DOCUMENTS, LABELS, Bundle
from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.prove.describe import documents
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
    """Gives the classes of a bundle other names, in a file or as they are: labels.txt, its hash in the manifest, and
    the documents that name it, where there are any.

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
    described = any(name in manifest.files for name in DOCUMENTS)
    signed = change(opened, manifest, {LABELS: format_labels(names)}, documents if described else None)
    changed = sum(a != b for a, b in zip(before, names, strict=True))
    return Relabelled(str(opened.path), len(names), changed, signed)
