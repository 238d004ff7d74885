"""INT8 beside the other precisions of its runtime, a table for docs/int8.md.

    python benchmarks/int8_table.py FOLDER [--threads 1,2] [--batches 1,8] [--minutes 12] [--output table.md]

FOLDER holds bundles; those of one model and one target are raced against its fp32 in interleaved rounds until the 90 %
interval of each ratio is narrower than a tenth, with as many rounds at most as leave time for the rest. A batch goes to
the bundles that can take it: make some with --batch dynamic for more than one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dualtoken_deploy.bench import bench, run
from dualtoken_deploy.bench.report import BenchReport
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import DualTokenError

SECONDS, FEWEST, WIDTH = 0.25, 5, 0.1
ROUND_S = (
    0.75  # that a contestant takes of a round: the untimed start, SECONDS, and half of it with requests overlapped
)


def groups(folder: Path, batch: int) -> dict[tuple[str, str], list[Bundle]]:
    """By model and target those that take the batch, fp32 first; groups without an fp32 are left out."""
    found: dict[tuple[str, str], list[Bundle]] = {}
    for place in sorted(folder.glob("*/manifest.json")):
        bundle = Bundle.open(place.parent)
        fixed = bundle.manifest.input.batch
        if fixed == batch or (fixed is None and batch > 1):
            found.setdefault((bundle.manifest.variant, bundle.manifest.target), []).append(bundle)
    for bundles in found.values():
        bundles.sort(key=lambda b: (b.manifest.precision != "fp32", b.manifest.precision))
    return {key: b for key, b in found.items() if len(b) > 1 and b[0].manifest.precision == "fp32"}


def rows(report: BenchReport, what: Sequence[str]) -> list[str]:
    lines = []
    for one in report.contestants:
        if one.kind == "bundle":
            low, high = one.ratio_interval or (one.ratio.low, one.ratio.high)
            ratio = f"{one.ratio.median:.2f}x ({low:.2f}-{high:.2f})"
            lines.append(f"| {' | '.join((*what, one.precision))} | {one.p50_ms:.2f} | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    cells = [
        (batch, threads, key, bundles)
        for batch in map(int, asked.batches.split(","))
        for threads in map(int, asked.threads.split(","))
        for key, bundles in groups(asked.folder, batch).items()
    ]
    end = time.monotonic() + 60 * asked.minutes
    lines = ["| model | runtime | batch | threads | precision | p50 (ms) | fp32's time over it |", "| --- " * 7 + "|"]
    said = ""
    for number, (batch, threads, key, bundles) in enumerate(cells):
        share = (end - time.monotonic()) / (len(cells) - number)
        run.MOST_ROUNDS = max(FEWEST, int(share / (ROUND_S * (len(bundles) + 1))))
        try:
            report = bench(bundles, None, threads, batch, FEWEST, SECONDS, until=WIDTH)
        except DualTokenError as error:
            print(f"{key}: {error}", file=sys.stderr)
            continue
        said = report.machine_line()
        lines += rows(report, (*key, str(batch), str(threads)))
        print("\n".join(lines[-len(bundles) :]), flush=True)
    text = "\n".join([f"Machine: {said}.", "", *lines, ""])
    if asked.output is not None:
        asked.output.write_text(text)


if __name__ == "__main__":
    main()
