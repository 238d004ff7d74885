"""The application: its commands, and how errors and signals end it."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import typer

from dualtoken_deploy.cli import checking, making, using
from dualtoken_deploy.cli.common import say, take_any_text
from dualtoken_deploy.errors import DualTokenError, InputError, Note, out_of_memory
from dualtoken_deploy.serve.command import serve
from dualtoken_deploy.use.text import printable

app = typer.Typer(
    name="dualtoken",
    help="DualToken-ViT from PyTorch to a verified bundle for every target.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = (
    making.models,
    making.targets,
    making.train,
    making.export,
    making.build,
    checking.validate,
    checking.evaluate,
    checking.inspect,
    checking.bench,
    checking.compare,
    checking.diagnose,
    using.predict,
    using.visualize,
    serve,
)
for _command in COMMANDS:
    app.command()(_command)


class _Stop:
    """Remembers that a signal asked us to stop: a converter may wrap the KeyboardInterrupt in an error of its own."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: maps errors to one line and the documented exit code."""
    take_any_text()
    stop = _Stop()
    _show_notes()
    for number in (signal.SIGINT, signal.SIGTERM):  # a stopped export clears up as an interrupted one does
        signal.signal(number, stop)
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except DualTokenError as error:
        if not stop.asked:
            _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        stop.asked = True
    except BrokenPipeError:  # the reader of stdout, head for one, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not stop.asked:
            if out_of_memory(error):
                _fail(
                    "not enough memory; take a smaller --image-size or --batch, or a larger machine",
                    InputError.exit_code,
                )
            if not hasattr(error, "exit_code"):
                raise
            _usage(error)
    else:
        if code and not stop.asked:  # what typer makes of an exit inside a command
            sys.exit(code)
    if stop.asked:
        _end_interrupted()


def _show_notes() -> None:
    """Notes become lines like all others; what libraries warn of stays theirs."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            say(f"warning: {message}")
        else:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", Note)


def _end_interrupted() -> None:
    """Exits with 130 whatever happens: CPython remembers a KeyboardInterrupt that came inside an exec of text (as in
    the making of a dataclass) and would end `python -m` by SIGINT instead of the exit code asked for."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    say("error: interrupted; nothing half-written was left")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(130)


def _usage(error: Exception) -> None:
    """Click's own errors (a missing argument, an unknown option) and exits, as click would end them."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    sys.exit(error.exit_code)  # type: ignore[attr-defined]


def _fail(message: str, code: int) -> None:
    say(f"error: {printable(message)}")
    sys.exit(code)
