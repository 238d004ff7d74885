"""Runs a Program operation by operation, and holds every result to the type that the program declares for it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.targets.coreml.mil.ops import OPERATIONS, Implementation
from dualtoken_deploy.targets.coreml.mil.program import Operation, Program, Type, Value
from dualtoken_deploy.targets.runner import Array

Observer = Callable[[str, Array], None]  # is told the name and the value of each result

_NO_TENSOR = ("STRING", "LIST", "DICTIONARY")


class MilProgram:
    """A program ready to run. Constants are decoded and checked once, here.

    Raises BundleError that names each operation or parameter that is not executed here.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._check_operations()
        self._constants: dict[str, Value] = {}
        self._wide: dict[str, Value] = {}  # float32 copies of float16 constants, made when first asked for
        self._steps: list[Operation] = []
        for operation in program.operations:
            if operation.kind == "const":
                name, declared = operation.outputs[0]
                self._constants[name] = _checked(operation, name, declared, operation.constants["val"])
            elif all(n in self._constants for names in operation.inputs.values() for n in names):
                self._constants.update(self._results(operation, self._constants))  # computed from constants alone
            else:
                self._steps.append(operation)
        self._last_use = self._find_last_uses()

    @property
    def steps(self) -> tuple[Operation, ...]:
        """What runs for each input; constants, and what is computed from constants alone, are done."""
        return tuple(self._steps)

    def run(self, feeds: Mapping[str, Array], observe: Observer | None = None) -> dict[str, Any]:
        """{input: array} -> {output: array, label or dictionary}. Arrays are cast to the declared dtype of the input.

        Raises BundleError where a shape is not the declared one.
        """
        values: dict[str, Value] = {}
        for name, declared in self.program.inputs.items():
            if name not in feeds:
                raise BundleError(f"the program needs input {name!r}; it was given {', '.join(feeds) or 'nothing'}")
            values[name] = _checked_input(name, declared, feeds[name])
        for number, operation in enumerate(self._steps):
            results = self._results(operation, values)
            if observe is not None:
                for name, value in results.items():
                    if isinstance(value, np.ndarray):
                        observe(name, value)
            values.update(results)
            for name in self._last_use.get(number, ()):
                del values[name]
        return {name: values[name] if name in values else self._constants[name] for name in self.program.outputs}

    def operators(self) -> dict[str, int]:
        """Executed operations by kind."""
        return dict(Counter(op.kind for op in self._steps).most_common())

    def precision(self) -> dict[str, tuple[str, ...]]:
        """Dtypes of each kind's first result, the most frequent first."""
        found: dict[str, Counter[str]] = {}
        for op in self._steps:
            declared = op.outputs[0][1].dtype
            found.setdefault(op.kind, Counter())[declared.lower()] += 1
        return {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(found.items())}

    def _check_operations(self) -> None:
        unknown = Counter(op.kind for op in self.program.operations if op.kind not in {*OPERATIONS, "const"})
        if unknown:
            names = ", ".join(f"{kind} ({count})" for kind, count in sorted(unknown.items()))
            raise BundleError(f"the program has operations that are not executed here: {names}; run it on macOS")
        for op in self.program.operations:
            if op.kind == "const":
                continue
            known = inspect.signature(OPERATIONS[op.kind].function).parameters
            extra = sorted({*op.inputs, *op.constants} - set(known))
            if extra:
                raise BundleError(f"{op.kind} {op.name!r} has parameters not executed here: {', '.join(extra)}")

    def _results(self, op: Operation, values: Mapping[str, Value]) -> dict[str, Value]:
        implementation = OPERATIONS[op.kind]
        arguments: dict[str, Any] = dict(op.constants)
        for parameter, names in op.inputs.items():
            found = [self._argument(name, values, implementation) for name in names]
            variadic = parameter == "values"
            arguments[parameter] = found if variadic or len(found) > 1 else found[0]
        if implementation.wide:
            arguments = {key: _widened(value) for key, value in arguments.items()}
        try:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                result = implementation.function(**arguments)
        except (ValueError, TypeError, IndexError, KeyError) as error:
            raise BundleError(f"{op.kind} {op.name!r} cannot be executed: {error}") from error
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(op.outputs):
            raise BundleError(
                f"{op.kind} {op.name!r} gives {len(results)} results, the program declares {len(op.outputs)}"
            )
        return {
            name: _checked(op, name, declared, value)
            for (name, declared), value in zip(op.outputs, results, strict=True)
        }

    def _argument(self, name: str, values: Mapping[str, Value], implementation: Implementation) -> Value:
        if name in values and values is not self._constants:
            return values[name]
        if name not in self._constants:
            raise BundleError(f"the program reads {name!r} before anything has made it")
        constant = self._constants[name]
        if not implementation.wide:
            return constant
        if name not in self._wide:
            self._wide[name] = _widened(constant)
        return self._wide[name]

    def _find_last_uses(self) -> dict[int, list[str]]:
        """For each step, the values that nothing after it reads."""
        last: dict[str, int] = {}
        for number, op in enumerate(self._steps):
            for name, _ in op.outputs:
                last[name] = number  # freed at once unless it is read
            for names in op.inputs.values():
                for name in names:
                    if name not in self._constants:
                        last[name] = number
        freed: dict[int, list[str]] = {}
        for name, number in last.items():
            if name not in self.program.outputs:
                freed.setdefault(number, []).append(name)
        return freed


def _widened(value: Value) -> Value:
    if isinstance(value, np.ndarray) and value.dtype == np.float16:
        return value.astype(np.float32)
    if isinstance(value, list):
        return [_widened(item) for item in value]
    return value


def _checked(op: Operation, name: str, declared: Type, value: Value) -> Value:
    """The value in its declared dtype. Raises BundleError where its shape is not the declared one."""
    if declared.dtype in _NO_TENSOR:
        return value
    array = np.asarray(value)
    if not _fits(array.shape, declared):
        raise BundleError(
            f"{op.kind} {op.name!r}: {name!r} has shape {array.shape}, the program declares {declared.shape}"
        )
    wanted = declared.numpy
    if array.dtype == wanted:
        return array
    if array.dtype.kind != wanted.kind:
        raise BundleError(f"{op.kind} {op.name!r}: {name!r} is {array.dtype}, the program declares {wanted}")
    with np.errstate(over="ignore"):  # beyond float16's range is infinity, as on the device
        return array.astype(wanted)


def _checked_input(name: str, declared: Type, value: Array) -> Array:
    if not _fits(value.shape, declared):
        raise BundleError(f"input {name!r} has shape {value.shape}, the program takes {declared.shape}")
    with np.errstate(over="ignore"):
        return value.astype(declared.numpy)


def _fits(shape: tuple[int, ...], declared: Type) -> bool:
    return len(shape) == len(declared.shape) and all(
        d is None or n == d for n, d in zip(shape, declared.shape, strict=True)
    )
