"""What a module of anyone's does with its tensors, seen while it runs once: each call of torch, and who reads what.

Nothing is read from its source and nothing is traced, so that code which no tracer takes can be looked at as well.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

Value = int | str  # a number for what was computed, a name for a parameter or buffer

# What gives a tensor as it was: where the very same one comes back, nothing was done to it.
_SAME = frozenset({"contiguous", "dropout", "to", "float", "double", "type", "type_as", "alpha_dropout", "detach"})


@dataclass(frozen=True)
class Call:
    """A function of torch as the module called it; tensors in `args` and `kwargs` are Values. `within`: the path of the
    module whose forward called it."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    results: tuple[int, ...]
    within: str

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument wherever it was given."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    @property
    def values(self) -> list[Value]:
        return [v.value for v in _leaves((self.args, dict(self.kwargs))) if isinstance(v, Read)]


@dataclass(frozen=True)
class Read:
    """A tensor among a call's arguments."""

    value: Value


class Observed:
    """The calls of one run, in their order. `outputs`: what the run gave. `narrow`: whether any float result was of
    less than 64 bits."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.outputs: frozenset[Value] = frozenset()
        self.narrow = False

    def index(self) -> None:
        """Called once the run is over."""
        self._makers = {result: call for call in self.calls for result in call.results}
        self._readers: dict[Value, list[Call]] = defaultdict(list)
        for call in self.calls:
            for value in call.values:
                self._readers[value].append(call)
        self._made = Counter(result for call in self.calls for result in call.results)

    def maker(self, value: Any) -> Call | None:
        """The one call that made a value; None for what is a parameter, or was changed in place."""
        value = value.value if isinstance(value, Read) else value
        return self._makers.get(value) if self._made[value] == 1 else None

    def readers(self, value: Value) -> list[Call]:
        return self._readers[value]

    def only_reader(self, value: Value) -> Call | None:
        """The one call that reads a value that is no output."""
        readers = self._readers[value]
        return readers[0] if len(readers) == 1 and value not in self.outputs else None


def observe(module: nn.Module, image: Tensor, flat: Any) -> Observed:
    """Runs `module(image)` and says what it called; `flat`: its outputs -> the tensors among them."""
    observed = Observed()
    paths = {id(m): name for name, m in module.named_modules()}
    mode = _Recorder(module, observed)
    with torch.no_grad(), _stack(paths, mode.stack), mode:
        outputs = flat(module(image))
    observed.outputs = frozenset(mode.value(t) for t in outputs)
    observed.index()
    return observed


class _Recorder(TorchFunctionMode):
    def __init__(self, module: nn.Module, observed: Observed) -> None:
        super().__init__()
        self.observed = observed
        self.stack: list[str] = []
        self._names: dict[int, str] = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            self._names[id(tensor)] = name
        self._numbers: Any = WeakIdKeyDictionary()
        self._count = 0

    def value(self, tensor: Tensor) -> Value:
        if id(tensor) in self._names:
            return self._names[id(tensor)]
        if tensor not in self._numbers:
            self._count += 1
            self._numbers[tensor] = self._count
        number: int = self._numbers[tensor]
        return number

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: dict[str, Any] = kwargs or {}
        result = func(*args, **given)
        made = [t for t in _leaves(result) if isinstance(t, Tensor)]
        name = getattr(func, "__name__", str(func))
        read = [t for t in _leaves((args, given)) if isinstance(t, Tensor)]
        if not made or (name in _SAME and len(made) == 1 and any(made[0] is t for t in read)):
            return result
        self.observed.narrow |= any(t.is_floating_point() and t.dtype != torch.float64 for t in made)
        numbers = tuple(n for t in made if isinstance(n := self.value(t), int))
        within = self.stack[-1] if self.stack else ""
        self.observed.calls.append(Call(name, self._plain(args), self._plain(given), numbers, within))
        return result

    def _plain(self, given: Any) -> Any:
        """The arguments without their tensors, so that no activation is kept alive."""
        if isinstance(given, Tensor):
            return Read(self.value(given))
        if isinstance(given, dict):
            return {key: self._plain(value) for key, value in given.items()}
        if isinstance(given, (tuple, list)):
            return tuple(self._plain(value) for value in given)
        return given


def _leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, dict):
        given = tuple(given.values())
    if isinstance(given, (tuple, list)):
        for item in given:
            yield from _leaves(item)
    else:
        yield given


@contextmanager
def _stack(paths: Mapping[int, str], stack: list[str]) -> Iterator[None]:
    """Keeps the path of the module that runs on top of `stack`."""

    def enter(module: nn.Module, _: Any) -> None:
        if id(module) in paths:
            stack.append(paths[id(module)])

    def leave(module: nn.Module, _: Any, __: Any) -> None:
        if id(module) in paths:
            stack.pop()

    hooks = nn.modules.module
    handles = [hooks.register_module_forward_pre_hook(enter), hooks.register_module_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
