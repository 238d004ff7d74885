"""Reaches a model of the user's own: imports what a reference names, calls it, and says where it went wrong.

This runs the user's code. Nothing here is reached by opening a bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dualtoken_deploy.errors import DualTokenError, InputError, UsageError, first_line

EXAMPLES = "package.module:callable or path/to/file.py:callable"
_OURS = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


def split_reference(reference: str) -> tuple[str, str]:
    """(module or file, dotted name in it). Raises UsageError on anything else than EXAMPLES; looks at no file."""
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name or not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"model {reference!r} is no reference; give {EXAMPLES}")
    if not where.endswith(".py") and not all(part.isidentifier() for part in where.split(".")):
        raise UsageError(f"{where!r} of model {reference!r} is neither a Python file nor a module; give {EXAMPLES}")
    return where, name


def build_model(reference: str, arguments: Mapping[str, Any], seed: int) -> nn.Module:
    """What the callable of a reference returns for these arguments; torch's random numbers start at `seed`.

    Raises UsageError where there is no such module, callable or argument, InputError where the code raises or returns
    no nn.Module.
    """
    where, name = split_reference(reference)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for what importing initialises too
        found = _look_up(_import(where), where, name)
        if isinstance(found, nn.Module) and not arguments:
            return found
        if not callable(found):
            raise UsageError(f"{reference} is a {type(found).__name__} and cannot be called; give {EXAMPLES}")
        _check_arguments(found, reference, arguments)
        with blamed(f"calling {reference}"):
            made = found(**arguments)
    if not isinstance(made, nn.Module):
        raise InputError(
            f"{reference} returned a {type(made).__name__}, not a torch.nn.Module; return the model itself"
        )
    return made


def source_sha256(reference: str) -> str | None:
    """Hash of the file that a reference names; None for a module, whose files are the environment's matter."""
    path = Path(split_reference(reference)[0])
    if path.suffix != ".py" or not path.is_file():
        return None
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
    """Turns whatever the user's code raises into one InputError with its place; what it prints goes to stderr."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except DualTokenError:
        raise
    except (Exception, SystemExit) as error:  # any code may raise anything
        text = first_line(error) if isinstance(error, Exception) else f"exit {error}"
        raise InputError(f"{what} raised {type(error).__name__}{place_of(error)}: {text}") from error


def place_of(error: BaseException) -> str:
    """ " at file.py:12 in forward": the innermost line outside of torch and of this package; "" where there is none."""
    if isinstance(error, SyntaxError):
        return f" at {error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith((_OURS, _TORCH, "<"))]
    return f" at {own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else ""


def _look_up(found: Any, where: str, name: str) -> Any:
    for part in name.split("."):
        if not hasattr(found, part):
            names = [n for n in vars(found) if not n.startswith("_") and callable(getattr(found, n))]
            listed = f"; it has {', '.join(names[:8])}" if names else ""
            raise UsageError(f"{where} has no {name!r}{listed}")
        found = getattr(found, part)
    return found


def _import(where: str) -> ModuleType:
    if where.endswith(".py"):
        return _import_file(Path(where))
    _reach(Path.cwd())
    with blamed(f"importing {where}"):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{where}.".startswith(f"{error.name}."):
                raise  # something that the user's module needs
            missing = error.name
    raise UsageError(f"no module named {missing!r} from here or in this environment; give {EXAMPLES}")


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no file {path}; give {EXAMPLES}")
    _reach(path.resolve().parent)
    name = f"dualtoken_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} cannot be imported as Python; give {EXAMPLES}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up
    try:
        with blamed(f"importing {path}"):
            spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    return module


def _reach(folder: Path) -> None:
    """What lies beside the user's code can be imported, now and from within `forward`; installed packages go first."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _check_arguments(function: Any, reference: str, arguments: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # of a built-in, which says so itself when it is called
    try:
        signature.bind(**arguments)
    except TypeError as error:
        listed = ", ".join(signature.parameters) or "none"
        raise UsageError(f"{reference}: {error}; its arguments: {listed}") from error
