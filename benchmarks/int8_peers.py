"""INT8 of this project beside what else a user would take, on one graph, with the same pictures, in one run.

    python benchmarks/int8_peers.py [digits|shapes] [--only NAME...] [--calibration-size 100] [--max-drop 0.5]
        [--litert BUNDLE] [--cpu-limit 600] [--ranking-subset 60]

ai-edge-quantizer's rows need the model converted to LiteRT in float32 (`dualtoken export --target litert --precision
fp32`): that bundle is --litert.

Each gets the float ONNX graph of the trained model and the same calibration pictures, and is judged on the same
held-out ones in the runtime that it is for: points of top-1 lost against the float graph, the share of the MACs that
executes in integers as the runtime's profiler says, and CPU seconds from the graph to the file. One that is not done
after --cpu-limit seconds is ended, and its row says how far it came; --ranking-subset is how many pictures NNCF's
accuracy control ranks layers by (all held-out ones unless given). A contestant that has
no runtime here (symmetric S8/S8, for TensorRT) is computed as plain float arithmetic over its Q/DQ pairs; its share is
the planned one.
"""

from __future__ import annotations

import argparse
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
from int8_methods import open_weights

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import Products
from dualtoken_deploy.quantize.calibration import CalibrationSet, HeldOut
from dualtoken_deploy.quantize.gate import Int8Options, quantize_within_budget
from dualtoken_deploy.quantize.judge import make_judge
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.litert.compress import KINDS
from dualtoken_deploy.targets.litert.products import read_products as read_litert_products
from dualtoken_deploy.targets.litert.runner import MODEL, LiteRtRunner
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, Style, onnxruntime_style, read_products
from dualtoken_deploy.targets.onnx.quantize import OnnxBackend
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.onnxruntime.runner import OnnxRuntimeRunner
from dualtoken_deploy.targets.openvino.ir import save_ir
from dualtoken_deploy.targets.openvino.quantize import OpenVinoBackend
from dualtoken_deploy.targets.openvino.runner import OpenVinoRunner
from dualtoken_deploy.targets.runner import RunnerOptions
from dualtoken_deploy.tasks.table import get_task


@dataclass(frozen=True)
class Case:
    """What every contestant gets."""

    graph: onnx.ModelProto
    calibration: CalibrationSet
    held_out: HeldOut
    expected: Array  # (N, classes) of the float graph
    truth: Array
    max_drop: float
    litert: Path | None = None  # the float32 file for LiteRT
    ranking: int | None = None  # pictures that NNCF's accuracy control ranks layers by

    @property
    def name(self) -> str:
        return self.graph.graph.input[0].name

    def top1(self, logits: Array) -> float:
        return float((logits.argmax(1) == self.truth).mean())


@dataclass(frozen=True)
class Made:
    """Where the file is, what runs it, and the share of the MACs that was planned where nothing here runs it."""

    path: Path
    runtime: str
    planned: float | None = None


def specs(case: Case) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs, logits = case.calibration.inputs, case.expected
    feed = TensorSpec(case.name, inputs.dtype.name, "NHWC", (1, *inputs.shape[1:]))
    return (feed,), (TensorSpec("logits", "float32", "NC", (1, logits.shape[1])),)


def open_runner(case: Case, made: Made) -> Any:
    if made.runtime == "litert":
        return LiteRtRunner(made.path, *specs(case), 1)
    kind = OnnxRuntimeRunner if made.runtime == "onnxruntime" else OpenVinoRunner
    return kind(made.path, *specs(case), RunnerOptions(threads=1))


def run(case: Case, made: Made, inputs: Array) -> Array:
    if made.planned is not None:
        return Prober(onnx.load(made.path), ["logits"]).run_each(inputs)["logits"]
    with open_runner(case, made) as runner:
        return np.concatenate([runner.run({case.name: inputs[i : i + 1]})["logits"] for i in range(len(inputs))])


def share(case: Case, made: Made, products: Products) -> float:
    """Of the MACs in integers, by the names that the runtimes keep."""
    if made.planned is not None:
        return made.planned
    with open_runner(case, made) as runner:
        nodes = runner.execution().nodes
    if made.runtime == "litert":
        assert case.litert is not None  # noqa: S101 (else there is no such contestant)
        products = read_litert_products(flat.read(case.litert), KINDS)
    return sum(n for name, n in products.macs.items() if nodes.get(name) in ("int8", "uint8")) / products.total


