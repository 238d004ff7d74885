"""Commands about this installation: what works here, and what lies in the cache."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from dualtoken_deploy.cli.common import Json, answer, progress, say, show
from dualtoken_deploy.errors import OutputError, install_command


def doctor(json_output: Json = False) -> None:
    """Shows this machine, what works here, and for each gap the one command that mends it."""
    from dualtoken_deploy.use.doctor import examine

    with progress() as tell:
        tell("looking at this machine")
        found = examine()
    show(json_output, found.to_json(), lambda r: r.doctor_table(found))
    if not json_output:
        gaps = list(dict.fromkeys(c.extra for c in found.checks if c.extra is not None))
        answer(f"everything that is missing at once: {install_command(*gaps)}" if gaps else "nothing is missing")


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove it; all of it can be made again.")] = False,
    json_output: Json = False,
) -> None:
    """Shows what this program keeps in the user's cache, or clears it."""
    from dualtoken_deploy.files import cache_folder, folder_bytes

    folder = cache_folder()
    entries: list[Path] = []
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        pass
    except OSError as error:
        raise OutputError(f"{folder} cannot be read ({error.strerror}); check its permissions") from error
    rows = [{"name": p.name, "what": _what(p), "bytes": folder_bytes(p)} for p in entries]
    data: dict[str, Any] = {"folder": str(folder), "entries": rows, "cleared": clear}
    if clear:
        _clear(folder, entries)
    show(json_output, data, lambda r: r.cache_table(data))
    if clear:
        say(f"cleared: {folder}")


KEPT = {
    "search": "scores of INT8 searches, so that an interrupted one goes on",
    "made": "notes on which bundles were made here, so that their code may run",
    "tensorrt-rtx": "kernels that TensorRT for RTX compiled",
    "litert-converter": "the environment of LiteRT's converter",
    "digits": "the data set digits",
    "shapes": "the data set shapes",
}


def _what(path: Path) -> str:
    return next((text for name, text in KEPT.items() if path.name.startswith(name)), "of another version")


def _clear(folder: Path, entries: list[Path]) -> None:
    for path in entries:
        try:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        except OSError as error:
            raise OutputError(f"{path} cannot be removed ({error.strerror}); remove {folder} yourself") from error
