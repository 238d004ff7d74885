"""Moves that end where they began: a map made of tokens and turned to the same tokens again.

norm of tokens (N, H W, C) -> (N, H, W, C) -> (N, C, H, W) -> (N, C, H W) -> (N, H W, C)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from dualtoken_deploy.targets.onnx.graph import Graph, drop_unused

MOVES = frozenset({"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"})


def without_idle_moves(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes read what stood in front of such moves. What they do is found by moving numbers, so any order
    and any kind of them is seen; shapes that are not known stay as they are."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    graph = Graph(out)
    instead: dict[str, str] = {}
    for node in out.graph.node:
        for place, name in enumerate(node.input):
            if name in instead:
                node.input[place] = instead[name]
        if node.op_type in MOVES:
            begin = _begin(node, graph)
            if begin is not None:
                instead[node.output[0]] = instead.get(begin, begin)
    drop_unused(out)
    return out


def _begin(last: onnx.NodeProto, graph: Graph) -> str | None:
    """The first value in a chain of moves that `last` ends, if it is what `last` makes."""
    shape, moves = graph.shapes.get(last.output[0], []), [last]
    found = None
    while (above := graph.maker(moves[-1].input[0])) is not None and above.op_type in MOVES:
        moves.append(above)
        value = above.input[0]
        if shape and all(shape) and graph.shapes.get(value, []) == shape and _idle(moves[::-1], shape, graph):
            found = value
    return found


def _idle(moves: list[onnx.NodeProto], shape: list[int], graph: Graph) -> bool:
    numbers: np.ndarray[Any, Any] = np.arange(int(np.prod(shape))).reshape(shape)
    moved = numbers
    for move in moves:
        if move.op_type == "Transpose":
            perm: Any = graph.attribute(move, "perm", None)
            moved = moved.transpose(perm)
        else:
            wanted = graph.shapes.get(move.output[0], [])
            if not wanted or not all(wanted):
                return False
            moved = moved.reshape(wanted)
    return bool((moved == numbers).all())