def ours(kind: type[OnnxBackend], style: Style, runtime: str, executed: bool = True) -> Callable[[Case, Path], Made]:
    def quantize(case: Case, folder: Path) -> Made:
        file = "model.xml" if runtime == "openvino" else "model.onnx"
        backend = kind(case.graph, case.calibration, "minmax", style, lambda _: None)
        judge = make_judge(
            get_task("classify"), case.held_out, [{"logits": row[None]} for row in case.expected], "top1",
            case.calibration.inputs.shape[1:3], case.expected.shape[1],
        )  # fmt: skip

        def outputs(place: Path, inputs: Array) -> Iterator[dict[str, Array]]:
            for row in run(case, Made(place / file, runtime, None if executed else 0.0), inputs):
                yield {"logits": row[None]}

        options = Int8Options(case.calibration.name, len(case.calibration.inputs), max_drop=case.max_drop)
        said = quantize_within_budget(
            f"peers-{style.name}-{runtime}", backend, case.calibration, judge, options, outputs, folder, lambda _: None
        )
        return Made(folder / file, runtime, None if executed else said.planned_int8_mac_share)

    return quantize


class Reader:
    """ORT's protocol of calibration data."""

    def __init__(self, case: Case) -> None:
        inputs = case.calibration.inputs
        self._left = iter([{case.name: inputs[i : i + 1]} for i in range(len(inputs))])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._left, None)


def ort_static(per_channel: bool, unsigned: bool) -> Callable[[Case, Path], Made]:
    def quantize(case: Case, folder: Path) -> Made:
        from onnxruntime.quantization import QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        onnx.save(case.graph, folder / "float.onnx")
        quant_pre_process(str(folder / "float.onnx"), str(folder / "ready.onnx"), skip_symbolic_shape=True)
        activation = QuantType.QUInt8 if unsigned else QuantType.QInt8
        quantize_static(
            folder / "ready.onnx", folder / "model.onnx", Reader(case), per_channel=per_channel,
            activation_type=activation,
        )  # fmt: skip
        return Made(folder / "model.onnx", "onnxruntime")

    return quantize


