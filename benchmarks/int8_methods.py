"""What each method gains, and how well layers are ranked without being run one at a time, on trained weights.

    python benchmarks/int8_methods.py [digits|shapes|VARIANT|FILE.py:CALLABLE] [methods|ranks]...

methods: the SQNR of the outputs over held-out pictures with all layers in INT8, scheme by scheme, with one method after
the other, executed as plain float arithmetic over the Q/DQ graph. ranks: Spearman's rank correlation between the
sensitivities of one pass and the noise at the outputs with each layer alone in INT8. A variant's name takes random
weights and 64x64; a module of somebody is calibrated on the photographs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch
from scipy.stats import spearmanr

from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.source import Source
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.numerics import Array, compare
from dualtoken_deploy.quantize.backend import layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet, HeldOut, open_calibration
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.onnx.differentiable import Attributes, TorchGraph, compute
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, Methods, QdqQuantizer, Style, round_value, round_weight
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.tasks.table import get_task

STYLES = {
    "ONNX Runtime U8/S8": Style("U8/S8", True, False, True),
    "ONNX Runtime, 7 bits": Style("U8/S8, 7 bits", True, True, True),
    "OpenVINO U8/S8": Style("U8/S8", True, False, False),
    "symmetric S8/S8": NEUTRAL,
}
PLAIN = Methods(saturation=False, migration=False, bias=False)
RUNS = (
    ("plain", PLAIN, "minmax"),
    ("+ ranges end where an activation saturates", replace(PLAIN, saturation=True), "minmax"),
    ("+ channel scales moved", replace(PLAIN, saturation=True, migration=True), "minmax"),
    ("+ bias correction", Methods(), "minmax"),
    ("+ second-order rounding", Methods(rounding=True), "minmax"),
    ("all but moved scales", Methods(migration=False), "minmax"),
    ("all but rounding, percentile ranges", Methods(), "percentile"),
)
HELD_OUT, SCORED = 60, 24  # pictures spread over those held out, and how many of them are scored
MEASURED = 2  # pictures for each layer alone
Watch = Callable[[onnx.NodeProto, Attributes, list[Any], Any], Any]


def main(name: str = "digits", *parts: str) -> None:
    graph, calibration, pictures = prepare(name)
    if "ranks" in parts or not parts:
        style = STYLES["ONNX Runtime U8/S8"]
        rank, layers = correlation(QdqQuantizer(graph, calibration, style), calibration.inputs)
        print(f"{name} | {layers} layers | rank correlation {rank:.3f}", flush=True)
    if "methods" not in parts and parts:
        return
    output, pictures = graph.graph.output[0].name, pictures[:SCORED]
    exact = Prober(graph, [output]).run_each(pictures)[output]
    for title, style in STYLES.items():
        for method, methods, ranges in RUNS:
            quantizer = QdqQuantizer(graph, calibration, style, ranges, methods=methods)
            found = Prober(quantizer.quantize(), [output]).run_each(pictures)[output]
            alike = float((found.argmax(1) == exact.argmax(1)).mean())
            print(
                f"{title} | {method} | {compare(exact, found).sqnr_db:.1f} dB | {100 * alike:.1f} % as in float",
                flush=True,
            )


def prepare(name: str) -> tuple[onnx.ModelProto, CalibrationSet, Array]:
    if ":" in name:
        return of_module(name)
    graph, calibration, held_out = open_weights(name)
    at = np.linspace(0, len(held_out.inputs) - 1, min(HELD_OUT, len(held_out.inputs))).astype(int)
    return graph, calibration, held_out.inputs[at]


def open_weights(name: str, pictures: int = 100) -> tuple[onnx.ModelProto, CalibrationSet, HeldOut]:
    """The float graph of weights that come with this project, or of a variant with random ones."""
    info = describe_weights(name)
    size = info.image_size if info else (64, 64)
    if info:
        model = create_model(info.variant, len(info.labels), size, name, **info.options)
    else:
        model = create_model(name, 10, size)
    contract = InputContract(TensorSpec("image", "uint8", "NHWC", (1, *size, 3)), "image", size)
    outputs = (TensorSpec("logits", "float32", "NC", (1, 10 if info is None else len(info.labels))),)
    labels = info.labels if info else tuple("0123456789")
    source = name if info else "digits"
    calibration, held_out = open_calibration(get_task("classify"), source, contract, pictures, labels)
    request = Request("fp32", contract, outputs, None, {})
    graph = export_onnx(model, request, DEFAULT_RULES, DECOMPOSED_OPSET, lambda _: None).model
    return graph, calibration, held_out


def of_module(reference: str) -> tuple[onnx.ModelProto, CalibrationSet, Array]:
    source = Source.reference(reference)
    contract = source.contract("image", 1)
    calibration, held_out = open_calibration(get_task("classify"), "photographs", contract, 100, source.labels)
    request = Request("fp32", contract, source.outputs(contract.size, 1), None, {})
    graph = export_onnx(source.make(), request, DEFAULT_RULES, DECOMPOSED_OPSET, lambda _: None).model
    return graph, calibration, held_out.inputs


def correlation(quantizer: QdqQuantizer, inputs: Array) -> tuple[float, int]:
    found = quantizer.sensitivity().alone()
    graph = TorchGraph(quantizer.migrated)
    chosen = inputs[np.linspace(0, len(inputs) - 1, MEASURED).astype(int)]
    exact = logits(graph, chosen, lambda _node, _attributes, _given, made: made)
    measured = []
    for name in found:
        rounded = logits(graph, chosen, rounding(quantizer, name))
        measured.append(float(((rounded - exact) ** 2).sum() / (exact**2).sum()))
    return float(spearmanr(list(found.values()), measured).statistic), len(measured)


def logits(graph: TorchGraph, inputs: Array, watch: Watch) -> Array:
    with torch.no_grad():
        return np.concatenate(
            [graph.run(inputs[i : i + 1], watch)[graph.outputs[0]].numpy() for i in range(len(inputs))]
        )


def rounding(quantizer: QdqQuantizer, layer: str) -> Watch:
    """Rounds one layer's products alone, as INT8 does."""
    style, ranges = quantizer.style, quantizer.ranges
    weights = {t.name for t in quantizer.migrated.graph.initializer}

    def watch(node: onnx.NodeProto, attributes: Attributes, given: list[Any], made: Any) -> Any:
        if node.name not in quantizer.products.eligible or layer_of(node.name) != layer:
            return made
        read = [
            round_weight(v, node.op_type, style) if n in weights else round_value(v, ranges[n], style)
            for n, v in zip(node.input[:2], given, strict=False)
        ]
        out = compute(node, attributes, [*read, *given[2:]])
        behind = node.op_type == "Conv" and style.conv_outputs
        return round_value(out, ranges[node.output[0]], style) if behind else out

    return watch


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
