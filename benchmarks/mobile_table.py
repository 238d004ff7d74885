"""Every bundle for phones and boards of one model, as one Markdown table.

    .venv/bin/python benchmarks/mobile_table.py [--variant t-mix] [--weights digits|random] [--only litert ...]
        [--bundles DIR] [--rounds 0] [--output results.md]

Each row is `dualtoken export`, `dualtoken inspect` and, with trained weights, `dualtoken evaluate`; int8 is calibrated
on the data set of the weights, at most half a point lost, and of random weights on the built-in photographs, whatever
is lost. Bundles and rows (BUNDLE.row.json) that are there are kept, so a run that was ended goes on, and the timing
can be a run of its own. `--rounds`: of one interleaved `dualtoken bench` of all rows against ONNX Runtime fp32, one
thread; 0 times nothing.
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
    ("executorch", "int8", "dynamic"),
    ("ncnn", "fp32", None),
    ("ncnn", "fp16", None),
)
HEAD = (
    "| bundle | operators | delegate | to eager (dB) | top-1 (%) | MACs in integers | MiB | time to ONNX Runtime's |\n"
    "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
)
RANDOM = "random"


def dualtoken(*arguments: str) -> Any:
    """What a command prints as JSON. Raises CalledProcessError where it fails."""
    command = [sys.executable, "-m", "dualtoken_deploy", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def make(bundle: Path, variant: str, weights: str, target: str, precision: str, quantizer: str | None) -> None:
    """Exports what is not there."""
    if bundle.exists():
        return
    given = () if weights == RANDOM else ("--weights", weights)
    data = ("photographs", "--metric", "agreement", "--max-drop", "100") if weights == RANDOM else (weights,)
    extra = ("--calibration", *data, "--no-race") if "int" in precision else ()
    chosen = ("--quantizer", quantizer) if quantizer else ()
    dualtoken("export", "--variant", variant, *given, "--target", target, "--precision", precision, *extra, *chosen,
              "--output", str(bundle))  # fmt: skip


def cells(bundle: Path, weights: str) -> list[str]:
    """One row of the table, read from a bundle; kept beside it."""
    kept = bundle.with_suffix(".row.json")
    if kept.exists():
        found: list[str] = json.loads(kept.read_text(encoding="utf-8"))
        return found
    seen = dualtoken("inspect", str(bundle))
    manifest = seen["manifest"]
    measured = manifest["measured"].get("photographs") or manifest["measured"]["golden"]
    top1 = "-" if weights == RANDOM else f"{100 * dualtoken('evaluate', str(bundle), '--data', weights)['top1']:.2f}"
    share = f"{100 * seen['int8_mac_share']:.1f} %" if manifest["precision"] == "int8" else "-"
    size = sum((bundle / name).stat().st_size for name in manifest["files"] if name.startswith("model"))
    count = sum(n for kind, n in seen["operators"].items())
    found = [str(count), delegate(seen), f"{measured['sqnr_db']:.1f}", top1, share, f"{size / 2**20:.2f}"]
    kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def delegate(inspection: Any) -> str:
    """How many of the operators the delegate takes, in how many pieces; "-" where there is none."""
    return next((note.removeprefix("XNNPACK takes ") for note in inspection["notes"] if "XNNPACK takes" in note), "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="t-mix")
    parser.add_argument("--weights", default="digits")
    parser.add_argument("--only", nargs="*", default=[], help='targets, or rows like "litert int8 dynamic"')
    parser.add_argument("--bundles", type=Path, default=Path("bundles/mobile"))
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    given.bundles.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Path, list[str]]] = []
    for target, precision, quantizer in ROWS:
        title = f"{target} {precision}" + (f" {quantizer}" if quantizer else "")
        if given.only and target not in given.only and title not in given.only:
            continue
        bundle = given.bundles / f"{given.variant}-{title.replace(' ', '-')}"
        make(bundle, given.variant, given.weights, target, precision, quantizer)
        rows.append((title, bundle, cells(bundle, given.weights)))
        print(f"{title}: {rows[-1][2]}", file=sys.stderr, flush=True)
    times = latencies([bundle for _, bundle, _ in rows], given.rounds, given.seconds)
    lines = [f"| {title} | {' | '.join(found)} | {times.get(bundle.name, '-')} |" for title, bundle, found in rows]
    table = "\n".join([HEAD, *lines])
    print(table)
    if given.output:
        given.output.write_text(table + "\n", encoding="utf-8")


def latencies(bundles: list[Path], rounds: int, seconds: float) -> dict[str, str]:
    """Time over that of the first bundle by name, with its interval; nothing for no rounds."""
    if rounds < 1:
        return {}
    names = [str(bundle) for bundle in bundles]
    said = dualtoken("bench", *names, "--rounds", str(rounds), "--seconds", str(seconds), "--threads", "1")
    print(json.dumps(said["machine"]), file=sys.stderr)
    ratios = {row["name"]: (row["ratio"], row["p50_ms"]) for row in said["contestants"]}  # of rates: more is faster
    return {
        Path(name).name: f"{1 / r['median']:.2f} ({1 / r['high']:.2f}-{1 / r['low']:.2f}), {ms:.1f} ms"
        for name, (r, ms) in ratios.items()
    }


if __name__ == "__main__":
    main()
