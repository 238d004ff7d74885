"""What every target that traces a module shares: where the model lies in what is traced, why tracing failed, and how
parts of another's tracer are replaced for a while."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import nn

from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.errors import first_line
from dualtoken_deploy.models.named_outputs import NamedOutputs
from dualtoken_deploy.models.user_code import place_of

_OURS, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
_FILE = re.compile(r'File "([^"]+)", line (\d+), in (\S+)')
INPUT, ROOT = "input", "model"  # names of what prepares the image, and of the model's own forward


class Around(nn.Module):
    """A module that a target puts around the model; `inside` is the model's name in it."""

    inside: ClassVar[str] = "model"


class Prepares(nn.Module):
    """A module that a target puts before the model, for its picture."""


def is_foreign(module: nn.Module) -> bool:
    """Whether the model is not one of this package's."""
    return any(isinstance(part, NamedOutputs) for part in module.modules())


def own_path(module: nn.Module) -> str:
    """The path in a traced module at which the model itself lies: behind what prepares its picture, and inside of what
    names its outputs."""
    path = []
    while not isinstance(module, NamedOutputs):
        if isinstance(module, Around):
            path.append(module.inside)
        elif isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], (ImageInput, Prepares)):
            path.append("1")
        else:
            return ".".join(path)
        module = module.get_submodule(path[-1])
    return ".".join([*path, "model"])


def path_below(path: str, inside: str) -> str:
    """A module's path in the model; INPUT where it is beside the model, ROOT where it is the model or around it."""
    if path == inside or not path or inside.startswith(f"{path}."):
        return ROOT
    if not inside:
        return path
    return path.removeprefix(f"{inside}.") if path.startswith(f"{inside}.") else INPUT


def why(error: BaseException, module: nn.Module | None = None) -> str:
    """Why a model was not taken, in one line: "the model", or the operator and the module it is in, the place in the
    user's code where the tracer knew it, and the first line of what was raised first.

    `module`: what was traced.
    """
    causes = list(_causes(error))
    frames = [frame for cause in causes for frame in _frames(cause)]
    node = next((n for frame in reversed(frames) if isinstance(n := frame.f_locals.get("node"), torch.fx.Node)), None)
    operator, path, place = "", "", ""
    if node is not None:
        operator, path, place = _of_node(node)
    elif module is not None:
        paths = {id(m): name for name, m in module.named_modules()}
        path = next((paths[id(s)] for f in reversed(frames) if id(s := f.f_locals.get("self")) in paths), "")
    if module is not None and path:
        path = path_below(path, own_path(module))
    place = place or next((p for cause in causes if (p := place_in(str(cause)))), "") or _raised_at(causes)
    what = " in ".join(part for part in (operator, path) if part) or "the model"
    return f"{what}{f' ({place})' if place else ''}: {_reason(causes[-1])}"


def _of_node(node: torch.fx.Node) -> tuple[str, str, str]:
    """The operator, the path of the module that it is in, and the place in the user's code."""
    stack = node.meta.get("nn_module_stack")
    path = "" if not stack else next(reversed(stack.values()))[0]
    return str(node.target).removesuffix(".default"), path, place_in(str(node.meta.get("stack_trace") or ""))


def find_operator(text: str, program: torch.export.ExportedProgram, module: nn.Module) -> str:
    """ "aten.lgamma in stem.0 (net.py:7 in forward)" of the first operator of a traced module that a converter's words
    name; "" where they name none."""
    for node in program.graph.nodes:
        if node.op == "call_function" and re.search(rf"\b{re.escape(str(node.target))}(?!\w)", text):
            operator, path, place = _of_node(node)
            path = path_below(path, own_path(module))
            return f"{operator} in {path}{f' ({place})' if place else ''}"
    return ""


# What torch says of the commonest reasons, and what it means.
_MEANINGS = (
    ("data-dependent", "what it does depends on the picture's values, and a graph has one way; use torch.where"),
    ("No ONNX function found", "ONNX has no such operator"),
)


def _reason(error: BaseException) -> str:
    text = first_line(_exception(error))
    return next((f"{meaning} ({text[:120]})" for words, meaning in _MEANINGS if words in text), text)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from, the first of all last."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def place_in(text: str) -> str:
    """The last line outside of torch and of this package in a printed stack; "" where there is none."""
    own = [f for f in _FILE.findall(text) if not f[0].startswith((_OURS, _TORCH, "<"))]
    return "{}:{} in {}".format(*own[-1]) if own else ""


def stack_names(error: BaseException) -> list[str]:
    """Names of the graph's nodes that a converter had in hand where it raised, the innermost first."""
    frames = [frame for cause in _causes(error) for frame in _frames(cause)]
    held = [getattr(frame.f_locals.get("node"), "name", None) for frame in reversed(frames)]
    return [name for name in held if isinstance(name, str)]


def _raised_at(causes: list[BaseException]) -> str:
    return next((p for cause in reversed(causes) if (p := place_of(cause).removeprefix(" at "))), "")


def _exception(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(str(error))


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """`name` of a module or class replaced by what is made of it; as it was where there is none."""
    whole = getattr(owner, name, None)
    if whole is None:
        yield
        return
    setattr(owner, name, make(whole))
    try:
        yield
    finally:
        setattr(owner, name, whole)
