"""Executes a .pte whose delegates no runtime here has: what lies outside of them by PyTorch's operators of the same
names, and each of them by what executes its program here.

A reference execution: it tells what the saved file computes, not how fast a device is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.coreml.mil.vendor import quiet
from dualtoken_deploy.targets.executorch.backends import Backend, check_promise
from dualtoken_deploy.targets.executorch.contents import execution_of
from dualtoken_deploy.targets.executorch.package import CoreMLPiece
from dualtoken_deploy.targets.executorch.program import (
    Contents,
    Node,
    ids_in,
    ids_of,
    load,
    not_executed,
    outside_of,
    whole,
)
from dualtoken_deploy.targets.executorch.vulkan import VulkanGraph, dtype_name, operator
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, check_declared

DTYPES = {"BYTE": torch.uint8, "CHAR": torch.int8, "SHORT": torch.int16, "INT": torch.int32, "LONG": torch.int64,
          "HALF": torch.float16, "FLOAT": torch.float32, "DOUBLE": torch.float64, "BOOL": torch.bool}  # fmt: skip
_SCALARS = {"Int": "int_val", "Double": "double_val", "Bool": "bool_val", "String": "string_val"}


class Piece(Protocol):
    """A delegate's program."""

    @property
    def nodes(self) -> tuple[Node, ...]: ...

    @property
    def outputs(self) -> int: ...

    def run(self, given: Sequence[Tensor]) -> list[Tensor]: ...


PIECES: Mapping[str, Callable[[bytes, Mapping[str, bytes]], Piece]] = MappingProxyType(
    {"CoreMLBackend": CoreMLPiece, "VulkanBackend": VulkanGraph}
)


class ReferenceProgram:
    """A file ready to run. Raises BundleError on one that is damaged or has what is not executed here."""

    def __init__(self, path: Path) -> None:
        with quiet():
            import executorch.exir.passes.dim_order_ops_registry  # noqa: F401  # its operators, by PyTorch

        self._path = path
        with whole(path):
            pte = load(path)
            (self._plan,) = pte.program.execution_plan
            named = {
                key: bytes(pte.named_data.buffers[entry.buffer_index])
                for key, entry in (pte.named_data.pte_data if pte.named_data else {}).items()
            }
            data = pte.program.backend_delegate_data
            if strange := set(ids_of(self._plan)) - set(PIECES):
                raise not_executed(f"pieces for {', '.join(sorted(strange))}")
            self._pieces = [PIECES[d.id](bytes(data[d.processed.index].data), named) for d in self._plan.delegates]
            self._constants = [bytes(buffer.storage) for buffer in pte.program.constant_buffer]
            self._steps = [step.instr_args for chain in self._plan.chains for step in chain.instructions]
            self._operators = [
                operator(f"{op.name.replace('::', '.')}.{op.overload or 'default'}") for op in self._plan.operators
            ]
            self.contents = Contents(
                outside_of(self._plan), tuple(piece.nodes for piece in self._pieces), ids_of(self._plan)
            )

    def declared(self, specs: Sequence[TensorSpec], which: str) -> dict[str, Declared]:
        """What the method says of its "inputs" or "outputs", which have no names, by those of `specs`."""
        values = [self._plan.values[number].val for number in getattr(self._plan, which)]
        names = [spec.name for spec in specs] + [f"number {n}" for n in range(len(specs), len(values))]
        return {
            name: Declared(dtype_name(DTYPES[value.scalar_type.name]), tuple(value.sizes))
            for name, value in zip(names, values, strict=False)
        }

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The method's outputs for its inputs."""
        with whole(self._path), torch.no_grad():
            found: dict[int, Any] = dict(zip(self._plan.inputs, given, strict=True))
            for step in self._steps:
                kind = type(step).__name__
                if kind not in _STEPS:
                    raise not_executed(f"a {kind}")
                _STEPS[kind](self, step, found)
            return [self._value(number, found) for number in self._plan.outputs]

    def _kernel(self, step: Any, found: dict[int, Any]) -> None:
        call = self._operators[step.op_index]
        places, names = [], {}
        for argument, number in zip(call._schema.arguments, step.args, strict=False):
            value = self._made(number, found) if argument.is_out else self._value(number, found)
            if argument.kwarg_only:
                names[argument.name] = value
            else:
                places.append(value)
        call(*places, **names)

    def _delegate(self, step: Any, found: dict[int, Any]) -> None:
        piece = self._pieces[step.delegate_index]
        count = len(step.args) - piece.outputs
        results = piece.run([self._value(number, found) for number in step.args[:count]])
        for number, result in zip(step.args[count:], results, strict=True):
            self._made(number, found).copy_(result)

    def _move(self, step: Any, found: dict[int, Any]) -> None:
        found[step.move_to] = self._value(step.move_from, found)

    def _made(self, number: int, found: dict[int, Any]) -> Tensor:
        """Where a value is written to."""
        declared = self._plan.values[number].val
        made = found[number] = torch.empty(declared.sizes, dtype=DTYPES[declared.scalar_type.name])
        return made

    def _value(self, number: int, found: dict[int, Any]) -> Any:
        if number in found:
            return found[number]
        value = self._plan.values[number].val
        kind = type(value).__name__
        if kind == "Tensor":
            if value.allocation_info is not None or not value.data_buffer_idx:
                raise ValueError(f"value {number} is read before anything has made it")
            data, dtype = bytearray(self._constants[value.data_buffer_idx]), DTYPES[value.scalar_type.name]
            count = math.prod(value.sizes)  # what is stored may be longer, to end on a border
            found[number] = torch.frombuffer(data, dtype=dtype, count=count).reshape(value.sizes)
            return found[number]
        if kind in ("IntList", "TensorList", "OptionalTensorList"):
            return [None if item < 0 else self._value(item, found) for item in value.items]
        if kind in ("BoolList", "DoubleList"):
            return list(value.items)
        return None if kind == "Null" else getattr(value, _SCALARS[kind])


_STEPS: Mapping[str, Callable[[ReferenceProgram, Any, dict[int, Any]], None]] = MappingProxyType(
    {
        "KernelCall": ReferenceProgram._kernel,
        "DelegateCall": ReferenceProgram._delegate,
        "MoveCall": ReferenceProgram._move,
        "FreeCall": lambda *_: None,
    }
)


class ReferenceRunner(Bordered):
    """A bundle by a reference execution. `engine` says what this is wherever results are shown.

    Raises BundleError, and ToleranceError where the file is for another backend than was promised.
    """

    def __init__(
        self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], backend: Backend
    ) -> None:
        self._inputs, self._outputs, self._backend = inputs, outputs, backend
        check_promise(path, ids_in(path), backend)
        self.engine = f"{backend.stand_in}: lowered to {backend.title}, not run by it"
        self._program = ReferenceProgram(path)
        check_declared(path, "input", inputs, self._program.declared(inputs, "inputs"))
        check_declared(path, "output", outputs, self._program.declared(outputs, "outputs"))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        given = [torch.from_numpy(np.array(feeds[spec.name])) for spec in self._inputs]
        found = self._program.run(given)
        return {spec.name: out.numpy() for spec, out in zip(self._outputs, found, strict=True)}

    def execution(self) -> Execution:
        return execution_of(self._program.contents, self._backend)