def nncf_plain(case: Case, folder: Path) -> Made:
    import nncf
    import openvino as ov

    inputs = case.calibration.inputs
    samples = [inputs[i : i + 1] for i in range(len(inputs))]
    model = nncf.quantize(
        ov.Core().read_model(case.graph.SerializeToString()),
        nncf.Dataset(samples, lambda sample: {case.name: sample}),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    save_ir(model, folder)
    return Made(folder / "model.xml", "openvino")


SCORED: list[int] = []  # pictures of each score that NNCF's accuracy control asked for


class OverLimitError(Exception):
    """A contestant is not done after the CPU seconds that it may take."""


def _over(_number: int, _frame: FrameType | None) -> None:
    raise OverLimitError(f"{len(SCORED)} scores of {sum(SCORED)} pictures in all")


def nncf_controlled(case: Case, folder: Path) -> Made:
    """Its budget is an absolute drop of what the validation function gives, on the same held-out pictures."""
    import nncf
    import openvino as ov

    inputs = case.calibration.inputs
    samples = [inputs[i : i + 1] for i in range(len(inputs))]
    pairs = [(case.held_out.inputs[i : i + 1], int(case.truth[i])) for i in range(len(case.truth))]

    def validate(compiled: Any, data: Any) -> tuple[float, None]:
        right = [int(np.asarray(compiled(image)[0]).argmax()) == label for image, label in data]
        SCORED.append(len(right))
        return float(np.mean(right)), None

    model = nncf.quantize_with_accuracy_control(
        ov.Core().read_model(case.graph.SerializeToString()),
        nncf.Dataset(samples, lambda sample: {case.name: sample}),
        nncf.Dataset(pairs),
        validate,
        max_drop=case.max_drop / 100,
        subset_size=len(samples),
        advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
            ranking_subset_size=case.ranking, num_ranking_workers=1
        ),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    save_ir(model, folder)
    return Made(folder / "model.xml", "openvino")


def ai_edge(kind: str) -> Callable[[Case, Path], Made]:
    """A recipe of ai-edge-quantizer's own, by its name; a static one is calibrated by its own calibrator."""

    def quantize(case: Case, folder: Path) -> Made:
        from ai_edge_quantizer import quantizer, recipe

        tool = quantizer.Quantizer(str(case.litert), getattr(recipe, kind)())
        statistics = None
        if tool.need_calibration:
            inputs = case.calibration.inputs
            feeds = [{case.name: inputs[i : i + 1]} for i in range(len(inputs))]
            (signature,) = flat.read(case.litert).signatureDefs
            statistics = tool.calibrate({signature.signatureKey.decode(): feeds}, num_threads=1)
        tool.quantize(statistics, enable_progress_bar=False).export_model(str(folder / MODEL))
        return Made(folder / MODEL, "litert")

    return quantize


def contestants(litert: bool) -> dict[str, Callable[[Case, Path], Made]]:
    style = onnxruntime_style()
    dense = Style(style.name, style.unsigned, style.reduce_range, conv_outputs=False)
    edge = {
        "ai-edge-quantizer static_wi8_ai8": ai_edge("static_wi8_ai8"),
        "ai-edge-quantizer dynamic_wi8_afp32": ai_edge("dynamic_wi8_afp32"),
    }
    return {
        "ours, ONNX Runtime": ours(OnnxBackend, style, "onnxruntime"),
        "ours, OpenVINO": ours(OpenVinoBackend, dense, "openvino"),
        "ours, symmetric S8/S8": ours(OnnxBackend, NEUTRAL, "onnxruntime", executed=False),
        "ORT quantize_static, defaults": ort_static(per_channel=False, unsigned=False),
        "ORT quantize_static, U8/S8 per channel": ort_static(per_channel=True, unsigned=True),
        "NNCF quantize, for transformers": nncf_plain,
        "NNCF quantize_with_accuracy_control": nncf_controlled,
        **(edge if litert else {}),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?", default="digits")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--calibration-size", type=int, default=100)
    parser.add_argument("--max-drop", type=float, default=0.5)
    parser.add_argument("--cpu-limit", type=float, default=0.0, help="end a contestant after so many CPU seconds")
    parser.add_argument("--ranking-subset", type=int, help="of NNCF's accuracy control")
    parser.add_argument("--litert", type=Path, help="a bundle of the same weights: LiteRT, fp32")
    given = parser.parse_args(arguments)
    logging.getLogger().setLevel(logging.ERROR)
    graph, calibration, held_out = open_weights(given.weights, given.calibration_size)
    truth = np.array([sample.label for sample, _ in held_out.truth])
    expected = Prober(graph, ["logits"]).run_each(held_out.inputs)["logits"]
    file = None if given.litert is None else given.litert / MODEL
    case, products = Case(graph, calibration, held_out, expected, truth, given.max_drop, file,
                          given.ranking_subset), read_products(graph)  # fmt: skip
    signal.signal(signal.SIGPROF, _over)
    print(f"float: {100 * case.top1(expected):.2f} % of {len(truth)} pictures; calibration: {len(calibration.inputs)}")
    print(
        "| contestant | top-1 lost (points) | SQNR (dB) | MACs in INT8 | CPU s |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, quantize in contestants(file is not None).items():
        if given.only and not any(part in name for part in given.only):
            continue
        with tempfile.TemporaryDirectory() as place:
            began = time.process_time()
            SCORED.clear()
            signal.setitimer(signal.ITIMER_PROF, given.cpu_limit)
            try:
                made = quantize(case, Path(place))
            except OverLimitError as error:
                print(f"| {name} | not done: {error} | | | over {given.cpu_limit:.0f} |", flush=True)
                continue
            except Exception as error:  # noqa: BLE001  # a contestant that fails has a row that says so
                print(
                    f"| {name} | failed: {type(error).__name__}: {str(error).splitlines()[0][:90]} | | | |", flush=True
                )
                continue
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - began
            logits = run(case, made, held_out.inputs)
            lost = 100 * (case.top1(expected) - case.top1(logits))
            noise = float(((logits - expected) ** 2).sum() / (expected**2).sum())
            done = 100 * share(case, made, products)
            print(f"| {name} | {lost:.2f} | {-10 * np.log10(noise):.1f} | {done:.1f} % | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
