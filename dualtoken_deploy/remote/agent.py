"""What runs on the device: sent through ssh, standard library alone, Python 3.8 on. One request, then frames.

A request is one JSON line on stdin, behind this source; bytes may follow. Frames are JSON lines on stdout:
{"said": text}, {"err": line}, {"out": text}, {"take": name, "size": n} with n bytes behind it, and at last
{"result": ...} or {"error": text, "code": n}. The end of stdin while a command runs is a lost connection, or Ctrl-C at
the other end: the command and what it started are ended then.

Files are kept by their sha256 in FOLDER/files and copied from there, so that only what changed travels, and what
arrived whole before a connection broke does not travel again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

IN, OUT = sys.stdin.buffer, sys.stdout.buffer
LOCK = threading.Lock()
CHUNK = 1 << 20
INSTALLS_ELSEWHERE = 23  # pip's version from which it installs into another environment (22.3)
GRACE_S = 10.0  # for a command that is ended to clear up


class FailedError(Exception):
    """Ends the request with one line; `code` is the exit code of the program's own errors."""

    def __init__(self, text: str, code: int = 4) -> None:
        super().__init__(text)
        self.code = code


def frame(**said: Any) -> None:
    with LOCK:
        OUT.write(json.dumps(said).encode() + b"\n")
        OUT.flush()


def folder_of(request: dict[str, Any]) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(request.get("folder") or cache / "dualtoken" / "remote").expanduser()
    for part in ("files", "work", "env"):
        (base / part).mkdir(parents=True, exist_ok=True)
    return base


def hello(request: dict[str, Any]) -> dict[str, Any]:
    base = folder_of(request)
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "architecture": platform.machine(),
        "free": shutil.disk_usage(str(base)).free,
        "folder": str(base),
        "environments": sorted(p.name for p in (base / "env").iterdir() if "." not in p.name),
    }


def missing(request: dict[str, Any]) -> dict[str, Any]:
    files = folder_of(request) / "files"
    return {"missing": [digest for digest in request["hashes"] if not (files / digest).is_file()]}


def put(request: dict[str, Any]) -> dict[str, Any]:
    """Bytes of each file behind the request, in its order. A file is kept once it is whole and its hash is right."""
    files = folder_of(request) / "files"
    for one in request["files"]:
        partial = files / ".{}.{}".format(one["sha256"], os.getpid())
        try:
            digest, left = hashlib.sha256(), one["size"]
            with partial.open("wb") as out:
                while left:
                    chunk = IN.read(min(left, CHUNK))
                    if not chunk:
                        raise FailedError("the connection ended inside a file")
                    out.write(chunk)
                    digest.update(chunk)
                    left -= len(chunk)
            if digest.hexdigest() != one["sha256"]:
                raise FailedError("a file arrived with other bytes (sha256 differs)")
            partial.replace(files / one["sha256"])
        finally:
            with suppress(FileNotFoundError):
                partial.unlink()
        frame(kept=one["sha256"])
    return {}


def place(request: dict[str, Any]) -> dict[str, Any]:
    """A folder of its own with the files of a tree: relative path -> sha256."""
    base = folder_of(request)
    root = base / "work" / request["work"]
    root.mkdir(parents=True, exist_ok=True)
    for path, digest in request["tree"].items():
        target = root / path
        if root.resolve() not in target.resolve().parents:
            raise FailedError("a path leads out of the folder: " + path)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(base / "files" / digest), str(target))  # a copy: a build may change it
    return {"root": str(root)}


