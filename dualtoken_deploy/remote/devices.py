"""Which machine is meant: ssh://user@host:port, adb://serial, or a name of devices.toml; OpenSSH's configuration says
the rest."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.files import line_of, read_toml

MAX_FILE = 1 << 20
ADDRESS = re.compile(
    r"ssh://(?:(?P<user>[^@/:\s-][^@/:\s]*)@)?(?P<host>[\w.][\w.-]*|\[[0-9a-fA-F:]+\])(?::(?P<port>\d{1,5}))?/?$"
)
ANDROID = re.compile(r"adb://(?P<serial>[\w.][\w.:-]*)/?$")
OWN, MADE = "own", "made"
SSH_ALONE = ("python", "environment", "wheelhouse", "config")


@dataclass(frozen=True)
class Device:
    """`python`: the interpreter there. `environment` "made": one is made of the wheel and the extra; "own": `python`
    has the package already. `wheelhouse`: wheels here that travel along, for a device without a network. `folder`:
    where copies and environments are kept there; ~/.cache/dualtoken/remote unless given. `config`: for `ssh -F`.

    Of Android (adb://SERIAL) `programs`: a folder here with the runtimes' own programs, built for the device; without
    it they are /data/local/tmp/NAME there already. `folder`: /data/local/tmp/dualtoken unless given."""

    name: str
    url: str
    python: str = "python3"
    environment: str = MADE
    wheelhouse: str | None = None
    folder: str | None = None
    config: str | None = None
    programs: str | None = None

    def __post_init__(self) -> None:
        if ADDRESS.match(self.url) is None and ANDROID.match(self.url) is None:
            raise UsageError(f"{self.url!r} is no ssh://[USER@]HOST[:PORT] and no adb://SERIAL")
        for field in fields(self):
            foreign = field.name in SSH_ALONE if self.android else field.name == "programs"
            if foreign and getattr(self, field.name) != field.default:
                raise UsageError(f"device {self.name}: {field.name} is for {'ssh' if self.android else 'adb'}:// alone")
        if self.environment not in (OWN, MADE):
            raise UsageError(f"device {self.name}: environment {self.environment!r} is neither {MADE!r} nor {OWN!r}")

    @property
    def android(self) -> bool:
        return self.url.startswith("adb://")

    @property
    def serial(self) -> str:
        found = ANDROID.match(self.url)
        assert found is not None  # noqa: S101 (asked for of Android alone)
        return found["serial"]

    @property
    def ssh(self) -> list[str]:
        """The client's arguments up to the command: no questions, no unknown host, a connection that is seen to die."""
        found = ADDRESS.match(self.url)
        assert found is not None  # noqa: S101 (checked when it was made)
        options = ("BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=15", "ServerAliveInterval=10",
                   "ServerAliveCountMax=3")  # fmt: skip
        words = ["ssh", "-T", *(word for option in options for word in ("-o", option))]
        words += ["-F", str(Path(self.config).expanduser())] if self.config else []
        words += ["-p", found["port"]] if found["port"] else []
        words += ["-l", found["user"]] if found["user"] else []
        return [*words, "--", found["host"].strip("[]")]


def devices_file() -> Path:
    """~/.config/dualtoken/devices.toml, or below XDG_CONFIG_HOME."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path("~/.config").expanduser()) / "dualtoken" / "devices.toml"


def read_devices(path: Path | None = None) -> dict[str, Device]:
    """By name; none where there is no file. Raises InputError with what is wrong in it."""
    file = path or devices_file()
    if not file.exists():
        return {}
    data, text = read_toml(file, MAX_FILE, InputError, "see docs/ci.md")
    return {name: _device(name, table, file, text) for name, table in data.items()}


def _device(name: str, table: Any, file: Path, text: str) -> Device:
    known = [f.name for f in fields(Device) if f.name != "name"]
    if not isinstance(table, dict) or "url" not in table:
        raise InputError(f"{file}: device {name!r} is no table with a url; keys: {', '.join(known)}")
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{_line(file, text, key)}: [{name}] has no {key!r}{meant} Valid: {', '.join(known)}")
        if not isinstance(value, str):
            raise InputError(f"{_line(file, text, key)}: {key} of [{name}] is no text")
    try:
        return Device(name, **table)
    except UsageError as error:
        raise InputError(f"{file}: [{name}]: {error}") from error


def _line(file: Path, text: str, key: str) -> str:
    return line_of(file, text, rf"\s*{re.escape(key)}\s*=")


def find_device(said: str) -> Device:
    """Raises UsageError that lists the devices that there are."""
    if said.startswith(("ssh://", "adb://")):
        return Device(said, said)
    if "://" in said:
        raise UsageError(f"{said!r} is no device: ssh://[USER@]HOST[:PORT], adb://SERIAL or a name of {devices_file()}")
    known = read_devices()
    if said not in known:
        names = ", ".join(known) or "none"
        raise UsageError(f"there is no device {said!r} in {devices_file()} (it has: {names}); or give ssh://HOST")
    return known[said]
