"""Names under which files and folders are made before they take their own, and what a killed process left of them.

A staged name is `.<name>.new.<random><suffix>`, beside the name that it will take. Whoever makes it holds a lock on it
(flock): the kernel gives that up with the process, however it ends, so what is not locked and not of this minute has no
owner and goes with the next run that stages the same name. Where a file system knows no such locks, it stays.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALE_SECONDS = 60.0  # between the making of a name and its lock another process may look at it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h and linux/fs.h
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_cleared: set[Path] = set()


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """A new, empty, locked folder beside `final`, as the umask has folders; what lies under its name at the end goes.

    Raises OSError.
    """
    clear_abandoned(final)
    staged = _name(final, "")
    staged.mkdir()
    try:
        with _lock(staged):
            yield staged
    finally:
        remove(staged)


@contextmanager
def staged_file(final: Path) -> Iterator[Path]:
    """An empty, locked file beside `final` with its suffix, as the umask has files; it goes unless it was renamed.

    Raises OSError.
    """
    clear_abandoned(final)
    staged = _name(final, final.suffix)
    os.close(os.open(staged, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        with _lock(staged):
            yield staged
    finally:
        staged.unlink(missing_ok=True)


def clear_abandoned(final: Path) -> None:
    """Removes what killed processes staged for `final`; looked for once by a process. Nothing that is locked goes."""
    if final in _cleared:
        return
    _cleared.add(final)
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(new|old)\.[0-9a-f]{{16}}({re.escape(final.suffix)})?")
    with suppress(OSError):
        for entry in list(os.scandir(final.parent)):
            if pattern.fullmatch(entry.name):
                with suppress(OSError):  # locked, gone meanwhile, or not ours to remove
                    _clear(Path(entry.path), final)


def _clear(left: Path, final: Path) -> None:
    if time.time() - left.lstat().st_mtime < STALE_SECONDS:
        return
    with _lock(left, wait=False):
        put_back(left, final)
        remove(left)


def put_back(aside: Path, final: Path) -> None:
    """What was put aside of `final` gets its name again, where nothing has it."""
    if (aside / final.name).exists() and not os.path.lexists(final):
        (aside / final.name).rename(final)


def swap(new: Path, final: Path) -> None:
    """Gives the folder `new` the name `final`; what has that name lies under `new` afterwards, or is gone.

    At once where the kernel exchanges names (Linux, renameat2); elsewhere there is a moment without `final`, and a
    process that is killed in it leaves the old folder aside, from where the next run puts it back. Raises OSError.
    """
    if not os.path.lexists(final):
        new.rename(final)
        return
    if _exchange(new, final):
        return
    aside = final.parent / f".{final.name}.old.{secrets.token_hex(8)}"
    aside.mkdir()
    try:
        with _lock(aside):
            try:
                final.rename(aside / final.name)
                new.rename(final)
            except BaseException:  # Ctrl-C between the two renames would otherwise lose what was there
                put_back(aside, final)
                raise
    finally:
        remove(aside)


def remove(place: Path) -> None:
    """Removes a folder, a file or a link, to the end even where Ctrl-C is pressed again meanwhile."""
    try:
        _remove(place)
    except KeyboardInterrupt:
        _remove(place)
        raise


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        with suppress(OSError):
            place.unlink(missing_ok=True)


def _name(final: Path, suffix: str) -> Path:
    return final.parent / f".{final.name}.new.{secrets.token_hex(8)}{suffix}"


@contextmanager
def _lock(place: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file or folder. Raises BlockingIOError where another has it and `wait` is not given; where
    there are no locks, OSError unless `wait` is given."""
    handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
        yield
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names at once; False where the kernel or the file system cannot. Raises OSError on a real one."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:  # a C library of before 2018
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(other))
