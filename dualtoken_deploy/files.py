"""Files that are whole or not there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from dualtoken_deploy.errors import OutputError


def write_atomically(path: Path, write: Callable[[Path], object], library_error: type[Exception] = OSError) -> None:
    """Calls `write` with a temporary path of the same suffix in the same folder (made if need be), renames the result.

    Raises OutputError on OSError, or what a library has for it; the old file stays then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, library_error) as error:
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}; the file that was there is unchanged") from error
