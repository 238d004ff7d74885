"""Commands that measure and judge what was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualtoken_deploy.cli.common import (
    ROUNDS,
    SECONDS,
    AllowNative,
    Bundles,
    Device,
    Json,
    Limit,
    OneBundle,
    Threads,
    answer,
    command_line,
    find_bundles,
    importing,
    progress,
    remark,
    show,
    with_torch,
    write_text,
)
from dualtoken_deploy.errors import UsageError

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.blocks import Calibration
    from dualtoken_deploy.use.inspect import Inspection


def validate(
    bundles: Bundles = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Image folder, or `photographs`; of detectors and segmenters `scenes` or a folder. "
            "Without it the one input stored in the bundle."
        ),
    ] = None,
    limit: Limit = None,
    reference: Annotated[
        str | None,
        typer.Option(help="eager or golden; unless given eager with --data and torch, else golden."),
    ] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of equal answers, in 0..1.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Classifiers: least top-1 accuracy, in 0..1.")] = None,
    min_sqnr: Annotated[float | None, typer.Option(help="Least SQNR in dB.")] = None,
    min_ap: Annotated[float | None, typer.Option(help="Detectors: least AP of the boxes, in 0..1.")] = None,
    min_miou: Annotated[float | None, typer.Option(help="Segmenters: least mean IoU, in 0..1.")] = None,
    minimum: Annotated[
        list[str] | None,
        typer.Option(help="METRIC=VALUE: least value of any metric, such as psnr_db=22 or probe_top1=0.75. Repeat it."),
    ] = None,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Compares bundles with the eager model they came from, or with its outputs stored in them (golden).

    A minimum that is missed exits with 5; against golden the SQNR that the bundle's export asks for is one unless
    another is given.
    """
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    from dualtoken_deploy.use.validate import gate, parse_minima
    from dualtoken_deploy.use.validate import validate as run

    more = parse_minima(minimum or [])
    minima = {"agreement": min_agreement, "top1": min_top1, "sqnr_db": min_sqnr, "ap": min_ap, "miou": min_miou}
    if twice := [name for name in more if minima.get(name) is not None]:
        raise UsageError(f"--minimum gives {', '.join(twice)} a second time; give it once")
    with progress() as tell:
        results = run(find_bundles(bundles), data, limit, reference, device, threads, progress=tell)
    show(json_output, {"results": [r.to_json() for r in results]}, lambda r: r.validation_table(results))
    gate(results, **{**minima, **more})


