"""`make demo`: two models, from PyTorch to bundles that are checked, asked and held against each other.

EfficientNet-Lite0 with ImageNet weights, somebody else's model: exported for ONNX Runtime and OpenVINO by a reference
to the function that makes it, and asked what is on four photographs. Then T (mix) with the trained digits weights in
fp32 and gated INT8: what is lost, how much runs in integers, how large and how fast it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dualtoken_deploy import export, predict, validate
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.errors import DualTokenError, missing_extra
from dualtoken_deploy.models.source import Preprocessing
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.use.compare import compare
from dualtoken_deploy.use.report import comparison_table, export_table, prediction_table, validation_table

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("bundles")
TARGETS = ("onnxruntime", "openvino")
PHOTOGRAPHS = ("coffee.png", "chelsea.png", "motorcycle_left.png", "camera.png")
EXAMPLE = ROOT / "examples" / "python" / "efficientnet_lite0.py"
INT8 = Int8Options("digits", size=100)
Tell = Callable[[str], None]


def main() -> None:
    errors, console = Console(stderr=True), Console()
    if not console.is_terminal:  # a pipe has no width; 80 columns would cut the figures to pieces
        console = Console(width=200)
    words = (
        "Four exports, each checked on its saved files, then predictions and a comparison: some minutes on two cores."
    )
    print(words, file=sys.stderr)
    began = time.monotonic()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("starting", total=None)

        def tell(text: str) -> None:
            progress.update(task, description=text)
            if not errors.is_terminal:
                print(text, file=sys.stderr)

        known = photographs(tell)
        console.print(export_table(known))
        bundles = [Path(made.bundle) for made in known]
        console.print(validation_table(validate(bundles, "photographs", progress=tell)))
        pictures = [path for path in open_dataset("photographs").images if path.name in PHOTOGRAPHS]
        console.print(prediction_table(predict(bundles[0], pictures, top=2)))
        trained = [digits(precision, tell) for precision in ("fp32", "int8")]
        console.print(export_table(trained))
        compared = compare([made.bundle for made in trained], "digits", rounds=3, seconds=0.5, progress=tell)
        console.print(comparison_table(compared))
    console.print(
        f"{time.monotonic() - began:.0f} s; the bundles are in {OUTPUT}/. Next: dualtoken inspect {bundles[0]}"
    )


def photographs(tell: Tell) -> list[ExportResult]:
    """EfficientNet-Lite0 for each of TARGETS, by reference."""
    sys.path.insert(0, str(EXAMPLE.parent))
    try:
        import efficientnet_lite0 as example

        labels = example.labels()
    except ModuleNotFoundError as error:
        raise missing_extra("dev", "the demo's photograph model") from error
    preprocess = Preprocessing(example.MEAN, example.STD)
    return [
        export(
            f"{EXAMPLE}:make", target, labels=labels, preprocess=preprocess, force=True, command="make demo",
            output=OUTPUT / f"efficientnet-lite0-{target}-fp32", progress=tell,
        )
        for target in TARGETS
    ]  # fmt: skip


def digits(precision: str, tell: Tell) -> ExportResult:
    """T (mix) with its trained weights for ONNX Runtime."""
    return export(
        "t-mix", "onnxruntime", precision, weights="digits", int8=INT8 if precision == "int8" else None, force=True,
        output=OUTPUT / f"t-mix-digits-onnxruntime-{precision}", command="make demo", progress=tell,
    )  # fmt: skip


if __name__ == "__main__":
    try:
        main()
    except DualTokenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
