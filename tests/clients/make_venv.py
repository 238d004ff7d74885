"""Makes the environment of the outside clients: python tests/clients/make_venv.py [FOLDER] (.venv-clients)."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REQUIREMENTS = HERE / "requirements.txt"


def make(folder: Path = ROOT / ".venv-clients") -> Path:
    """The environment's python; made once, and again when the requirements change. A second process waits for it.

    Raises CalledProcessError with uv's words where the packages cannot be had.
    """
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _make(folder)


def _make(folder: Path) -> Path:
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = REQUIREMENTS.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    uv = [sys.executable, "-m", "uv"]  # pip takes a minute of CPU for what uv does in two seconds
    for words in (
        ["venv", "--python", sys.executable, folder],
        ["pip", "install", "--python", python, "-r", REQUIREMENTS],
    ):
        command = [*uv, *words, "--quiet"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, env=environment)
    stamp.write_text(wanted)
    return python


if __name__ == "__main__":
    print(make(*map(Path, sys.argv[1:])))
