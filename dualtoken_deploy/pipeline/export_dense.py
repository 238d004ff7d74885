"""From a dense head on a variant to a verified bundle: pipeline.py's way for detectors and segmenters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import nn

from dualtoken_deploy import numerics
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle, new_folder
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.data.stretch import prepare_input
from dualtoken_deploy.errors import InputError, ToleranceError, UsageError, WeightsError
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.heads.output_forms import FORMS, choose_form, outputs_of
from dualtoken_deploy.models.heads.rebuild import random_dense_model
from dualtoken_deploy.models.heads.table import create_dense_model, get_head
from dualtoken_deploy.models.heads.weights import dense_weights_path, describe_dense
from dualtoken_deploy.models.registry import DEFAULT_SEED, options_of, parse_image_size
from dualtoken_deploy.pipeline.dense_int8 import write_dense_int8
from dualtoken_deploy.pipeline.export import (
    DYNAMIC,
    Tell,
    build_here,
    check_can_export,
    check_seed,
    check_space,
    make_contract,
    read_labels,
    target_settings,
)
from dualtoken_deploy.pipeline.seal import Checked, ExportResult, clear_of_ties, draft_manifest, seal, weights_source
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.spec import STRETCH, Tolerance
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import RunnerOptions, engine_of, load_runner
from dualtoken_deploy.targets.request import Artifact, Request, check_request, compile_files, run_exporter
from dualtoken_deploy.targets.table import Target, check_dense, check_precision, get_target
from dualtoken_deploy.tasks import dense_outputs
from dualtoken_deploy.tasks.dense_outputs import DETECTED, RAW

CHECKED_IMAGES = 4  # photographs; an image has as many values as a thousand classifications

# What detections and label maps must share with eager's: they jump where two candidates are level, and the nearer the
# numbers are, the fewer of them do.
AGREEMENT: Mapping[str, float] = MappingProxyType({"fp32": 0.99, "fp16": 0.9})
DETECTIONS_SQNR_DB: Mapping[str, float] = MappingProxyType({"fp32": 60.0, "fp16": 30.0})


@dataclass(frozen=True)
class _Plan:
    """What is made, once every name and value was checked."""

    head: str
    form: str
    variant: str
    classes: int
    labels: tuple[str, ...]
    size: tuple[int, int]
    width: int
    weights: str | Path | None
    seed: int
    options: Mapping[str, Any]
    command: str

    def model(self) -> nn.Module:
        if self.weights is not None:
            return create_dense_model(self.head, weights=self.weights, image_size=self.size)
        return random_dense_model(
            self.head, self.seed, variant=self.variant, classes=self.classes, width=self.width, image_size=self.size,
            **self.options,
        )  # fmt: skip


def export_dense(
    head: str,
    target: str = "onnxruntime",
    precision: str = "fp32",
    variant: str | None = None,
    weights: str | Path | None = None,
    output: str | Path | None = None,
    labels: str | Path | None = None,
    image_size: int | tuple[int, int] | str | None = None,
    classes: int | None = None,
    width: int | None = None,
    input_kind: str = "image",
    suppress: bool = False,
    argmax: bool = False,
    opset: int | None = None,
    seed: int = DEFAULT_SEED,
    force: bool = False,
    int8: Int8Options | None = None,
    deployment_target: str | None = None,
    layout: str | None = None,
    compute_capability: str | None = None,
    weightless: bool = False,
    command: str = "dualtoken_deploy.export_dense(...)",
    progress: Tell | None = None,
    **options: Any,
) -> ExportResult:
    """Exports a head (retinanet, mask-rcnn, deeplabv3, pspnet) on a variant to one target, for one image of one size.

    `weights`: of a dense run, which say variant, classes, width and size; None: random ones from `seed`, and what is
    not given is the paper's. `suppress`: a detector's boxes, scores and classes instead of its raw outputs; `argmax`: a
    segmenter's label map instead of its logits. The other arguments are those of `export`.
    Raises UsageError, MissingError, WeightsError, OutputError, ConversionError, and ToleranceError where the saved
    files do not reach the tolerance; no bundle is left then.
    """
    start = time.perf_counter()
    tell = progress or (lambda _: None)
    row = get_target(target)
    check_precision(row, precision)
    check_can_export(row)
    get_head(head)
    form = choose_form(head, suppress, argmax)
    check_dense(row, head, form, precision)
    if (precision == "int8") != (int8 is not None):
        needs = "takes no calibration set" if int8 is not None else "needs a calibration set (--calibration scenes)"
        raise UsageError(f"{row.name} {precision} {needs}")
    settings = target_settings(
        row, deployment_target=deployment_target, layout=layout, compute_capability=compute_capability,
        weightless="yes" if weightless else None,
    )  # fmt: skip
    plan = _plan(head, form, variant, weights, labels, image_size, classes, width, seed, options, command)
    contract = replace(make_contract(input_kind, plan.size, 1), crop_ratio=1.0, resize=STRETCH)
    metadata = {
        "variant": plan.variant, "head": head, "precision": precision,
        "weights": str(weights or f"random, seed {seed}"),
    }  # fmt: skip
    request = Request(
        precision, contract, outputs_of(head, form, plan.classes, plan.size), opset, metadata,
        labels=plan.labels, settings=settings, task=get_head(head).task,
    )  # fmt: skip
    check_request(row, request)
    final = Path(output) if output is not None else Path("bundles") / f"{head}-{plan.variant}-{row.name}-{precision}"
    with new_folder(final, force) as folder:
        tell("building the eager model")
        model = plan.model()
        check_space(folder, model)
        module = FORMS[head][form](model, plan.size)

        def draft(artifact: Artifact) -> Manifest:
            return _draft(plan, model, module, row, request, artifact)

        if int8 is not None:
            manifest = write_dense_int8(module, row, request, int8, folder, draft, tell)
        else:
            manifest = draft(run_exporter(row, module, request, folder, tell))
        manifest = compile_files(row, request, folder, manifest, tell)
        result = _seal(folder, manifest, module, plan.labels, tell)
    warnings = () if weights else (f"weights are random (seed {seed}): latency is real, what is found means nothing",)
    result = replace(result, bundle=str(final), warnings=warnings + result.warnings)
    if row.built_by:
        result = build_here(result, final, tell)
    return replace(result, seconds=round(time.perf_counter() - start, 1))


def _plan(
    head: str,
    form: str,
    variant: str | None,
    weights: str | Path | None,
    labels: str | Path | None,
    image_size: int | tuple[int, int] | str | None,
    classes: int | None,
    width: int | None,
    seed: int,
    options: dict[str, Any],
    command: str,
) -> _Plan:
    """Everything that can be wrong with names and values is said here, before anything is built or written."""
    if image_size == DYNAMIC:
        raise UsageError(f"{head} has anchors and maps of one size; give --image-size HxW")
    check_seed(seed)
    for name, value in (("classes", classes), ("width", width)):
        if value is not None and value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    row = get_head(head)
    given = None if labels is None else read_labels(Path(labels))
    if weights is not None:
        said = describe_dense(weights)
        if options:
            raise UsageError(f"{weights} say their model options themselves; leave {', '.join(options)} out")
        for name, mine, theirs in (
            ("head", head, said.head),
            ("variant", variant or said.variant, said.variant),
            ("classes", classes or len(said.labels), len(said.labels)),
            ("width", width or said.width, said.width),
        ):
            if mine != theirs:
                raise WeightsError(f"{weights} are weights with {name} {theirs}, not {mine}; give {name} {theirs}")
        names, variant, width, options = said.labels, said.variant, said.width, dict(said.options)
        size = parse_image_size(image_size or said.image_size)
    else:
        count = classes or (len(given) if given else row.classes)
        names = given or tuple(f"class {i}" for i in range(count))
        variant, width = variant or row.variant, width or row.width
        size = parse_image_size(image_size or row.image_size)
    if given is not None and len(given) != len(names):
        raise InputError(f"labels {labels} has {len(given)} names for {len(names)} classes; give one name a class")
    if classes is not None and classes != len(names):
        raise UsageError(f"{classes} classes and {len(names)} labels do not fit; leave one of them out")
    if row.task == "segment" and len(names) > 255:
        raise UsageError(f"a label map holds at most 255 classes, not {len(names)}")
    return _Plan(head, form, variant, len(names), given or names, size, width, weights, seed, options, command)


def _draft(
    plan: _Plan, model: nn.Module, module: nn.Module, row: Target, request: Request, artifact: Artifact
) -> Manifest:
    options = options_of(_backbone(model).model.config)
    return draft_manifest(
        model, module, row, request, artifact,
        weights_source(plan.weights, plan.seed, dense_weights_path), tolerance(row, plan.form, request.precision),
        variant=plan.variant,
        options={k: v for k, v in options.items() if k != "num_classes"},
        command=plan.command,
        task=request.task,
        head=plan.head,
        dense={"form": plan.form, "classes": plan.classes, "width": plan.width},
    )  # fmt: skip


def tolerance(row: Target, form: str, precision: str) -> Tolerance:
    """SQNR over raw outputs as for classifiers, whatever the largest logit; detections and label maps by agreement."""
    if precision == "int8":  # gated by AP or mean IoU on held-out pictures instead
        return Tolerance(row.tolerances[precision].sqnr_db if form == RAW else -numerics.SQNR_LIMIT_DB, 0.0)
    if form == RAW:
        return Tolerance(row.tolerances[precision].sqnr_db, 0.0)
    sqnr = DETECTIONS_SQNR_DB[precision] if form == DETECTED else 0.0
    return Tolerance(sqnr, AGREEMENT[precision])


def _seal(folder: Path, draft: Manifest, module: nn.Module, labels: tuple[str, ...], tell: Tell) -> ExportResult:
    """Runs the saved files against eager on photographs, and completes the bundle if they hold."""
    contract = draft.input
    pictures = open_dataset("photographs").images[:CHECKED_IMAGES]
    inputs = np.concatenate([prepare_input(load_image(picture), contract) for picture in pictures])
    tell(f"checking the saved files against eager on {len(inputs)} photographs")
    with EagerRunner(module, contract, draft.outputs, RunnerOptions()) as eager:
        kept = clear_of_ties(_backbone(module).model, eager.normalised(inputs), draft.precision)
        inputs = inputs if kept is None else inputs[kept]
        expected = [eager.run({contract.tensor.name: one[None]}) for one in inputs]
    checker = get_target(draft.target).checked_by
    with load_runner(Bundle(folder, replace(draft, target=checker or draft.target))) as runner:
        found = [
            dense_outputs.compare(want, runner.run({contract.tensor.name: one[None]}))
            for one, want in zip(inputs, expected, strict=True)
        ]
        execution, engine = runner.execution(), engine_of(runner)
    numbers = dense_outputs.worst(found)
    _check(draft, numbers)
    counted = {"images": len(inputs), **asdict(numbers)}
    checked = Checked(asdict(found[0]), counted, numbers.agreement, kept, execution, engine)
    golden = {"input": inputs[:1], **dense_outputs.thin(expected[0])}
    return seal(folder, draft, f"{draft.head} on {draft.variant}", checked, golden, labels)


def _check(draft: Manifest, numbers: dense_outputs.Likeness) -> None:
    wanted = draft.tolerance
    if numbers.sqnr_db < wanted.sqnr_db or numbers.agreement < wanted.top1_agreement:
        raise ToleranceError(
            f"{draft.head} on {draft.variant} as {draft.target} {draft.precision} is out of tolerance on photographs: "
            f"SQNR {numbers.sqnr_db:.1f} dB (needs {wanted.sqnr_db:g}), equal {numbers.agreement:.4g} (needs "
            f"{wanted.top1_agreement:g}), worst error {numbers.max_abs_error:.3g}; no bundle was written"
        )


def _backbone(module: nn.Module) -> Backbone:
    return next(m for m in module.modules() if isinstance(m, Backbone))
