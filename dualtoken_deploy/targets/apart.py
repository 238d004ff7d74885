"""A step in a vendor's code that can take its process down with it, in a process of its own.

A builder that reads beyond its memory leaves no exception to be caught: here that is an error with a reason, the
exporter goes on, and nothing half-written stays. `python -m dualtoken_deploy.targets.apart FOLDER` is the other side.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from dualtoken_deploy.errors import ConversionError, DualTokenError
from dualtoken_deploy.processes import end_group, how_it_ended, last_words, own_command, own_environment, own_streams

ASKED, ANSWER = "asked", "answer"  # pickles, in a folder that is this process's alone
T = TypeVar("T")
Tell = Callable[[str], None]


def run_apart(function: Callable[..., T], *arguments: Any, tell: Tell, what: str, mend: str) -> T:
    """What `function(*arguments, tell)` gives; it stands in a module, and what goes in and out can be pickled.

    Raises the function's own DualTokenError, and ConversionError where it raises anything else or its process ends
    without an answer: `what` was killed by SIGSEGV; `mend`.
    """
    with tempfile.TemporaryDirectory(prefix="dualtoken-apart.") as name, tempfile.TemporaryFile() as log:
        folder = Path(name)
        (folder / ASKED).write_bytes(pickle.dumps((function, arguments)))
        # A session of its own: Ctrl-C reaches this process alone, which then ends the other.
        process = subprocess.Popen(
            [*own_command(__name__), name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=own_environment(),
            start_new_session=True,
        )
        try:
            for line in process.stdout or ():
                tell(line.decode().rstrip("\n"))
            code = process.wait()
        finally:
            end_group(process)
            if process.stdout:
                process.stdout.close()
        if code != 0:
            raise ConversionError(f"{what} {how_it_ended(code)}{last_words(log)}; {mend}")
        answer = pickle.loads((folder / ANSWER).read_bytes())  # noqa: S301 - of the process started above
    if isinstance(answer, DualTokenError):
        raise answer
    return answer  # type: ignore[no-any-return]  # as `function` gave it


def main() -> None:
    """Computes what the folder asks for; a line on stdout is progress."""
    _, lines = own_streams()
    folder = Path(sys.argv[1])
    function, arguments = pickle.loads((folder / ASKED).read_bytes())  # noqa: S301 - of the process that started this

    def tell(text: str) -> None:
        try:
            print(" ".join(text.splitlines()), file=lines, flush=True)
        except BrokenPipeError:
            os._exit(1)  # who asked is gone, and an exception must not pass through a vendor's frames

    try:
        answer = function(*arguments, tell)
    except DualTokenError as error:
        answer = error
    (folder / ANSWER).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
