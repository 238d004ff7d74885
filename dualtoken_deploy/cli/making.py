"""Commands that make something: what can be made, training, export, build."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualtoken_deploy.cli import asked
from dualtoken_deploy.cli.again import check_alone, export_locked
from dualtoken_deploy.cli.common import (
    AllowNative,
    Json,
    Licenses,
    OneBundle,
    command_line,
    importing,
    json_arguments,
    model_options,
    progress,
    recipe_settings,
    remark,
    say,
    show,
    split_names,
    with_torch,
)
from dualtoken_deploy.errors import MissingError, UsageError, install_command

if TYPE_CHECKING:
    from dualtoken_deploy.targets.table import Target


def models(
    ablations: Annotated[bool, typer.Option("--ablations", help="Tables 6 to 9 of DualToken-ViT instead.")] = False,
    heads: Annotated[bool, typer.Option("--heads", help="The detectors and segmenters instead.")] = False,
    json_output: Json = False,
) -> None:
    """Lists the variants, with counted parameters and MACs beside the paper's."""
    from dualtoken_deploy.models.listing import shipped

    if ablations and heads:
        raise UsageError("--ablations and --heads are two tables; give one of them")
    kind = "heads" if heads else "ablations" if ablations else "variants"
    with progress():
        rows = shipped(kind)
    tables = {"heads": "heads_table", "ablations": "ablations_table", "variants": "models_table"}
    show(json_output, rows, lambda r: getattr(r, tables[kind])(rows))


def targets(json_output: Json = False) -> None:
    """Lists the targets, what can be exported and run here, and which target is for which device."""
    from dualtoken_deploy.targets.table import EXPORT_MODULES, TARGETS

    rows = []
    for row in TARGETS.values():
        can_run, can_export = not row.missing(), not row.missing(row.export_modules)
        export_here = not row.missing(EXPORT_MODULES if row.source == "onnx" else ("torch",))
        extras = [e for e, here in ((row.extra, can_run), ("export", export_here)) if not here]
        install = install_command(*extras) if extras else None
        if install and row.vendor and not can_run:
            install = f"{install} and {row.vendor}"
        rows.append(
            {
                "target": row.name,
                "title": row.title,
                "precisions": list(row.precisions),
                "can_export": can_export,
                "can_run": can_run,
                "runs_as": _runs_as(row, can_run),
                "install": install,
                "devices": [
                    {"device": d.name, "commands": list(d.commands(row.name)), "where": d.where} for d in row.devices
                ],
            }
        )
    show(json_output, rows, lambda r: r.targets_tables(rows))


def _runs_as(row: Target, can_run: bool) -> str:
    """One of "device", "no", and "reference" where something stands in here for the target's own runtime."""
    if not can_run:
        return "no"
    reason = getattr(row.part("runner"), "why_no_latency", None)
    return "reference" if reason is not None and reason(None) is not None else "device"


