"""Layouts that ONNX Runtime's CPU kernels run faster, on a finished float32 graph; no value's numbers change.

Measured on S in docs/decisions/003-rules-per-target.md. Other targets lay tensors out by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper, numpy_helper

from dualtoken_deploy.targets.onnx.graph import Graph, drop_unused

# Operators that compute the same over (N, C) as over (1, N, C); a Reshape takes either.
_ROWWISE = frozenset(
    {"MatMul", "Add", "Mul", "Gelu", "Sigmoid", "LayerNormalization", "ReduceMean", "Split", "Reshape"}
)


def attention_over_tokens(model: onnx.ModelProto) -> int:
    """Attention takes (B, N, heads * d) and the number of heads, instead of four transposes around it.

    Only where the heads are split by a Reshape to a constant shape. Returns how many it changed.
    """
    graph = Graph(model)
    count = 0
    for node in [n for n in model.graph.node if n.op_type == "Attention"]:
        splits = [graph.source(graph.source(name, "Transpose"), "Reshape") for name in node.input[:3]]
        joined = graph.only_reader(graph.only_reader(node, "Transpose"), "Reshape")
        shapes = [graph.heads_of(split) for split in splits]
        if joined is None or len(node.input) != 3 or any(shape is None for shape in shapes):
            continue
        for place, (split, shape) in enumerate(zip(splits, shapes, strict=True)):
            assert split is not None  # noqa: S101 (for the type checker)
            assert shape is not None  # noqa: S101
            node.input[place] = graph.reshape(split.input[0], [*shape[:2], shape[2] * shape[3]], before=node)
        node.attribute.append(helper.make_attribute("q_num_heads", shapes[0][2]))  # type: ignore[index]
        node.attribute.append(helper.make_attribute("kv_num_heads", shapes[1][2]))  # type: ignore[index]
        node.output[0] = joined.output[0]
        model.graph.node.remove(joined)
        graph = Graph(model)
        count += 1
    drop_unused(model)
    return count


def drop_unit_batch(model: onnx.ModelProto) -> int:
    """Tokens of one image as (N, C): ONNX Runtime makes a Gemm with bias of such a layer, and of one over (1, N, C)
    a Gemm between two Reshapes. Returns how many operators now work on (N, C)."""
    graph = Graph(model)
    tokens = {v for v, s in graph.shapes.items() if len(s) == 3 and s[0] == 1 and all(s)}
    tokens -= {v.name for v in (*model.graph.input, *model.graph.output)}
    flat = [n for n in model.graph.node if tokens & {*n.input, *n.output} and _is_rowwise(n, graph, tokens)]
    outputs = {v for n in flat for v in n.output if v in tokens}
    inside = {n.output[0] for n in flat}
    for node in flat:
        if node.op_type == "Split" and not any(r.output[0] in inside for v in node.output for r in graph.readers[v]):
            inside.discard(node.output[0])  # its parts are read as they were: better one Reshape in front of it
            outputs -= set(node.output)
    whole = {name: graph.shapes[name] for name in tokens}
    graph.shapes.update({name: whole[name][1:] for name in outputs})
    for node in list(model.graph.node):
        for place, name in enumerate(node.input):
            if name not in tokens or node.op_type == "Reshape":
                continue  # a Reshape takes either
            if node.output[0] in inside and name not in outputs and name not in graph.weights:
                node.input[place] = graph.reshape(name, whole[name][1:], before=node)
            elif node.output[0] not in inside and name in outputs:
                node.input[place] = graph.reshape(name, whole[name], before=node)
        if node.output[0] in inside:
            _flatten(node, graph)
    del model.graph.value_info[:]
    drop_unused(model)
    return len(inside)


def transpose_first(model: onnx.ModelProto) -> int:
    """A picture (B, H, W, 3) is transposed before it is cast and normalised: a row of three is too short for vectors,
    and its bytes are a quarter of what floats are. Returns how many operators now come after the Transpose."""
    graph = Graph(model)
    pictures = {value.name for value in model.graph.input}
    for turn in [n for n in model.graph.node if n.op_type == "Transpose"]:
        if graph.attribute(turn, "perm", None) != CHANNELS_FIRST:
            continue
        chain: list[onnx.NodeProto] = []
        value = turn.input[0]
        while value not in pictures and (node := graph.maker(value)) is not None and _pointwise(node, graph):
            if len(graph.readers[node.output[0]]) != 1:
                break
            chain.append(node)
            value = next(name for name in node.input if name not in graph.weights)
        if chain and value in pictures:
            _turn(model, graph, turn, chain[::-1], value)
            del model.graph.value_info[:]
            drop_unused(model)
            return len(chain)
    return 0


CHANNELS_FIRST = [0, 3, 1, 2]


def _pointwise(node: onnx.NodeProto, graph: Graph) -> bool:
    """Whether a node is a cast, or one value with a constant for each channel or for all."""
    if node.op_type == "Cast":
        return True
    if node.op_type not in ("Add", "Sub", "Mul", "Div"):
        return False
    constants = [graph.weights[name] for name in node.input if name in graph.weights]
    return len(constants) == 1 and all(side == 1 for side in list(constants[0].dims)[:-1])


def _turn(
    model: onnx.ModelProto, graph: Graph, turn: onnx.NodeProto, chain: Sequence[onnx.NodeProto], picture: str
) -> None:
    """Puts the Transpose in front of a chain that ends in it. What the chain makes lies otherwise now, and is called
    otherwise: a value of a name is the same in every graph of a model."""
    ends = turn.output[0]
    for node in chain:
        for place, name in enumerate(node.input):
            if name in graph.weights and list(graph.weights[name].dims) not in ([], [1]):
                array = numpy_helper.to_array(graph.weights[name]).reshape(-1, 1, 1)
                node.input[place] = graph.add(array, f"{name}/channels")
    first = f"{picture}/channels"
    renamed = {picture: first} | {node.output[0]: f"{node.output[0]}/channels" for node in chain[:-1]}
    for node in chain:
        for place, name in enumerate(node.input):
            node.input[place] = renamed.get(name, name)
        node.output[0] = renamed.get(node.output[0], node.output[0])
    nodes = list(model.graph.node)
    moved = helper.make_node("Transpose", [picture], [first], name=turn.name, perm=CHANNELS_FIRST)
    chain[-1].output[0] = ends
    model.graph.node.insert(nodes.index(chain[0]), moved)
    model.graph.node.remove(turn)


def _is_rowwise(node: onnx.NodeProto, graph: Graph, tokens: set[str]) -> bool:
    """Whether the operator does the same over (N, C), and everything it reads can be had so."""
    if node.op_type not in _ROWWISE:
        return False
    if node.op_type == "Reshape":
        return node.output[0] in tokens
    values = [v for v in node.input if v and v not in graph.weights]
    if any(v not in tokens for v in values):
        return False
    if any(v not in tokens and graph.shapes.get(v) != [1, graph.shapes[values[0]][2]] for v in node.output):
        return False  # an output of the graph; or a mean without its dimension, which is (1, C) either way
    if any(len(graph.weights[v].dims) > 2 and graph.weights[v].dims[0] != 1 for v in node.input if v in graph.weights):
        return False
    axis = graph.attribute(node, "axis", -1)
    if node.op_type == "ReduceMean":
        axes = graph.constant(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and axes.tolist() == [1]
    return axis in (-1, 2)


def _flatten(node: onnx.NodeProto, graph: Graph) -> None:
    """Makes an operator over (1, N, C) one over (N, C)."""
    if node.op_type == "Reshape":
        node.input[1] = graph.add(graph.shapes[node.output[0]], f"{node.output[0]}/rows/shape")
        return
    if node.op_type == "ReduceMean":  # (N, C) -> (1, C), whether its dimension was kept in (1, 1, C) or not in (1, C)
        node.input[1] = graph.add([0], f"{node.output[0]}/axes")
        graph.set(node, "keepdims", 1)
        return
    for attribute in node.attribute:
        if attribute.name == "axis":
            attribute.i = -1
    for place, name in enumerate(node.input):
        weight = graph.weights.get(name)
        if weight is not None and len(weight.dims) == 3:
            node.input[place] = graph.add(numpy_helper.to_array(weight)[0], f"{name}/{node.output[0]}")
