"""Fewer operators in the converter's .tflite: exact, by moving no data that need not move.

Each takes a model, changes it in place and says how many operators it took away.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.targets.litert.flat import kinds_of, schema
from dualtoken_deploy.targets.litert.graph import Graph, Step, reshape_to

BINARY = ("ADD", "MUL", "SUB", "DIV", "SQUARED_DIFFERENCE", "MAXIMUM", "MINIMUM")
UNARY = ("GELU", "LOGISTIC", "RSQRT", "SQRT", "TANH", "RELU", "RELU6", "NEG", "EXP", "SQUARE")
TO_PLANES, TO_MAP = [0, 3, 1, 2], [0, 2, 3, 1]  # permutations of a map's four axes
SPLIT_CODE = 49  # BuiltinOperator of the schema


def split_slices(model: Any) -> int:
    """Slices that cut a value into equal parts along one axis are one SPLIT."""
    graph, removed = Graph(model), 0
    for source, readers in list(graph.readers.items()):
        parts = [(cut, step) for step in readers if step.op.kind == "SLICE" and (cut := _cut(graph, step))]
        for axis in sorted({axis for (axis, _, _), _ in parts}):
            mine = sorted(
                ((start, long, step) for (a, start, long), step in parts if a == axis), key=lambda part: part[0]
            )
            width = mine[0][1]
            if len(mine) < 2 or [p[:2] for p in mine] != [(k * width, width) for k in range(len(mine))]:
                continue
            if width * len(mine) != graph.shape(source)[axis]:
                continue
            _split(graph, source, axis, [step for _, _, step in mine])
            removed += len(mine) - 1
    return removed


def _cut(graph: Graph, step: Step) -> tuple[int, int, int] | None:
    """(axis, start, length) of a slice along one axis; None of any other."""
    source, begin, size = step.op.inputs
    if not (graph.constant(begin) and graph.constant(size)):
        return None
    whole, start, long = graph.shape(source), graph.integers(begin), graph.shape(step.op.outputs[0])
    changed = [axis for axis in range(len(whole)) if long[axis] != whole[axis]]
    return (changed[0], start[changed[0]], long[changed[0]]) if len(changed) == 1 else None


def _split(graph: Graph, source: int, axis: int, steps: list[Step]) -> None:
    tfl = schema()
    made, options = tfl.OperatorT(), tfl.SplitOptionsT()
    options.numSplits = len(steps)
    made.opcodeIndex = _code(graph.model, "SPLIT", SPLIT_CODE)
    made.inputs = np.array([graph.add_integers([axis], []), source], np.int32)
    made.outputs = np.array([step.op.outputs[0] for step in steps], np.int32)
    made.builtinOptionsType, made.builtinOptions = tfl.BuiltinOptions.SplitOptions, options
    gone = {id(step.own) for step in steps}
    kept: list[Any] = []
    for own in graph.graph.operators:
        if id(own) not in gone:
            kept.append(own)
        elif made is not None:
            kept.append(made)
            made = None
    graph.graph.operators = kept


def _code(model: Any, kind: str, number: int) -> int:
    """The index of an operator's code, added where the model has none."""
    kinds = kinds_of(model)
    if kind in kinds:
        return kinds.index(kind)
    code = schema().OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = number
    code.version = 1
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def stay_channels_last(model: Any) -> int:
    """A map turned to planes, gained and shifted a channel, and turned back: the same on the map as it was."""
    removed = 0
    for first in Graph(model).steps:
        graph = Graph(model)
        start = next((step for step in graph.steps if step.own is first.own), None)
        chain = [] if start is None else _planes(graph, start)
        if not chain:
            continue
        for step in chain[1:-1]:
            for i in step.op.inputs:
                if graph.constant(i) and len(graph.shape(i)) == 3:
                    graph.read_instead(step, i, graph.reshaped_constant(i, [graph.shape(i)[0]]))
            sizes = graph.shape(step.op.outputs[0])
            graph.set_shape(step.op.outputs[0], [sizes[axis] for axis in TO_MAP])
        for step in (chain[0], chain[-1]):
            graph.remove(step)
        removed += 2
    return removed


def _planes(graph: Graph, step: Step) -> list[Step]:
    """From a TRANSPOSE to planes to the one back, if all between work on each channel alone."""
    chain = [step]
    if not _turns(graph, step, TO_PLANES):
        return []
    while True:
        (value,) = chain[-1].op.outputs[:1]
        readers = graph.readers.get(value, [])
        if len(readers) != 1 or value in graph.ends:
            return []
        following = readers[0]
        chain.append(following)
        if _turns(graph, following, TO_MAP):
            return chain if following.op.outputs[0] not in graph.ends else []
        constants = [graph.shape(i) for i in following.op.inputs if graph.constant(i)]
        fits = all(len(s) in (0, 3) and s[1:] in ([], [1, 1]) for s in constants)
        unary = following.op.kind in UNARY
        if not (unary or (following.op.kind in BINARY and len(constants) == 1 and fits)):
            return []


def _turns(graph: Graph, step: Step, order: list[int]) -> bool:
    return step.op.kind == "TRANSPOSE" and graph.constant(step.op.inputs[1]) and (
        graph.integers(step.op.inputs[1]) == order
    )  # fmt: skip


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
    return len(graph.shape(step.op.inputs[0])) == 2 and _turns(graph, step, [1, 0])


def _ways(graph: Graph, turns: bool = False) -> Iterator[set[int]]:
    """Sets of tensors that operators on tokens join; with `turns` those that are swapped with their channels too."""
    parent: dict[int, int] = {}

    def root(i: int) -> int:
        while parent.setdefault(i, i) != i:
            i = parent[i]
        return i

    for step in graph.steps:
        ends = list(step.op.inputs[:1] + step.op.outputs) if turns and _swaps(graph, step) else _joined(graph, step)
        for i in ends[1:]:
            parent[root(i)] = root(ends[0])
    groups: dict[int, set[int]] = {}
    for i in parent:
        groups.setdefault(root(i), set()).add(i)
    yield from groups.values()


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
    if op.kind not in BINARY:
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
    elif op.kind in BINARY and op.outputs[0] in way:
        for i in op.inputs:
            sizes = graph.shape(i)
            if graph.constant(i) and len(sizes) in (2, 3):
                lead = rows[math.prod(sizes[:-1])]
                graph.read_instead(step, i, graph.reshaped_constant(i, [*lead, sizes[-1]]))


FEWER: Mapping[str, Callable[[Any], int]] = MappingProxyType(
    {function.__name__: function for function in (split_slices, stay_channels_last, keep_maps, keep_batch)}
)


def take_away(model: Any) -> Counter[str]:
    """All of these, in the order of the table: {name: operators taken away}."""
    return Counter({name: function(model) for name, function in FEWER.items()})
