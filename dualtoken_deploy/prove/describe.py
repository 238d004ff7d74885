"""The documents of a bundle, and what they gain later: licences, and accuracies measured on its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.blocks import Evaluated
from dualtoken_deploy.bundle.change import change
from dualtoken_deploy.bundle.licenses import parse_licenses
from dualtoken_deploy.bundle.store import BOM, CARD, DOCUMENTS, Bundle, sha256
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.prove.bom import bill
from dualtoken_deploy.prove.card import card
from dualtoken_deploy.use.evaluate import evaluate


def documents(bundle: Bundle) -> dict[str, bytes]:
    """By name; of a bundle whose other files are there."""
    return {CARD: card(bundle), BOM: bill(bundle)}


@dataclass(frozen=True)
class Described:
    """`edited`: documents that somebody had changed, and that are as the manifest says again; `signed`: the bundle's
    signature is of what was before."""

    bundle: str
    licenses: dict[str, str | None]
    evaluated: list[dict[str, Any]]
    documents: list[str]
    edited: list[str]
    signed: bool

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def describe(
    path: Path,
    licenses: Sequence[str] = (),
    data: str | None = None,
    limit: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Described:
    """Writes README.md and bom.cdx.json of a bundle anew, with `licenses` and with its accuracy on `data`.

    The model is not touched, and the bundle is whole at every moment. Raises UsageError where a README.md of somebody
    else lies there, DatasetError, BundleError, MissingError, OutputError.
    """
    bundle = Bundle.open(path, verify=False)
    bundle.verify(but=DOCUMENTS)
    manifest = bundle.manifest
    for name in DOCUMENTS:
        if name not in manifest.files and (path / name).exists():
            raise UsageError(f"{path / name} is not of this bundle's manifest; move it away, or its text would be lost")
    edited = [n for n in DOCUMENTS if n in manifest.files and _digest(path / n) != manifest.files[n]]
    said = parse_licenses(licenses, manifest.licenses)
    if data is not None:
        found = evaluate(bundle, data, limit, device=device, threads=threads, progress=progress)
        one = Evaluated(
            data=found.data,
            images=found.images,
            scores=found.scores,
            date=datetime.now(UTC).strftime("%Y-%m-%d"),
            cpu=describe_machine().get("cpu"),
            engine=found.engine,
        )
        others = (e for e in manifest.evaluated if e.data != one.data)
        manifest = replace(manifest, evaluated=(*others, one))
    signed = change(bundle, replace(manifest, licenses=said), {}, documents)
    return Described(
        str(path), vars(said), [vars(e) | {"scores": dict(e.scores)} for e in manifest.evaluated], list(DOCUMENTS),
        edited, signed,
    )  # fmt: skip


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
