"""The command line: parse, one call, print. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from dualtoken_deploy.errors import DualTokenError, MissingError, UsageError, missing_extra
from dualtoken_deploy.serve.cli import serve

app = typer.Typer(
    name="dualtoken",
    help="DualToken-ViT from PyTorch to a verified bundle for every target.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Bundles = Annotated[list[Path] | None, typer.Argument(help="Bundle folders; without any, all under ./bundles.")]
OneBundle = Annotated[Path, typer.Argument(help="Bundle folder.")]
Device = Annotated[str | None, typer.Option(help="Device in the runtime's own words; its CPU unless given.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]


@app.command()
def models(
    ablations: Annotated[bool, typer.Option("--ablations", help="Tables 6 to 9 of DualToken-ViT instead.")] = False,
    json_output: Json = False,
) -> None:
    """Lists the variants, with counted parameters and MACs beside the paper's."""
    if ablations:
        rows = _with_torch("counting models", _count_ablations)
        _print(json_output, rows, lambda r: r.ablations_table(rows))
        return
    rows = _with_torch("counting models", _count_models)
    _print(json_output, rows, lambda r: r.models_table(rows))


@app.command()
def targets(json_output: Json = False) -> None:
    """Lists the targets, and what can be exported and run here."""
    from dualtoken_deploy.targets import EXPORT_MODULES, TARGETS

    rows = []
    for row in TARGETS.values():
        can_run, can_export = not row.missing(), not row.missing(row.export_modules)
        extras = [e for e, here in ((row.extra, can_run), ("export", not row.missing(EXPORT_MODULES))) if not here]
        install = f"pip install 'dualtoken-deploy[{','.join(extras)}]'" if extras else None
        if install and row.vendor and not can_run:
            install = f"{install} and {row.vendor}"
        rows.append(
            {
                "target": row.name,
                "title": row.title,
                "precisions": list(row.precisions),
                "can_export": can_export,
                "can_run": can_run,
                "install": install,
            }
        )
    _print(json_output, rows, lambda r: r.targets_table(rows))


