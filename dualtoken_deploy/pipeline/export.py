"""From a variant to a verified bundle: the only file that wires the stages together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dualtoken_deploy.bundle.manifest import COMPLETE, Manifest
from dualtoken_deploy.bundle.store import Bundle, new_folder
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import InputError, OutputError, ToleranceError, UsageError, WeightsError, missing_extra
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.count import count_params
from dualtoken_deploy.models.registry import (
    DEFAULT_SEED,
    create_model,
    make_config,
    options_of,
    parse_image_size,
    random_model,
    takes_any_size,
)
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.pipeline.build import build_bundle, build_command, why_no_build
from dualtoken_deploy.pipeline.int8 import write_int8, write_w8a8
from dualtoken_deploy.pipeline.seal import Checked, ExportResult, clear_of_ties, draft_manifest, seal, weights_source
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.spec import Dim, InputContract, TensorSpec, Tolerance
from dualtoken_deploy.targets.backends import BACKENDS
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import RunnerOptions, engine_of, load_runner
from dualtoken_deploy.targets.request import Artifact, Request, check_request, compile_files, run_exporter
from dualtoken_deploy.targets.table import EXPORT_MODULES, TARGETS, W8A8, Target, check_precision, get_target
from dualtoken_deploy.use.validate import measure, run_batches

Tell = Callable[[str], None]

INPUT_KINDS = ("image", "tensor")
DYNAMIC = "dynamic"
NOMINAL_SIZE = 224  # at which a bundle of any size is checked and timed


def export(
    variant: str,
    target: str = "onnxruntime",
    precision: str = "fp32",
    weights: str | Path | None = None,
    output: str | Path | None = None,
    labels: str | Path | None = None,
    image_size: int | tuple[int, int] | str | None = None,
    batch: int | str = 1,
    input_kind: str = "image",
    opset: int | None = None,
    seed: int = DEFAULT_SEED,
    device: str | None = None,
    force: bool = False,
    int8: Int8Options | None = None,
    deployment_target: str | None = None,
    layout: str | None = None,
    compute_capability: str | None = None,
    weightless: bool = False,
    batches: str | None = None,
    command: str = "dualtoken_deploy.targets.request(...)",
    progress: Tell | None = None,
    **options: Any,
) -> ExportResult:
    """Exports one variant to one target, checks the saved files against eager, and only then names the bundle.

    `batch`: a number or "dynamic"; `image_size` too, for the targets that offer it; None: that of the weights, where
    they say it, or 224. `input_kind`: "image" (uint8 NHWC RGB, normalised in the graph) or "tensor" (normalised
    float32 NCHW). `weights` None: random ones from `seed`. `device`: for a target that compiles natively, what to
    compile for. `int8`: how precision int8 is calibrated and gated, for targets that have it so, and Core ML's
    int8-w8a8, where other pictures than the photographs are to calibrate it. `deployment_target` (iOS16, iOS17, iOS18,
    iOS26) and `layout` (ane, plain) are Core ML's own; `compute_capability` ("8.6,8.9"), `weightless` and `batches`
    (MIN,BEST,MAX) TensorRT for RTX's. `options`: as create_model takes them.
    Raises UsageError, MissingError, WeightsError, OutputError, ConversionError, and ToleranceError where the files do
    not reach the target's tolerance; no bundle is left then. A target that is built on its device is built where that
    is here; elsewhere the result's `state` is "prepared".
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    row = get_target(target)
    check_precision(row, precision)
    check_can_export(row)
    if device is not None and (row.portable or row.built_by):
        raise UsageError(f"{row.name} does not compile for a device; leave --device to aotinductor")
    settings = target_settings(
        row, deployment_target=deployment_target, layout=layout, compute_capability=compute_capability,
        weightless="yes" if weightless else None, batches=batches,
    )  # fmt: skip
    info = None if weights is None else describe_weights(weights)
    if image_size is None:
        image_size = 224 if info is None else info.image_size
    any_size = image_size == DYNAMIC
    if any_size and not row.any_size:
        offered = ", ".join(name for name, target in TARGETS.items() if target.any_size)
        raise UsageError(f"{row.name} takes no dynamic image size; targets that do: {offered}")
    if any_size and precision == "int8":
        raise UsageError("int8 is calibrated at one image size; give --image-size HxW, or fp32 or fp16 with dynamic")
    contract = make_contract(
        input_kind, parse_image_size(NOMINAL_SIZE if any_size else image_size), parse_batch(batch), any_size
    )
    if info is not None and info.variant != variant:
        raise WeightsError(
            f"{weights} are weights of variant {info.variant}, not of {variant}; give --variant {info.variant}"
        )
    if labels is not None and "num_classes" not in options:
        options["num_classes"] = len(read_labels(Path(labels)))
    if info is not None:  # what the file says of itself, unless told otherwise
        options = {"num_classes": len(info.labels), **info.options, **options}
    # what is wrong with names and values is said before anything is built or written
    try:
        config = make_config(variant, image_size=contract.size, **options)
    except TypeError as error:  # text where a number belongs
        raise UsageError(f"an option has a value of the wrong kind ({error}): {options}") from error
    if any_size and not takes_any_size(config):
        raise UsageError(f"{variant} with window attention takes no dynamic image size; give --image-size HxW")
    if precision != W8A8 and (precision == "int8" and row.name in BACKENDS) != (int8 is not None):
        needs = "takes no calibration set" if int8 is not None else "needs a calibration set (--calibration)"
        raise UsageError(f"{row.name} {precision} {needs}")
    check_seed(seed)
    if labels is None and info is not None and len(info.labels) == config.num_classes:
        names = info.labels
    else:
        names = _labels(labels, config.num_classes)
    outputs = (TensorSpec("logits", "float32", "NC", (contract.tensor.shape[0], config.num_classes)),)
    metadata = {"variant": variant, "precision": precision, "weights": str(weights or f"random, seed {seed}")}
    request = Request(precision, contract, outputs, opset, metadata, device, names, settings)
    check_request(row, request)
    final = Path(output) if output is not None else Path("bundles") / f"{variant}-{row.name}-{precision}"
    with new_folder(final, force) as folder:
        tell("building the eager model")
        if weights is None:
            model = random_model(variant, seed, image_size=contract.size, **options)
        else:
            model = create_model(variant, image_size=contract.size, weights=weights, **options)
        check_space(folder, model)
        warnings = () if weights else (f"weights are random (seed {seed}): latency is real, predictions mean nothing",)

        def draft(artifact: Artifact) -> Manifest:
            return _draft(model, variant, row, request, artifact, weights, seed, command)

        if precision == W8A8:
            manifest = write_w8a8(model, row, request, int8, names, folder, draft, tell)
        elif int8 is not None:
            manifest = write_int8(model, row, request, int8, names, folder, draft, tell)
        else:
            manifest = draft(run_exporter(row, model, request, folder, tell))
        manifest = compile_files(row, request, folder, manifest, tell)
        result = _seal(folder, manifest, model, names, tell)
    result = replace(result, bundle=str(final), warnings=warnings + result.warnings)
    if row.built_by:
        result = build_here(result, final, tell)
    return replace(result, seconds=round(time.perf_counter() - start, 1))