def train(
    variant: Annotated[str | None, typer.Option(help="Model variant; see `dualtoken models`.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with train/ and val/ (docs/train.md), or digits, shapes; dense: scenes.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="classify, detect, segment, tokenize or forecast; classify unless given.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="retinanet to detect; pspnet or deeplabv3 to segment; the first of each.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of the head; the paper's unless given.")] = None,
    output: Annotated[Path | None, typer.Option(help="The run's own folder.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with this run after its last whole epoch.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the train part; 300 unless given.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images in an optimiser step, over all processes; 1024 unless given.")
    ] = None,
    image_size: Annotated[str | None, typer.Option(help="Side or HxW; 224 unless given.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate at a batch of 1024; 1e-3 unless given.")] = None,
    init: Annotated[str | None, typer.Option(help="Start from these weights; another class count is fine.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Model option NAME=VALUE, e.g. global_tokens=3.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting of the recipe, NAME=VALUE; see docs/train.md.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Trains a variant with the paper's recipe; every setting can be overridden."""
    module = with_torch("training", importing("train"))
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init}
    kind = {"task": task, "head": head, "width": width}
    settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None} | recipe_settings(setting or [])
    with progress() as tell:
        if resume is not None:
            if variant or data or output or image_size or option or any(kind.values()):
                raise UsageError("--resume takes task, variant, data, size and options from the run; leave them out")
            result = module.resume(resume, tell, **settings)
        else:
            if not (variant and data and output):
                raise UsageError("training needs --variant, --data and --output (or --resume RUN)")
            settings |= {k: v for k, v in kind.items() if v is not None}
            if image_size is not None:
                settings["image_size"] = module.image_size(image_size)
            config = module.make_config(variant=variant, data=data, options=model_options(option or []), **settings)
            result = module.train(config, output, tell)
    show(json_output, result.to_json(), lambda r: r.training_table(result))


def export(
    target: Annotated[
        list[str] | None,
        typer.Option(help="Target, may be repeated; `all`: the portable ones with this precision that are here."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="Model variant; see `dualtoken models`. With --head the paper's unless given.")
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Dense model on the variant: retinanet, mask-rcnn, deeplabv3 or pspnet.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Yours: PACKAGE.MODULE:CALLABLE or FILE.py:CALLABLE, whose code runs, or FILE.onnx."),
    ] = None,
    model_arg: Annotated[
        list[str] | None, typer.Option(help="--model: argument of the callable, NAME=VALUE, the value in JSON.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="--model: classify (unless given), detect, segment, embed or tensors.")
    ] = None,
    output_names: Annotated[
        str | None, typer.Option(help="--model: names of its outputs, comma between them; those to take, or one each.")
    ] = None,
    preprocess: Annotated[str | None, typer.Option(help="--model: imagenet (unless given), clip or unit.")] = None,
    mean: Annotated[str | None, typer.Option(help="--model: R,G,B that is taken off pixels in 0..1.")] = None,
    std: Annotated[str | None, typer.Option(help="--model: R,G,B that they are divided by then.")] = None,
    crop_ratio: Annotated[float | None, typer.Option(help="--model: share of the short side that is cut out.")] = None,
    resize: Annotated[str | None, typer.Option(help="--model: bicubic (cover and crop) or stretch.")] = None,
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8 or one of the target's own (`dualtoken targets`).")
    ] = "fp32",
    weights: Annotated[
        str | None,
        typer.Option(help="Safetensors or torch checkpoint, or digits, or shapes; random, or the model's own, if not."),
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one class name a line.")] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Side or HxW, or `dynamic` (ONNX Runtime, OpenVINO); that of trained weights, or 224."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch size, or `dynamic`.")] = "1",
    input_kind: Annotated[
        str | None, typer.Option("--input", help="image (uint8 NHWC RGB) or tensor; of a forecaster series.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the target's own choice unless given.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; from --labels, or 1000.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="--head: channels of its pyramid or context.")] = None,
    suppress: Annotated[
        bool, typer.Option("--suppress", help="RetinaNet: suppression in the graph (ONNX Runtime, OpenVINO).")
    ] = False,
    argmax: Annotated[bool, typer.Option("--argmax", help="Segmenters: the label map instead of logits.")] = False,
    option: Annotated[list[str] | None, typer.Option(help="Model option NAME=VALUE, e.g. global_tokens=3.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    licenses: Licenses = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="int8, int8-w8a8, palettized4|6: folder, or digits, shapes, photographs; `random` only to try."
        ),
    ] = None,
    calibration_size: Annotated[
        int | None, typer.Option(min=1, help="int8: images that ranges are taken from; 300 unless given.")
    ] = None,
    calibrator: Annotated[str | None, typer.Option(help="int8: minmax (unless given), entropy or percentile.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="int8: points of the metric that may be lost; 0.5 unless given.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="int8: top1, agreement or sqnr; detectors ap, segmenters miou instead of top1.")
    ] = None,
    quantizer: Annotated[str | None, typer.Option(help="int8: qdq, qdq-symmetric, or nncf (openvino).")] = None,
    search_seconds: Annotated[float | None, typer.Option(min=1, help="int8: time limit of the search.")] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option(help="int8: times fp32's latency that it may take here, exit 5 beyond; unless given it is said."),
    ] = None,
    no_race: Annotated[
        bool, typer.Option("--no-race", help="int8: do not time it beside fp32; on a machine that is busy.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for aotinductor: what to compile for.")] = None,
    deployment_target: Annotated[str | None, typer.Option(help="Core ML: iOS16, iOS17, iOS18 or iOS26.")] = None,
    layout: Annotated[str | None, typer.Option(help="Core ML: ane (for the Neural Engine) or plain.")] = None,
    backend: Annotated[str | None, typer.Option(help="ExecuTorch: xnnpack (unless given), coreml or vulkan.")] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="TensorRT for RTX: 7.5, 8.0, 8.6, ...; may be repeated; from 8.0 on.")
    ] = None,
    weightless: Annotated[
        bool, typer.Option("--weightless", help="TensorRT for RTX: weights stay in the ONNX; needs a GPU to compile.")
    ] = False,
    batches: Annotated[
        str | None, typer.Option(help="TensorRT for RTX: smallest, best, largest of a dynamic batch, MIN,BEST,MAX.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The bundle's own folder; of several targets the folder of the bundles.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="Several targets: stop at the first that fails.")
    ] = False,
    triton_repository: Annotated[Path | None, typer.Option(help="Lay the bundle out for Triton in here too.")] = None,
    lock: Annotated[
        Path | None, typer.Option(help="manifest.json of a bundle that is to come out again; other bytes exit with 5.")
    ] = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Exports a model and checks the saved files against eager; out of tolerance leaves no bundle.

    --model runs the code that it names, as python would: give it models that you trust.
    """
    given = dict(locals())
    if lock is not None:
        _check_lock(given)
        export_locked(export, lock, labels, output, force, json_output)
        return
    if allow_native:
        raise UsageError("--allow-native is for --lock, whose manifest names code; --model runs yours without it")
    if not target:
        raise UsageError("give --target (`dualtoken targets` lists them), or --lock with the manifest of a bundle")
    exporting = with_torch("exporting", importing("pipeline.several"))
    names = _target_names(exporting, target, precision, head, model)
    if variant is not None and model is not None:
        raise UsageError("--variant and --model both name the model; give one of them")
    asked.check_int8(export, given)
    int8 = None if calibration is None else exporting.Int8Options(calibration, **asked.int8_fields(given))
    said = exporting.Model(
        variant or model, weights, labels, image_size, seed, head, classes, width, suppress, argmax, task,
        json_arguments(model_arg or []), split_names(output_names),
        exporting.own_preprocessing(task, preprocess, mean, std, crop_ratio, resize), model_options(option or []),
        licenses or (),
    )  # fmt: skip
    with progress() as tell:
        results = exporting.export_several(
            said, names, precision, output, batch, input_kind, opset, device, force, int8,
            asked.settings(given), triton_repository, fail_fast, command_line(), tell, say,
        )  # fmt: skip
    _show_exports(results, json_output)


def _check_lock(given: Mapping[str, Any]) -> None:
    from dualtoken_deploy.bundle.trust import permit_native

    check_alone(export, given)
    permit_native(given["allow_native"])


def _target_names(exporting: Any, given: Sequence[str], precision: str, head: str | None, model: str | None) -> Any:
    """Each target once; those that `all` stands for."""
    from dualtoken_deploy.targets.table import get_target

    if "all" in given:
        return exporting.exportable_targets(precision, head, model)
    return [get_target(name).name for name in dict.fromkeys(given)]


def _show_exports(results: Sequence[Any], json_output: bool) -> None:
    """Prints what was exported, and what was not; raises the worst of the errors, and MissingError where a step on the
    device is left without which nothing ships."""
    from dualtoken_deploy.bundle.manifest import COMPILED

    made = [r for r in results if r.error is None]
    for warning in dict.fromkeys(w for r in made for w in r.warnings):
        remark(f"warning: {warning}")
    data: Any = [r.to_json() for r in results]
    show(json_output, data[0] if len(data) == 1 else data, lambda r: r.export_table(results))
    if failed := [r for r in results if r.error is not None]:
        raise max((r.error for r in failed), key=lambda error: error.exit_code)
    for result in (r for r in made if r.next_step and r.state == COMPILED):
        remark(f"note: {result.bundle} is compiled, not executed: {result.next_step}")
    if left := [r for r in made if r.next_step and r.state != COMPILED]:
        raise MissingError("; ".join(f"{r.bundle} is prepared and checked, not built: {r.next_step}" for r in left))


def label(
    bundle: OneBundle,
    labels: Annotated[Path, typer.Argument(help="Text file, one class name a line, as many as the classes.")],
    json_output: Json = False,
) -> None:
    """Gives the classes of a bundle other names; the hash in its manifest follows."""
    from dualtoken_deploy.prove.relabel import relabel

    result = relabel(bundle, labels)
    show(json_output, result.to_json(), lambda r: r.relabelled_table(result))
    if result.signed:
        remark(f"warning: the signature in {bundle} is of the names before; sign the bundle anew")


def build(
    bundle: OneBundle,
    workspace: Annotated[int | None, typer.Option(min=1, help="Most scratch memory of the builder, MiB.")] = None,
    optimization: Annotated[int, typer.Option(min=0, max=5, help="Builder optimisation level.")] = 3,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="The engine loads in later TensorRT versions too.")
    ] = False,
    hardware_compatibility: Annotated[
        str, typer.Option(help="none, ampere-plus or same-compute-capability: GPUs that the engine loads on.")
    ] = "none",
    batches: Annotated[
        str, typer.Option(help="Smallest, best and largest batch of a dynamic one, MIN,BEST,MAX.")
    ] = "1,1,8",
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build anew where there is an engine already.")] = False,
    json_output: Json = False,
) -> None:
    """Builds the engine of a prepared TensorRT bundle, on the device that will run it."""
    from dualtoken_deploy.pipeline.build import BuildOptions, build_bundle, parse_batches

    options = BuildOptions(
        workspace, optimization, version_compatible, hardware_compatibility, parse_batches(batches)
    )  # fmt: skip
    with progress() as tell:
        result = build_bundle(bundle, options, rebuild, tell)
    show(json_output, result.to_json(), lambda r: r.build_table(result))
