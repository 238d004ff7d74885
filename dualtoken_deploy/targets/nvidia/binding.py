"""TensorRT's two libraries behind one door: the module, its version, and a logger that keeps what it complains of."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.errors import MissingError, first_line, install_command

if TYPE_CHECKING:
    import tensorrt


@dataclass(frozen=True)
class Library:
    """One of NVIDIA's inference libraries. Their Python API is one; `lean`: a runtime without builder, if there is one.

    `oldest`: the first version with all that is used here. `install`: how to come by it, the end of a sentence.
    """

    title: str
    module: str
    oldest: tuple[int, ...]
    install: str
    lean: str | None = None


# Strongly typed networks came with 10.0; the recorded versions 10.3, 10.16 and 11.4 are held against what is used here.
TENSORRT = Library(
    title="TensorRT",
    module="tensorrt",
    oldest=(10, 0),
    install="TensorRT comes with JetPack, NVIDIA's packages or `pip install tensorrt`, see docs/tensorrt.md",
    lean="tensorrt_lean",
)
# The meta package `tensorrt-rtx` adds a module of another name around this one; the pinned wheels have it alone.
RTX = Library(
    title="TensorRT for RTX",
    module="tensorrt_rtx_bindings",
    oldest=(1, 7),
    install=f"run: {install_command('tensorrt-rtx')}",
)


def load_library(library: Library, lean: bool = False) -> Any:
    """The library's module; with `lean`, the lean runtime's where the full one is not installed.

    Raises MissingError where it is not installed, does not load, or is too old.
    """
    names = (library.module, library.lean) if lean and library.lean else (library.module,)
    found = next((name for name in names if importlib.util.find_spec(name)), None)
    if found is None:
        raise MissingError(f"{' or '.join(names)} is not installed; {library.install}")
    try:
        module = importlib.import_module(found)
    except (ImportError, OSError) as error:  # the libraries beside it are missing, or need a driver
        raise MissingError(f"{found} is installed but does not load here: {first_line(error)}") from error
    version = version_tuple(module.__version__)
    if version < library.oldest:
        oldest = ".".join(map(str, library.oldest))
        raise MissingError(f"{found} {module.__version__} is too old; {oldest} is the oldest taken")
    return module


def version_tuple(version: str) -> tuple[int, ...]:
    """(10, 16, 1, 11) of "10.16.1.11"; what is no number ends it."""
    numbers = []
    for part in version.split("."):
        if not part.isdecimal():
            break
        numbers.append(int(part))
    return tuple(numbers)


def make_logger(trt: Any) -> Any:
    """A logger that prints nothing and keeps `.errors`, which go into the one line that the user sees, and
    `.warnings`, which go into the manifest."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # made when the module is there
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding's own __init__ must run, and super() does not reach it
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(msg)

    return Logger()


def complaint(logger: Any) -> str:
    """The first error that the logger kept, in one line."""
    return logger.errors[0].strip().partition("\n")[0] if logger.errors else "it gave no reason"
