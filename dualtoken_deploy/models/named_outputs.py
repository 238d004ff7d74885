"""What a model of anyone's gives, as a tuple of tensors with names: from a tensor, a tuple, a dict or a dataclass."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.models.onnx_reference import OnnxReference
from dualtoken_deploy.models.user_code import blamed
from dualtoken_deploy.spec import Dim, TensorSpec
from dualtoken_deploy.tasks.base import OutputKind
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.tasks.tensors import TENSORS

PICTURES = "pixel_values"  # what transformers calls the picture

_LAYOUTS = MappingProxyType({1: "N", 2: "NC", 3: "NLC", 4: "NCHW"})


class NamedOutputs(nn.Module):
    """The user's `model` with its outputs as a tuple: of the picture's dtype, or int32 for integers and truths.

    `picks`: (place among the model's outputs, name), in the order of the tuple. `series`: it takes (B, L, M). Paths of
    the model's own modules start with "model."; exporters take that off.
    """

    def __init__(self, model: nn.Module, picks: Sequence[tuple[int, str]], series: bool = False) -> None:
        super().__init__()
        self.model = model
        self.picks, self.series = tuple(picks), series
        self._keyword = picture_keyword(model)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for _, name in self.picks)

    def example_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        """That of one input of this size."""
        return (1, *size) if self.series else (1, 3, *size)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        given = self.model(image) if self._keyword is None else self.model(**{self._keyword: image})
        found = flatten(given)
        values = (found[place][1] for place, _ in self.picks)
        return tuple(v.to(image.dtype if v.is_floating_point() else torch.int32) for v in values)


def called(model: nn.Module) -> str:
    """A module for messages: its class, or the ONNX file that it runs."""
    return str(model.path) if isinstance(model, OnnxReference) else type(model).__name__


def picture_keyword(model: nn.Module) -> str | None:
    """The keyword under which forward takes the picture; None where it is the first argument.

    Raises UsageError where forward needs more than the picture.
    """
    parameters = list(inspect.signature(model.forward).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    keyword = PICTURES if PICTURES in {p.name for p in parameters} and positional[0].name != PICTURES else None
    rest = [p for p in parameters if p.name != (keyword or (positional[0].name if positional else ""))]
    needed = [
        p.name for p in rest if p.default is inspect.Parameter.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise UsageError(
            f"forward of {called(model)} needs {', '.join(needed)} beside the picture; give a module whose "
            "forward takes the picture alone"
        )
    return keyword


def flatten(given: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """(name, tensor) of everything in what a model gave, in its order; None entries are left out.

    A tensor alone, and those of a tuple, have the places as names ("", "0", "1"), others their keys; what lies in one
    another is joined by "_". Raises InputError on anything that is no tensor.
    """
    if given is None:
        return []
    if isinstance(given, Tensor):
        return [(name, given)]
    if isinstance(given, Mapping):
        items: list[tuple[str, Any]] = [(str(key), value) for key, value in given.items()]
    elif is_dataclass(given) and not isinstance(given, type):
        items = [(field.name, getattr(given, field.name)) for field in fields(given)]
    elif isinstance(given, tuple) and hasattr(given, "_fields"):
        items = list(zip(given._fields, given, strict=True))
    elif isinstance(given, (tuple, list)):
        items = [(str(place), value) for place, value in enumerate(given)]
    else:
        where = f"output {name!r}" if name else "the output"
        raise InputError(f"{where} is a {type(given).__name__}, which is no tensor; let forward give tensors alone")
    return [found for key, value in items for found in flatten(value, f"{name}_{key}" if name else key)]


def look_at(model: nn.Module, image: Tensor) -> list[tuple[str, Tensor]]:
    """The named tensors that a user's model gives for a picture (B, 3, H, W).

    Raises InputError where forward raises, gives no tensors, or other ones for the same picture or of other sizes for
    another one.
    """
    keyword = picture_keyword(model)

    def run(picture: Tensor) -> list[tuple[str, Tensor]]:
        size = "x".join(map(str, picture.shape[2:]))
        with blamed(f"{called(model)} on a picture of {size}"), torch.no_grad():
            given = model(picture) if keyword is None else model(**{keyword: picture})
        return flatten(given)

    first, again, other = run(image), run(image), run(image.flip(0, 2) * -0.5)
    if not first:
        raise InputError(f"{called(model)} gives no tensors; let forward return what the bundle is to give")
    _check_steady(called(model), first, again, other)
    return first


def _check_steady(
    model: str, first: list[tuple[str, Tensor]], again: list[tuple[str, Tensor]], other: list[tuple[str, Tensor]]
) -> None:
    shapes, others = [(n, tuple(t.shape)) for n, t in first], [(n, tuple(t.shape)) for n, t in other]
    if shapes != others:
        changed = next((n for (n, a), (_, b) in zip(shapes, others, strict=False) if a != b), "their number")
        raise InputError(
            f"the sizes of {model}'s outputs depend on the picture ({changed or 'the output'}), and a bundle's are "
            "fixed; pad what it finds to one size"
        )
    for (name, value), (_, same) in zip(first, again, strict=True):
        if value.shape != same.shape or not torch.equal(torch.nan_to_num(value), torch.nan_to_num(same)):
            raise InputError(
                f"{model} gives another {name or 'output'} for the same picture; something in it is random or keeps "
                "state although it is in evaluation mode"
            )


def choose(found: Sequence[tuple[str, Tensor]], task: str, names: Sequence[str]) -> tuple[tuple[int, str], ...]:
    """Which outputs a bundle of this task has: (place, name) of each.

    `names`: the user's; those of the model's own choose, others rename. Raises UsageError where they do not fit, or
    where the task's outputs are not among them.
    """
    chosen = _by_names(found, names)
    alternatives = get_task(task).outputs
    if not alternatives:
        return tuple((place, _identifier(name, place, len(chosen))) for place, name in chosen)
    values = [value for _, value in found]
    for wanted in alternatives:
        picks = [_pick(one, chosen, values, len(wanted)) for one in wanted]
        if None not in picks:
            return tuple((place, one.name) for place, one in zip(picks, wanted, strict=True) if place is not None)
    needs = " or ".join(
        " and ".join(f"{one.name} ({one.rank} axes{', integers' if one.indices else ''})" for one in wanted)
        for wanted in alternatives
    )
    has = ", ".join(f"{name or 'a tensor'} {tuple(values[place].shape)}" for place, name in chosen)
    raise UsageError(
        f"task {task} needs {needs}, and the model gives {has}; choose with --output-names, or take "
        f"--task {TENSORS.name}"
    )


def _by_names(found: Sequence[tuple[str, Tensor]], names: Sequence[str]) -> list[tuple[int, str]]:
    own = [name for name, _ in found]
    if not names:
        return list(enumerate(own))
    repeated = [name for name in names if list(names).count(name) > 1]
    if repeated:
        raise UsageError(f"output name {repeated[0]!r} is given twice; each output needs one of its own")
    if set(names) <= set(own):
        return [(own.index(name), name) for name in names]
    if len(names) == len(own):
        return list(enumerate(names))
    listed = ", ".join(name or "a tensor without a name" for name in own)
    raise UsageError(f"the output names {', '.join(names)} do not fit; the model gives {len(own)}: {listed}")


def fits(one: OutputKind, value: Tensor) -> bool:
    """Whether a tensor can be that output."""
    return value.ndim == one.rank and value.is_floating_point() != one.indices


def _pick(one: OutputKind, chosen: Sequence[tuple[int, str]], values: Sequence[Tensor], of: int) -> int | None:
    """The output of that name, or, for a task with one output, the only one of its kind."""
    for place, name in chosen:
        if name == one.name and fits(one, values[place]):
            return place
    fitting = [place for place, _ in chosen if fits(one, values[place])]
    return fitting[0] if of == 1 and len(fitting) == 1 else None


def describe(model: NamedOutputs, task: str, image_size: tuple[int, int], batch: Dim) -> tuple[TensorSpec, ...]:
    """The specifications of what the model gives for `batch` pictures ("batch": any number) of (H, W).

    Raises InputError where the first axis of an output is not the batch.
    """
    count = batch if isinstance(batch, int) else 2
    pictures = f"{count} pictures of {image_size[0]}x{image_size[1]}"
    with blamed(f"{called(model.model)} on {pictures}"), torch.no_grad():
        values = model(torch.zeros(count, *model.example_shape(image_size)[1:]))
    specs = []
    for name, value in zip(model.names, values, strict=True):
        if value.ndim == 0 or value.shape[0] != count:
            raise InputError(
                f"output {name} of {count} pictures has shape {tuple(value.shape)}: its first axis is not the batch; "
                "leave it out with --output-names"
            )
        kinds = (one for wanted in get_task(task).outputs for one in wanted)
        layouts = {one.name: one.layout for one in kinds if fits(one, value)}
        layout = layouts.get(name) or _LAYOUTS.get(value.ndim, "N" + "D" * (value.ndim - 1))
        dtype = str(value.dtype).removeprefix("torch.")
        specs.append(TensorSpec(name, dtype, layout, (batch, *value.shape[1:])))
    return tuple(specs)


def _identifier(name: str, place: int, count: int) -> str:
    """A name that every target takes: letters, digits and underscores."""
    if not name or name.isdecimal():
        return "output" if count == 1 else f"output_{place}"
    plain = re.sub(r"\W", "_", name)
    return plain if not plain[0].isdigit() else f"output_{plain}"
