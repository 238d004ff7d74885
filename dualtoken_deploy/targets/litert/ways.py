"""Shapes in a .tflite: tokens of a map stay that map, and every value has the batch as its first axis.

Each takes a model, changes it in place and says how often it applied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.targets.litert.graph import BINARY, UNARY, Graph, Step, reshape_to, turns_by


def keep_maps(model: Any) -> int:
    """Tokens (B, N, C) that come from a map (B, h, w, C), or go to one, stay a map on the whole way: no reshape.

    Operators that work on each token alone, or on the mean over all of them, do the same on a map. A way is all that
    such operators and reshapes join; it changes where all of it can.
    """
    graph, removed = Graph(model), 0
    for way in _ways(graph):
        rows = _rows(graph, way)
        if rows is None:
            continue
        changed = {i: [*rows[math.prod(graph.shape(i)[:-1])], graph.shape(i)[-1]] for i in way}
        before = {i: graph.shape(i) for i in way}
        for step in graph.steps:
            _follow(graph, step, way, rows, before)
        for i, sizes in changed.items():
            graph.set_shape(i, sizes)
        for step in graph.steps:
            if step.op.kind != "RESHAPE" or step.op.outputs[0] not in way:
                continue
            target = step.op.outputs[0]
            if step.op.inputs[0] in way and target not in graph.ends:
                graph.remove(step)
                removed += 1
            else:
                reshape_to(graph, step.own, changed[target])
    return removed


def keep_batch(model: Any) -> int:
    """(N, C) on the way to (1, N, C) has the axis of one element from the start, through transposes too: no reshape."""
    graph, removed = Graph(model), 0
    for way in _ways(graph, turns=True):
        flat = {i for i in way if len(graph.shape(i)) == 2}
        gone = [s for s in graph.steps if s.op.kind == "RESHAPE" and s.op.outputs[0] in way and s.op.inputs[0] in flat]
        if not gone or not all(_gains_an_axis(graph, i) for i in way):
            continue
        for step in graph.steps:
            _follow_batch(graph, step, flat)
        for i in flat:
            graph.set_shape(i, [1, *graph.shape(i)])
        for step in graph.steps:
            if step.op.kind != "RESHAPE" or step.op.outputs[0] not in way:
                continue
            if step in gone and step.op.outputs[0] not in graph.ends:
                graph.remove(step)
                removed += 1
            else:
                reshape_to(graph, step.own, graph.shape(step.op.outputs[0]))
    return removed


def _gains_an_axis(graph: Graph, index: int) -> bool:
    """Whether all that touches a tensor does the same where (N, C) is (1, N, C)."""
    sizes = graph.shape(index)
    if len(sizes) == 3:
        return sizes[0] == 1
    if len(sizes) != 2 or index in graph.ends or graph.constant(index):
        return False
    for step in (*graph.readers.get(index, []), *([graph.maker[index]] if index in graph.maker else [])):
        op = step.op
        fits = op.kind in (*UNARY, *BINARY, "RESHAPE") or _swaps(graph, step)
        if not fits and not (op.kind == "FULLY_CONNECTED" and index in (op.inputs[0], op.outputs[0])):
            return False
    return True


def _follow_batch(graph: Graph, step: Step, flat: set[int]) -> None:
    op = step.op
    if op.kind == "FULLY_CONNECTED" and op.outputs[0] in flat:
        step.own.builtinOptions.keepNumDims = True
    elif op.outputs[0] in flat and _swaps(graph, step):
        step.own.inputs = np.array([op.inputs[0], graph.add_integers([0, 2, 1])], np.int32)
    elif op.outputs[0] in flat and op.kind in BINARY:
        for i in op.inputs:
            if graph.constant(i) and len(graph.shape(i)) == 2:
                graph.read_instead(step, i, graph.reshaped_constant(i, [1, *graph.shape(i)]))


def _swaps(graph: Graph, step: Step) -> bool:
    return len(graph.shape(step.op.inputs[0])) == 2 and turns_by(graph, step, [1, 0])


def _ways(graph: Graph, turns: bool = False) -> Iterator[set[int]]:
    """Sets of tensors that operators on tokens join; with `turns` those that are swapped with their channels too."""
    parent: dict[int, int] = {}
    for step in graph.steps:
        swapped = turns and _swaps(graph, step)
        _join(parent, [step.op.inputs[0], step.op.outputs[0]] if swapped else _joined(graph, step))
    yield from _groups(parent)


def _root(parent: dict[int, int], i: int) -> int:
    while parent.setdefault(i, i) != i:
        i = parent[i]
    return i


def _join(parent: dict[int, int], ends: list[int]) -> None:
    for i in ends[1:]:
        parent[_root(parent, i)] = _root(parent, ends[0])


def _groups(parent: dict[int, int]) -> list[set[int]]:
    groups: dict[int, set[int]] = {}
    for i in parent:
        groups.setdefault(_root(parent, i), set()).add(i)
    return list(groups.values())


def _joined(graph: Graph, step: Step) -> list[int]:
    """The tensors whose leading axes an operator has in common."""
    op, out = step.op, step.op.outputs[0]
    if op.kind in BINARY:
        return [out, *(i for i in op.inputs if not graph.constant(i))]
    if op.kind in (*UNARY, "FULLY_CONNECTED"):
        return [out, op.inputs[0]]
    if op.kind == "MEAN":
        return [op.inputs[0], *([out] if op.options.keepDims else [])]
    if op.kind == "RESHAPE" and graph.shape(op.inputs[0])[-1:] == graph.shape(out)[-1:]:
        return [out, op.inputs[0]]
    return []


def _rows(graph: Graph, way: set[int]) -> Mapping[int, list[int]] | None:
    """{number of tokens: leading axes of the map that they are}; None where the way cannot stay a map."""
    maps = [graph.shape(i) for i in way if len(graph.shape(i)) == 4]
    rows: dict[int, list[int]] = {}
    for sizes in maps:
        if rows.setdefault(math.prod(sizes[:-1]), sizes[:-1]) != sizes[:-1]:
            return None
    if len({sizes[0] for sizes in maps}) != 1:
        return None
    batch = maps[0][0]
    rows.setdefault(batch, [batch, 1, 1])
    for i in way:
        sizes = graph.shape(i)
        if len(sizes) == 4:
            continue
        if len(sizes) not in (2, 3) or math.prod(sizes[:-1]) not in rows or i in graph.ends or graph.constant(i):
            return None
        users = [*graph.readers.get(i, []), *([graph.maker[i]] if i in graph.maker else [])]
        if not all(_bends(graph, step, i, rows) for step in users):
            return None
    return MappingProxyType(rows)


def _bends(graph: Graph, step: Step, index: int, rows: Mapping[int, list[int]]) -> bool:
    """Whether an operator does the same where a tensor of its tokens is a map."""
    op = step.op
    if op.kind == "RESHAPE":
        return True
    if op.kind in UNARY:
        return True
    if op.kind == "FULLY_CONNECTED":
        return index in (op.inputs[0], op.outputs[0])
    if op.kind == "MEAN":
        axes = graph.integers(op.inputs[1]) if graph.constant(op.inputs[1]) else []
        return len(graph.shape(op.inputs[0])) == 3 and axes in ([1], [2], [-1], [-2]) and (
            index == op.inputs[0] or bool(op.options.keepDims)
        )  # fmt: skip
    if op.kind not in BINARY or any(len(graph.shape(i)) > 3 for i in (*op.inputs, *op.outputs)):
        return False
    constants = [graph.shape(i) for i in op.inputs if graph.constant(i)]
    return all(len(s) <= 1 or math.prod(s[:-1]) in rows for s in constants)


def _follow(
    graph: Graph, step: Step, way: set[int], rows: Mapping[int, list[int]], before: Mapping[int, list[int]]
) -> None:
    """Has an operator on the way work on maps."""
    op = step.op
    if op.kind == "FULLY_CONNECTED" and op.outputs[0] in way:
        step.own.builtinOptions.keepNumDims = True
    elif op.kind == "MEAN" and op.inputs[0] in way and len(before[op.inputs[0]]) == 3:
        token = graph.integers(op.inputs[1])[0] in (1, -2)
        step.own.inputs = np.array([op.inputs[0], graph.add_integers([1, 2] if token else [3])], np.int32)
    elif op.kind in BINARY and len(before.get(op.outputs[0], ())) in (2, 3):
        for i in op.inputs:
            sizes = graph.shape(i)
            if graph.constant(i) and len(sizes) in (2, 3):
                lead = rows[math.prod(sizes[:-1])]
                graph.read_instead(step, i, graph.reshaped_constant(i, [*lead, sizes[-1]]))


def equal_constants(model: Any) -> int:
    """A constant of fewer axes than what it is added to, but more than one, has as many: GPUs take no two ranks."""
    graph, count = Graph(model), 0
    for step in graph.steps:
        if step.op.kind not in BINARY:
            continue
        rank = max(len(graph.shape(i)) for i in step.op.inputs)
        for i in step.op.inputs:
            sizes = graph.shape(i)
            if graph.constant(i) and 1 < len(sizes) < rank:
                graph.read_instead(step, i, graph.reshaped_constant(i, [*[1] * (rank - len(sizes)), *sizes]))
                count += 1
    return count


def one_batch(model: Any) -> int:
    """Stacks of matrices (heads, N, d) between two reshapes are (1, heads, N, d): every value has the batch first.

    For OpenGL and Metal, which take no graph whose values differ in that axis. No operator less.
    """
    graph, count = Graph(model), 0
    parent: dict[int, int] = {}
    for step in graph.steps:
        op = step.op
        if op.kind in ("TRANSPOSE", "SPLIT", "BATCH_MATMUL", "SOFTMAX", *UNARY, *BINARY):
            _join(parent, [i for i in (*op.outputs, *op.inputs) if not graph.constant(i)])
    for stack in _groups(parent):
        if not all(_stacks(graph, i) for i in stack):
            continue
        for step in graph.steps:
            op = step.op
            if op.outputs[0] not in stack:
                continue
            if op.kind == "TRANSPOSE":
                order = [0, *(axis % 3 + 1 for axis in graph.integers(op.inputs[1]))]
                step.own.inputs = np.array([op.inputs[0], graph.add_integers(order)], np.int32)
            elif op.kind == "SPLIT":
                axis = graph.integers(op.inputs[0])[0] % 3 + 1
                step.own.inputs = np.array([graph.add_integers([axis], []), op.inputs[1]], np.int32)
            elif op.kind == "RESHAPE":
                reshape_to(graph, step.own, [1, *graph.shape(op.outputs[0])])
        for i in stack:
            graph.set_shape(i, [1, *graph.shape(i)])
        count += 1
    return count


def _stacks(graph: Graph, index: int) -> bool:
    """Whether a tensor is a stack of matrices that all around it takes with one more axis."""
    if len(graph.shape(index)) != 3 or index in graph.ends or index not in graph.maker:
        return False
    for step in (*graph.readers.get(index, []), graph.maker[index]):
        op = step.op
        if op.kind not in ("TRANSPOSE", "SPLIT", "BATCH_MATMUL", "SOFTMAX", "RESHAPE", *UNARY, *BINARY):
            return False
        constants = [i for i in op.inputs if graph.constant(i)]
        if op.kind in BINARY and any(len(graph.shape(i)) > 1 for i in constants):
            return False
        if op.kind == "BATCH_MATMUL" and constants:
            return False
    return True