def build_here(result: ExportResult, bundle: Path, tell: Tell) -> ExportResult:
    """Finishes a prepared bundle where the device is here; elsewhere says what is left to do."""
    reason = why_no_build(result.target)
    if reason:
        return replace(result, next_step=f"{reason}; on the device run: {build_command(bundle)}")
    built = build_bundle(bundle, progress=tell)
    return replace(result, state=COMPLETE, executed_precision=built.executed_precision)


def exportable_targets(precision: str, head: str | None = None) -> list[str]:
    """Portable targets that offer the precision, and the dense head if one is given, and can be exported here: their
    modules and those of [export] are here.

    Raises UsageError where no portable target offers both, MissingError where none of them can be exported.
    """
    portable = [row for row in TARGETS.values() if row.portable]
    taking = [row for row in portable if head is None or head in row.dense]
    if not taking:
        known = dict.fromkeys(h for row in portable for h in row.dense)
        raise UsageError(f"unknown head {head!r}; valid heads: {', '.join(known)}")
    offering = [row for row in taking if precision in row.precisions]
    if not offering:
        known = dict.fromkeys(p for row in taking for p in row.precisions)
        raise UsageError(f"unknown precision {precision!r}; valid precisions: {', '.join(known)}")
    here = [row.name for row in offering if not row.missing(row.export_modules)]
    if not here:
        raise missing_extra("all", f"exporting to any target in {precision}")
    return here


def check_can_export(row: Target) -> None:
    """Raises MissingError that names the extra to install."""
    if row.missing(EXPORT_MODULES if row.source == "onnx" else ("torch",)):
        raise missing_extra("export", f"exporting to {row.name}")
    if row.missing(row.export_modules):
        raise missing_extra(row.extra, f"exporting to {row.name}")


def check_seed(seed: int) -> None:
    """Raises UsageError on one that PyTorch does not take."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range; give one from 0 to 2**63 - 1")


def target_settings(row: Target, **given: str | None) -> dict[str, str]:
    """The settings that were given. Raises UsageError on one that is not this target's."""
    settings = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in settings if name not in row.settings]
    if foreign:
        owners = ", ".join(name for name, other in TARGETS.items() if foreign[0] in other.settings)
        raise UsageError(f"--{foreign[0].replace('_', '-')} is for target {owners}, not for {row.name}; leave it out")
    return settings


