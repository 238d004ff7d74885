"""Models that nobody here wrote through the targets: the table of docs/foreign-models.md.

    nice -n 10 python benchmarks/foreign_models.py --output foreign.json
    python benchmarks/foreign_models.py --output foreign.json --table
    python benchmarks/foreign_models.py --seeds

A process a model; what is in the output file already is not made again. int8 is calibrated on the built-in photographs,
or on scenes where the task calibrates on those, and searched until SQNR is INT8_SQNR_DB on pictures that calibration
did not see. `--seeds`: the first seed of each classifier whose logits leave no photograph near a tie, its default.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CELLS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("openvino", "fp32"),
    ("coreml", "fp16"),
    ("tensorrt", "fp16"),
)
INT8_SQNR_DB = 15.0  # what a logit is off by is then a sixth of how far logits differ
ENOUGH_DB = 30.0  # metric sqnr counts the dB below this as points
SECONDS = 300  # a cell's limit


def measure(name: str, target: str, precision: str) -> dict[str, Any]:
    """Exports one model and says how near its saved files are to eager on the built-in photographs, or why not."""
    sys.path.insert(0, str(HERE))
    from foreign_zoo import ZOO

    from dualtoken_deploy import export
    from dualtoken_deploy.data.scenes import CLASSES, CLUTTER
    from dualtoken_deploy.errors import DualTokenError
    from dualtoken_deploy.quantize.gate import Int8Options

    row, start = ZOO[name], time.perf_counter()
    int8 = None
    if precision == "int8":
        int8 = Int8Options(
            "scenes" if row.task == "segment" else "photographs", 100, metric="sqnr", max_drop=ENOUGH_DB - INT8_SQNR_DB
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = export(
                f"{HERE / 'foreign_zoo.py'}:{name}", target, precision, task=row.task, image_size=row.size,
                output_names=row.output_names, output=Path(folder) / "bundle", int8=int8,
                labels=[CLUTTER, *CLASSES] if row.task == "segment" else None,
            )  # fmt: skip
        except DualTokenError as error:
            return {"error": f"{type(error).__name__}: {error}"}
    return {
        "sqnr_db": found.sqnr_db,
        "agreement": found.top1_agreement,
        "int8_mac_share": found.int8_mac_share,
        "seconds": round(time.perf_counter() - start, 1),
    }


def seeds() -> dict[str, int]:
    """Of each classifier the first that is clear of ties."""
    sys.path.insert(0, str(HERE))
    import foreign_zoo as zoo

    return {
        name: next(seed for seed in range(100) if zoo.clearness(getattr(zoo, name)(seed)) >= zoo.CLEAR)
        for name, row in zoo.ZOO.items()
        if row.task == "classify"
    }


def _cells(name: str, cells: list[tuple[str, str]]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Measures cells of a model in one process, which another takes over from where it dies or hangs."""
    left = list(cells)
    while left:
        words = [word for cell in left for word in cell]
        command = [sys.executable, __file__, "--cells", name, *words]
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            clock = threading.Timer(SECONDS * len(left), process.kill)
            clock.start()
            assert process.stdout is not None  # noqa: S101
            for line in process.stdout:
                if line.startswith("{"):  # converters print too
                    yield left.pop(0), json.loads(line)
            process.wait()
            clock.cancel()
            log.seek(0)
            said = log.read().strip().splitlines()
        if left and process.returncode:
            reason = (
                f"not done within {SECONDS} s a cell"
                if process.returncode == -9
                else f"ended with {process.returncode}"
            )
            yield left.pop(0), {"error": ": ".join([reason, *said[-1:]])}


def run(output: Path, names: list[str]) -> None:
    """Every cell that is not in the file, written to it one by one."""
    done: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    for name in names:
        left = [(target, precision) for target, precision in CELLS if f"{name} {target} {precision}" not in done]
        for (target, precision), found in _cells(name, left):
            key = f"{name} {target} {precision}"
            done[key] = found
            print(key, found, file=sys.stderr, flush=True)
            output.write_text(json.dumps(done, indent=1) + "\n")


def table(done: dict[str, Any]) -> str:
    """Markdown: a row a model, a cell SQNR in dB with what agrees, and below it why the others are not there."""
    sys.path.insert(0, str(HERE))
    from foreign_zoo import ZOO

    lines = [
        "| model | what it is | task | " + " | ".join(f"{t} {p}" for t, p in CELLS) + " |",
        "| --- | --- | --- | " + " | ".join("--:" for _ in CELLS) + " |",
    ]
    reasons = []
    for name, row in ZOO.items():
        cells = []
        for target, precision in CELLS:
            found = done.get(f"{name} {target} {precision}")
            if found is None:
                cells.append("")
            elif "error" in found:
                reasons.append(f"- {name}, {target} {precision}: {found['error']}")
                cells.append("no")
            else:
                agreed = "" if found["agreement"] is None else f", {100 * found['agreement']:.0f} %"
                share = f", {100 * found['int8_mac_share']:.0f} % of MACs" if precision == "int8" else ""
                cells.append(f"{found['sqnr_db']:.0f} dB{agreed}{share}")
        if any(cells):
            lines.append(f"| {name} | {row.kind} | {row.task} | " + " | ".join(cells) + " |")
    works = sum("error" not in found for found in done.values())
    return "\n".join([*lines, "", f"{works} of {len(done)} cells work.", "", *reasons])


def main() -> None:
    sys.path.insert(0, str(HERE))
    from foreign_zoo import ZOO

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("foreign.json"))
    parser.add_argument("--models", nargs="*", default=list(ZOO))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--cells", nargs="+")
    parser.add_argument("--seeds", action="store_true")
    given = parser.parse_args()
    if given.cells:
        name, *words = given.cells
        for target, precision in zip(words[::2], words[1::2], strict=True):
            print(json.dumps(measure(name, target, precision)), flush=True)
    elif given.seeds:
        print(json.dumps(seeds()))
    elif given.table:
        print(table(json.loads(given.output.read_text())))
    else:
        run(given.output, given.models)


if __name__ == "__main__":
    main()
