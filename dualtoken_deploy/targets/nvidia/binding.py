"""The tensorrt module, full or lean, and a logger that keeps what it complains of."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.errors import MissingError

if TYPE_CHECKING:
    import tensorrt

FULL, LEAN = "tensorrt", "tensorrt_lean"
OLDEST = (10, 0)  # strongly typed networks with all that is used here; 10.3, 10.16 and 11.4 are held against it


def load_tensorrt(lean: bool = False) -> Any:
    """The tensorrt module; with `lean`, the lean runtime's where the full one is not installed.

    Raises MissingError where it is not installed, does not load, or is older than OLDEST.
    """
    names = (FULL, LEAN) if lean else (FULL,)
    found = next((name for name in names if importlib.util.find_spec(name)), None)
    if found is None:
        raise MissingError(
            f"{' or '.join(names)} is not installed; TensorRT comes with JetPack, NVIDIA's packages or "
            "`pip install tensorrt`, see docs/tensorrt.md"
        )
    try:
        module = importlib.import_module(found)
    except (ImportError, OSError) as error:  # the libraries beside it are missing, or need a driver
        raise MissingError(f"{found} is installed but does not load here: {str(error).splitlines()[0]}") from error
    version = version_tuple(module.__version__)
    if version < OLDEST:
        raise MissingError(f"{found} {module.__version__} is too old; {'.'.join(map(str, OLDEST))} is the oldest taken")
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
    """A logger that keeps errors in `.errors` and says nothing: they go into the one line that the user sees."""

    class Logger(trt.ILogger):  # type: ignore[misc]  # made when the module is there
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # the binding's own __init__ must run, and super() does not reach it
            self.errors: list[str] = []

        def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)

    return Logger()


def complaint(logger: Any) -> str:
    """The first error that the logger kept, in one line."""
    return logger.errors[0].splitlines()[0] if logger.errors else "it gave no reason"
