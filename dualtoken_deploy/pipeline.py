"""From a variant to a verified bundle: the only file that wires the stages together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle import Bundle, Manifest, new_folder, write_bundle
from dualtoken_deploy.datasets import open_dataset
from dualtoken_deploy.errors import InputError, OutputError, ToleranceError, UsageError, missing_extra
from dualtoken_deploy.export import Artifact, Request, run_exporter
from dualtoken_deploy.images import load_batch
from dualtoken_deploy.inspection import kind_precision, product_precision
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.count import count_macs, count_params, matrix_products
from dualtoken_deploy.models.dualtoken_vit import DualTokenViT
from dualtoken_deploy.models.registry import (
    DEFAULT_SEED,
    OPTIONS,
    create_model,
    make_config,
    parse_image_size,
    random_model,
    weights_sha256,
)
from dualtoken_deploy.runtimes import RunnerOptions, engine_of, load_runner
from dualtoken_deploy.runtimes.eager import EagerRunner
from dualtoken_deploy.spec import InputContract, TensorSpec, Tolerance
from dualtoken_deploy.targets import EXPORT_MODULES, TARGETS, Target, check_precision, get_target
from dualtoken_deploy.validate import measure, run_batches

Tell = Callable[[str], None]

INPUT_KINDS = ("image", "tensor")
DYNAMIC = "dynamic"
LIBRARIES = (
    *(
        "torch",
        "onnx",
        "onnxscript",
        "onnxsim",
        "onnxruntime",
        "openvino",
        "coremltools",
        "coreai-core",
        "coreai-torch",
    ),
    *("numpy", "pillow", "dualtoken-deploy"),
)


@dataclass(frozen=True)
class ExportResult:
    """Where the bundle is and what was measured on its saved files. `warnings` are to be shown, never dropped."""

    bundle: str
    target: str
    precision: str
    executed_precision: str
    sqnr_db: float
    top1_agreement: float
    size_mib: float
    seconds: float
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def export(
    variant: str,
    target: str = "onnxruntime",
    precision: str = "fp32",
    weights: str | Path | None = None,
    output: str | Path | None = None,
    labels: str | Path | None = None,
    image_size: int | tuple[int, int] | str = 224,
    batch: int | str = 1,
    input_kind: str = "image",
    opset: int | None = None,
    seed: int = DEFAULT_SEED,
    force: bool = False,
    deployment_target: str | None = None,
    layout: str | None = None,
    command: str = "dualtoken_deploy.export(...)",
    progress: Tell | None = None,
    **options: Any,
) -> ExportResult:
    """Exports one variant to one target, checks the saved files against eager, and only then names the bundle.

    `batch`: a number or "dynamic". `input_kind`: "image" (uint8 NHWC RGB, normalised in the graph) or "tensor"
    (normalised float32 NCHW). `weights` None: random ones from `seed`. `options`: as create_model takes them.
    `deployment_target` (iOS16, iOS17, iOS18, iOS26) and `layout` (ane, plain) are Core ML's own.
    Raises UsageError, MissingError, WeightsError, OutputError, ConversionError, and ToleranceError where the files do
    not reach the target's tolerance; no bundle is left then.
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    row = get_target(target)
    check_precision(row, precision)
    check_can_export(row)
    settings = target_settings(row, deployment_target=deployment_target, layout=layout)
    contract = make_contract(input_kind, parse_image_size(image_size), parse_batch(batch))
    if labels is not None and "num_classes" not in options:
        options["num_classes"] = len(read_labels(Path(labels)))
    # what is wrong with names and values is said before anything is built or written
    try:
        config = make_config(variant, image_size=contract.size, **options)
    except TypeError as error:  # text where a number belongs
        raise UsageError(f"an option has a value of the wrong kind ({error}): {options}") from error
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is out of range; give one from 0 to 2**63 - 1")
    names = _labels(labels, config.num_classes)
    final = Path(output) if output is not None else Path("bundles") / f"{variant}-{row.name}-{precision}"
    with new_folder(final, force) as folder:
        tell("building the eager model")
        if weights is None:
            model = random_model(variant, seed, image_size=contract.size, **options)
        else:
            model = create_model(variant, image_size=contract.size, weights=weights, **options)
        _check_space(folder, model)
        outputs = (TensorSpec("logits", "float32", "NC", (contract.tensor.shape[0], model.config.num_classes)),)
        warnings = () if weights else (f"weights are random (seed {seed}): latency is real, predictions mean nothing",)
        metadata = {"variant": variant, "precision": precision, "weights": str(weights or f"random, seed {seed}")}
        request = Request(precision, contract, outputs, opset, metadata, names, settings)
        artifact = run_exporter(row, model, request, folder, tell)
        draft = _draft(model, variant, row, request, artifact, weights, seed, command)
        result = _seal(folder, draft, model, names, tell)
    return replace(
        result, bundle=str(final), seconds=round(time.perf_counter() - start, 1), warnings=warnings + result.warnings
    )


