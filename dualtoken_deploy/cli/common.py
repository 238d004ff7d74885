"""What the commands share: their common options, progress, and how results are shown."""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from dualtoken_deploy.cli.progress import progress, remark, say
from dualtoken_deploy.errors import OutputError, UsageError, missing_extra
from dualtoken_deploy.use.text import printable

__all__ = ["progress", "remark", "say"]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Bundles = Annotated[list[Path] | None, typer.Argument(help="Bundle folders; without any, all under ./bundles.")]
OneBundle = Annotated[Path, typer.Argument(help="Bundle folder.")]
Device = Annotated[str | None, typer.Option(help="Device in the runtime's own words; its CPU unless given.")]
AllowNative = Annotated[
    bool, typer.Option("--allow-native", help="Run code of a bundle that was not made here by you; trust who made it.")
]
Licenses = Annotated[
    list[str] | None,
    typer.Option("--license", help="SPDX expression; of one part: weights=EXPR, code=EXPR. May be repeated."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take this many images, spread over the set.")]
ROUNDS = typer.Option(min=1, help="Interleaved rounds.")
SECONDS = typer.Option(min=0.01, help="Seconds for each contestant in a round.")
YARDSTICK_ROUNDS = typer.Option(min=0, help="Rounds beside the yardstick; 0: no latency.")
YARDSTICK_SECONDS = typer.Option(min=0.01, help="Seconds in a round for each of the two.")


def answer(text: str) -> None:
    """A line of the answer, on stdout."""
    write_out(printable(text))


def write_out(text: str) -> None:
    """Raises OutputError where stdout takes no more; a reader that has gone is no error (main)."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _give_up_stdout()
        raise OutputError(f"cannot write the answer: {error.strerror or error}; send it where there is room") from error


def _give_up_stdout() -> None:
    """What is still in the buffer would fail once more at the end of the process."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Document:
    """The one JSON document of a command, kept until its end: an error that comes after it belongs into it."""

    def __init__(self) -> None:
        self.data: Any = None
        self.asked = False

    def begin(self, asked: bool) -> None:
        self.data, self.asked = None, asked

    def end(self, code: int = 0, message: str = "") -> None:
        """Prints the document, where one was asked for. An error is added to an object; a list, whose rows say what
        failed, stays as it is."""
        if not self.asked:
            return
        data, self.asked = self.data, False
        if code:
            error = {"error": {"code": code, "message": message}}
            data = error if data is None else data | error if isinstance(data, dict) else data
        if data is not None:
            write_out(json.dumps(data, indent=2, allow_nan=False))


DOCUMENT = Document()


def take_any_text() -> None:
    """What the console's encoding cannot show is shown as an escape; without this a path would end in a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def show(as_json: bool, data: Any, draw: Callable[[Any], Any]) -> None:
    """JSON, or the table that `draw` makes of the report module."""
    if as_json:
        DOCUMENT.data, DOCUMENT.asked = data, True
        return
    from rich.console import Console

    from dualtoken_deploy.use import report

    screen, drawn = Console(), _Drawn()
    # a pipe or a file has no width; a table cut to 80 columns would lose its figures
    width = screen.width if screen.is_terminal else 200
    console = Console(file=drawn, width=width, force_terminal=screen.is_terminal)
    console.print(report.fitted(draw(report), console))
    write_out(drawn.getvalue().rstrip("\n"))


class _Drawn(io.StringIO):
    """What rich draws, with the characters that stdout has."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(sys.stdout, "encoding", None) or "utf-8"


def find_bundles(given: list[Path] | None) -> list[Path]:
    """The bundles named, or every one under ./bundles that can be run. Raises UsageError where there is none."""
    found = given or sorted(p.parent for p in Path("bundles").glob("*/manifest.json") if p.parent.name[0] != ".")
    if given is None:
        found = [path for path in found if not _left_out(path)]
    if not found:
        raise UsageError(
            "no bundle was named and there is none under ./bundles; make one with: dualtoken export --variant t-mix "
            "--weights digits --target onnxruntime"
        )
    return list(found)


def _left_out(path: Path) -> bool:
    """Whether no device has run a bundle yet; says so, and which step that is."""
    from dualtoken_deploy.bundle.manifest import COMPLETE
    from dualtoken_deploy.bundle.store import Bundle

    state = Bundle.open(path, verify=False).manifest.state
    if state == COMPLETE:
        return False
    lacks = {"prepared": "prepared, not built", "compiled": "compiled, not executed"}[state]
    remark(f"note: {path} is {lacks}, and left out; on the device run: dualtoken build {path}")
    return True


def model_options(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs as keyword arguments: numbers where they read as such."""
    options: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if name in ("image_size", "num_classes"):
            raise UsageError(f"{name} is no --option; give {'--image-size' if name == 'image_size' else '--classes'}")
        if not separator or not name:
            raise UsageError(f"option {pair!r} is not NAME=VALUE of a model option, e.g. global_tokens=3")
        options[name] = _number(text)
    return options


def json_arguments(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs whose values are JSON; a text that is none stands for itself."""
    arguments: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name.isidentifier():
            raise UsageError(f"model argument {pair!r} is not NAME=VALUE, e.g. depth=12 or 'sizes=[1, 2]'")
        try:
            arguments[name] = json.loads(text)
        except ValueError:
            arguments[name] = text
    return arguments


def split_names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them. Raises UsageError on an empty one."""
    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise UsageError(f"names {text!r} have an empty one; give them as first,second")
    return names


def recipe_settings(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs of the training recipe; "a,b" is a pair of numbers."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise UsageError(f"setting {pair!r} is not NAME=VALUE, e.g. warmup_epochs=5")
        parts = [_number(part) for part in text.split(",")]
        settings[name] = parts[0] if len(parts) == 1 else tuple(parts)
    return settings


def _number(text: str) -> int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return text


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def command_line() -> str:
    return printable(shlex.join(["dualtoken", *sys.argv[1:]]))


def with_torch(what: str, call: Callable[[], Any]) -> Any:
    """Runs what imports torch; a device install without it gets the name of the extra."""
    try:
        return call()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("export", what) from error


def importing(name: str) -> Callable[[], Any]:
    """What `with_torch` calls to import a module of this package."""
    return lambda: importlib.import_module(f"dualtoken_deploy.{name}")