@app.command()
def export(
    variant: Annotated[str, typer.Option(help="Model variant; see `dualtoken models`.")],
    target: Annotated[list[str], typer.Option(help="Target, may be repeated; `all`: the portable ones that are here.")],
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8 or one of the target's own (`dualtoken targets`).")
    ] = "fp32",
    weights: Annotated[
        str | None, typer.Option(help="Safetensors or torch checkpoint, or digits, or shapes; random unless given.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one class name a line.")] = None,
    image_size: Annotated[
        str | None,
        typer.Option(help="Side or HxW, or `dynamic` (ONNX Runtime, OpenVINO); that of trained weights, or 224."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch size, or `dynamic`.")] = "1",
    input_kind: Annotated[str, typer.Option("--input", help="image (uint8 NHWC RGB) or tensor.")] = "image",
    opset: Annotated[int | None, typer.Option(help="ONNX opset; the target's own choice unless given.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Classes; from --labels, or 1000.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Model option NAME=VALUE, e.g. global_tokens=3.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    calibration: Annotated[
        str | None, typer.Option(help="int8: folder, or digits, shapes, photographs; `random` only to try the path.")
    ] = None,
    calibration_size: Annotated[int, typer.Option(min=1, help="int8: images that ranges are taken from.")] = 300,
    calibrator: Annotated[str, typer.Option(help="int8: minmax, entropy or percentile.")] = "minmax",
    max_drop: Annotated[float, typer.Option(help="int8: points of the metric that may be lost.")] = 0.5,
    metric: Annotated[str | None, typer.Option(help="int8: top1, agreement or sqnr.")] = None,
    quantizer: Annotated[str | None, typer.Option(help="int8: qdq, qdq-symmetric, or nncf (openvino).")] = None,
    search_seconds: Annotated[float | None, typer.Option(min=1, help="int8: time limit of the search.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda, for aotinductor: what to compile for.")] = None,
    deployment_target: Annotated[str | None, typer.Option(help="Core ML: iOS16, iOS17, iOS18 or iOS26.")] = None,
    layout: Annotated[str | None, typer.Option(help="Core ML: ane (for the Neural Engine) or plain.")] = None,
    output: Annotated[Path | None, typer.Option(help="The bundle's own folder.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    triton_repository: Annotated[Path | None, typer.Option(help="Lay the bundle out for Triton in here too.")] = None,
    json_output: Json = False,
) -> None:
    """Exports a variant and checks the saved files against eager; out of tolerance leaves no bundle."""
    from dualtoken_deploy.targets import get_target

    options = _options(option or [])
    if classes is not None:
        options["num_classes"] = classes
    pipeline = _with_torch("exporting", _module("pipeline"))
    names = pipeline.exportable_targets() if "all" in target else [get_target(t).name for t in dict.fromkeys(target)]
    if not names:
        raise missing_extra("all", "exporting to any target")
    if output is not None and len(names) > 1:
        raise UsageError("--output names one bundle's folder; give one --target with it")
    int8 = None
    if calibration is not None:
        settings = (calibration, calibration_size, calibrator, metric, max_drop, quantizer, search_seconds)
        int8 = pipeline.Int8Options(*settings)
    if triton_repository is not None:
        _check_triton(names)
    results = []
    with _progress() as tell:
        for name in names:
            results.append(
                pipeline.export(
                    variant, name, precision, weights=weights, output=output, labels=labels, image_size=image_size,
                    batch=batch, input_kind=input_kind, opset=opset, seed=seed, device=device, force=force,
                    int8=int8 if len(names) == 1 or name in pipeline.BACKENDS else None,
                    deployment_target=deployment_target, layout=layout, command=_command(),
                    progress=lambda text, name=name: tell(f"{name}: {text}"), **options,
                )
            )  # fmt: skip
            if triton_repository is not None:
                _lay_out(results[-1].bundle, triton_repository, force)
    for warning in dict.fromkeys(w for r in results for w in r.warnings):
        _say(f"warning: {warning}")
    data: Any = [r.to_json() for r in results]
    _print(json_output, data[0] if len(data) == 1 else data, lambda r: r.export_table(results))
    if left := [r for r in results if r.next_step]:
        raise MissingError("; ".join(f"{r.bundle} is prepared and checked, not built: {r.next_step}" for r in left))


@app.command()
def validate(
    bundles: Bundles = None,
    data: Annotated[
        str | None, typer.Option(help="Image folder, or `photographs`; the golden input unless given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many images.")] = None,
    reference: Annotated[str | None, typer.Option(help="eager or golden; eager where torch is installed.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of equal top-1, in 0..1.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Least top-1 accuracy, in 0..1.")] = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Least SQNR in dB.")] = None,
    device: Device = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Compares bundles with the eager model they came from; a minimum that is missed exits with 5."""
    from dualtoken_deploy.validate import gate
    from dualtoken_deploy.validate import validate as run

    with _progress() as tell:
        results = run(_bundles(bundles), data, limit, reference, device, threads, progress=tell)
    _print(json_output, {"results": [r.to_json() for r in results]}, lambda r: r.validation_table(results))
    gate(results, min_agreement, min_top1, min_sqnr)


@app.command()
def bench(
    bundles: Bundles = None,
    against: Annotated[
        str | None, typer.Option(help="Baseline: eager, gemm, or a bundle; the first one unless given.")
    ] = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size, where the bundles leave it open.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for each contestant in a round.")] = 2.0,
    device: Device = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
    json_output: Json = False,
) -> None:
    """Times bundles side by side: one process each, interleaved rounds, ratios with their spread."""
    from dualtoken_deploy.bench import bench as run

    with _progress() as tell:
        report = run(_bundles(bundles), against, threads, batch, rounds, seconds, device, progress=tell)
    _print(json_output, report.to_json(), lambda r: r.bench_table(report))
    for note in report.notes:
        _say(f"note: {note}")
    if markdown is not None:  # last: figures that took minutes are shown even where the file cannot be written
        _write(markdown, report.to_markdown())


@app.command()
def inspect(
    bundle: OneBundle,
    device: Device = None,
    search: Annotated[
        Path | None, typer.Option(help="Draw the search behind an INT8 bundle here (.png, .svg, .pdf).")
    ] = None,
    json_output: Json = False,
) -> None:
    """Verifies a bundle and reads from the runtime what executes; a broken promise exits with 5."""
    from dualtoken_deploy.inspection import check_promise, inspect_bundle

    inspection = inspect_bundle(bundle, device)
    if search is not None:
        if inspection.manifest.calibration is None:
            raise UsageError(f"{bundle} is no INT8 bundle with a search behind it")
        from dualtoken_deploy.plots import plot_search

        plot_search(inspection.manifest.calibration, search)
    _print(json_output, inspection.to_json(), lambda r: r.inspection_table(inspection))
    if not json_output:
        contract = inspection.manifest.input
        shape = "x".join(map(str, contract.tensor.shape))
        print(f"input {contract.tensor.name}: {contract.tensor.dtype} {contract.tensor.layout} {shape}")
        print(f"weights: {inspection.manifest.weights['source']}")
        if inspection.manifest.calibration is not None:
            said = inspection.manifest.calibration
            floats = ", ".join(said["in_float"]) or "none"
            print(
                f"INT8: {100 * inspection.int8_mac_share:.1f} % of the MACs here; kept in float by the search: {floats}"
            )
            print(f"products that run in float here: {', '.join(inspection.float_products) or 'none'}")
    for note in inspection.notes:
        _say(f"note: {note}")
    check_promise(inspection)


@app.command()
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
    from dualtoken_deploy.build import BuildOptions, build_bundle, parse_batches

    options = BuildOptions(
        workspace, optimization, version_compatible, hardware_compatibility, parse_batches(batches)
    )  # fmt: skip
    with _progress() as tell:
        result = build_bundle(bundle, options, rebuild, tell)
    _print(json_output, result.to_json(), lambda r: r.build_table(result))


@app.command()
def predict(
    bundle: OneBundle,
    images: Annotated[list[Path], typer.Argument(help="Pictures.")],
    top: Annotated[int, typer.Option(min=1, help="Classes to show.")] = 5,
    device: Device = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Shows the most likely classes of pictures."""
    from dualtoken_deploy.predict import predict as run

    predictions = run(bundle, images, top, device, threads)
    _print(json_output, [p.to_json() for p in predictions], lambda r: r.prediction_table(predictions))


@app.command()
def train(
    variant: Annotated[str | None, typer.Option(help="Model variant; see `dualtoken models`.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder with train/ and val/ of class folders, or digits, or shapes.")
    ] = None,
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
    module = _with_torch("training", _module("train"))
    given = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "init": init}
    settings: dict[str, Any] = {k: v for k, v in given.items() if v is not None} | _settings(setting or [])
    with _progress() as tell:
        if resume is not None:
            if variant or data or output or image_size or option:
                raise UsageError("--resume takes variant, data, size and options from the run; leave them out")
            result = module.resume(resume, tell, **settings)
        else:
            if not (variant and data and output):
                raise UsageError("training needs --variant, --data and --output (or --resume RUN)")
            if image_size is not None:
                settings["image_size"] = module.image_size(image_size)
            config = module.make_config(variant=variant, data=data, options=_options(option or []), **settings)
            result = module.train(config, output, tell)
    _print(json_output, result.to_json(), lambda r: r.training_table(result))


@app.command()
def evaluate(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    data: Annotated[str, typer.Option(help="Labelled folder (its val part where it has two), or digits, or shapes.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many images, spread over the set.")] = None,
    variant: Annotated[str | None, typer.Option(help="Checked against what the weights say.")] = None,
    confusion: Annotated[Path | None, typer.Option(help="Draw the confusion matrix here (.png, .svg, .pdf).")] = None,
    device: Device = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Top-1, top-5 and accuracy per class of a bundle, or of weights in eager PyTorch."""
    from dualtoken_deploy.evaluate import evaluate as run

    with _progress() as tell:
        result = run(source, data, limit, variant, device, threads, progress=tell)
    _print(json_output, result.to_json(), lambda r: r.evaluation_table(result))
    if confusion is not None:
        import numpy as np

        from dualtoken_deploy.plots import plot_confusion

        title = f"{result.source} on {result.data}: top-1 {100 * result.top1:.2f} %"
        plot_confusion(np.array(result.confusion), result.labels, confusion, title)


@app.command()
def compare(
    data: Annotated[str, typer.Option(help="Pictures, best labelled: a folder, or digits, shapes, photographs.")],
    bundles: Bundles = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take this many images, spread over the set.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of the bench.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for each contestant in a round.")] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Draw accuracy against latency here (.png, .svg, .pdf).")] = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Holds bundles of one model against each other: accuracy, size, latency, and a verdict on each."""
    module = _with_torch("comparing with eager", _module("compare"))
    with _progress() as tell:
        found = module.compare(_bundles(bundles), data, limit, threads, rounds, seconds, progress=tell)
    _print(json_output, found.to_json(), lambda r: r.comparison_table(found))
    for note in () if found.bench is None else found.bench.notes:
        _say(f"note: {note}")
    if picture is not None:
        module.draw(found, picture)


@app.command()
def diagnose(
    bundle: OneBundle,
    data: Annotated[str | None, typer.Option(help="Pictures; the photographs unless given.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take this many pictures.")] = 4,
    threshold: Annotated[float | None, typer.Option(help="SQNR in dB below which a layer counts as drifted.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw SQNR over the layers here (.png, .svg, .pdf).")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Layers to show, those that lose most first.")] = 15,
    json_output: Json = False,
) -> None:
    """Shows where a bundle drifts from eager, layer by layer in the model's own names."""
    module = _with_torch("diagnosing a bundle", _module("diagnose"))
    with _progress() as tell:
        found = module.diagnose(bundle, data, limit, threshold, progress=tell)
    _print(json_output, found.to_json(), lambda r: r.drift_table(found, rows))
    if not json_output:
        past = "no layer is past the threshold" if found.first is None else f"first past it: {found.first}"
        print(f"threshold {found.threshold_db:g} dB: {past}")
        if found.suspect is not None:
            print(f"loses most by itself: {found.suspect}")
    if picture is not None:
        module.draw(found, picture)


@app.command()
def visualize(
    source: Annotated[str, typer.Argument(help="Bundle folder, or weights: of a run, or digits, or shapes.")],
    image: Annotated[Path, typer.Argument(help="Picture.")],
    output: Annotated[Path, typer.Option(help="Where to draw it (.png, .svg, .pdf).")],
) -> None:
    """Draws which global tokens the image tokens read in the last block (the paper's Figure 4)."""
    _with_torch("looking into a model", _module("visualize")).visualize(source, image, output)
    _say(f"drawn: {output}")


app.command()(serve)


class _Stop:
    """Remembers that a signal asked us to stop: a converter may wrap the KeyboardInterrupt in an error of its own."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: maps errors to one line and the documented exit code."""
    stop = _Stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # a stopped export clears up as an interrupted one does
        signal.signal(number, stop)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except DualTokenError as error:
        if not stop.asked:
            _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        stop.asked = True
    except BrokenPipeError:  # the reader of stdout, head for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not stop.asked:
            if not hasattr(error, "exit_code"):
                raise
            _usage(error)
    else:
        if code and not stop.asked:  # what typer makes of an exit inside a command
            sys.exit(code)
    if stop.asked:
        _end_interrupted()


def _end_interrupted() -> None:
    """Exits with 130 whatever happens: CPython remembers a KeyboardInterrupt that came inside an exec of text (as in
    the making of a dataclass) and would end `python -m` by SIGINT instead of the exit code asked for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _say("error: interrupted; nothing half-written was left")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _usage(error: Exception) -> None:
    """Click's own errors (a missing argument, an unknown option) and exits, as click would end them."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    sys.exit(error.exit_code)  # type: ignore[attr-defined]


def _fail(message: str, code: int) -> None:
    _say(f"error: {message}")
    sys.exit(code)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Tells what happens now: a live line with its time on a terminal, plain lines elsewhere; always on stderr."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _say
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield lambda text: progress.update(task, description=text)


def _print(as_json: bool, data: Any, draw: Callable[[Any], Any]) -> None:
    """JSON, or the table that `draw` makes of the report module."""
    if as_json:
        print(json.dumps(data, indent=2, allow_nan=False))
        return
    from rich.console import Console

    from dualtoken_deploy import report

    console = Console()
    # a pipe or a file has no width; a table cut to 80 columns would lose its figures
    Console(width=None if console.is_terminal else 200).print(draw(report))


def _bundles(given: list[Path] | None) -> list[Path]:
    """The bundles named, or every one under ./bundles that can be run. Raises UsageError where there is none."""
    found = given or sorted(p.parent for p in Path("bundles").glob("*/manifest.json") if p.parent.name[0] != ".")
    if given is None:
        found = [path for path in found if not _left_out(path)]
    if not found:
        raise UsageError("no bundle was named and there is none under ./bundles; make one with: dualtoken export")
    return list(found)


def _left_out(path: Path) -> bool:
    """Whether a bundle still has to be built; says so."""
    from dualtoken_deploy.bundle import PREPARED, Bundle

    prepared = Bundle.open(path, verify=False).manifest.state == PREPARED
    if prepared:
        _say(f"note: {path} is prepared, not built, and left out; on the device run: dualtoken build {path}")
    return prepared


def _settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs of the training recipe; "a,b" is a pair of numbers."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"setting {pair!r} is not NAME=VALUE, e.g. warmup_epochs=5")
        parts = [_number(part) for part in text.split(",")]
        settings[name] = parts[0] if len(parts) == 1 else tuple(parts)
    return settings


def _check_triton(targets: Sequence[str]) -> None:
    """Said before the export, not after it."""
    from dualtoken_deploy.triton import check_target

    for target in targets:
        check_target(target)


def _lay_out(bundle: str, repository: Path, force: bool) -> None:
    from dualtoken_deploy.bundle import Bundle
    from dualtoken_deploy.triton import lay_out

    _say(f"for Triton: {lay_out(Bundle.open(bundle), repository, force=force)}")


def _options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments: numbers where they read as such."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name or name in ("image_size", "num_classes"):
            raise UsageError(f"option {pair!r} is not NAME=VALUE of a model option, e.g. global_tokens=3")
        options[name] = _number(text)
    return options


def _number(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def _write(path: Path, text: str) -> None:
    from dualtoken_deploy.errors import OutputError

    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def _command() -> str:
    return shlex.join(["dualtoken", *sys.argv[1:]])


def _with_torch(what: str, call: Callable[[], Any]) -> Any:
    """Runs what imports torch; a device install without it gets the name of the extra."""
    try:
        return call()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("export", what) from error


def _module(name: str) -> Callable[[], Any]:
    """What `_with_torch` calls to import a module of this package."""
    return lambda: importlib.import_module(f"dualtoken_deploy.{name}")


def _count_models() -> list[dict[str, Any]]:
    from dualtoken_deploy.models.registry import describe_variants

    return describe_variants()


def _count_ablations() -> list[dict[str, Any]]:
    from dualtoken_deploy.models.ablations import describe_ablations

    return describe_ablations()