def exportable_targets() -> list[str]:
    """Targets that can be exported on this machine: their modules and those of the extra [export] are here."""
    return [name for name, row in TARGETS.items() if not row.missing((*EXPORT_MODULES, *row.modules))]


def check_can_export(row: Target) -> None:
    """Raises MissingError that names the extra to install."""
    if row.missing(EXPORT_MODULES):
        raise missing_extra("export", f"exporting to {row.name}")
    if row.missing():
        raise missing_extra(row.extra, f"exporting to {row.name}")


def target_settings(row: Target, **given: str | None) -> dict[str, str]:
    """The settings that were given. Raises UsageError on one that is not this target's."""
    settings = {name: value for name, value in given.items() if value is not None}
    foreign = [name for name in settings if name not in row.settings]
    if foreign:
        owners = ", ".join(name for name, other in TARGETS.items() if foreign[0] in other.settings)
        raise UsageError(f"--{foreign[0].replace('_', '-')} is for target {owners}, not for {row.name}; leave it out")
    return settings


def make_contract(kind: str, size: tuple[int, int], batch: int | None) -> InputContract:
    """The input contract of a kind from INPUT_KINDS; `batch` None is dynamic."""
    first = "batch" if batch is None else batch
    if kind == "image":
        return InputContract(TensorSpec("image", "uint8", "NHWC", (first, *size, 3)), kind, size)
    if kind == "tensor":
        return InputContract(TensorSpec("input", "float32", "NCHW", (first, 3, *size)), kind, size)
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


def _check_space(folder: Path, model: DualTokenViT) -> None:
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
    model: DualTokenViT,
    variant: str,
    row: Target,
    request: Request,
    artifact: Artifact,
    weights: str | Path | None,
    seed: int,
    command: str,
) -> Manifest:
    config = model.config
    source = {"source": "random", "seed": seed} if weights is None else {"source": str(Path(weights).resolve())}
    return Manifest(
        variant=variant,
        options={name: getattr(config, name) for name in OPTIONS},
        weights={**source, "sha256": weights_sha256(model)},
        target=row.name,
        precision=request.precision,
        executed_precision={},
        input=request.contract,
        outputs=request.outputs,
        tolerance=row.tolerances[request.precision],
        measured={"params": count_params(model), "macs": count_macs(model, request.contract.size)},
        rules=artifact.rules,
        operators=artifact.operators,
        products=matrix_products(model, request.contract.size),
        versions=library_versions(LIBRARIES),
        machine=describe_machine(),
        command=command,
    )


def _seal(folder: Path, draft: Manifest, model: DualTokenViT, labels: tuple[str, ...], tell: Tell) -> ExportResult:
    """Runs the saved files against eager on golden and on photographs, and writes the manifest if they hold."""
    contract = draft.input
    photographs = open_dataset("photographs").images[: get_target(draft.target).check_images]
    inputs = load_batch(photographs, contract)
    tell(f"checking the saved files against eager on {len(inputs)} photographs")
    with EagerRunner(model, contract, draft.outputs, RunnerOptions()) as eager:
        expected = run_batches(eager, contract, inputs)
    with load_runner(Bundle(folder, draft)) as runner:
        actual = run_batches(runner, contract, inputs)
        kinds, engine = kind_precision(runner.execution()), engine_of(runner)
    numbers = measure(expected, actual)
    golden_size = contract.batch or 1
    golden = [_fill(array, golden_size) for array in (inputs, expected)]
    on_golden = measure(golden[1], _fill(actual, golden_size))
    _check_tolerance(draft, {"golden": on_golden, "photographs": numbers})
    manifest = replace(
        draft,
        executed_precision=kinds,
        measured={**draft.measured, "golden": on_golden, "photographs": {"images": len(inputs), **numbers}}
        | ({"engine": engine} if engine else {}),
    )
    write_bundle(folder, manifest, {"input": golden[0], "logits": golden[1].astype(np.float32)}, labels)
    bundle = Bundle.open(folder)
    return ExportResult(
        bundle=str(folder),
        target=draft.target,
        precision=draft.precision,
        executed_precision=product_precision(kinds),
        sqnr_db=round(numbers["sqnr_db"], 1),
        top1_agreement=numbers["top1_agreement"],
        size_mib=round(bundle.size_bytes / 2**20, 2),
        seconds=0.0,
        warnings=(f"{draft.target}: checked by {engine}",) if engine else (),
    )


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
