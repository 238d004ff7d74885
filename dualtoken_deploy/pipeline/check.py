"""What every bundle ends with: a manifest from what was made, and its completion by what the saved files did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dualtoken_deploy.bundle.blocks import Figures, Level, Measured, NearTies, Speed, Weights
from dualtoken_deploy.bundle.manifest import COMPILED, COMPLETE, EAGER, PREPARED, REFERENCES, Manifest
from dualtoken_deploy.bundle.store import Bundle, write_bundle
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.count import count_params, count_products
from dualtoken_deploy.models.own_sources import classifier_of, inner_model, known_licenses
from dualtoken_deploy.models.registry import weights_sha256
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.pipeline.plan import Plan
from dualtoken_deploy.prove.describe import documents
from dualtoken_deploy.quantize.calibration import FITTED
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import Execution, RunnerOptions, engine_of, load_runner
from dualtoken_deploy.targets.precision import Precision
from dualtoken_deploy.targets.request import Artifact, Request
from dualtoken_deploy.targets.runner import counted, run_each
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.base import Likeness, Outputs, Task
from dualtoken_deploy.use.inspect import int8_share, kind_precision, product_precision

Tell = Callable[[str], None]
# float32 and float64 runs of DualFormer-T differ by about 1e-7 of a token's feature (133 dB and more).
TIE_MARGIN = 1e-6
# Of the MACs: so much may a runtime leave in float of what was quantized for it. OpenVINO 2026.4 leaves 5.5 points (T
# mix at 224: small products of attention); a graph whose linear layers are not taken at all loses forty and more.
LOST_SHARE = 0.08

LIBRARIES = tuple(
    dict.fromkeys(
        (
            *("torch", "onnx", "onnxscript", "onnxsim"),
            *(name for row in TARGETS.values() for name in row.libraries),
            *("numpy", "pillow", "dualtoken-deploy"),
        )
    )
)


# Compiled is not executed, and prepared is not built: what is shown where no device ran the artifact.
_NOT_RUN = {PREPARED: "not run", COMPILED: "compiled, not executed"}


@dataclass(frozen=True)
class ExportResult:
    """Where the bundle is and what was measured on its saved files. `warnings` are to be shown, never dropped.

    `top1_agreement`: of the task, None where it has none. `state` "prepared": the bundle is whole but for a step that
    needs the device; "compiled": it is whole, and no device has run it; `next_step` says what is left and why. `drop`:
    points of the metric that int8 loses on held-out pictures. `reference`: what the figures are against, a key of
    manifest.REFERENCES. `speed`: of int8 beside float files of its target, None where it was not raced.
    """

    bundle: str
    task: str
    target: str
    precision: str
    executed_precision: str
    sqnr_db: float
    top1_agreement: float | None
    size_mib: float
    seconds: float
    warnings: tuple[str, ...]
    state: str = COMPLETE
    next_step: str | None = None
    int8_mac_share: float = 0.0
    drop: float | None = None
    reference: str = EAGER
    speed: Speed | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def draft_manifest(plan: Plan, module: nn.Module, request: Request, artifact: Artifact) -> Manifest:
    """All of a manifest that is known before the saved files ran."""
    source, size = plan.source, request.contract.size
    macs, products = count_products(module, size)
    own = {"variant": source.name, "options": {}} | dict(source.described)
    return Manifest(
        **own,
        weights=Weights(**source.weights, sha256=weights_sha256(inner_model(module))),
        target=plan.target.name,
        precision=request.precision,
        executed_precision={},
        input=request.contract,
        outputs=request.outputs,
        tolerance=plan.tolerance(tuple(output.name for output in request.outputs)),
        measured=Measured(params=count_params(module), macs=macs),
        rules=artifact.rules,
        operators=artifact.operators,
        products=products,
        versions=library_versions(LIBRARIES),
        machine=describe_machine(),
        command=plan.command,
        calibration=artifact.calibration,
        state=PREPARED if plan.target.built_by else COMPLETE,
        build=artifact.build,
        task=plan.task.name,
        origin=source.origin,
        licenses=source.licenses or known_licenses(source),
        asked=plan.asked,
    )


@dataclass(frozen=True)
class _Ran:
    """The saved files on photographs, beside eager: inputs (N, ...), the outputs of each, and what executed.

    `kept`: which photographs were compared, None for all; `engine`: what stood in for the target's own runtime.
    """

    inputs: Array
    expected: list[Outputs]
    actual: list[Outputs]
    kept: Array | None
    execution: Execution
    engine: str | None


def check_and_complete(
    plan: Plan, folder: Path, draft: Manifest, module: nn.Module, labels: tuple[str, ...], tell: Tell
) -> ExportResult:
    """Runs the saved files against eager on golden and on photographs; writes manifest, golden and labels to them.

    Raises ToleranceError where they are not near enough, or where less runs in INT8 than the search planned with.
    """
    ran = _run(plan, folder, draft, module, tell)
    task, contract = plan.task, draft.input
    meter = task.meter()
    for want, got in zip(ran.expected, ran.actual, strict=True):
        meter.add(want, got)
    decided = _decided(plan, ran.expected, ran.actual)
    golden, wanted, given = (_first(rows, contract.batch or 1) for rows in (ran.inputs, ran.expected, ran.actual))
    likeness, on_golden = meter.likeness(), task.compare(wanted, given)
    of_golden = _decided(plan, [wanted], [given])
    _check_tolerance(plan, draft, {"golden": (on_golden, of_golden), "photographs": (likeness, decided)})
    share, floats = int8_share(draft, ran.execution)
    planned = None if draft.calibration is None else draft.calibration.planned_int8_mac_share
    checker = plan.target.checked_by
    if planned is not None and checker:  # another runtime's kernels say nothing of it; `build` measures it
        share = planned
    elif planned is not None and not plan.precision.weight_only:  # of those the plan is what is stored
        check_executed(planned, share, floats, f"{plan.what} for {draft.target}")
    kinds = {} if checker else kind_precision(ran.execution)
    ties = None if ran.kept is None else NearTies(TIE_MARGIN, int((~ran.kept).sum()))
    manifest = replace(
        draft,
        executed_precision=kinds,
        measured=replace(
            draft.measured,
            int8_mac_share=share,
            near_ties=ties,
            level=decided.level,
            golden=figures(task, on_golden),
            photographs=figures(task, likeness, len(ran.inputs)),
            checked_by=checker,
            engine=ran.engine,
        ),
    )
    write_bundle(folder, manifest, {"input": golden, **task.thin(wanted)}, labels, documents)
    return ExportResult(
        bundle=str(folder),
        task=task.name,
        target=draft.target,
        precision=draft.precision,
        executed_precision=_NOT_RUN[draft.state] if checker else product_precision(kinds),
        sqnr_db=round(likeness.sqnr_db, 1),
        top1_agreement=likeness.agreement,
        int8_mac_share=share,
        drop=None if draft.calibration is None else draft.calibration.drop,
        size_mib=round(Bundle.open(folder).size_bytes / 2**20, 2),
        seconds=0.0,
        warnings=((f"{draft.target}: checked by {ran.engine}",) if ran.engine else ()) + _doubts(draft),
        state=manifest.state,
        reference=draft.reference,
    )


def _doubts(draft: Manifest) -> tuple[str, ...]:
    """What is to be said of a search that found something and had no time to find more, and of figures that flatter."""
    said = draft.calibration
    if said is not None and said.method == FITTED and said.held_out is None:
        return (
            f"{draft.target}: the SQNR is of the pictures that the weights were fitted to ({said.name}); calibrate on "
            "pictures of your own (--calibration) for a figure of others",
        )
    search = None if said is None else said.search
    if search is None or not search.timed_out:
        return ()
    return (
        f"{draft.target}: --search-seconds ended the search after {search.seconds:g} s; with more time, more than "
        f"{100 * search.int8_share:.1f} % of the MACs may be in INT8",
    )


def figures(task: Task, found: Likeness, images: int | None = None) -> Figures:
    """A likeness as a manifest has it."""
    return Figures.of(task.numbers(found), images)


def _run(plan: Plan, folder: Path, draft: Manifest, module: nn.Module, tell: Tell) -> _Ran:
    contract, row = draft.input, plan.target
    limits = [limit for limit in (row.check_images, plan.task.check_images) if limit is not None]
    examples = plan.task.examples(contract)
    count = min([len(examples), *limits])
    inputs = np.stack([plan.task.prepare(examples[i], contract) for i in range(count)])
    against = REFERENCES[draft.reference]
    tell(f"checking the saved files against {against} on {count} of {examples.name}")
    with EagerRunner(module, contract, draft.outputs, RunnerOptions()) as eager:
        kept = clear_of_ties(jumping(module), eager.normalised(inputs), plan.precision)
        inputs = inputs if kept is None else inputs[kept]
        asked = counted(inputs, tell, f"running {against} on {examples.name}")
        expected: list[Outputs] = list(run_each(eager, contract, asked))
    with load_runner(Bundle(folder, replace(draft, target=row.checked_by or draft.target))) as runner:
        asked = counted(inputs, tell, f"running the saved files on {examples.name}")
        actual: list[Outputs] = list(run_each(runner, contract, asked))
        return _Ran(inputs, expected, actual, kept, runner.execution(), engine_of(runner))


def _first(rows: Any, count: int) -> Any:
    """The first `count` inputs, or the outputs of the first `count` by name, from the start again where there are
    fewer."""
    chosen = [rows[i % len(rows)] for i in range(count)]
    if not isinstance(chosen[0], Mapping):
        return np.stack(chosen)
    return chosen[0] if count == 1 else {name: np.concatenate([one[name] for one in chosen]) for name in chosen[0]}


@dataclass(frozen=True)
class _Decided:
    """What agrees of the pictures whose best answer the precision can tell, and those that it cannot."""

    agreement: float
    level: Level | None


def _decided(plan: Plan, expected: Sequence[Outputs], actual: Sequence[Outputs]) -> _Decided:
    task, step = plan.task, plan.precision.step
    left, meter, added = 0, task.meter(), False
    for want, got in zip(expected, actual, strict=True):
        if task.level is not None and step is not None:
            clear = ~task.level(want, step)
            left += int((~clear).sum())
            if not clear.any():
                continue
            want, got = ({name: rows[clear] for name, rows in one.items()} for one in (want, got))
        meter.add(want, got)
        added = True
    agreement = meter.likeness().agreement if added else None
    return _Decided(1.0 if agreement is None else agreement, Level(step, left) if left and step else None)


def _check_tolerance(plan: Plan, draft: Manifest, measured: Mapping[str, tuple[Likeness, _Decided]]) -> None:
    wanted = draft.tolerance
    for where, (found, decided) in measured.items():
        agreement = decided.agreement
        if found.sqnr_db < wanted.sqnr_db or agreement < wanted.top1_agreement:
            raise ToleranceError(
                f"{plan.what} as {draft.target} {draft.precision} is out of tolerance on {where}: SQNR "
                f"{found.sqnr_db:.1f} dB (needs {wanted.sqnr_db:g}), equal {plan.task.alike} {agreement:.4g} (needs "
                f"{wanted.top1_agreement:g}), worst error {found.max_abs_error:.3g}; no bundle was written"
            )


def check_executed(planned: float, executed: float, floats: tuple[str, ...], what: str) -> None:
    """Raises ToleranceError where a runtime runs much less in INT8 than was quantized for it: it was not applied."""
    if executed < planned - LOST_SHARE:
        raise ToleranceError(
            f"{what} was quantized for {100 * planned:.1f} % of the MACs, but only {100 * executed:.1f} % run in INT8 "
            f"here (in float: {', '.join(floats[:3])}, ...); no bundle was written"
        )


def jumping(module: nn.Module) -> nn.Module | None:
    """The part that says how near an input comes to where the model jumps; None where there is none."""
    if hasattr(module, "smallest_margin"):
        return module
    return classifier_of(module)


def clear_of_ties(model: nn.Module | None, images: Array, precision: Precision) -> Array | None:
    """Which images stay TIE_MARGIN away from every point where the model jumps; None where it never does.

    Nearer, two exact float32 programs may round to different sides, and neither is wrong. In another precision hardly
    an image is clear of the ties, so there all are kept and the target's tolerance has to hold with the jumps.
    """
    import torch

    if model is None or not precision.exact:
        return None
    smallest_margin: Callable[[Any], Any] = getattr(model, "smallest_margin")  # noqa: B009  # of any module
    parts = [smallest_margin(torch.from_numpy(image[None])) for image in images]
    margins = [float(part) for part in parts if part is not None]
    if len(margins) < len(parts):
        return None
    kept = np.array(margins) >= TIE_MARGIN
    if not kept.any():
        raise ToleranceError(
            f"all {len(kept)} photographs come within {TIE_MARGIN:g} of a tie: nothing can be compared"
        )
    return kept
