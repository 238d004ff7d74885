"""Layers whose float kernels are faster on x86 than their integer ones, pairs included.

By table, so that an export gives the same file again; docs/int8.md has what was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from dualtoken_deploy.targets.onnx.graph import Graph

# What is done to integers without leaving them
BETWEEN = frozenset({"Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Add", "Concat", "LeakyRelu"})
NO_KERNEL = frozenset({"RoiAlign"})  # of ONNX Runtime 1.31, at the opset that has Attention


def slow_in_integers(model: onnx.ModelProto, attention: bool = True) -> frozenset[str]:
    """Products of a float graph whose integer kernels take longer than their float ones, pairs included:

    - an attention's two products (`attention`: if its operator may be had): ONNX Runtime's operator and OpenVINO's
      kernel for all of it compute in float;
    - a convolution that nothing gives integers to and nobody takes them from, if it is depth-wise or sums up few
      products: writing and reading the pairs takes longer than the sums do.
    """
    slow = {product.output[0] for one in attentions(model) for product in one.products} if attention else set()
    graph = Graph(model)
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in graph.weights and _stands_alone(node, graph):
            dims = graph.weights[node.input[1]].dims
            if dims[1] == 1 or math.prod(dims[1:]) < FEW_SUMS:
                slow.add(node.output[0])
    return frozenset(slow)


FEW_SUMS = 32  # products that one output of a convolution adds up: the first one of a network has 27


def _stands_alone(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether no other convolution is behind or in front of one, or nothing but what keeps integers lies between."""
    before, after = [node.input[0]], [node.output[0]]
    while before:
        source = graph.maker(before.pop())
        if source is not None and source.op_type == "Conv":
            return False
        if source is not None and source.op_type in BETWEEN:
            before.extend(name for name in source.input if name not in graph.weights)
    while after:
        for reader in graph.readers[after.pop()]:
            if reader.op_type == "Conv":
                return False
            if reader.op_type in BETWEEN:
                after.extend(reader.output)
    return True


@dataclass(frozen=True)
class Attention:
    """In its parts: `products` make the scores and the result, `inputs` are (B, N, heads * d)."""

    products: tuple[onnx.NodeProto, onnx.NodeProto]
    inputs: tuple[str, str, str]
    heads: int
    joined: onnx.NodeProto  # the Reshape that ends it


def attentions(model: onnx.ModelProto) -> list[Attention]:
    """Those that the operator computes: without a mask, the scale in the queries. None where the graph has an operator
    that ONNX Runtime lacks at the opset of Attention."""
    if NO_KERNEL & {n.op_type for n in model.graph.node}:
        return []
    graph = Graph(model)
    return [found for node in model.graph.node if node.op_type == "Softmax" and (found := _attention(node, graph))]


def _attention(softmax: onnx.NodeProto, graph: Graph) -> Attention | None:
    scores, result = graph.source(softmax.input[0], "MatMul"), graph.only_reader(softmax, "MatMul")
    joined = graph.only_reader(graph.only_reader(result, "Transpose"), "Reshape")
    if scores is None or result is None or joined is None or graph.attribute(softmax, "axis", -1) not in (-1, 3):
        return None
    queries = graph.source(graph.source(scores.input[0], "Transpose"), "Reshape")
    values = graph.source(graph.source(result.input[1], "Transpose"), "Reshape")
    keys = _keys(scores.input[1], graph)
    if queries is None or keys is None or values is None:
        return None
    shapes = [graph.heads_of(split) for split in (queries, keys, values)]
    inputs = (queries.input[0], keys.input[0], values.input[0])
    for name, shape in zip(inputs, shapes, strict=True):
        if shape is None or graph.shapes.get(name, [])[2:] != [shape[2] * shape[3]] or shape[2] != (shapes[0] or [])[2]:
            return None
    return Attention((scores, result), inputs, (shapes[0] or [])[2], joined)


def _keys(name: str, graph: Graph) -> onnx.NodeProto | None:
    """The Reshape that split the keys' heads. torch transposes them with their heads joined to the batch."""
    plain = graph.made_by(name, "Transpose")
    if plain is not None and graph.attribute(plain, "perm", None) == [0, 2, 3, 1]:
        return graph.source(plain.input[0], "Reshape")
    inner = graph.made_by(name, "Reshape")
    turned = None if inner is None else graph.made_by(inner.input[0], "Transpose")
    outer = None if turned is None else graph.made_by(turned.input[0], "Reshape")
    if turned is None or outer is None or graph.attribute(turned, "perm", None) != [0, 2, 1]:
        return None
    return graph.source(graph.source(outer.input[0], "Transpose"), "Reshape")