def make_contract(kind: str, size: tuple[int, int], batch: int | None, any_size: bool = False) -> InputContract:
    """The input contract of a kind from INPUT_KINDS; `batch` None is dynamic, and so are the sides with `any_size`."""
    first = "batch" if batch is None else batch
    sides: tuple[Dim, Dim] = ("height", "width") if any_size else size
    if kind == "image":
        return InputContract(TensorSpec("image", "uint8", "NHWC", (first, *sides, 3)), kind, size)
    if kind == "tensor":
        return InputContract(TensorSpec("input", "float32", "NCHW", (first, 3, *sides)), kind, size)
    raise UsageError(f"unknown input {kind!r}; valid inputs: {', '.join(INPUT_KINDS)}")


def parse_batch(batch: int | str) -> int | None:
    """A batch size, or None for "dynamic". Raises UsageError on anything else."""
    if batch == DYNAMIC:
        return None
    if not str(batch).isdecimal() or int(batch) < 1:
        raise UsageError(f"batch {batch!r} is neither a number of at least 1 nor {DYNAMIC!r}")
    return int(batch)


def read_labels(path: Path) -> tuple[str, ...]:
    """One label a line. Raises InputError where the file cannot be read or has an empty line."""
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"labels {path} cannot be read ({error}); give a UTF-8 file with one name a line") from error
    if not names or not all(name.strip() for name in names):
        raise InputError(f"labels {path} are empty or have an empty line; give one name a line")
    return names


def _labels(path: str | Path | None, classes: int) -> tuple[str, ...]:
    if path is None:
        return tuple(f"class {i}" for i in range(classes))
    names = read_labels(Path(path))
    if len(names) != classes:
        raise InputError(f"labels {path} has {len(names)} names for {classes} classes; give one name a class")
    return names


def check_space(folder: Path, model: nn.Module) -> None:
    """Some converters leave a short file behind when space runs out, and say nothing: so ask before."""
    needed = 4 * count_params(model) * 5 // 4 + (
        8 << 20
    )  # float32 weights, a quarter for the graph, 8 MiB for the rest
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{folder.parent} has {free >> 20} MiB free and the bundle may take {needed >> 20} MiB; "
            "make room or choose another --output"
        )


def _draft(
    model: ImageModel,
    variant: str,
    row: Target,
    request: Request,
    artifact: Artifact,
    weights: str | Path | None,
    seed: int,
    command: str,
) -> Manifest:
    source = weights_source(weights, seed)
    tolerance = row.tolerances[request.precision]
    return draft_manifest(
        model, model, row, request, artifact, source, tolerance,
        variant=variant, options=options_of(model.config), command=command, calibration=artifact.calibration,
    )  # fmt: skip


def _seal(folder: Path, draft: Manifest, model: ImageModel, labels: tuple[str, ...], tell: Tell) -> ExportResult:
    """Runs the saved files against eager on golden and on photographs, and completes the bundle if they hold."""
    contract = draft.input
    photographs = open_dataset("photographs").images[: get_target(draft.target).check_images]
    inputs = load_batch(photographs, contract)
    tell(f"checking the saved files against eager on {len(inputs)} photographs")
    with EagerRunner(model, contract, draft.outputs, RunnerOptions()) as eager:
        kept = clear_of_ties(model, eager.normalised(inputs), draft.precision)
        inputs = inputs if kept is None else inputs[kept]
        expected = run_batches(eager, contract, inputs)
    checker = get_target(draft.target).checked_by
    with load_runner(Bundle(folder, replace(draft, target=checker or draft.target))) as runner:
        actual = run_batches(runner, contract, inputs)
        execution, engine = runner.execution(), engine_of(runner)
    image, logits, found = (_fill(array, contract.batch or 1) for array in (inputs, expected, actual))
    numbers, on_golden = measure(expected, actual), measure(logits, found)
    _check_tolerance(draft, {"golden": on_golden, "photographs": numbers})
    counted = {"images": len(inputs), **numbers}
    checked = Checked(on_golden, counted, numbers["top1_agreement"], kept, execution, engine)
    golden = {"input": image, "logits": logits.astype(np.float32)}
    return seal(folder, draft, draft.variant, checked, golden, labels)


def _fill(array: np.ndarray[Any, Any], count: int) -> np.ndarray[Any, Any]:
    """The first `count` rows, from the start again where there are fewer."""
    return np.resize(array, (count, *array.shape[1:])) if len(array) < count else array[:count]


def _check_tolerance(draft: Manifest, measured: Mapping[str, Mapping[str, Any]]) -> None:
    tolerance: Tolerance = draft.tolerance
    for where, numbers in measured.items():
        if numbers["sqnr_db"] < tolerance.sqnr_db or numbers["top1_agreement"] < tolerance.top1_agreement:
            raise ToleranceError(
                f"{draft.variant} as {draft.target} {draft.precision} is out of tolerance on {where}: SQNR "
                f"{numbers['sqnr_db']:.1f} dB (needs {tolerance.sqnr_db:g}), equal top-1 "
                f"{numbers['top1_agreement']:.4g} (needs {tolerance.top1_agreement:g}), worst error "
                f"{numbers['max_abs_error']:.3g}; no bundle was written"
            )
