"""A bundle made again from what its manifest says, and its files held against each other by hash."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.consistency import check
from dualtoken_deploy.bundle.labels import read_labels
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import DOCUMENTS, LABELS, MANIFEST, MAX_MANIFEST, Bundle, new_folder
from dualtoken_deploy.errors import BundleError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.files import is_folder, read_bytes
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.own_sources import source_of
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.pipeline.make import make
from dualtoken_deploy.pipeline.plan import DYNAMIC, Plan, default_name, plan
from dualtoken_deploy.quantize.gate import Int8Options

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Said:
    """What the export was asked for beside the model."""

    opset: int | None = None
    device: str | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict)
    int8: Int8Options | None = None

    @staticmethod
    def of(manifest: Manifest) -> Said | None:
        """As the manifest keeps it; None where it is of before that, and its command alone can say."""
        asked = manifest.asked
        if asked is None:
            return None
        int8 = None if asked.int8 is None else Int8Options(**asdict(asked.int8), race=False)  # it is compared by bytes
        return Said(asked.opset, asked.device, asked.settings, int8)


@dataclass(frozen=True)
class Lock:
    """A manifest that a bundle is to come out of again. `labels`: of its classes; none: those of the source. `name`:
    for messages."""

    manifest: Manifest
    labels: tuple[str, ...]
    name: str

    @staticmethod
    def of(bundle: Bundle) -> Lock:
        return Lock(bundle.manifest, bundle.labels, str(bundle.path))

    @staticmethod
    def read(path: Path, labels: Path | None = None) -> Lock:
        """Of a manifest.json, which may have come alone, or of a bundle's folder. Labels are those of `labels`, or of
        the labels.txt beside it. Raises BundleError, InputError."""
        file = path / MANIFEST if is_folder(path) else path
        mend = f"give the {MANIFEST} of a bundle"
        manifest = Manifest.parse(read_bytes(file, MAX_MANIFEST, BundleError, mend), str(file))
        check(manifest, str(file))
        beside = file.parent / LABELS
        chosen = labels if labels is not None else beside if beside.is_file() else None
        return Lock(manifest, () if chosen is None else read_labels(chosen), str(file))


@dataclass(frozen=True)
class Reproduction:
    """`files`: by name, whether the bytes are the same. `different`: what of library versions and CPU is not what it
    was when the bundle was made."""

    bundle: str
    files: Mapping[str, bool]
    different: tuple[str, ...]

    @property
    def same(self) -> bool:
        return all(self.files.values())

    def to_json(self) -> dict[str, Any]:
        return {"bundle": self.bundle, "same": self.same, "files": dict(self.files), "different": list(self.different)}

    def gate(self) -> None:
        """Raises ToleranceError that names the files."""
        if not self.same:
            names = ", ".join(name for name, same in self.files.items() if not same)
            why = f"; not as it was then: {', '.join(self.different)}" if self.different else ""
            raise ToleranceError(f"{self.bundle} was made again, and {names} came out otherwise{why}")


def reproduce(
    bundle: Bundle, said: Said, output: Path | None = None, progress: Callable[[str], None] | None = None
) -> Reproduction:
    """Makes the bundle again, into `output` or a folder that goes again. Raises what export raises, MissingError where
    the model lived in memory alone, UsageError of a bundle that was built on a device."""
    locked = Lock.of(bundle)
    with tempfile.TemporaryDirectory() as folder:
        made = _plan(locked, said, output or Path(folder) / "again")
        make(made, progress)
        return _compare(locked, made.output)


def remake(
    locked: Lock, said: Said, output: Path | None, force: bool, progress: Tell | None = None
) -> tuple[Reproduction, ExportResult | None]:
    """Makes the bundle of a manifest under its name, or `output`, where every file comes out as it was; nothing is left
    where one does not, and the result is None. Raises what `reproduce` and export raise."""
    made = _plan(locked, said, output)
    found: Reproduction | None = None
    try:
        with new_folder(made.output, force) as folder:
            inner = folder / "again"
            result = make(replace(made, output=inner), progress)
            found = _compare(locked, inner)
            found.gate()
            for path in sorted(inner.iterdir()):
                path.rename(folder / path.name)
            inner.rmdir()
    except ToleranceError:
        if found is None:
            raise
        return found, None
    return found, replace(result, bundle=str(made.output))


def _plan(locked: Lock, said: Said, output: Path | None) -> Plan:
    manifest = locked.manifest
    if "engine.json" in manifest.files:
        raise UsageError(f"{locked.name} was built on a device, whose timings choose its kernels: nothing repeats that")
    source = source_of(manifest)
    source = replace(source, labels=locked.labels or source.labels, licenses=manifest.licenses)
    said = _as_found(locked, said)
    folder = output or Path("bundles") / default_name(source, manifest.target, manifest.precision, said.settings)
    contract = manifest.input
    return plan(
        source, manifest.target, manifest.precision, folder, DYNAMIC if contract.batch is None else contract.batch,
        contract.any_size, contract.kind, said.opset, said.device, False, said.int8, said.settings, manifest.command,
    )  # fmt: skip


def _as_found(locked: Lock, said: Said) -> Said:
    """With the layers in float that the manifest names: a search that had a time limit, or began where another target's
    ended, would not end there again. Raises MissingError where nothing says what the bundle was calibrated with."""
    calibration = locked.manifest.calibration
    if calibration is None or calibration.search is None:
        return said
    if said.int8 is None:
        raise MissingError(
            f"{locked.name} was calibrated with {calibration.name}, and does not say by which options (an earlier "
            "version made it from a recipe or from Python): export it anew once"
        )
    return replace(said, int8=replace(said.int8, in_float=calibration.in_float))


def _compare(locked: Lock, folder: Path) -> Reproduction:
    before, again = locked.manifest, Bundle.open(folder).manifest
    names = (name for name in {**before.files, **again.files} if name not in DOCUMENTS)  # they tell of machines
    files = {name: before.files.get(name) == again.files.get(name) for name in names}
    return Reproduction(locked.name, files, (*_other_pictures(before, again), *_different(before)))


def _other_pictures(before: Manifest, again: Manifest) -> tuple[str, ...]:
    was, now = before.calibration, again.calibration
    if was is None or now is None or was.sha256 == now.sha256:
        return ()
    return (f"the pictures of {was.name}, of which {was.images} calibrated (here {now.images} of {now.name})",)


def _different(manifest: Manifest) -> tuple[str, ...]:
    now = library_versions(tuple(manifest.versions))
    found = [f"{name} {was} (here {now.get(name, 'not installed')})" for name, was in manifest.versions.items()
             if now.get(name) != was]  # fmt: skip
    cpu = describe_machine()["cpu"]
    return tuple(found if manifest.machine.get("cpu") == cpu else [*found, f"CPU {manifest.machine.get('cpu')}"])
