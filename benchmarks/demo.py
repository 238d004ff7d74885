"""`make demo`: two models, from PyTorch to bundles that are checked, asked and held against each other.

EfficientNet-Lite0 with ImageNet weights, somebody else's model: exported for ONNX Runtime and OpenVINO by a reference
to the function that makes it, and asked what is on four photographs. Then T (mix) with the trained digits weights in
fp32 and gated INT8: what is lost, how much runs in integers, how large and how fast it is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from dualtoken_deploy import Classifier, export, validate
from dualtoken_deploy.cli.progress import progress
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.errors import DualTokenError, missing_extra
from dualtoken_deploy.models.source import Preprocessing
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.use.compare import compare
from dualtoken_deploy.use.report import comparison_table, export_table, fitted, prediction_table, validation_table

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("bundles")
PHOTOGRAPHS = ("coffee.png", "chelsea.png", "motorcycle_left.png", "camera.png")
EXAMPLE = ROOT / "examples" / "python" / "efficientnet_lite0.py"
LITE0 = [OUTPUT / f"efficientnet-lite0-{target}-fp32" for target in ("onnxruntime", "openvino")]
INT8 = Int8Options("digits", size=100)
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Step:
    """`share`: a rough guess at its part of the whole time; what is left is scaled by what the steps before took."""

    what: str
    share: float
    run: Callable[[Tell], Any]


def main() -> None:
    steps = (
        Step(
            "EfficientNet-Lite0 with ImageNet weights for ONNX Runtime, checked on 16 photographs", 12, photographs(0)
        ),
        Step("the same for OpenVINO", 10, photographs(1)),
        Step("both saved files against eager", 8, validated),
        Step("four photographs, named", 3, lambda _: named()),
        Step("T (mix), trained on digits, for ONNX Runtime in fp32", 12, digits("fp32")),
        Step("the same in INT8, gated: at most half a point lost on held-out digits", 60, digits("int8")),
        Step("fp32 and INT8 side by side: accuracy, size, speed", 20, compared),
    )
    print(f"Seven steps, {MINUTES}:", file=sys.stderr)
    for number, step in enumerate(steps, 1):
        print(f"  {number}. {step.what}", file=sys.stderr)
    console, clock = Console(), Clock([step.share for step in steps])
    if not console.is_terminal:  # a pipe has no width; 80 columns would cut the figures to pieces
        console = Console(width=200)
    for number, step in enumerate(steps, 1):
        with progress() as tell:
            lead = f"step {number}/{len(steps)}{clock.left()}: "
            shown = step.run(lambda text, lead=lead, tell=tell: tell(f"{lead}{text}"))  # type: ignore[misc]
        clock.done += 1
        console.print(fitted(shown, console))
    seconds = time.monotonic() - clock.began
    console.print(f"{seconds:.0f} s; the bundles are in {OUTPUT}/. Next: .venv/bin/dualtoken serve {LITE0[0]}")


MINUTES = "some minutes on two cores, most of them in the sixth"


@dataclass
class Clock:
    """What is left of all steps, by what those that are done took for their shares."""

    shares: list[float]
    began: float = field(default_factory=time.monotonic)
    done: int = 0

    def left(self) -> str:
        before, after = sum(self.shares[: self.done]), sum(self.shares[self.done :])
        if not before:
            return ""
        return f", about {(time.monotonic() - self.began) / before * after:.0f} s left of all"


def validated(tell: Tell) -> Any:
    return validation_table(validate(LITE0, "photographs", progress=tell))


def named() -> Any:
    pictures = [path for path in open_dataset("photographs").images if path.name in PHOTOGRAPHS]
    with Classifier(LITE0[0], top=2) as classify:
        return prediction_table([(path.name, None, classify(path)) for path in pictures], classify)


def compared(tell: Tell) -> Any:
    made = [OUTPUT / f"t-mix-digits-onnxruntime-{precision}" for precision in ("fp32", "int8")]
    return comparison_table(compare(made, "digits", rounds=3, seconds=0.5, progress=tell))


def photographs(index: int) -> Callable[[Tell], Any]:
    """EfficientNet-Lite0 by reference, for the target of LITE0[index]."""

    def run(tell: Tell) -> Any:
        sys.path.insert(0, str(EXAMPLE.parent))
        try:
            import efficientnet_lite0 as example

            labels = example.labels()
        except ModuleNotFoundError as error:
            raise missing_extra("dev", "the demo's photograph model") from error
        preprocess, target = Preprocessing(example.MEAN, example.STD), ("onnxruntime", "openvino")[index]
        result = export(
            f"{EXAMPLE}:make", target, labels=labels, preprocess=preprocess, force=True, command="make demo",
            output=LITE0[index], progress=tell,
        )  # fmt: skip
        return exported(result)

    return run


def digits(precision: str) -> Callable[[Tell], Any]:
    """T (mix) with its trained weights for ONNX Runtime."""

    def run(tell: Tell) -> Any:
        result = export(
            "t-mix", "onnxruntime", precision, weights="digits", int8=INT8 if precision == "int8" else None, force=True,
            output=OUTPUT / f"t-mix-digits-onnxruntime-{precision}", command="make demo", progress=tell,
        )  # fmt: skip
        return exported(result)

    return run


def exported(result: ExportResult) -> Any:
    return export_table([result])


if __name__ == "__main__":
    try:
        main()
    except DualTokenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
