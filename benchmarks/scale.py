"""Time and memory of S against image size and batch, on two runtimes, with the exponents that they follow.

    python benchmarks/scale.py prepare FOLDER                       # exports the two bundles of any size and any batch
    python benchmarks/scale.py run FOLDER --output scale.json       # each point in a process of its own, in rounds
    python benchmarks/scale.py show scale.json --picture docs/images/scale.svg     # the table, exponents and a picture

A point is the least CPU time of a call, which other jobs on the machine stretch less than the time on the wall (with
one thread both are the same on a quiet one), and the most memory that its process held. Each runtime has one bundle for
all points. The exponent is the slope of log(time) over log(pixels), or over log(batch), by least squares, with
Student's 90 % interval; 1 is linear. Memory has a part that does not grow, so its slope is in MiB a megapixel.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bench.process import worker_environment
from dualtoken_deploy.bench.worker import peak_rss_mib
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.targets.load import load_runner

RUNTIMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
SIZES = (224, 320, 448, 640, 768, 1024)  # at batch 1
BATCHES = (1, 2, 4, 8, 16, 32)  # at 224
CONFIDENCE = 0.9
MIN_CALLS = 3
TICKS_MS = (25, 50, 100, 200, 400, 800)  # of the picture


def points() -> list[tuple[int, int]]:
    """(side, batch)."""
    return [*((side, 1) for side in SIZES), *((SIZES[0], batch) for batch in BATCHES[1:])]


def prepare(folder: Path) -> None:
    from dualtoken_deploy import export

    for target in RUNTIMES:
        export("s", target=target, precision="fp32", image_size="dynamic", batch="dynamic", output=folder / target)


def measure_point(path: Path, side: int, batch: int, threads: int, seconds: float) -> dict[str, float]:
    """In this process: the least CPU time and time of a call in ms, how many calls, and the most memory in MiB."""
    bundle = Bundle.open(path, verify=False)
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    with load_runner(bundle, threads=threads) as runner:
        feeds = {runner.inputs[0].name: images}
        runner.run(feeds)
        laps: list[float] = []
        works: list[float] = []
        end = time.perf_counter() + seconds
        while len(laps) < MIN_CALLS or time.perf_counter() < end:
            start, before = time.perf_counter(), time.process_time()
            runner.run(feeds)
            laps.append(1e3 * (time.perf_counter() - start))
            works.append(1e3 * (time.process_time() - before))
    return {"cpu_ms": min(works), "least_ms": min(laps), "calls": len(laps), "peak_mib": peak_rss_mib()}


def run(folder: Path, rounds: int, seconds: float, threads: int, output: Path) -> None:
    """Rounds over all points in an order that changes; what `output` has is kept: a run that was cut goes on."""
    said = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {"points": {}}
    found: dict[str, list[dict[str, float]]] = said["points"]
    said |= {"threads": threads, "rounds": rounds, "seconds": seconds, "machine": describe_machine()}
    said["versions"] = library_versions(["onnxruntime", "openvino", "numpy"])
    order = [(runtime, side, batch) for runtime in RUNTIMES for side, batch in points()]
    for number in range(rounds):
        random.Random(number).shuffle(order)
        for runtime, side, batch in order:
            if len(found.get(f"{runtime} {side} {batch}", [])) > number:
                continue
            words = [str(folder / runtime), str(side), str(batch), str(threads), str(seconds)]
            asked = [sys.executable, __file__, "point", *words]
            done = subprocess.run(asked, env=worker_environment(threads), capture_output=True, text=True, check=True)
            found.setdefault(f"{runtime} {side} {batch}", []).append(json.loads(done.stdout))
            print(f"round {number + 1}: {runtime}, {side}x{side}, batch {batch}: {done.stdout.strip()}", flush=True)
            output.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def exponent(over: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Slope of log(values) over log(over) and its interval."""
    return slope(np.log(over), np.log(values))


