"""The main graph of a .tflite while it is changed: who makes and who reads each tensor, new constants, new shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dualtoken_deploy.targets.litert.flat import Operator, is_constant, operators, schema, shape, tensor_name

BINARY = ("ADD", "MUL", "SUB", "DIV", "SQUARED_DIFFERENCE", "MAXIMUM", "MINIMUM")
UNARY = ("GELU", "LOGISTIC", "RSQRT", "SQRT", "TANH", "RELU", "RELU6", "NEG", "EXP", "SQUARE")


@dataclass(frozen=True)
class Step:
    """An operator as it is read, and as the schema's object that is changed."""

    op: Operator
    own: Any


class Graph:
    """The main graph with who makes and who reads each tensor."""

    def __init__(self, model: Any) -> None:
        self.model, self.graph = model, model.subgraphs[0]
        self.steps = [Step(op, own) for op, own in zip(operators(model), self.graph.operators, strict=True)]
        self.maker = {i: step for step in self.steps for i in step.op.outputs}
        self.readers: dict[int, list[Step]] = {}
        for step in self.steps:
            for i in dict.fromkeys(step.op.inputs):
                self.readers.setdefault(i, []).append(step)
        self.ends = {int(i) for i in (*self.graph.inputs, *self.graph.outputs)}

    def shape(self, index: int) -> list[int]:
        return shape(self.model, index)

    def constant(self, index: int) -> bool:
        return index < 0 or is_constant(self.model, index)

    def integers(self, index: int) -> list[int]:
        """The value of a constant of int32."""
        tensor = self.graph.tensors[index]
        return [int(n) for n in np.frombuffer(bytes(self.model.buffers[tensor.buffer].data), np.int32)]

    def add_integers(self, value: list[int], sizes: list[int] | None = None) -> int:
        """The index of a new constant of int32: a list, or of the shape given."""
        tfl = schema()
        buffer, tensor = tfl.BufferT(), tfl.TensorT()
        buffer.data = np.frombuffer(np.array(value, np.int32).tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        tensor.shape = np.array([len(value)] if sizes is None else sizes, np.int32)
        tensor.type, tensor.buffer = tfl.TensorType.INT32, len(self.model.buffers) - 1
        tensor.name = f"integers.{tensor.buffer}".encode()  # names are one each: ai-edge-quantizer asks for it
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def set_shape(self, index: int, sizes: list[int]) -> None:
        tensor = self.graph.tensors[index]
        tensor.shape, tensor.shapeSignature = np.array(sizes, np.int32), None

    def reshaped_constant(self, index: int, sizes: list[int]) -> int:
        """The index of the same constant in another shape, for one reader."""
        old, tensor = self.graph.tensors[index], schema().TensorT()
        tensor.type, tensor.buffer = old.type, old.buffer
        tensor.name = f"{tensor_name(self.model, index)}.{len(self.graph.tensors)}".encode()
        tensor.shape = np.array(sizes, np.int32)
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def read_instead(self, step: Step, old: int, new: int) -> None:
        step.own.inputs = np.array([new if i == old else i for i in step.own.inputs], np.int32)

    def remove(self, step: Step) -> None:
        """Takes an operator of one input away, whose readers read that input from now on."""
        source, target = int(step.own.inputs[0]), step.op.outputs[0]
        for own in self.graph.operators:
            if own.inputs is not None and target in own.inputs:
                own.inputs = np.array([source if i == target else i for i in own.inputs], np.int32)
        self.graph.operators = [own for own in self.graph.operators if own is not step.own]


def reshape_to(graph: Graph, own: Any, sizes: list[int]) -> None:
    """Gives a RESHAPE its own new shape, in the options and in a constant of its own."""
    if own.builtinOptions is not None:
        own.builtinOptions.newShape = np.array(sizes, np.int32)
    own.inputs = np.array([own.inputs[0], graph.add_integers(sizes)], np.int32)


def turns_by(graph: Graph, step: Step, order: list[int]) -> bool:
    """Whether an operator permutes axes in that order."""
    return step.op.kind == "TRANSPOSE" and graph.constant(step.op.inputs[1]) and (
        graph.integers(step.op.inputs[1]) == order
    )  # fmt: skip
