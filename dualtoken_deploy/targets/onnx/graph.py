"""Look-ups in an ONNX graph, and additions to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

HEADS_LAST = [0, 2, 1, 3]  # (B, heads, N, d) <-> (B, N, heads, d)


_READ = 4096  # bytes of the largest constant that a shape can come from


def _inferred(model: onnx.ModelProto) -> onnx.GraphProto:
    """The graph with all shapes that follow. Weights are taken out meanwhile: onnx copies the whole model twice, which
    for every attention of S was a fifth of its export."""
    held = [(tensor, tensor.raw_data) for tensor in model.graph.initializer if len(tensor.raw_data) > _READ]
    for tensor, _ in held:
        tensor.ClearField("raw_data")
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    finally:
        for tensor, data in held:
            tensor.raw_data = data


class Graph:
    """Look-ups in a model, and additions to it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        inferred = _inferred(model)
        self.shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in (*inferred.value_info, *inferred.input, *inferred.output)
        }
        self.weights = {t.name: t for t in model.graph.initializer}
        self._sources = {v: n for n in model.graph.node for v in n.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self._made: dict[tuple[str, tuple[int, ...]], str] = {}

    def source(self, value: str | onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
        """The node of that kind that makes a value, or a node's first input; a Transpose must move the heads."""
        name = value.input[0] if isinstance(value, onnx.NodeProto) else value
        return None if name is None else self._checked(self._sources.get(name), kind)

    def made_by(self, value: str, kind: str) -> onnx.NodeProto | None:
        """The node of that kind that makes a value, whatever its attributes."""
        node = self._sources.get(value)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
        """The node of that kind, if it alone reads a node's first output."""
        readers = [] if node is None else self.readers[node.output[0]]
        return self._checked(readers[0], kind) if len(readers) == 1 else None

    def maker(self, value: str) -> onnx.NodeProto | None:
        return self._sources.get(value)

    def _checked(self, node: onnx.NodeProto | None, kind: str) -> onnx.NodeProto | None:
        if node is None or node.op_type != kind:
            return None
        return None if kind == "Transpose" and self.attribute(node, "perm", None) != HEADS_LAST else node

    def constant(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]] | None:
        return numpy_helper.to_array(self.weights[name]) if name in self.weights else None

    def heads_of(self, split: onnx.NodeProto | None) -> list[int] | None:
        """(B, N, heads, d) of a Reshape to a constant shape of that rank, B or N perhaps open; None of another one."""
        shape = None if split is None else self.constant(split.input[1])
        if split is None or shape is None or shape.size != 4:
            return None
        known = self.shapes.get(split.output[0], [])
        sides = [int(side) for side in (known if len(known) == 4 and all(known) else shape)]
        return sides if min(sides[2:]) > 0 else None

    def attribute(self, node: onnx.NodeProto, name: str, default: object) -> object:
        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def set(self, node: onnx.NodeProto, name: str, value: float) -> None:
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    def add(self, values: Iterable[int] | np.ndarray[tuple[int, ...], np.dtype[np.float32]], name: str) -> str:
        """A new constant's name; integers as int64."""
        array = values if isinstance(values, np.ndarray) else np.array(list(values), np.int64)
        self.weights[name] = numpy_helper.from_array(array, name)
        self._model.graph.initializer.append(self.weights[name])
        return name

    def reshape(self, value: str, shape: Iterable[int], before: onnx.NodeProto) -> str:
        """The value in that shape, by a Reshape in front of a node unless it has it; asked again, the same one."""
        wanted = tuple(int(side) for side in shape)
        if tuple(self.shapes.get(value, ())) == wanted:
            return value
        key = (value, wanted)
        if key not in self._made:
            name = f"{value}/{'x'.join(map(str, wanted))}"
            node = helper.make_node("Reshape", [value, self.add(wanted, f"{name}/shape")], [name], name=name)
            at = next(i for i, n in enumerate(self._model.graph.node) if n.output[0] == before.output[0])
            self._model.graph.node.insert(at, node)
            self._made[key] = name
        return self._made[key]


def drop_unused(model: onnx.ModelProto) -> None:
    """Removes nodes and constants that nothing reads."""
    graph = model.graph
    kept = {v.name for v in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if any(name in kept for name in node.output):
            nodes.append(node)
            kept.update(node.input)
    constants = [t for t in graph.initializer if t.name in kept]
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    del graph.initializer[:]
    graph.initializer.extend(constants)