def slope(over: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """Of a line by least squares, and its interval."""
    from scipy.stats import linregress, t

    fit = linregress(over, values)
    width = float(t.ppf((1 + CONFIDENCE) / 2, len(over) - 2) * fit.stderr)
    return float(fit.slope), float(fit.slope) - width, float(fit.slope) + width


def series(found: dict[str, Any], runtime: str, figure: str, batches: bool) -> tuple[list[float], list[float]]:
    """(pixels of one picture or batch, the figure): the least time over rounds, the most memory."""
    chosen = [(SIZES[0], batch) for batch in BATCHES] if batches else [(side, 1) for side in SIZES]
    gather = max if figure == "peak_mib" else min
    values = [float(gather([r[figure] for r in found["points"][f"{runtime} {s} {b}"]])) for s, b in chosen]
    return [float(b if batches else s * s) for s, b in chosen], values


def memory(found: dict[str, Any], runtime: str, batches: bool) -> tuple[float, float, float]:
    """MiB a megapixel, beyond what one small picture takes, and its interval."""
    over, values = series(found, runtime, "peak_mib", batches)
    pixels = [o * SIZES[0] ** 2 if batches else o for o in over]
    return slope([p / 1e6 for p in pixels], values)


def table(found: dict[str, Any]) -> str:
    columns = [f"{title}: {figure}" for title in RUNTIMES.values() for figure in ("CPU ms", "ns a pixel", "peak MiB")]
    lines = [f"| image, batch | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for side, batch in points():
        cells = [f"{side}x{side}, {batch}"]
        for runtime in RUNTIMES:
            rows = found["points"][f"{runtime} {side} {batch}"]
            ms, peak = min(r["cpu_ms"] for r in rows), max(r["peak_mib"] for r in rows)
            cells += [f"{ms:.1f}", f"{1e6 * ms / (side * side * batch):.0f}", f"{peak:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| exponent of time, slope of memory | in pixels | in batch | MiB a megapixel | of a batch |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for runtime, title in RUNTIMES.items():
        times = [exponent(*series(found, runtime, "cpu_ms", batches)) for batches in (False, True)]
        slopes = [memory(found, runtime, batches) for batches in (False, True)]
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*t) for t in times]
        cells += ["{:.0f} ({:.0f} to {:.0f})".format(*m) for m in slopes]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    from dualtoken_deploy.use.plots import COLOURS, save_figure

    def fill(figure: Any) -> None:
        axes = figure.subplots(2, 2)
        for row, (figure_name, unit) in enumerate((("cpu_ms", "CPU ms a call"), ("peak_mib", "peak MiB"))):
            for column, batches in enumerate((False, True)):
                axis = axes[row][column]
                for (runtime, title), colour in zip(RUNTIMES.items(), COLOURS, strict=False):
                    over, values = series(found, runtime, figure_name, batches)
                    form = "{:.2f} ({:.2f} to {:.2f})" if row == 0 else "{:.0f} MiB a megapixel"
                    said = exponent(over, values) if row == 0 else memory(found, runtime, batches)
                    label = f"{title}: {form.format(*said)}"
                    axis.loglog(over, values, "o-", color=colour, label=label, markersize=4)
                places = [float(b) for b in BATCHES] if batches else [float(side * side) for side in SIZES]
                texts = [str(b) for b in BATCHES] if batches else [str(side) for side in SIZES]
                axis.set_xticks(places, texts)
                if row == 0:
                    axis.set_yticks(TICKS_MS, [str(ms) for ms in TICKS_MS])
                else:
                    axis.set_yscale("linear")
                    axis.set_ylim(bottom=0)
                axis.minorticks_off()
                axis.set_xlabel(
                    f"batch at {SIZES[0]}x{SIZES[0]}" if batches else "side of the image in pixels, batch 1"
                )
                axis.set_ylabel(unit)
                axis.legend(title="exponent" if row == 0 else None, fontsize=7, title_fontsize=7)

    machine, rounds = found["machine"], min(len(rows) for rows in found["points"].values())
    caption = (
        f"{machine['cpu']}, {found['threads']} thread, fp32; least CPU time of a call over {rounds} rounds; "
        "python benchmarks/scale.py run FOLDER"
    )
    save_figure(path, (9.0, 6.5), fill, "S: time and memory against image size and batch", caption)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("prepare").add_argument("folder", type=Path)
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--rounds", type=int, default=3)
    running.add_argument("--seconds", type=float, default=0.5)
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--output", type=Path, default=Path("scale.json"))
    showing = commands.add_parser("show")
    showing.add_argument("results", type=Path)
    showing.add_argument("--picture", type=Path)
    point = commands.add_parser("point")
    for name, kind in (("bundle", Path), ("side", int), ("batch", int), ("threads", int), ("seconds", float)):
        point.add_argument(name, type=kind)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.folder)
    elif given.command == "run":
        run(given.folder, given.rounds, given.seconds, given.threads, given.output)
    elif given.command == "point":
        print(json.dumps(measure_point(given.bundle, given.side, given.batch, given.threads, given.seconds)))
    else:
        found = json.loads(given.results.read_text(encoding="utf-8"))
        print(table(found))
        if given.picture is not None:
            draw(found, given.picture)


if __name__ == "__main__":
    main()
