"""The application: its commands, and how errors and signals end it."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any

import typer

from dualtoken_deploy import __version__
from dualtoken_deploy.cli import checking, making, proving, recipes, remote, sharing, tidying, using
from dualtoken_deploy.cli.common import DOCUMENT, remark, say, take_any_text, write_out
from dualtoken_deploy.cli.progress import MANNERS
from dualtoken_deploy.cli.shape import Quiet, Verbose, epilog, shaped
from dualtoken_deploy.errors import DualTokenError, InputError, Note, UsageError, out_of_memory
from dualtoken_deploy.serve.command import serve
from dualtoken_deploy.use.text import printable

app = typer.Typer(
    name="dualtoken",
    help="Turns a vision model into a verified bundle for every target, and puts it to use.",
    epilog="Exit codes: 0 done, 2 usage, 3 something is missing here, 4 bad input, 5 out of tolerance, 6 a converter "
    "failed. Completion of the shell: dualtoken --install-completion",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "Make": (making.export, making.build, making.train, making.label, recipes.run),
    "Check": (
        *(checking.validate, checking.evaluate, checking.inspect, checking.bench, checking.compare, checking.diagnose),
    ),
    "Prove": (proving.verify, proving.report, proving.card, proving.sign, recipes.reproduce),
    "Share": (sharing.push, sharing.pull),
    "Use": (using.predict, serve, using.visualize),
    "Look around": (making.models, making.targets, tidying.doctor, tidying.cache, remote.devices),
}
ON_A_DEVICE = ("bench", "validate", "build", "inspect", "evaluate")
for _panel, _commands in COMMANDS.items():
    for _command in _commands:
        _made = remote.remotely(_command) if _command.__name__ in ON_A_DEVICE else _command
        app.command(rich_help_panel=_panel, epilog=epilog(_command.__name__))(shaped(_made))


def _show_version(asked: bool) -> None:
    if asked:
        write_out(f"dualtoken-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _begin(
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_show_version)
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    MANNERS.quiet, MANNERS.verbose = quiet, verbose


INTERRUPTED = 130
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    words = list(arguments) if arguments is not None else sys.argv[1:]
    MANNERS.quiet = MANNERS.verbose = False
    DOCUMENT.begin("--json" in words)
    stop = _Stop()
    _show_notes()
    for number in STOPS:  # a stopped export clears up as an interrupted one does
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:  # nohup means it
            signal.signal(number, stop)
    try:
        code = app(args=words, standalone_mode=False)
        if not stop.asked:
            DOCUMENT.end()
    except DualTokenError as error:
        if not stop.asked:
            if MANNERS.verbose:
                traceback.print_exc()
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
    """Notes become lines like all others; what libraries warn of and log is shown with -v alone, errors always."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, Note):
            remark(f"warning: {message}")
        elif MANNERS.verbose:
            shown(message, category, *where, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", Note)
    logging.lastResort = _Spoken()


class _Spoken(logging.Handler):
    """Where records go for which nobody set up anything."""

    def emit(self, record: logging.LogRecord) -> None:
        if MANNERS.verbose or record.levelno >= logging.ERROR:
            say(record.getMessage())


def _end_interrupted() -> None:
    """Exits with 130 whatever happens: CPython remembers a KeyboardInterrupt that came inside an exec of text (as in
    the making of a dataclass) and would end `python -m` by SIGINT instead of the exit code asked for."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    message = "interrupted; nothing half-written was left"
    with suppress(OSError):  # the terminal may be gone
        say(f"error: {message}")
        DOCUMENT.end(INTERRUPTED, message)
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(INTERRUPTED)


def _usage(error: Exception) -> None:
    """Click's own errors (a missing argument, an unknown option) and exits, as click would end them."""
    show = getattr(error, "show", None)
    if show is not None:
        show()
    if error.exit_code:  # type: ignore[attr-defined]
        DOCUMENT.end(UsageError.exit_code, getattr(error, "message", "") or str(error))
    sys.exit(error.exit_code)  # type: ignore[attr-defined]


def _fail(message: str, code: int) -> None:
    say(f"error: {printable(message)}")
    with suppress(DualTokenError):  # stdout is what failed
        DOCUMENT.end(code, message)
    sys.exit(code)
