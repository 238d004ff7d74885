"""MACs and matrix products of an ONNX graph, counted from the shapes of its values."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from dualtoken_deploy.errors import InputError, first_line

_PRODUCTS = ("MatMul", "Gemm")


def count_graph(model: Any, picture: str, size: tuple[int, int]) -> tuple[int, Counter[tuple[int, int, int, int]]]:
    """MACs, and (batch, m, k, n) of each matrix product, for one picture (1, 3, H, W) at the input named `picture`.

    Convolutions, matrix products and Attention count, those in branches and loops do not; a convolution with groups is
    no matrix product. Raises InputError where a shape cannot be told.
    """
    known = _shapes(model, picture, size)
    macs, products = 0, Counter[tuple[int, int, int, int]]()
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight, out = known.get(node.input[1]), known.get(node.output[0])
            if weight and out:
                macs += math.prod(out) * math.prod(weight[1:])
                if next((a.i for a in node.attribute if a.name == "group"), 1) == 1:
                    products[(1, out[0] * math.prod(out[2:]), math.prod(weight[1:]), weight[0])] += 1
        elif node.op_type in _PRODUCTS:
            left, right, out = (known.get(name) for name in (node.input[0], node.input[1], node.output[0]))
            if left and right and out and len(left) > 1 and len(right) > 1:
                first = next((a.i for a in node.attribute if a.name == "transA"), 0)
                inner = left[-2] if first else left[-1]
                macs += math.prod(out) * inner
                shared = len(right) == 2  # one matrix for all rows
                batch = 1 if shared else math.prod(out[:-2])
                rows = math.prod(out[:-1]) if shared else out[-2]
                products[(batch, rows, inner, out[-1])] += 1
        elif node.op_type == "Attention":
            query, key, value = (known.get(name) for name in node.input[:3])
            if query and key and value and len(query) == 4:
                batch, rows, inner, tokens, width = math.prod(query[:2]), query[2], query[3], key[2], value[3]
                macs += batch * rows * tokens * (inner + width)
                products[(batch, rows, inner, tokens)] += 1
                products[(batch, rows, tokens, width)] += 1
    return macs, products


def _shapes(model: Any, picture: str, size: tuple[int, int]) -> dict[str, list[int]]:
    """Of every value whose shape follows from the picture's."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.input:
        if value.name == picture:
            value.CopyFrom(onnx.helper.make_tensor_value_info(picture, onnx.TensorProto.FLOAT, [1, 3, *size]))
    del copy.graph.value_info[:]
    for output in copy.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(copy, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        height, width = size
        raise InputError(f"the graph does not take pictures of {height}x{width}: {first_line(error)}") from error
    found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dims):
            found[value.name] = [d.dim_value for d in dims]
    return found
