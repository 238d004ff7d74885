"""Fewer operators in the converter's .tflite: exact, by moving no data that need not move.

Each takes a model, changes it in place and says how often it applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dualtoken_deploy.targets.litert.flat import kinds_of, schema
from dualtoken_deploy.targets.litert.graph import BINARY, UNARY, Graph, Step, reshape_to, turns_by
from dualtoken_deploy.targets.litert.ways import equal_constants, keep_batch, keep_maps, one_batch

TO_PLANES, TO_MAP = [0, 3, 1, 2], [0, 2, 3, 1]  # permutations of a map's four axes
SPLIT, SPACE_TO_DEPTH = ("SPLIT", 49), ("SPACE_TO_DEPTH", 26)  # with their number in the schema's BuiltinOperator


def split_slices(model: Any) -> int:
    """Slices that cut a value into equal parts along one axis are one SPLIT."""
    graph, count = Graph(model), 0
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
            count += 1
    return count


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
    made.opcodeIndex = _code(graph.model, *SPLIT)
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


def space_to_depth(model: Any) -> int:
    """(B h/2, 2, w/2, 2 C) with its inner axes changed, between two reshapes, is one SPACE_TO_DEPTH of the map.

    Both put pixel (2 y + i, 2 x + j)'s channel c at channel (2 i + j) C + c of (y, x). The reshapes that make tokens a
    map and back stay for `keep_maps`.
    """
    graph, count = Graph(model), 0
    for turn in graph.steps:
        found = _merge(graph, turn)
        if found is None:
            continue
        first, (b, h, w, c) = found
        tfl, options = schema(), schema().SpaceToDepthOptionsT()
        options.blockSize = 2
        reshape_to(graph, first.own, [b, h, w, c])
        graph.set_shape(first.op.outputs[0], [b, h, w, c])
        turn.own.opcodeIndex = _code(model, *SPACE_TO_DEPTH)
        turn.own.inputs = np.array([first.op.outputs[0]], np.int32)
        turn.own.builtinOptionsType, turn.own.builtinOptions = tfl.BuiltinOptions.SpaceToDepthOptions, options
        graph.set_shape(turn.op.outputs[0], [b, h // 2, w // 2, 4 * c])
        count += 1
    return count


def _merge(graph: Graph, turn: Step) -> tuple[Step, tuple[int, int, int, int]] | None:
    """The reshape before a transpose that puts two by two pixels together, and the map's shape."""
    if not turns_by(graph, turn, [0, 2, 1, 3]) or turn.op.inputs[0] not in graph.maker:
        return None
    first, readers = graph.maker[turn.op.inputs[0]], graph.readers.get(turn.op.outputs[0], [])
    if first.op.kind != "RESHAPE" or len(graph.readers[first.op.outputs[0]]) != 1 or len(readers) != 1:
        return None
    last = readers[0]
    (rows, two, half, width), source = graph.shape(turn.op.inputs[0]), graph.shape(first.op.inputs[0])
    target = graph.shape(last.op.outputs[0])
    if last.op.kind != "RESHAPE" or two != 2 or len(source) not in (3, 4) or target[-1] != 2 * width:
        return None
    batch, c = source[0], source[-1]
    if 2 * c != width or rows % batch:
        return None
    sizes = batch, 2 * rows // batch, 2 * half, c
    return (first, sizes) if source in ([*sizes], [batch, sizes[1] * sizes[2], c]) else None


def stay_channels_last(model: Any) -> int:
    """A map turned to planes, gained and shifted a channel, and turned back: the same on the map as it was."""
    count = 0
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
        count += 1
    return count


def _planes(graph: Graph, step: Step) -> list[Step]:
    """From a TRANSPOSE to planes to the one back, if all between work on each channel alone."""
    chain = [step]
    if not turns_by(graph, step, TO_PLANES):
        return []
    while True:
        (value,) = chain[-1].op.outputs[:1]
        readers = graph.readers.get(value, [])
        if len(readers) != 1 or value in graph.ends:
            return []
        following = readers[0]
        chain.append(following)
        if turns_by(graph, following, TO_MAP):
            return chain if following.op.outputs[0] not in graph.ends else []
        constants = [graph.shape(i) for i in following.op.inputs if graph.constant(i)]
        fits = all(len(s) in (0, 3) and s[1:] in ([], [1, 1]) for s in constants)
        unary = following.op.kind in UNARY
        if not (unary or (following.op.kind in BINARY and len(constants) == 1 and fits)):
            return []


FEWER: Mapping[str, Callable[[Any], int]] = MappingProxyType(
    {
        function.__name__: function
        for function in (
            split_slices,
            space_to_depth,
            stay_channels_last,
            keep_maps,
            keep_batch,
            one_batch,
            equal_constants,
        )
    }
)


def take_away(model: Any) -> Counter[str]:
    """All of these, in the order of the table: {name: how often it applied}."""
    return Counter({name: function(model) for name, function in FEWER.items()})
