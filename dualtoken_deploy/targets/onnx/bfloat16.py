"""bfloat16 in ONNX: a graph that is typed so, and the same graph for a runtime that has no kernels for it."""

from __future__ import annotations

from collections.abc import Iterable

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dualtoken_deploy.targets.onnx.export import to_float16

# Nodes that move values and compute none: nothing is rounded behind them.
MOVES = frozenset({"Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Concat", "Slice", "Expand", "Pad"})


def to_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """bfloat16 tensors and weights where `to_float16` has float16; `model` is kept.

    Weights are rounded once, from the float32 of `model`.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    typed = to_float16(copy)
    exact = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    for tensor in typed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT16:
            values = numpy_helper.to_array(exact.get(tensor.name, tensor))
            rounded = numpy_helper.from_array(values.astype(ml_dtypes.bfloat16), tensor.name)
            tensor.CopyFrom(rounded)
    for node in typed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT16:
                attribute.i = TensorProto.BFLOAT16
    for value in (*typed.graph.value_info, *typed.graph.input, *typed.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16:
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
    return typed


def rounded_to_bfloat16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that gives what `model`, typed bfloat16, gives on a device that sums in float32.

        y = f(x)  in bfloat16   ->   y = float32(bfloat16(f(x)))  with x, y in float32

    ONNX Runtime has no bfloat16 kernels on the CPU, so this is how such a graph is held against eager there.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    narrow = {
        v.name
        for v in (*graph.value_info, *graph.input, *graph.output)
        if v.type.tensor_type.elem_type == TensorProto.BFLOAT16
    }
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for tensor in out.graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = [made for node in out.graph.node for made in _rounding(node, narrow)]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    del out.graph.value_info[:]
    return out


def _rounding(node: onnx.NodeProto, narrow: Iterable[str]) -> list[onnx.NodeProto]:
    """The node in float32, with a rounding behind each of its bfloat16 outputs."""
    if node.op_type in MOVES:
        return [node]
    made = [node]
    for index, name in enumerate(node.output):
        if name in narrow:
            wide, low = f"{name}:wide", f"{name}:bfloat16"
            node.output[index] = wide
            made.append(helper.make_node("Cast", [wide], [low], name=f"{low}/round", to=TensorProto.BFLOAT16))
            made.append(helper.make_node("Cast", [low], [name], name=f"{low}/widen", to=TensorProto.FLOAT))
            if node.op_type == "Cast":  # to bfloat16: the rounding is what it did
                made[0] = helper.make_node("Cast", [node.input[0]], [wide], name=node.name, to=TensorProto.FLOAT)
    return made
