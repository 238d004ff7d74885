"""A command on a device, from copying what it needs to bringing back what it made."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlparse

from dualtoken_deploy.bundle.store import Bundle, new_folder, sha256
from dualtoken_deploy.errors import BundleError, DualTokenError, InputError, MissingError, UsageError
from dualtoken_deploy.remote.devices import OWN, Device
from dualtoken_deploy.remote.link import Frame, Link, error_of
from dualtoken_deploy.targets.table import get_target

Tell = Callable[[str], None]
OLDEST_PYTHON = (3, 11)
NAME = "dualtoken-deploy"
ABOUT = (
    "import json; from importlib.metadata import version; from dualtoken_deploy.machine import describe_machine; "
    f"print(json.dumps([version('{NAME}'), describe_machine()]))"
)


@dataclass(frozen=True)
class Outcome:
    """`out` is what the command printed, with the paths of this machine; `machine` the device's record of itself."""

    code: int
    out: str
    error: str | None
    machine: Mapping[str, Any]

    def gate(self, device: str) -> None:
        """Raises the error that ended the command, with the device's name before it."""
        if self.code:
            raise error_of(self.code, f"{device}: {self.error or f'the command ended with {self.code}'}")


@dataclass
class Session:
    """One command on one device. `folders`: what travels, by the name that it has there. `machine`: the device's own
    record, once it was asked."""

    device: Device
    tell: Tell
    folders: dict[str, Path] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.link = Link(self.device)
        self.work = uuid.uuid4().hex

    def add(self, path: Path) -> str:
        """The relative path of a file or folder on the device; its own name stays the last part."""
        name = f"carried{len(self.folders)}/{path.resolve().name}"
        self.folders[name] = path
        return name

    def run(self, arguments: Sequence[str], extras: Iterable[str], back: str | None = None) -> Outcome:
        """`dualtoken ARGUMENTS` there. `back`: the folder that takes the place of its copy here where the command went
        well. Whatever happens, the device keeps nothing but files by their hash and its environments.

        Raises MissingError, InputError, UsageError; what the command itself says is in the outcome.
        """
        here = self._hello()
        try:
            root = self._copy()
            python = self._python(here, tuple(sorted(set(extras))))
            self.machine = self._about(python)
            self.tell(f"{self.device.name}: dualtoken {' '.join(arguments)}")
            code, out, error = self._execute([python, "-m", "dualtoken_deploy", *arguments])
            if code == 0 and back is not None:
                self._bring_back(back)
            return Outcome(code, self._local(out, root), error and self._local(error, root, plain=True), self.machine)
        finally:
            with suppress(DualTokenError):
                self.link.ask("clean", work=self.work)

    def _hello(self) -> dict[str, Any]:
        self.tell(f"{self.device.name}: connecting")
        found = self.link.ask("hello")
        version = tuple(int(part) for part in found["python"].split(".")[:2])
        if version < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            raise MissingError(
                f"{self.device.name} has Python {found['python']} as {self.device.python}, and {oldest} is the oldest "
                "taken; name another in devices.toml (python = ...)"
            )
        return found

    # --- copying ---

    def _copy(self) -> str:
        """What changed travels, the rest is there by its hash; the folder with all of it there."""
        tree: dict[str, str] = {}
        sources: dict[str, Path] = {}
        for name, path in self.folders.items():
            for file, inner in _files(path):
                digest = sha256(file)
                tree[f"{name}/{inner}" if inner else name] = digest
                sources[digest] = file
        self._send(sources)
        found: str = self.link.ask("place", work=self.work, tree=tree)["root"]
        return found

    def _send(self, sources: Mapping[str, Path]) -> None:
        wanted = self.link.ask("missing", hashes=list(sources))["missing"]
        if not wanted:
            return
        sizes = {digest: sources[digest].stat().st_size for digest in wanted}
        self.tell(f"{self.device.name}: copying {len(wanted)} files, {sum(sizes.values()) / 2**20:.1f} MiB")
        self.link.ask(
            "put",
            (chunk for digest in wanted for chunk in _chunks(sources[digest], sizes[digest])),
            files=[{"sha256": digest, "size": sizes[digest]} for digest in wanted],
        )

    # --- the environment ---

    def _python(self, here: Mapping[str, Any], extras: tuple[str, ...]) -> str:
        """The interpreter whose environment has this version of the package."""
        if self.device.environment == OWN:
            return self.device.python
        with tempfile.TemporaryDirectory() as folder:
            wheel, wheels = self._wheels(Path(folder))
            digests = {path.name: sha256(path) for path in wheels}
            words = f"[{','.join(extras)}]" if extras else ""
            said = json.dumps([digests, wheel.name, words, here["python"]], sort_keys=True)
            self._send({digests[path.name]: path for path in wheels})
            found = self.link.ask(
                "environment", (), self._said, key=hashlib.sha256(said.encode()).hexdigest()[:24], wheels=digests,
                wheel=wheel.name, extras=words, index=self.device.wheelhouse is None,
            )  # fmt: skip
        python: str = found["python"]
        return python

    def _about(self, python: str) -> dict[str, Any]:
        """The device's record of itself. Raises MissingError where the package there is not of our version."""
        code, out, error = self._execute([python, "-c", ABOUT])
        version, machine = json.loads(out) if code == 0 else ("none", {})
        here = metadata.version(NAME)
        if code or (self.device.environment == OWN and version != here):
            has = f"{NAME} {version}" if code == 0 else f"no {NAME} ({error})"
            raise MissingError(
                f"{self.device.name}: {python} has {has}, here is {here}; install that there, or let an environment be "
                "made (leave environment out in devices.toml)"
            )
        return dict(machine)

    def _wheels(self, folder: Path) -> tuple[Path, list[Path]]:
        """Our wheel, and all that travel with it."""
        if self.device.wheelhouse is not None:
            house = Path(self.device.wheelhouse).expanduser()
            wheels = sorted(house.glob("*.whl"))
            ours = [path for path in wheels if path.name.startswith("dualtoken_deploy-")]
            if not ours:
                raise InputError(f"{house} has no dualtoken_deploy-*.whl; put the wheel there: make wheel")
            return ours[-1], wheels
        self.tell("making the wheel")
        source = _checkout()
        # the date is in the wheel's entries: a fixed one gives the same bytes, and the environment there is found again
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "315532800"}
        command = [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            str(folder),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
            raise MissingError(f"the wheel of {source} cannot be made ({reason}); give a wheelhouse in devices.toml")
        (wheel,) = folder.glob("*.whl")
        return wheel, [wheel]

    # --- running ---

    def _execute(self, command: Sequence[str]) -> tuple[int, str, str | None]:
        """Exit code, stdout, and the line with the error."""
        out, errors, last = list[str](), list[str](), list[str]()

        def on_frame(frame: Frame) -> None:
            if "out" in frame:
                out.append(frame["out"])
            elif "err" in frame and frame["err"].startswith("error: "):
                errors.append(frame["err"].removeprefix("error: "))
            elif "err" in frame:
                last.append(frame["err"].strip(" \u2502") or (last[-1] if last else ""))
                self.tell(f"{self.device.name}: {frame['err']}")

        found = self.link.ask("run", (), on_frame, work=self.work, command=list(command), environment={})
        said = [*last[-1:], *errors[-1:]]  # what is not one of our errors may say why in its last line
        return int(found["code"]), "".join(out), said[-1] if said and found["code"] else None

    def _said(self, frame: Frame) -> None:
        if "said" in frame:
            self.tell(f"{self.device.name}: {frame['said']}")

    def _local(self, text: str, root: str, plain: bool = False) -> str:
        """The paths of this machine in the place of the device's."""
        for name, path in self.folders.items():
            own = str(path) if plain else json.dumps(str(path))[1:-1]
            for there in (f"{root}/{name}", name):
                text = text.replace(there, own)
        return text

    def _bring_back(self, name: str) -> None:
        """The bundle as it is there takes the place of the one here, once it is whole."""
        path = self.folders[name]
        there = self.link.ask("hashes", work=self.work, path=name)["files"]
        changed = [n for n, f in there.items() if not (path / n).is_file() or sha256(path / n) != f["sha256"]]
        self.tell(f"{self.device.name}: bringing {len(changed)} files back")
        with new_folder(path, force=True) as folder:
            for inner in there:
                (folder / inner).parent.mkdir(parents=True, exist_ok=True)
                if inner not in changed:
                    shutil.copy2(path / inner, folder / inner)

            def take(inner: str, size: int, stream: IO[bytes]) -> None:
                _receive(folder / inner, size, stream, there[inner]["sha256"])

            self.link.ask("take", (), None, take, work=self.work, path=name, names=changed)
            Bundle.open(folder)


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """Regular files with their path inside; a file is its own."""
    if path.is_file():
        yield path, ""
    for file in sorted(path.rglob("*")) if path.is_dir() else ():
        if file.is_file():
            yield file, file.relative_to(path).as_posix()


def _chunks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            size -= len(chunk)
            yield chunk


def _receive(path: Path, size: int, stream: IO[bytes], expected: str) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as out:
        while size:
            chunk = stream.read(min(size, 1 << 20))
            if not chunk:
                raise MissingError(f"the connection ended inside {path.name}; run the command again")
            size -= len(chunk)
            out.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != expected:
        raise BundleError(f"{path.name} came back with other bytes (sha256 differs); run the command again")


def _checkout() -> Path:
    """The folder that this program is installed from, in place."""
    said = metadata.distribution(NAME).read_text("direct_url.json")
    url = urlparse(json.loads(said)["url"]) if said else None
    source = Path(unquote(url.path)) if url is not None and url.scheme == "file" else None
    if source is None or not (source / "pyproject.toml").is_file():
        raise UsageError(
            "this program is not installed from a checkout, so there is no wheel of it to take along; give a folder "
            "with wheels in devices.toml (wheelhouse = ...)"
        )
    return source


def extras_of(bundles: Iterable[Path]) -> set[str]:
    """What the targets of bundles need to run."""
    return {get_target(Bundle.open(path).manifest.target).extra for path in bundles}
