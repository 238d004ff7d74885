"""One model to several targets: every plan is checked before the first file; what succeeds stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import DualTokenError, UsageError
from dualtoken_deploy.models.source import Preprocessing, preprocessing_of
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.pipeline.export import Model, open_source
from dualtoken_deploy.pipeline.make import make
from dualtoken_deploy.pipeline.plan import DYNAMIC, Plan, default_name, exportable_targets, plan
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.serve.triton import check_target, lay_out
from dualtoken_deploy.targets.precision import NO_CALIBRATION
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task

__all__ = ["Int8Options", "Model", "export_several", "exportable_targets", "own_preprocessing"]

Tell = Callable[[str], None]
FAILED = "failed"


@dataclass(frozen=True)
class Failed:
    """A target that gave no bundle, and why."""

    bundle: str
    target: str
    precision: str
    error: DualTokenError

    def to_json(self) -> dict[str, Any]:
        return {
            "bundle": None,
            "target": self.target,
            "precision": self.precision,
            "state": FAILED,
            "error": {"code": self.error.exit_code, "message": str(self.error)},
        }


@dataclass(frozen=True)
class Exported(ExportResult):
    """A bundle that was made."""

    error: None = None

    def to_json(self) -> dict[str, Any]:
        data = super().to_json()
        del data["error"]
        return data


def export_several(
    said: Model,
    targets: Sequence[str],
    precision: str,
    output: Path | None,
    batch: int | str,
    input_kind: str | None,
    opset: int | None,
    device: str | None,
    force: bool,
    int8: Int8Options | None,
    settings: Mapping[str, str | None],
    triton_repository: Path | None,
    fail_fast: bool,
    command: str,
    tell: Tell,
    say: Tell,
) -> list[Exported | Failed]:
    """A bundle for each target, in their order. The arguments are those of `export`; of several targets `output` is the
    folder of the bundles, and a calibration set goes to those that take one.

    A target that cannot take the model is said before anything is made; it is in the list as one that fails later is,
    and the others are made all the same unless `fail_fast`. A single target raises, and so does what is wrong with all.
    """
    if triton_repository is not None:
        for target in targets:
            check_target(target)
    source = open_source(said)

    def planned(target: str) -> Plan:
        row, several = get_target(target), len(targets) > 1
        folder = (
            output / default_name(source, row.name, precision, settings) if several and output is not None else output
        )
        calibrates = not several or row.precision(precision).calibration != NO_CALIBRATION
        return plan(
            source, target, precision, folder, batch, said.image_size == DYNAMIC, input_kind, opset, device, force,
            int8 if calibrates else None, settings, command,
        )  # fmt: skip

    plans: list[Plan | Failed] = []
    for target in targets:
        try:
            plans.append(planned(target))
        except DualTokenError as error:
            if len(targets) == 1 or fail_fast:
                raise
            plans.append(_failed(source.name, target, precision, output, error))
    refused = [one for one in plans if isinstance(one, Failed)]
    if len(refused) == len(plans):
        raise refused[0].error
    for known in refused:
        say(f"{known.target} is left out: {known.error}")
    results: list[Exported | Failed] = []
    for one in plans:
        if isinstance(one, Failed):
            results.append(one)
            continue
        name = one.target.name
        try:
            result = make(one, lambda text, name=name: tell(f"{name}: {text}"))  # type: ignore[misc]
            if triton_repository is not None:
                say(f"for Triton: {lay_out(Bundle.open(result.bundle), triton_repository, force=force)}")
            results.append(Exported(**vars(result)))
        except DualTokenError as error:
            if len(targets) == 1 or fail_fast:
                raise
            say(f"{name} failed: {error}")
            results.append(Failed(str(one.output), name, precision, error))
    return results


def _failed(source: str, target: str, precision: str, output: Path | None, error: DualTokenError) -> Failed:
    """A target that cannot take the model, known before anything was made."""
    name = get_target(target).name
    return Failed(str((output or Path("bundles")) / f"{source}-{name}-{precision}"), name, precision, error)


def own_preprocessing(
    task: str | None,
    name: str | None,
    mean: str | None,
    std: str | None,
    crop_ratio: float | None,
    resize: str | None,
) -> Preprocessing | str | None:
    """The preprocessing of a name with what was given beside it; None where nothing was. Raises UsageError."""
    given: dict[str, Any] = {"crop_ratio": crop_ratio, "resize": resize}
    given |= {"mean": _three("--mean", mean), "std": _three("--std", std)}
    changed = {key: value for key, value in given.items() if value is not None}
    if not changed:
        return name
    return replace(preprocessing_of(name, get_task(task or "classify").name), **changed)


def _three(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3:
        raise UsageError(f"{name} {text!r} is not three numbers R,G,B, e.g. 0.485,0.456,0.406")
    return values
