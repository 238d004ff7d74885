"""What is changed in the converter's .tflite: names of values, and ranks that a GPU would refuse."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np

from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.litert.flat import (
    WEIGHTED,
    WIDENED,
    Operator,
    is_constant,
    kinds_of,
    operators,
    schema,
    shape,
    tensor_name,
)
from dualtoken_deploy.targets.litert.graph import Graph, reshape_to

_NAMED = re.compile(r"(?<![^;/])d_([^;]+);")  # how the converter writes the module stack that export.py gave a node


def name_values(
    model: Any,
    traced: Sequence[str],
    biased: Collection[str],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
) -> None:
    """Gives the graph's values the model's own names, as ONNX graphs here have them, and its signature the contract's.

    The value that a traced operation ends in has the operation's name, those on the way there the TFLite operator as
    well (`stage1.block1.local.pw1/FULLY_CONNECTED`), constants that one operator reads the name of what it makes.
    `traced`: the names of all operations in their order; an operator that stands for several has that of the last.
    `biased`: those of products with a bias. The converter moves one into a later sum where it can; the product that is
    left is not the operation's value and does not get its name.
    """
    order = {name: place for place, name in enumerate(traced)}
    graph = model.subgraphs[0]
    ends = {int(index): spec.name for index, spec in zip(graph.outputs, outputs, strict=True)}
    bases = [
        (op, ends.get(op.outputs[0]) or _traced_name(tensor_name(model, op.outputs[0]), order))
        for op in operators(model)
    ]
    last = {base: place for place, (_, base) in enumerate(bases)}
    taken: Counter[str] = Counter(spec.name for spec in inputs)
    readers = Counter(i for op, _ in bases for i in op.inputs)
    for place, (op, base) in enumerate(bases):
        whole = last[base] == place and not (base in biased and _lost_bias(op))
        name = base if whole else f"{base}/{op.kind}"
        taken[name] += 1
        name += f"_{taken[name]}" if taken[name] > 1 else ""
        for number, index in enumerate(op.outputs):
            graph.tensors[index].name = (name if number == 0 else f"{name}.{number}").encode()
        for number, index in enumerate(op.inputs):
            if index >= 0 and readers[index] == 1 and is_constant(model, index):
                graph.tensors[index].name = f"{name}.{('input', 'weight', 'bias')[min(number, 2)]}".encode()
    tfl = schema()
    signature = model.signatureDefs[0]
    for maps, indices, specs in (
        (signature.inputs, graph.inputs, inputs), (signature.outputs, graph.outputs, outputs),
    ):  # fmt: skip
        for entry, index, spec in zip(maps, indices, specs, strict=True):
            graph.tensors[index].name = entry.name = spec.name.encode()
            entry.tensorIndex = int(index)
    assert isinstance(signature, tfl.SignatureDefT)  # noqa: S101 (an export of another converter fails here, not later)


def _lost_bias(op: Operator) -> bool:
    return op.kind == "FULLY_CONNECTED" and (len(op.inputs) < 3 or op.inputs[2] < 0)


def name_dequantized(model: Any) -> int:
    """A value that ai-edge-quantizer widens behind a product, `x_dequant` of `x`, has the name; how many there are.

    What the product itself makes is then `x` and WIDENED. The signature names what it did before.
    """
    graph = model.subgraphs[0]
    count = 0
    for op in operators(model):
        if op.kind != "DEQUANTIZE" or is_constant(model, op.inputs[0]):
            continue
        name = tensor_name(model, op.inputs[0])
        if tensor_name(model, op.outputs[0]) == f"{name}_dequant":
            graph.tensors[op.inputs[0]].name = f"{name}{WIDENED}".encode()
            graph.tensors[op.outputs[0]].name = name.encode()
            count += 1
    return count


def part_weights(model: Any) -> int:
    """A constant that products and other operators read, as a codebook that is searched and looked up, becomes two over
    one buffer: ai-edge-quantizer fails on a tensor that it would have to part itself. Returns how many were parted."""
    graph = model.subgraphs[0]
    ops = list(operators(model))
    weights = {i for op in ops if op.kind in WEIGHTED for i in op.inputs[1:2] if i >= 0 and is_constant(model, i)}
    others = [place for place, op in enumerate(ops) if op.kind not in WEIGHTED and weights.intersection(op.inputs)]
    copies: dict[int, int] = {}
    for index in sorted(weights.intersection(i for place in others for i in ops[place].inputs)):
        other = copy(graph.tensors[index])
        other.name = f"{tensor_name(model, index)}.value".encode()
        graph.tensors.append(other)
        copies[index] = len(graph.tensors) - 1
    for place in others:
        graph.operators[place].inputs = np.array([copies.get(i, i) for i in ops[place].inputs], np.int32)
    return len(copies)


def equal_ranks(model: Any) -> int:
    """(N, C) where a sum or a product meets (1, N, C) becomes (1, N, C): GPUs do not take operands of two ranks.

    The converter drops the axis of one element behind a FULLY_CONNECTED. It comes back in what FULLY_CONNECTED, the
    operators of one operand behind it, and the reshape in front of it declare; elsewhere by a reshape. Returns how many
    tensors changed.
    """
    ops = list(operators(model))
    graph = model.subgraphs[0]
    own = list(graph.operators)  # before any is added
    maker = {i: place for place, op in enumerate(ops) for i in op.outputs}
    readers: dict[int, list[int]] = {}
    for place, op in enumerate(ops):
        for i in op.inputs:
            readers.setdefault(i, []).append(place)
    changed, added = 0, 0
    for place, op in enumerate(ops):
        if op.kind not in ("ADD", "MUL", "SUB"):
            continue
        low, high = sorted(op.inputs[:2], key=lambda i: len(shape(model, i)))
        if len(shape(model, low)) != 2 or len(shape(model, high)) != 3:
            continue
        chain = _chain(model, low, maker, readers, ops)
        for index in chain:
            graph.tensors[index].shape = np.array([1, *shape(model, index)], np.int32)
            graph.tensors[index].shapeSignature = None
            made = own[maker[index]] if index in maker else None
            if made is not None and ops[maker[index]].kind == "FULLY_CONNECTED":
                made.builtinOptions.keepNumDims = True
            elif made is not None and ops[maker[index]].kind == "RESHAPE":
                reshape_to(Graph(model), made, shape(model, index))
        if not chain:
            _reshape_before(model, place + added, low, [1, *shape(model, low)])
            added += 1
        changed += len(chain) or 1
    return changed


_POINTWISE = ("ADD", "MUL", "SUB", "GELU", "LOGISTIC", "RSQRT", "RESHAPE")  # who may be handed one more axis of one


def _chain(
    model: Any, low: int, maker: Mapping[int, int], readers: Mapping[int, list[int]], ops: list[Operator]
) -> list[int]:
    """The tensors that change so that `low` gets its axis; none where one of them cannot."""
    chain: list[int] = []
    index = low
    while len(shape(model, index)) == 2:
        fits = all(ops[r].kind in _POINTWISE or (ops[r].kind == "FULLY_CONNECTED" and chain) for r in readers[index])
        if not fits or (index not in maker and not is_constant(model, index)):
            return []
        chain.append(index)
        if index not in maker:
            return chain  # a constant
        op = ops[maker[index]]
        if op.kind == "RESHAPE":
            return chain if len(readers[index]) == 1 else []
        if op.kind not in ("FULLY_CONNECTED", "GELU", "LOGISTIC"):
            return []
        index = op.inputs[0]
    return chain if len(shape(model, index)) == 3 and shape(model, index)[0] == 1 else []


def _reshape_before(model: Any, place: int, index: int, wanted: list[int]) -> None:
    """Puts a RESHAPE of one tensor in front of the operator at `place`, which reads it instead."""
    tfl, graph = schema(), model.subgraphs[0]
    reader, source, tensor, made = graph.operators[place], graph.tensors[index], tfl.TensorT(), tfl.OperatorT()
    tensor.shape, tensor.type, tensor.name, tensor.buffer = np.array(wanted, np.int32), source.type, source.name, 0
    graph.tensors.append(tensor)
    new = len(graph.tensors) - 1
    reader.inputs = np.array([new if i == index else i for i in reader.inputs], np.int32)
    made.opcodeIndex = kinds_of(model).index("RESHAPE")
    made.inputs, made.outputs = np.array([index, -1], np.int32), np.array([new], np.int32)
    reshape_to(Graph(model), made, wanted)
    graph.operators.insert(place, made)


def _traced_name(converted: str, order: Mapping[str, int]) -> str:
    names = [name.replace(":", ".") for name in _NAMED.findall(converted)]
    known = [name for name in names if name in order]
    return max(known, key=order.__getitem__) if known else converted.partition(";")[0] or "constant"
