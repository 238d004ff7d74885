"""Every family's rows exported for every target and precision: SQNR to eager as Markdown tables.

    .venv/bin/python benchmarks/export_matrix.py [--results benchmarks/results/export-matrix.json] [--only lightvit]

A process is `dualtoken export --variant V --precision P` for all targets that are left, with random weights of seed 0
at 224x224; int8 at 64x64, calibrated on photographs and judged by SQNR, since the top-1 of random weights says nothing.
ROWS has what is fed to the others: ViM2 at 64x64 where its scans are short, the forecaster and the tokenizer with the
weights that ship. What was measured is kept in the results file, so that an interrupted run goes on where it stopped; a
refusal is kept with its exit code. `--only` takes cells whose names have all of its words.
TensorRT's files are run in ONNX Runtime (exit 3: the engine is left to the device), Core ML's by the reference runner.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dualtoken_deploy import Bundle

VARIANTS = (
    "s",
    *("lightvit-t", "lightvit-s", "lightvit-b"),
    *("dualformer-t", "dualformer-xs", "dualformer-s", "dualformer-b"),
    *("vim2-t", "tsm2", "dualtoken-tokenizer-s"),
)
CELLS = (
    *(("onnxruntime", p) for p in ("fp32", "fp16", "int8")),
    *(("openvino", p) for p in ("fp32", "fp16", "bf16", "int8")),
    *(("tensorrt", p) for p in ("fp32", "fp16", "int8")),
    ("aotinductor", "fp32"),
    *(("coreml", p) for p in ("fp32", "fp16")),
)
ROWS = {  # options of every cell of a row
    "vim2-t": ("--image-size", "64"),
    "tsm2": ("--weights", "lorenz"),
    "dualtoken-tokenizer-s": ("--weights", "shapes-tokens"),
}
INT8 = (
    *("--image-size", "64", "--calibration", "photographs"),
    *("--metric", "sqnr", "--max-drop", "10", "--no-race"),
)
INT8_ROWS = {  # on the held-out part of what the weights were trained on
    "tsm2": ("--calibration", "lorenz", "--max-drop", "1", "--no-race"),
    "dualtoken-tokenizer-s": ("--calibration", "shapes", "--calibration-size", "50", "--max-drop", "1", "--no-race"),
}


def measure(variant: str, targets: Sequence[str], precision: str) -> dict[str, dict[str, Any]]:
    """For each target what its export says of itself and its manifest has, or how it was refused."""
    with tempfile.TemporaryDirectory() as name:
        options = INT8_ROWS.get(variant, INT8) if precision == "int8" else ()
        done = subprocess.run(
            [
                *(sys.executable, "-m", "dualtoken_deploy", "export", "--variant", variant, "--precision", precision),
                *(word for target in targets for word in ("--target", target)),
                *("--output", f"{name}/bundles", "--json", *ROWS.get(variant, ()), *options),
            ],
            capture_output=True,
            text=True,
        )
        if not done.stdout.strip():
            said = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {target: {"exit": done.returncode, "error": said} for target in targets}
        answer = json.loads(done.stdout)
        rows = answer if isinstance(answer, list) else [answer]
        if len(rows) < len(targets):  # one that cannot be planned stops all
            return {t: found for target in targets for t, found in measure(variant, [target], precision).items()}
        return {target: cell(row, precision) for target, row in zip(targets, rows, strict=True)}


def cell(row: Mapping[str, Any], precision: str) -> dict[str, Any]:
    """`exit` 3: made and checked, and to be built on the device."""
    if "error" in row and row.get("state") != "prepared":
        return {"exit": row["error"]["code"], "error": row["error"]["message"]}
    measured = Bundle.open(row["bundle"]).manifest.measured
    shots = measured.photographs
    assert shots is not None  # noqa: S101  # every export measures on them
    found = {"exit": 3 if row["state"] == "prepared" else 0, "seconds": row["seconds"], "sqnr_db": shots.sqnr_db}
    found |= {"top1_agreement": shots.top1_agreement, "images": shots.images}
    return found | ({"int8_mac_share": measured.int8_mac_share} if precision == "int8" else {})


def show(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "not run"
    if "sqnr_db" not in cell:
        return f"refused (exit {cell['exit']})"
    share = f" ({100 * cell['int8_mac_share']:.1f} %)" if "int8_mac_share" in cell else ""
    return f"{cell['sqnr_db']:.1f}{share}"


def table(results: dict[str, dict[str, Any]], targets: tuple[str, ...]) -> str:
    cells = [c for c in CELLS if c[0] in targets]
    lines = ["| variant | " + " | ".join(" ".join(c) for c in cells) + " |", "| --- |" + " ---: |" * len(cells)]
    for variant in VARIANTS:
        row = (show(results.get(f"{variant} {target} {precision}")) for target, precision in cells)
        lines.append(f"| `{variant}` | {' | '.join(row)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/export-matrix.json"))
    parser.add_argument(
        "--only", default="", help="cells whose name has these words, such as lightvit-t or 'openvino int8'"
    )
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text(encoding="utf-8")) if arguments.results.exists() else {}
    words = arguments.only.split()
    for variant, precision in itertools.product(VARIANTS, dict.fromkeys(p for _, p in CELLS)):
        names = {t: f"{variant} {t} {precision}" for t, p in CELLS if p == precision}
        left = [t for t, key in names.items() if key not in results and all(w in key for w in words)]
        if not left:
            continue
        for target, found in measure(variant, left, precision).items():
            results[names[target]] = found
            print(names[target], found, flush=True)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results, ("onnxruntime", "openvino")))
    print()
    print(table(results, ("tensorrt", "aotinductor", "coreml")))


if __name__ == "__main__":
    main()
