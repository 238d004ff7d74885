"""The float32 ONNX graph of a bundle's model: what ONNX Runtime's and OpenVINO's bundles are held against."""

from __future__ import annotations

import onnx

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.inner import Insides, Last, Tell
from dualtoken_deploy.targets.onnx.export import ATTENTION_OPSET, DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.request import Request

MOVES = frozenset({"Reshape", "Transpose", "Split", "Cast", "Squeeze", "Unsqueeze", "Concat", "Slice", "Expand"})


def onnx_insides(bundle: Bundle, inputs: Array, tell: Tell) -> Insides:
    """Every value of the graph but moved data, computed by ONNX Runtime without optimisation."""
    file = bundle.path / "model.onnx"  # attention is one operator or three by its opset
    opset = int(onnx.load(file).opset_import[0].version) if file.is_file() else None
    graph = float_graph(bundle.manifest, tell, opset)
    kinds = {n.output[0]: n.op_type for n in graph.graph.node if n.op_type not in MOVES}
    tell("running the float graph")
    values = Prober(graph, list(kinds)).run_each(inputs)
    return Insides(kinds, values, [(n.input, n.output) for n in graph.graph.node], lambda value: value)


def float_graph(manifest: Manifest, tell: Tell, opset: int | None = None) -> onnx.ModelProto:
    """The float32 ONNX graph of a bundle's model, traced anew from its weights, with the names that the bundle has.

    `opset`: of the bundle's file, where it has one.
    """
    chosen = opset or (ATTENTION_OPSET if manifest.precision == "fp32" else DECOMPOSED_OPSET)

    def trace() -> onnx.ModelProto:
        request = Request(
            "fp32", manifest.input, manifest.outputs, None, {"variant": manifest.variant}, task=manifest.task
        )
        return export_onnx(rebuild(manifest), request, DEFAULT_RULES, chosen, tell).model

    return _GRAPHS.get(manifest, [chosen], trace)


_GRAPHS: Last[onnx.ModelProto] = Last()
