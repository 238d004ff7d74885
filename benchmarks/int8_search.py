"""The search from plain symmetric S8/S8, the form that TensorRT takes, on trained weights: what has to stay in float.

    python benchmarks/int8_search.py [digits|shapes] [MAX_DROP] [CALIBRATION_SIZE]

Prints every assignment that was scored, with the share of the MACs in INT8, and writes the trace as JSON and a picture
to benchmarks/results/. Executed by ONNX Runtime on the CPU: the accuracy is that of the Q/DQ graph, the speed is not
looked at.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx
from dualtoken_deploy.targets.backends import open_backend

from dualtoken_deploy.bundle.decode import plain
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.pipeline.export import make_contract
from dualtoken_deploy.quantize.calibration import Array, open_calibration
from dualtoken_deploy.quantize.gate import Int8Options, make_reference, quantize_within_budget
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.load import RunnerOptions
from dualtoken_deploy.targets.onnx.export import DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.use.plots import plot_search
from dualtoken_deploy.use.validate import run_batches

RESULTS = Path(__file__).parent / "results"


def main(name: str = "digits", max_drop: str = "0.5", size: str = "100") -> None:
    info = describe_weights(name)
    assert info is not None  # noqa: S101
    model = create_model(info.variant, len(info.labels), info.image_size, name, **info.options)
    contract = make_contract("image", info.image_size, 1)
    outputs = (TensorSpec("logits", "float32", "NC", (1, len(info.labels))),)
    calibration, held_out = open_calibration(name, contract, int(size), info.labels)
    with EagerRunner(model, contract, outputs, RunnerOptions()) as eager:
        reference = make_reference(held_out, run_batches(eager, contract, held_out.inputs), "top1")
    graph = export_onnx(
        model, Request("fp32", contract, outputs, None, {}), DEFAULT_RULES, DECOMPOSED_OPSET, _say
    ).model

    def run(folder: Path, inputs: Array) -> Array:
        return Prober(onnx.load(folder / "model.onnx"), ["logits"]).run_each(inputs)["logits"]

    options = Int8Options(name, int(size), max_drop=float(max_drop), quantizer="qdq-symmetric")
    with tempfile.TemporaryDirectory() as folder:
        backend = open_backend("onnxruntime", options.quantizer, graph, calibration, options.method, _say)
        found = quantize_within_budget(
            "onnxruntime", graph, backend, calibration, reference, options, run, Path(folder), _say
        )
    RESULTS.mkdir(exist_ok=True)
    machine = {key: describe_machine()[key] for key in ("cpu", "isa", "cores", "python")}
    data = {
        "weights": name,
        "eager_top1": _top1(reference.logits, held_out.labels),
        "machine": machine,
        **plain(replace(found, macs=None)),
    }
    (RESULTS / f"int8-search-{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    assert found.search is not None  # noqa: S101
    plot_search(found, found.search, RESULTS / f"int8-search-{name}.png")
    print(f"in float: {', '.join(found.in_float) or 'nothing'}")
    print(f"{found.drop:.2f} points lost, {100 * found.search.int8_share:.1f} % of the MACs in INT8")


def _top1(logits: Array, labels: Array | None) -> float:
    return float((logits.argmax(1) == labels).mean())


def _say(text: str) -> None:
    if not text.startswith("calibrating"):
        print(text, file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