def environment(request: dict[str, Any]) -> dict[str, Any]:
    """A virtual environment with the wheel and an extra, made once for each of its keys, or the one that is there."""
    base = folder_of(request)
    final = base / "env" / request["key"]
    python = final / "bin" / "python"
    if python.is_file():
        return {"python": str(python), "made": False}
    making = final.with_name("{}.{}".format(request["key"], os.getpid()))
    try:
        elsewhere = pip_version() >= INSTALLS_ELSEWHERE
        bare = ["--without-pip"] if elsewhere else []  # its own pip takes longer than what is installed with it
        quietly([sys.executable, "-m", "venv", *bare, str(making)], "cannot make an environment")
        wheels = making / "wheels"
        wheels.mkdir()
        for name, digest in request["wheels"].items():
            shutil.copyfile(str(base / "files" / digest), str(wheels / name))
        frame(said="installing " + request["wheel"] + request["extras"])
        # what is imported is compiled then: all of it takes a slow device as long as the rest
        inside = str(making / "bin" / "python")
        pip = [sys.executable, "-m", "pip", "--python", inside] if elsewhere else [inside, "-m", "pip"]
        pip += ["install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        index = [] if request["index"] else ["--no-index"]
        what = str(wheels / request["wheel"]) + request["extras"]
        quietly([*pip, *index, "--find-links", str(wheels), what], "cannot install " + request["wheel"])
        shutil.rmtree(str(wheels))
        # renamed as a whole: its scripts name the old place, so modules are run by the interpreter alone
        with suppress(OSError):  # another run was first
            making.rename(final)
        if not python.is_file():
            raise FailedError(f"cannot keep an environment in {final}")
    finally:
        shutil.rmtree(str(making), ignore_errors=True)
    return {"python": str(python), "made": True}


def pip_version() -> int:
    """The first number of the version of this Python's pip; 0 where it has none."""
    try:
        return int(metadata.version("pip").split(".")[0])
    except metadata.PackageNotFoundError:
        return 0


def quietly(command: list[str], what: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise FailedError(f"{what}: {errors[-1]}", 3)


def run(request: dict[str, Any]) -> dict[str, Any]:
    """The command in the work folder. Its lines of stderr at once, stdout at its end."""
    root = folder_of(request) / "work" / request["work"]
    root.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        request["command"], cwd=str(root), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env={**os.environ, **request["environment"]},
    )  # fmt: skip
    done = threading.Event()

    def watch() -> None:
        """The other end keeps stdin open as long as it wants the command to run."""
        while IN.read(1):
            pass
        if not done.is_set():
            end(process, done)

    out: list[bytes] = []
    reader = threading.Thread(target=lambda: out.append(process.stdout.read() if process.stdout else b""), daemon=True)
    for thread in (threading.Thread(target=watch, daemon=True), reader):
        thread.start()
    for line in process.stderr or ():
        with suppress(OSError):  # the other end has gone: the command is being ended
            frame(err=line.decode("utf-8", "replace").rstrip("\n"))
    reader.join()
    code = process.wait()
    done.set()
    frame(out=b"".join(out).decode("utf-8", "replace"))
    return {"code": code}


def end(process: subprocess.Popen[bytes], done: threading.Event) -> None:
    """Asked first, so that it clears up; killed if it does not."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(OSError):
            os.killpg(process.pid, number)
        if done.wait(GRACE_S):
            return


def hashes(request: dict[str, Any]) -> dict[str, Any]:
    root = folder_of(request) / "work" / request["work"] / request["path"]
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256()
            with path.open("rb") as data:
                chunk = data.read(CHUNK)
                while chunk:
                    digest.update(chunk)
                    chunk = data.read(CHUNK)
            found[path.relative_to(root).as_posix()] = {"sha256": digest.hexdigest(), "size": path.stat().st_size}
    return {"files": found}


def take(request: dict[str, Any]) -> dict[str, Any]:
    root = folder_of(request) / "work" / request["work"] / request["path"]
    for name in request["names"]:
        path = root / name
        frame(take=name, size=path.stat().st_size)
        with LOCK, path.open("rb") as data:
            shutil.copyfileobj(data, OUT)
            OUT.flush()
    return {}


def clean(request: dict[str, Any]) -> dict[str, Any]:
    shutil.rmtree(str(folder_of(request) / "work" / request["work"]), ignore_errors=True)
    return {}


DO = {
    "hello": hello, "missing": missing, "put": put, "place": place, "environment": environment, "run": run,
    "hashes": hashes, "take": take, "clean": clean,
}  # fmt: skip


def main() -> None:
    request = json.loads(IN.readline())
    try:
        frame(result=DO[request["do"]](request))
    except FailedError as error:
        frame(error=str(error), code=error.code)
    except BrokenPipeError:
        pass  # nobody is left to hear
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        frame(error="the disk is full" if full else str(error), code=4)


if __name__ in ("__main__", "agent"):
    main()
