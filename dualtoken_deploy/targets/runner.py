"""What a runner is: numpy in, numpy out, and it can say what it executes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.errors import BundleError, UsageError
from dualtoken_deploy.spec import Dim, InputContract, TensorSpec

Array = NDArray[Any]
AT_ONCE = 16  # inputs of an open batch: 224x224x3 float32 is 0.6 MB each
REFERENCES = ("eager", "golden")  # what a bundle is held against


def choose_reference(asked: str | None) -> str:
    """One of REFERENCES; unless one is asked for, eager where torch is installed and golden elsewhere."""
    if asked is not None and asked not in REFERENCES:
        raise UsageError(f"unknown reference {asked!r}; valid references: {', '.join(REFERENCES)}")
    return asked or ("eager" if importlib.util.find_spec("torch") else "golden")


@dataclass(frozen=True)
class RunnerOptions:
    """How to run: `device` in the runtime's own words (None: its CPU), CPU threads (None: the runtime's choice),
    and a folder where the runtime may keep compiled models (None: no cache). `throughput`: laid out for many requests
    at a time, where a runtime knows the difference, not for one as fast as can be."""

    device: str | None = None
    threads: int | None = None
    cache_dir: Path | None = None
    throughput: bool = False


@dataclass(frozen=True)
class Execution:
    """What a loaded model really executes, read from the runtime and not from the file.

    `operators` counts executed operators by kind, `precision` maps a kind to the dtypes it runs in, the most frequent
    first. `nodes` maps the name of an executed node to its dtype, where the runtime keeps the names of the graph.
    `float32_share`: the share in float32 of what holds matrix products, where a runtime tells it. `notes`: how well
    this machine fits what was built.
    """

    operators: Mapping[str, int] = field(default_factory=dict)
    precision: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    nodes: Mapping[str, str] = field(default_factory=dict)
    float32_share: float | None = None
    notes: tuple[str, ...] = ()


@runtime_checkable
class Runner(Protocol):
    """A loaded model. Use it as a context manager; `run` may be called any number of times inside."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the model once: {input name: array} -> {output name: array}."""
        ...

    def execution(self) -> Execution:
        """Operators and dtypes that this runtime executes for the loaded model."""
        ...


def engine_of(runner: Runner) -> str | None:
    """What stands in for the target's own runtime, in words to be shown with every result; None where nothing does."""
    engine: str | None = getattr(runner, "engine", None)
    return engine


def counted(inputs: Sequence[Array] | Array, tell: Callable[[str], None], what: str) -> Iterator[Array]:
    """The inputs, and of each that is taken its number: "running eager on held-out images: 17/96"."""
    for number, one in enumerate(inputs):
        tell(f"{what}: {number}/{len(inputs)}")
        yield one


def run_each(runner: Runner, contract: InputContract, inputs: Iterable[Array]) -> Iterator[dict[str, Array]]:
    """The outputs for inputs without a batch axis, one dict for each, the batch axis 1 first.

    Fed in the batch that the contract fixes, the last one filled up; AT_ONCE at a time where it is open.
    """
    batch = contract.batch or AT_ONCE
    waiting = iter(inputs)
    while part := list(itertools.islice(waiting, batch)):
        filled = part + part[-1:] * (batch - len(part)) if contract.batch is not None else part
        outputs = runner.run({contract.tensor.name: np.stack(filled)})
        for i in range(len(part)):
            yield outputs if batch == 1 else {name: array[i : i + 1] for name, array in outputs.items()}


@dataclass(frozen=True)
class Declared:
    """What a model's file says of one of its inputs or outputs: numpy's name of the dtype, and the shape; None where it
    is open or not said."""

    dtype: str | None
    shape: tuple[int | None, ...] | None


def check_declared(path: Path, kind: str, specs: Sequence[TensorSpec], declared: Mapping[str, Declared]) -> None:
    """Holds the manifest's tensors of a `kind`, "input" or "output", against those of the file that was loaded.

    Raises BundleError where one is not there, is of another dtype or shape, or is an input that nothing would feed. A
    size that the file leaves open may be fixed by the manifest, not the other way round.
    """
    names = [spec.name for spec in specs]
    strange = [name for name in declared if name not in names] if kind == "input" else []
    if strange or not declared.keys() >= set(names):
        raise BundleError(
            f"{path} has the {kind}s {', '.join(declared)}, the manifest says {', '.join(names)}; export it again"
        )
    for spec in specs:
        found = declared[spec.name]
        if found.dtype not in (None, spec.dtype) or not (found.shape is None or _fits(spec.shape, found.shape)):
            said = f"{found.dtype or spec.dtype} {_sizes(found.shape or spec.shape)}"
            raise BundleError(
                f"the {kind} {spec.name} of {path} is {said}, the manifest says {spec.dtype} {_sizes(spec.shape)}; "
                "export it again"
            )


def _fits(said: Sequence[Dim], found: Sequence[int | None]) -> bool:
    return len(said) == len(found) and all(b in (None, a) for a, b in zip(said, found, strict=True))


def _sizes(shape: Sequence[Dim | None]) -> str:
    return "[" + ", ".join("?" if side is None else str(side) for side in shape) + "]"


def planar_spec(spec: TensorSpec) -> TensorSpec:
    """What `planar` makes of an array of a spec: float32, and NCHW of NHWC."""
    order = (0, 3, 1, 2) if spec.layout == "NHWC" else range(len(spec.shape))
    return TensorSpec(spec.name, "float32", spec.layout, tuple(spec.shape[axis] for axis in order))


def planar(array: Array, spec: TensorSpec) -> Array:
    """What Apple's programs take, float32 NCHW; of a picture (NHWC) the pixels as they are, 0..255."""
    if spec.layout == "NHWC":
        array = array.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(array, np.float32)


def planar_shape(contract: InputContract) -> tuple[int, ...]:
    """The shape of what `planar` gives; a batch of one where it is open."""
    batch = contract.batch or 1
    return (batch, *contract.size) if contract.kind == "series" else (batch, 3, *contract.size)


class Bordered:
    """The border that most runners share: the specs they were given, and a context that gives nothing back."""

    _inputs: tuple[TensorSpec, ...]
    _outputs: tuple[TensorSpec, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@runtime_checkable
class AsyncRunner(Runner, Protocol):
    """A runner whose runtime can keep several requests in flight."""

    def run_async(self, feeds: Mapping[str, Array], count: int) -> None:
        """Runs the same feeds `count` times, overlapped as the runtime likes; returns when all are done."""
        ...
