"""AP and mean IoU of every bundle of the shipped dense weights, on all held-out scenes, as one Markdown table.

    .venv/bin/python benchmarks/dense_table.py [--output results.md] [--bundles DIR]

Each row is two commands: `dualtoken export --weights W --head H --target T --precision P` (int8: calibrated on 100
scenes, at most one point lost) and `dualtoken validate BUNDLE --data scenes`. Bundles that are there are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HEADS = {"retinanet": "scenes-detect", "pspnet": "scenes-segment"}
ROWS = (
    ("onnxruntime", "fp32", ()),
    ("onnxruntime", "fp16", ()),
    ("onnxruntime", "int8", ()),
    ("openvino", "fp32", ()),
    ("openvino", "int8", ()),
    ("coreml", "fp32", ("--limit", "40")),  # the reference runner takes a second a picture
)
INT8 = ("--calibration", "scenes", "--calibration-size", "100", "--max-drop", "1")


def dualtoken(*arguments: str) -> Any:
    """What a command prints as JSON. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "dualtoken_deploy", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def percent(scores: dict[str, float]) -> str:
    return " / ".join(f"{100 * scores[k]:.2f}" for k in ("ap", "ap50", "ap75", "miou") if k in scores)


def row(head: str, target: str, precision: str, limit: tuple[str, ...], folder: Path) -> str:
    bundle = folder / f"{head}-{target}-{precision}"
    if not (bundle / "manifest.json").exists():
        extra = INT8 if precision == "int8" else ()
        made = ("--head", head, "--weights", HEADS[head], "--target", target, "--precision", precision)
        dualtoken("export", *made, *extra, "--output", str(bundle))
    (found,) = dualtoken("validate", str(bundle), "--data", "scenes", *limit)["results"]
    share = dualtoken("inspect", str(bundle))["int8_mac_share"] if precision == "int8" else None
    size = sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file() and p.name.startswith("model")) / 2**20
    if target == "coreml":
        size = sum(p.stat().st_size for p in (bundle / "model.mlpackage").rglob("*") if p.is_file()) / 2**20
    first = "miou" if "miou" in found["scores"] else "ap"
    lost = 100 * (found["eager_scores"][first] - found["scores"][first])
    cells = (
        f"`{head}`",
        f"{target} {precision}" + (f", {found['images']} scenes" if limit else ""),
        f"{found['sqnr_db']:.1f}",
        percent(found["scores"]),
        percent(found["eager_scores"]),
        f"{lost:.2f}",
        "-" if share is None else f"{100 * share:.1f} %",
        f"{size:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundles", type=Path, default=Path("bundles/dense-table"))
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    arguments.bundles.mkdir(parents=True, exist_ok=True)
    titles = ("head", "bundle", "SQNR over the scenes (dB)", "AP / AP50 / AP75, or mIoU (%)", "eager (%)",
              "lost (points)", "MACs in INT8", "MiB")  # fmt: skip
    lines = [f"| {' | '.join(titles)} |", "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for head in HEADS:
        for target, precision, limit in ROWS:
            lines.append(row(head, target, precision, limit, arguments.bundles))
            print(lines[-1], flush=True)
    if arguments.output is not None:
        arguments.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
