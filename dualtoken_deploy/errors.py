"""Every error a user can meet. Each says what, where and how to mend it; the command line exits with its code.

DualTokenError
├── UsageError        2  an unknown variant, target, precision or option; an output folder that exists
├── MissingError      3  an extra, a runtime, a provider or a device that is not here
├── InputError        4
│   ├── WeightsError     weights that are unreadable or do not fit the model
│   ├── ImageError       an image that cannot be decoded, or should not be
│   │   └── LargeImageError  one of more pixels than are taken
│   ├── DatasetError     a data folder without what was asked of it
│   ├── BundleError      a bundle that is incomplete, changed, or newer than this program
│   └── OutputError      a place that cannot be written to
├── ToleranceError    5  measured error, accuracy or precision outside of what was promised
└── ConversionError   6  the vendor's exporter, simplifier or converter failed
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

PACKAGE = "dualtoken-deploy"


class Note(UserWarning):
    """What a user should know though nothing fails by it; the command line prints it as one line on stderr."""


class DualTokenError(Exception):
    """Base of every error that is part of the product."""

    exit_code = 1


class UsageError(DualTokenError):
    exit_code = 2


class MissingError(DualTokenError):
    exit_code = 3


class InputError(DualTokenError):
    exit_code = 4


class WeightsError(InputError):
    pass


class ImageError(InputError):
    pass


class LargeImageError(ImageError):
    pass


class DatasetError(InputError):
    pass


class BundleError(InputError):
    pass


class OutputError(InputError):
    pass


class ToleranceError(DualTokenError):
    exit_code = 5


class ConversionError(DualTokenError):
    exit_code = 6


def install_command(*extras: str) -> str:
    """The command that installs this program with extras, from where it came: its checkout, its wheel, or an index."""
    asked = f"[{','.join(dict.fromkeys(extras))}]" if extras else ""
    place, editable = _came_from()
    if place is None:
        return f"pip install '{PACKAGE}{asked}'"
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{place}{asked}')}"


def _came_from() -> tuple[str | None, bool]:
    """The folder or wheel that was installed (PEP 610), and whether editable; None: an index has it."""
    from importlib import metadata

    try:
        found = (one.read_text("direct_url.json") for one in metadata.distributions(name=PACKAGE))
        said = json.loads(next(filter(None, found), "{}"))  # a checkout has an egg-info without it beside the package
        place = unquote(urlsplit(said["url"]).path)
        editable = bool(said.get("dir_info", {}).get("editable"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, False
    return (place, editable) if Path(place).exists() else (Path(place).name if place.endswith(".whl") else None, False)


def missing_extra(extra: str | Sequence[str], why: str) -> MissingError:
    """The one sentence for missing optional dependencies: names the one `pip install` to run."""
    extras = [extra] if isinstance(extra, str) else list(dict.fromkeys(extra))
    what = "extra" if len(extras) == 1 else "extras"
    return MissingError(f"{why} needs the {what} [{','.join(extras)}]; run: {install_command(*extras)}")


def out_of_memory(error: Exception) -> bool:
    """Whether memory was refused: Python, PyTorch, ONNX Runtime and OpenVINO each say it in their own words."""
    text = str(error).lower()
    said = ("allocate memory", "bad_alloc", "bad allocation", "out of memory")
    return isinstance(error, MemoryError) or any(words in text for words in said)


def first_line(error: Exception) -> str:
    """A vendor's exception as one line: the first of its text, or the name of its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def last_line(error: Exception) -> str:
    """The last of its text, where a vendor says what went wrong behind where it did."""
    text = str(error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
