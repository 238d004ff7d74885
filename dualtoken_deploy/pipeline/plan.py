"""Everything that can be wrong with names and values is said here, before a file or a model is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.bundle.blocks import Asked, AskedInt8
from dualtoken_deploy.errors import UsageError, missing_extra
from dualtoken_deploy.models.source import ONNX, REFERENCE, Source, is_onnx_file
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.quantize.judge import measures
from dualtoken_deploy.spec import Dim, InputContract, Tolerance
from dualtoken_deploy.targets.precision import RANGES, SEARCH, Precision
from dualtoken_deploy.targets.request import check_compiler
from dualtoken_deploy.targets.table import EXPORT_MODULES, TARGETS, Target, check_head, get_target
from dualtoken_deploy.tasks.base import Task
from dualtoken_deploy.tasks.table import get_task

DYNAMIC = "dynamic"
NAMELESS_SIZE = (224, 224)
SHIPPED = tuple(BUILT_IN_WEIGHTS)
BATCH = "batch"  # the name of an open one
NONE_SAID: Mapping[str, str | None] = MappingProxyType({})


@dataclass(frozen=True)
class Plan:
    """One bundle to be made, checked. `settings` are the target's own; `int8`: how a precision with ranges is
    calibrated and gated, None where it needs none or takes the built-in photographs; `command` is kept in the
    manifest."""

    source: Source
    task: Task
    target: Target
    precision: Precision
    contract: InputContract
    opset: int | None
    settings: Mapping[str, str]
    device: str | None
    output: Path
    force: bool
    int8: Int8Options | None
    command: str

    @property
    def what(self) -> str:
        """The model, for messages."""
        said = self.source.described
        return f"{said['head']} on {said['variant']}" if "head" in said else self.source.name

    @property
    def asked(self) -> Asked:
        """What a manifest keeps of it, so that the bundle can be made again."""
        int8 = None
        if self.int8 is not None:
            int8 = AskedInt8(**{own.name: getattr(self.int8, own.name) for own in fields(AskedInt8)})
        return Asked(opset=self.opset, device=self.device, settings=self.settings, int8=int8)

    def tolerance(self, outputs: tuple[str, ...]) -> Tolerance:
        """What the saved files must reach; `outputs` are their names."""
        gated = self.int8 is not None  # by its loss on held-out pictures
        return self.task.tolerance(self.precision.tolerance, self.precision.name, gated, outputs)


def plan(
    source: Source,
    target: str = "onnxruntime",
    precision: str = "fp32",
    output: str | Path | None = None,
    batch: int | str = 1,
    any_size: bool = False,
    input_kind: str | None = None,
    opset: int | None = None,
    device: str | None = None,
    force: bool = False,
    int8: Int8Options | None = None,
    settings: Mapping[str, str | None] | None = None,
    command: str = "dualtoken_deploy.export(...)",
) -> Plan:
    """The plan for one bundle of `source`. The arguments are those of `export`.

    Raises UsageError on a name, value or combination that cannot be, MissingError that names the extra to install.
    """
    row = get_target(target)
    wanted = row.precision(precision)
    if not row.takes(source.origin.kind):
        offered = ", ".join(name for name, other in TARGETS.items() if other.takes(source.origin.kind))
        raise UsageError(
            f"{row.name} converts PyTorch modules, and {source.origin.reference} is an ONNX file; targets that take "
            f"one: {offered}"
        )
    check_can_export(row, int8)
    if device is not None and (row.portable or row.built_by):
        raise UsageError(f"{row.name} does not compile for a device; leave --device to aotinductor")
    own = target_settings(row, settings or {})
    check_compiler(row, precision, opset, own)
    count = parse_batch(batch)
    if source.one_picture and count != 1:
        raise UsageError(f"{source.name} takes one image at a time; leave --batch out")
    head = source.described.get("head")
    if head is not None:
        check_head(row, head, source.described["dense"]["form"], precision)
    if any_size:
        _check_any_size(source, row, wanted)
    _check_calibration(row, wanted, get_task(source.task), int8, count)
    return Plan(
        source=source,
        task=get_task(source.task),
        target=row,
        precision=wanted,
        contract=source.contract(input_kind, BATCH if count is None else count, any_size),
        opset=opset,
        settings=own,
        device=device,
        output=Path(output) if output is not None else Path("bundles") / default_name(source, row.name, precision, own),
        force=force,
        int8=int8,
        command=command,
    )


def default_name(source: Source, target: str, precision: str, settings: Mapping[str, str | None] = NONE_SAID) -> str:
    """What a bundle is called unless its folder is named: t-mix-digits-onnxruntime-int8, s-320x320-openvino-fp32.

    Of this package's models the weights are in it, where they were trained, and the size, where it is not 224 nor that
    of weights that ship.
    """
    parts, said = [source.name], str(source.weights["source"])
    if "variant" in source.described and not source.random_weights:
        path = Path(said)
        parts.append(path.parent.name if path.stem == "best" and path.parent.name else path.stem)
    height, width = source.size
    if "variant" in source.described and (height, width) != NAMELESS_SIZE and said not in SHIPPED:
        parts.append(str(height) if height == width else f"{height}x{width}")
    clean = [re.sub(r"[^A-Za-z0-9._]+", "-", part).strip("-.") or "weights" for part in parts]
    said_of_target = [settings[name] or "" for name in get_target(target).named if settings.get(name)]
    return "-".join([*clean, target, *said_of_target, precision])


def _check_any_size(source: Source, row: Target, precision: Precision) -> None:
    if not row.any_size:
        offered = ", ".join(name for name, other in TARGETS.items() if other.any_size)
        raise UsageError(f"{row.name} takes no dynamic image size; targets that do: {offered}")
    if precision.calibration == SEARCH:
        raise UsageError(
            f"{precision.name} is calibrated at one image size; give --image-size HxW, or fp32 or fp16 with dynamic"
        )
    if not source.any_size:
        raise UsageError(f"{source.why_one_size} takes no dynamic image size; give --image-size HxW")


def _check_calibration(
    row: Target, precision: Precision, task: Task, int8: Int8Options | None, batch: Dim | None
) -> None:
    if precision.calibration == SEARCH and int8 is None:
        raise UsageError(f"{row.name} {precision.name} needs a calibration set (--calibration)")
    if int8 is None:
        return
    if precision.calibration not in (RANGES, SEARCH):
        raise UsageError(f"{row.name} {precision.title} takes no calibration set; leave --calibration out")
    if int8.metric is not None and int8.metric not in measures(task):
        raise UsageError(
            f"unknown metric {int8.metric!r} for the task {task.name}; valid metrics: {', '.join(measures(task))}"
        )
    if int8.quantizer is not None and int8.quantizer not in row.quantizers:
        raise UsageError(
            f"unknown quantizer {int8.quantizer!r} for {row.name}; valid quantizers: {', '.join(row.quantizers)}"
        )
    if precision.calibration == SEARCH and batch not in (None, 1):
        raise UsageError(f"int8 takes a batch of 1 or dynamic, not {batch}: calibration goes one by one")
    if precision.calibration == RANGES and int8.method != "minmax":
        raise UsageError(f"{row.name} {precision.name} takes no other calibrator than its own; leave --calibrator out")


def exportable_targets(precision: str, head: str | None = None, model: str | None = None) -> list[str]:
    """Portable targets that offer the precision, and the head if one is given, take the model, and can be exported
    here: their modules and those of [export] are here.

    Raises UsageError where no portable target offers both, MissingError where none of them can be exported.
    """
    origin = ONNX if is_onnx_file(model) else REFERENCE
    portable = [row for row in TARGETS.values() if row.portable and row.takes(origin)]
    taking = [row for row in portable if head is None or head in row.heads]
    if not taking:
        known = dict.fromkeys(h for row in portable for h in row.heads)
        raise UsageError(f"unknown head {head!r}; valid heads: {', '.join(known)}")
    offering = [row for row in taking if precision in row.precisions]
    if not offering:
        known = dict.fromkeys(p for row in taking for p in row.precisions)
        raise UsageError(f"unknown precision {precision!r}; valid precisions: {', '.join(known)}")
    here = [row.name for row in offering if not row.missing(row.export_modules)]
    if not here:
        raise missing_extra("all", f"exporting to any target in {precision}")
    return here


def check_can_export(row: Target, int8: Int8Options | None = None) -> None:
    """Raises MissingError that names every extra to install, at once."""
    extras = []
    if row.missing(EXPORT_MODULES if row.source == "onnx" else ("torch",)):
        extras.append("export")
    own = row.compiler if row.built_by else row.modules
    if own and row.missing(own):
        extras.append(row.extra)
    if int8 is not None and int8.quantizer == "nncf" and row.missing(("nncf",)):
        extras.append("quantize")
    if int8 is not None and int8.calibration == "digits" and row.missing(("sklearn",)):
        extras.append("train")
    if extras:
        raise missing_extra(extras, f"exporting to {row.name}")


def target_settings(row: Target, given: Mapping[str, str | None]) -> dict[str, str]:
    """The settings that were given. Raises UsageError on one that is not this target's."""
    settings = {name: value for name, value in given.items() if value is not None}
    for name in settings:
        if name not in row.settings:
            owners = ", ".join(other.name for other in TARGETS.values() if name in other.settings)
            raise UsageError(f"--{name.replace('_', '-')} is for target {owners}, not for {row.name}; leave it out")
    return settings


def parse_batch(batch: int | str) -> int | None:
    """A batch size, or None for "dynamic". Raises UsageError on anything else."""
    if batch == DYNAMIC:
        return None
    if not str(batch).isdecimal() or int(batch) < 1:
        raise UsageError(f"batch {batch!r} is neither a number of at least 1 nor {DYNAMIC!r}")
    return int(batch)
