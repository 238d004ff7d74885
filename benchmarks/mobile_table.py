"""Every bundle for phones and boards of one model with trained weights, as one Markdown table.

    .venv/bin/python benchmarks/mobile_table.py [--variant t-mix] [--weights digits] [--only litert ...]
        [--bundles DIR] [--rounds 0] [--output results.md]

Each row is `dualtoken export`, `dualtoken inspect` and `dualtoken evaluate`; int8 is calibrated on the data set of the
weights, at most half a point lost. Bundles that are there are kept, so a run that was ended goes on. `--rounds`: of
one interleaved `dualtoken bench` of all rows against ONNX Runtime, one thread; 0 times nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROWS = (
    ("onnxruntime", "fp32", None),
    ("onnxruntime", "int8", None),
    ("litert", "fp32", None),
    ("litert", "fp16", None),
    ("litert", "int8", "dynamic"),
    ("litert", "int8", "static"),
    ("litert", "int8-weights", None),
    ("litert", "int4-weights", None),
    ("executorch", "fp32", None),
    ("executorch", "int8", "static"),
    ("ncnn", "fp32", None),
    ("ncnn", "fp16", None),
)
HEAD = (
    "| bundle | operators | delegate | to eager (dB) | top-1 (%) | eager (%) | MACs in integers | MiB | seconds "
    "| time to ONNX Runtime's |\n| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def dualtoken(*arguments: str) -> Any:
    """What a command prints as JSON. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "dualtoken_deploy", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make(bundle: Path, variant: str, weights: str, target: str, precision: str, quantizer: str | None) -> Any:
    """What exporting says, kept beside the bundle."""
    kept = bundle.with_suffix(".json")
    if not kept.exists():
        calibrated = "int" in precision
        extra = ("--calibration", weights, "--max-drop", "0.5") if calibrated else ()
        chosen = ("--quantizer", quantizer) if quantizer else ()
        said = dualtoken(
            "export", "--variant", variant, "--weights", weights, "--target", target, "--precision", precision, *extra,
            *chosen, "--output", str(bundle), "--force",
        )  # fmt: skip
        kept.write_text(json.dumps(said), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def delegate(inspection: Any) -> str:
    """How many of the operators the delegate takes, in how many pieces; "-" where there is none."""
    return next((note.removeprefix("XNNPACK takes ") for note in inspection["notes"] if "XNNPACK takes" in note), "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="t-mix")
    parser.add_argument("--weights", default="digits")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--bundles", type=Path, default=Path("bundles/mobile"))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.bundles.mkdir(parents=True, exist_ok=True)
    eager = dualtoken("evaluate", given.weights, "--data", given.weights)["top1"]
    rows: list[tuple[str, Path, list[str]]] = []
    for target, precision, quantizer in ROWS:
        if given.only and target not in given.only and target != "onnxruntime":
            continue
        title = f"{target} {precision}" + (f" {quantizer}" if quantizer else "")
        bundle = given.bundles / f"{given.variant}-{title.replace(' ', '-')}"
        made = make(bundle, given.variant, given.weights, target, precision, quantizer)
        seen = dualtoken("inspect", str(bundle))
        top1 = dualtoken("evaluate", str(bundle), "--data", given.weights)["top1"]
        share = f"{100 * made['int8_mac_share']:.1f} %" if precision == "int8" else "-"
        rows.append((title, bundle, [
            str(sum(seen["operators"].values())), delegate(seen), f"{made['sqnr_db']:.1f}", f"{100 * top1:.2f}",
            f"{100 * eager:.2f}", share, f"{made['size_mib']:.2f}", f"{made['seconds']:.0f}",
        ]))  # fmt: skip
        print(f"{title}: {rows[-1][2]}", file=sys.stderr, flush=True)
    times = latencies([bundle for _, bundle, _ in rows], given.rounds)
    lines = [f"| {title} | {' | '.join(cells)} | {times.get(bundle.name, '-')} |" for title, bundle, cells in rows]
    table = "\n".join([HEAD, *lines])
    print(table)
    if given.output:
        given.output.write_text(table + "\n", encoding="utf-8")


def latencies(bundles: list[Path], rounds: int) -> dict[str, str]:
    """Time over that of the first bundle by name, with its interval; nothing for no rounds."""
    if rounds < 1:
        return {}
    names = [str(bundle) for bundle in bundles]
    said = dualtoken("bench", *names, "--rounds", str(rounds), "--seconds", "0.3", "--threads", "1")
    ratios = {row["name"]: row["ratio"] for row in said["contestants"]}  # of rates: more is faster
    return {n: f"{1 / r['median']:.2f} ({1 / r['high']:.2f}-{1 / r['low']:.2f})" for n, r in ratios.items()}


if __name__ == "__main__":
    main()