def evaluate(
    source: Annotated[
        str,
        typer.Argument(
            help="Bundle folder, or weights: of a run, or digits, shapes, scenes-detect, scenes-segment, lorenz, "
            "shapes-tokens."
        ),
    ],
    data: Annotated[
        str, typer.Option(help="Labelled folder (its val part where it has two), or digits, shapes; dense: scenes.")
    ],
    limit: Limit = None,
    variant: Annotated[str | None, typer.Option(help="Checked against what the weights say.")] = None,
    confusion: Annotated[Path | None, typer.Option(help="Draw the confusion matrix here (.png, .svg, .pdf).")] = None,
    device: Device = None,
    threads: Threads = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Accuracy, overall and per class, of a bundle or of weights in eager PyTorch: top-1, AP of boxes, or mean IoU."""
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    from dualtoken_deploy.use.evaluate import evaluate as run

    with progress() as tell:
        result = run(source, data, limit, variant, device, threads, progress=tell)
    if result.weights == "random":
        remark("warning: the weights are random: the accuracy is that of guessing")
    show(json_output, result.to_json(), lambda r: r.evaluation_table(result))
    if confusion is None:
        return
    if result.confusion is None:
        raise UsageError(f"the task {result.task} has no confusion matrix; leave --confusion out")
    import numpy as np

    from dualtoken_deploy.use.plots import confusion_title, plot_confusion

    title = confusion_title(result.source, result.data, result.images, result.scores["top1"])
    plot_confusion(np.array(result.confusion), result.labels, confusion, title, command_line())


def inspect(
    bundle: OneBundle,
    device: Device = None,
    search: Annotated[
        Path | None, typer.Option(help="Draw the search behind an INT8 bundle here (.png, .svg, .pdf).")
    ] = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Verifies a bundle and reads from the runtime what executes; a broken promise exits with 5."""
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    from dualtoken_deploy.use.inspect import check_promise, inspect_bundle

    inspection = inspect_bundle(bundle, device)
    if search is not None:
        calibration = inspection.manifest.calibration
        if calibration is None or calibration.search is None:
            raise UsageError(f"{bundle} is no INT8 bundle with a search behind it")
        from dualtoken_deploy.use.plots import plot_search

        plot_search(calibration, calibration.search, search, command_line())
    show(json_output, inspection.to_json(), lambda r: r.inspection_table(inspection))
    if not json_output:
        contract = inspection.manifest.input
        shape = "x".join(map(str, contract.tensor.shape))
        answer(f"input {contract.tensor.name}: {contract.tensor.dtype} {contract.tensor.layout} {shape}")
        answer(f"weights: {inspection.manifest.weights.source}")
        if inspection.manifest.calibration is not None:
            _print_calibration(inspection, inspection.manifest.calibration)
    for note in inspection.notes:
        remark(f"note: {note}")
    check_promise(inspection)


def _print_calibration(inspection: Inspection, said: Calibration) -> None:
    floats = ", ".join(said.in_float) or "none"
    answer(f"calibrated on {said.name}, {said.images} images, {said.method}")
    if said.search is not None:
        answer(f"INT8: {100 * inspection.int8_mac_share:.1f} % of the MACs here; kept in float by the search: {floats}")
        answer(f"products that run in float here: {', '.join(inspection.float_products) or 'none'}")
    else:
        answer(f"INT8 inputs for every convolution and linear layer but: {floats}")


def bench(
    bundles: Bundles = None,
    against: Annotated[
        str | None, typer.Option(help="Baseline: eager, gemm, or a bundle; the first one unless given.")
    ] = None,
    threads: Threads = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size, where the bundles leave it open.")] = None,
    rounds: Annotated[int, ROUNDS] = 5,
    seconds: Annotated[float, SECONDS] = 2.0,
    until: Annotated[
        float | None,
        typer.Option(help="Go on until each ratio's 90 % interval is narrower than this share of it, such as 0.1."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(help="latency; throughput: many requests at a time; server: p99 at random arrivals."),
    ] = "latency",
    device: Device = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
    scenario: Annotated[
        str | None,
        typer.Option(help="MLPerf's instead, by LoadGen: singlestream, multistream, offline or server."),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="A scenario's least seconds: MLPerf's 600 unless given; less is no result there."),
    ] = None,
    logs: Annotated[Path | None, typer.Option(help="LoadGen's log files, a folder a bundle; ./loadgen.")] = None,
    target_qps: Annotated[float | None, typer.Option(help="Scenario server: queries a second.")] = None,
    target_latency: Annotated[float | None, typer.Option(help="Scenario server: ms that 99 % must hold; 15.")] = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Times bundles side by side: one process each, interleaved rounds, ratios with their spread."""
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    of_scenarios = {
        "--duration": duration, "--logs": logs, "--target-qps": target_qps, "--target-latency": target_latency,
    }  # fmt: skip
    if scenario is not None:
        others = {"--against": against, "--until": until, "--markdown": markdown}
        given = [name for name, value in others.items() if value is not None]
        given += ["--mode"] if mode != "latency" else []
        if given:
            raise UsageError(f"--scenario is LoadGen's own way of timing; leave {', '.join(given)} out")
        _run_scenario(scenario, find_bundles(bundles), threads, batch, device, of_scenarios, json_output)
        return
    if left := [name for name, value in of_scenarios.items() if value is not None]:
        raise UsageError(f"{', '.join(left)} without --scenario changes nothing; give --scenario too")
    from dualtoken_deploy.bench.run import bench as run

    with progress() as tell:
        report = run(find_bundles(bundles), against, threads, batch, rounds, seconds, device, tell, until, mode)
    show(json_output, report.to_json(), lambda r: r.bench_table(report))
    for note in report.notes:
        remark(f"note: {note}")
    if markdown is not None:  # last: figures that took minutes are shown even where the file cannot be written
        write_text(markdown, report.to_markdown())


def _run_scenario(
    scenario: str, bundles: list[Path], threads: int | None, batch: int | None, device: str | None,
    given: Mapping[str, Any], json_output: bool,
) -> None:  # fmt: skip
    from dualtoken_deploy.bench.loadgen import LEAST_S, TARGET_LATENCY_MS, run_scenario

    with progress() as tell:
        found = run_scenario(
            bundles, scenario, given["--logs"], LEAST_S if given["--duration"] is None else given["--duration"],
            threads, batch, device, given["--target-qps"],
            TARGET_LATENCY_MS if given["--target-latency"] is None else given["--target-latency"], tell,
        )  # fmt: skip
    show(json_output, found.to_json(), lambda r: r.table(found.columns(), found.rows(), f"scenario {scenario}"))
    for run in found.runs:
        remark(f"note: LoadGen's logs of {run.name}: {run.logs}")


def compare(
    data: Annotated[str, typer.Option(help="Pictures, best labelled: a folder, or digits, shapes, photographs.")],
    bundles: Bundles = None,
    limit: Limit = None,
    rounds: Annotated[int, ROUNDS] = 5,
    seconds: Annotated[float, SECONDS] = 1.0,
    picture: Annotated[Path | None, typer.Option(help="Draw accuracy against latency here (.png, .svg, .pdf).")] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(help="On this device, each in rows of its own: ssh://HOST or a name of devices.toml. Repeat it."),
    ] = None,
    threads: Threads = None,
    expected: Annotated[
        Path | None, typer.Option(hidden=True, help="Eager's outputs in a file that --on wrote, in place of eager.")
    ] = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Holds bundles of one model against each other: accuracy, size, latency, and a verdict on each.

    With several --on each device is measured in turn; one that fails is a row with its error.
    """
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    module = with_torch("comparing with eager", importing("use.compare"))
    if on:
        from dualtoken_deploy.cli.remote import compare_on

        more = ["--rounds", str(rounds), "--seconds", str(seconds), *(["--allow-native"] if allow_native else [])]
        compare_on(on, find_bundles(bundles), data, limit, threads, more, picture, json_output)
        return
    with progress() as tell:
        found = module.compare(
            find_bundles(bundles), data, limit, threads, rounds, seconds, progress=tell, expected=expected
        )
    show(json_output, found.to_json(), lambda r: r.comparison_table(found))
    for note in () if found.bench is None else found.bench.notes:
        remark(f"note: {note}")
    if picture is not None:
        module.draw(found, picture, command_line())


def diagnose(
    bundle: OneBundle,
    data: Annotated[
        str | None, typer.Option(help="Pictures; those of its calibration or weights where they ship, or photographs.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Take this many pictures.")] = 4,
    threshold: Annotated[float | None, typer.Option(help="SQNR in dB below which a layer counts as drifted.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw SQNR over the layers here (.png, .svg, .pdf).")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Layers to show, those that lose most first.")] = 15,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Shows where a bundle drifts from eager, layer by layer in the model's own names."""
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    module = with_torch("diagnosing a bundle", importing("use.diagnose"))
    with progress() as tell:
        found = module.diagnose(bundle, data, limit, threshold, progress=tell)
    show(json_output, found.to_json(), lambda r: r.drift_table(found, rows))
    if not json_output:
        past = "no layer is past the threshold" if found.first is None else f"first past it: {found.first}"
        answer(f"threshold {found.threshold_db:g} dB: {past}")
        if found.suspect is not None:
            answer(f"loses most by itself: {found.suspect}")
    if found.note is not None and found.suspect is not None:
        remark(f"note: {found.note}")
    if picture is not None:
        module.draw(found, picture, command_line())
