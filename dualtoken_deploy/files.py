"""Files that are whole or not there."""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import DualTokenError, OutputError
from dualtoken_deploy.staging import staged_file

OURS = "dualtoken"  # our folder among the caches of all programs


def cache_folder() -> Path:
    """Where this program keeps what it can make again: $DUALTOKEN_CACHE, else ~/.cache/dualtoken (XDG).

    Raises OutputError where the user has no home folder.
    """
    if own := os.environ.get("DUALTOKEN_CACHE"):
        return Path(own)
    return user_cache() / OURS


def user_cache() -> Path:
    """The folder of all programs' caches (XDG). Raises OutputError where the user has no home folder."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base)
    try:
        return Path.home() / ".cache"
    except RuntimeError as error:
        raise OutputError("this user has no home folder for a cache; set XDG_CACHE_HOME to a folder") from error


def is_folder(path: Path) -> bool:
    """Path.is_dir, and False for what cannot be looked at: too long a name, a folder above that nobody may enter."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Path.is_file, and False for what cannot be looked at."""
    try:
        return path.is_file()
    except OSError:
        return False


def folder_bytes(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; what cannot be looked at counts as none."""
    total = 0
    for file in [path, *path.rglob("*")] if is_folder(path) else [path]:
        try:
            found = file.lstat()
        except OSError:
            continue
        total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def read_bytes(path: Path, limit: int, kind: type[DualTokenError], mend: str) -> bytes:
    """All of a regular file of at most `limit` bytes: no pipe is waited for and no device read.

    Raises `kind` with `mend` at the end of its message.
    """
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise kind(f"{path} is no regular file; {mend}")
            data = file.read(limit + 1)
    except FileNotFoundError as error:
        raise kind(f"{path} cannot be read (no such file); {mend}") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise kind(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {mend}") from error
    if len(data) > limit:
        raise kind(f"{path} has more than {limit >> 20} MiB, which is no such file of ours; {mend}")
    return data


def read_toml(path: Path, limit: int, kind: type[DualTokenError], mend: str) -> tuple[dict[str, Any], str]:
    """A TOML file's tables, and its text. Raises `kind` where it cannot be read or is no TOML."""
    try:
        text = read_bytes(path, limit, kind, mend).decode("utf-8")
        return tomllib.loads(text), text
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError, TOMLDecodeError, a number of 5,000 digits
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise kind(f"{path} is no TOML: {why}; {mend}") from error


def line_of(path: Path, text: str, pattern: str) -> str:
    """Where the first line is that begins with a regular expression: "PATH, line N"; the path alone where none does."""
    expression = re.compile(pattern)
    for number, line in enumerate(text.split("\n"), 1):  # TOML's only end of a line; others may stand in its strings
        if expression.match(line):
            return f"{path}, line {number}"
    return str(path)


def write_atomically(path: Path, write: Callable[[Path], object], library_error: type[Exception] = OSError) -> None:
    """Calls `write` with a temporary path of the same suffix in the same folder (made if need be), renames the result.

    Raises OutputError on OSError, or what a library has for it; the old file stays then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as temporary:
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            temporary.chmod(mode)  # as the umask has files: a library may have put a private one there (safetensors)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, library_error) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}; the file that was there is unchanged") from error
