"""`make demo`: from PyTorch to verified bundles for ONNX Runtime and OpenVINO, in two parts.

S with random weights, checked against eager on photographs, asked and timed: what the size that matters costs. Then
T (mix) with the trained digits weights in fp32, fp16 and int8: what each precision loses on the held-out digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dualtoken_deploy import bench, export, predict, validate
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.use.compare import compare
from dualtoken_deploy.use.report import comparison_table, prediction_table, share, table

OUTPUT = Path("bundles")
TARGETS = ("onnxruntime", "openvino")
INT8 = Int8Options("digits", size=100)


def main() -> None:
    errors, console = Console(stderr=True), Console()
    if not console.is_terminal:  # a pipe has no width; 80 columns would cut the figures to pieces
        console = Console(width=200)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def tell(text: str) -> None:
            progress.update(task, description=text)
            if not errors.is_terminal:
                print(text, file=sys.stderr)

        exported = [
            export("s", target, output=OUTPUT / f"s-{target}-fp32", force=True, command="make demo", progress=tell)
            for target in TARGETS
        ]
        bundles = [Path(e.bundle) for e in exported]
        checked = validate(bundles, "photographs", progress=tell)
        guesses = predict(bundles[-1], open_dataset("photographs").images[:2], top=2)
        report = bench(bundles, against="eager", progress=tell)
        trained = []
        for target in TARGETS:
            for precision in ("fp32", "fp16", "int8"):
                folder = OUTPUT / f"t-mix-{target}-{precision}"
                int8 = INT8 if precision == "int8" else None
                made = export("t-mix", target, precision, weights="digits", output=folder, force=True, int8=int8,
                              command="make demo", progress=tell)  # fmt: skip
                trained.append(made.bundle)
        compared = compare(trained, "digits", rounds=3, seconds=0.5, progress=tell)

    console.print(prediction_table(guesses))
    timed = {Path(c.name).name: c for c in report.contestants}
    rows = []
    for result in checked:
        row = timed[Path(result.bundle).name]
        ratio = f"{row.ratio.median:.2f}x ({row.ratio.low:.2f}-{row.ratio.high:.2f})"
        rows.append(
            (result.bundle, f"{result.sqnr_db:.1f}", share(result.top1_agreement), f"{row.p50_ms:.1f}", ratio,
             f"{row.size_mib or 0:.1f}")
        )  # fmt: skip
    eager = timed["eager"]
    rows.append(("eager PyTorch", "-", "-", f"{eager.p50_ms:.1f}", "1.00x", "-"))
    names = ("bundle", "SQNR (dB)", "equal top-1", "p50 (ms)", "against eager", "MiB")
    console.print(table(names, rows, f"S, 224x224, batch 1, {report.threads} threads, 16 photographs"))
    console.print(comparison_table(compared))
    console.print(report.machine_line())
    for line in (*dict.fromkeys(w for e in exported for w in e.warnings), *report.notes):
        console.print(f"note: {line}")
    console.print(f"the bundles are in {OUTPUT.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except DualTokenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
