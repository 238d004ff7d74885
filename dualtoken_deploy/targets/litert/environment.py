"""The environment of LiteRT's converter: litert-torch wants other versions than ours, so it has one of its own.

    python -m dualtoken_deploy.targets.litert.environment [FOLDER]

makes it, 2.3 GB, from the versions of converter.txt. It is looked for at $DUALTOKEN_LITERT_CONVERTER, a Python, and
else in the user's cache, under a name that changes with the versions.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

from dualtoken_deploy.errors import DualTokenError, MissingError, OutputError
from dualtoken_deploy.files import cache_folder

REQUIREMENTS = Path(__file__).with_name("converter.txt")
VARIABLE = "DUALTOKEN_LITERT_CONVERTER"
MAKE = "python -m dualtoken_deploy.targets.litert.environment"


def converter_python() -> Path:
    """The Python that has the converter. Raises MissingError that says how to make its environment."""
    given = os.environ.get(VARIABLE)
    python = Path(given) if given else default_folder() / "bin" / "python"
    if not python.is_file():
        what = f"{VARIABLE} is {given}, which is no file" if given else "it is not made yet"
        raise MissingError(
            f"exporting to LiteRT needs the converter's own environment (2.3 GB), and {what}; run: {MAKE}"
        )
    return python


def default_folder() -> Path:
    """Where the environment of these versions belongs."""
    versions = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    return cache_folder() / f"litert-converter-{versions}"


def make(folder: Path | None = None) -> Path:
    """The environment's Python; made once. A second process waits for the first.

    Raises OutputError where the folder cannot be written, MissingError with pip's words where the packages cannot be
    had.
    """
    place = folder or default_folder()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return _make(place)
    except OSError as error:
        raise OutputError(f"{place} cannot be written ({error}); free space, or name another folder") from error


def _make(folder: Path) -> Path:
    python, whole = folder / "bin" / "python", folder / "installed.txt"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if whole.is_file() and whole.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON") and k != "PIP_CONSTRAINT"}
    # what is imported is compiled then; all of it would be half of the time
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command += ["-r", str(REQUIREMENTS)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=own)
    if done.returncode != 0:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or ["it said nothing"]
        raise MissingError(f"pip cannot install LiteRT's converter: {last[0]}; mend that and run again: {MAKE}")
    whole.write_text(wanted, encoding="utf-8")
    return python


if __name__ == "__main__":
    try:
        print(make(*(Path(argument).absolute() for argument in sys.argv[1:2])))
    except DualTokenError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
