"""A bundle made again from what its manifest says, and its files held against each other by hash."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import DOCUMENTS, Bundle
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.own_sources import source_of
from dualtoken_deploy.pipeline.make import make
from dualtoken_deploy.pipeline.plan import DYNAMIC, plan
from dualtoken_deploy.quantize.gate import Int8Options


@dataclass(frozen=True)
class Said:
    """What the export's command said that the manifest has no field for."""

    opset: int | None = None
    device: str | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict)
    int8: Int8Options | None = None


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
    manifest = bundle.manifest
    if "engine.json" in manifest.files:
        raise UsageError(f"{bundle.path} was built on a device, whose timings choose its kernels: nothing repeats that")
    source = replace(source_of(manifest), labels=bundle.labels, licenses=manifest.licenses)
    with ExitStack() as stack:
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "again"
        contract = manifest.input
        made = plan(
            source, manifest.target, manifest.precision, folder, DYNAMIC if contract.batch is None else contract.batch,
            contract.any_size, contract.kind, said.opset, said.device, False, said.int8, said.settings,
            manifest.command,
        )  # fmt: skip
        make(made, progress)
        again = Bundle.open(folder).manifest
    names = (name for name in {**manifest.files, **again.files} if name not in DOCUMENTS)  # they tell of machines
    files = {name: manifest.files.get(name) == again.files.get(name) for name in names}
    return Reproduction(str(bundle.path), files, _different(bundle))


def _different(bundle: Bundle) -> tuple[str, ...]:
    manifest = bundle.manifest
    now = library_versions(tuple(manifest.versions))
    found = [f"{name} {was} (here {now.get(name, 'not installed')})" for name, was in manifest.versions.items()
             if now.get(name) != was]  # fmt: skip
    cpu = describe_machine()["cpu"]
    return tuple(found if manifest.machine.get("cpu") == cpu else [*found, f"CPU {manifest.machine.get('cpu')}"])
