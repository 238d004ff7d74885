"""One Android device through adb's own client: its state, files that are kept by their hash, and commands.

Nothing of ours runs there: `/system/bin/sh` and toybox's tools (since Android 6) do what is asked.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import sha256
from dualtoken_deploy.errors import DualTokenError, InputError, MissingError
from dualtoken_deploy.machine import ISA_ARM
from dualtoken_deploy.remote.devices import Device

TIMEOUT_S = 60.0  # of what takes no time on a device that answers
ENDED = "dualtoken-exit"  # what is said behind a command: without it the connection broke
FULL = ("No space left on device", "Disk quota exceeded")
STATES = {
    "offline": "is offline; unlock it and connect it again, or: adb reconnect",
    "unauthorized": "has not allowed this computer; accept the question on its screen",
    "no permissions": "may not be opened by this user; see udev rules in Android's documentation of adb",
    "authorizing": "is still being asked to allow this computer; try again",
}
ASKED = (
    "for p in ro.product.manufacturer ro.product.model ro.soc.manufacturer ro.soc.model ro.build.version.release "
    'ro.product.cpu.abi; do echo "$p=$(getprop $p)"; done; echo "cores=$(nproc)"; echo "kernel=$(uname -sr)"; '
    "grep MemTotal /proc/meminfo; grep -m1 Features /proc/cpuinfo; "
    'echo "governor=$(cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor 2>/dev/null)"'
)


class Adb:
    """Raises MissingError where the device or adb is not to be had, or the connection breaks."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.base = device.folder or "/data/local/tmp/dualtoken"
        self.work = f"{self.base}/work/{uuid.uuid4().hex}"

    # --- what it is ---

    def hello(self) -> dict[str, Any]:
        """The device's record of itself, as describe_machine() has one, with "abi" and "free" bytes."""
        self._check_state()
        said = dict(
            re.split(r"\s*[:=]\s*", line, maxsplit=1)
            for line in self.shell(ASKED).splitlines()
            if re.search(r"[:=]", line)
        )
        last = self.shell(f"df -k {shlex.quote(self._root())} | tail -n 1").split()
        flags = said.get("Features", "").split()
        memory = re.search(r"\d+", said.get("MemTotal", ""))
        names = [said.get(f"ro.soc.{key}", "") for key in ("manufacturer", "model")]
        model = " ".join(filter(None, (said.get(f"ro.product.{key}", "") for key in ("manufacturer", "model"))))
        return {
            "cpu": " ".join(filter(None, names)) or model or "unknown",
            "model": model or "unknown",
            "architecture": said.get("ro.product.cpu.abi") or "unknown",
            "isa": [flag for flag in ISA_ARM if flag in flags],
            "cores": int(said["cores"]) if said.get("cores", "").isdigit() else None,
            "memory_mib": int(memory.group()) // 1024 if memory else None,
            "governor": said.get("governor") or None,
            "os": f"Android {said.get('ro.build.version.release') or 'of unknown version'}",
            "kernel": said.get("kernel", ""),
            "python": None,
            "free": int(last[3]) * 1024 if len(last) > 3 and last[3].isdigit() else None,
        }

    def _root(self) -> str:
        """What is there already of the folder."""
        return "/data/local/tmp" if self.base.startswith("/data/local/tmp") else self.base

    def _check_state(self) -> None:
        listed = {}
        for line in self._adb("devices").splitlines()[1:]:
            serial, _, state = line.partition("\t")
            if state:
                listed[serial.strip()] = state.strip()
        serial = self.device.serial
        if serial not in listed:
            known = ", ".join(listed) or "none"
            raise MissingError(
                f"{self.device.name}: adb sees no {serial} (it sees: {known}); connect it and allow USB debugging"
            )
        state = listed[serial]
        for word, mend in STATES.items():
            if state.startswith(word):
                raise MissingError(f"{self.device.name}: {serial} {mend}")
        if state != "device":
            raise MissingError(f"{self.device.name}: {serial} is in the state {state!r}; start Android on it")

    # --- files ---

    def begin(self) -> None:
        """The folders there; what another run could not clear away is gone."""
        files, work = (shlex.quote(f"{self.base}/{name}") for name in ("files", "work"))
        self.shell(f"mkdir -p {files} {shlex.quote(self.work)} && rm -f {files}/.*.part")
        self.shell(f"find {work} -mindepth 1 -maxdepth 1 -mmin +1440 -exec rm -rf {{}} +")

    def put(self, path: Path, executable: bool = False) -> str:
        """The file there, by its hash; pushed only where it is missing, checked when it has arrived."""
        digest = sha256(path)
        final = f"{self.base}/files/{digest}"
        if self.shell(f"test -f {shlex.quote(final)} && echo kept || true").strip() != "kept":
            partial = f"{self.base}/files/.{self.work.rpartition('/')[2]}.part"
            try:
                self._adb("push", str(path), partial)
                found = self.shell(f"sha256sum {shlex.quote(partial)}").split()
                if not found or found[0] != digest:
                    raise InputError(f"{self.device.name}: {path.name} arrived with other bytes (sha256 differs)")
                self.shell(f"mv {shlex.quote(partial)} {shlex.quote(final)}")
            except DualTokenError:
                with suppress(DualTokenError):
                    self.shell(f"rm -f {shlex.quote(partial)}")
                raise
        if executable:
            self.shell(f"chmod 755 {shlex.quote(final)}")
        return final

    def get(self, there: str, path: Path) -> bytes:
        """The bytes of a file there, through `path` here."""
        self._adb("pull", there, str(path))
        return path.read_bytes()

    def clean(self) -> None:
        """Nothing of the command stays but files by their hash: neither its folder nor, after Ctrl-C, its process."""
        with suppress(DualTokenError):
            self.shell(f"kill $(cat {self._pid} 2>/dev/null) 2>/dev/null; rm -rf {shlex.quote(self.work)}")

    @property
    def _pid(self) -> str:
        return shlex.quote(f"{self.work}/pid")

    # --- commands ---

    def shell(self, command: str, timeout: float = TIMEOUT_S) -> str:
        """What a command prints on both streams. Raises InputError where it fails."""
        code, text = self.run(command, timeout)
        if code:
            raise self._failed(command.split()[0], text)
        return text

    def run(self, command: str, timeout: float) -> tuple[int, str]:
        """Exit code and what is printed; a connection that breaks never says the last line."""
        text = self._adb("shell", f"({command}) 2>&1; echo {ENDED} $?", timeout=timeout)
        found = re.search(rf"{ENDED} (\d+)\s*$", text)
        if found is None:
            raise MissingError(f"{self.device.name}: the connection broke while a command ran; run it again")
        return int(found.group(1)), text[: found.start()]

    def program(self, command: Sequence[str], timeout: float) -> tuple[int, str]:
        """The same of a program, whose process clean() ends."""
        return self.run(f"sh -c {shlex.quote(f'echo $$ > {self._pid}; exec {shlex.join(command)}')}", timeout)

    def _adb(self, *words: str, timeout: float = 600.0) -> str:
        chosen = [] if words[0] == "devices" else ["-s", self.device.serial]
        command = ["adb", *chosen, *words]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, timeout=timeout,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise MissingError("there is no adb here; install Android's platform tools (Debian: adb)") from error
        except subprocess.TimeoutExpired as error:
            raise MissingError(f"{self.device.name}: no answer to adb {words[0]} in {timeout:.0f} s") from error
        if words[0] == "shell" and ENDED in done.stdout:
            return done.stdout  # its exit code is that of the command there
        if done.returncode or words[0] == "shell":
            raise self._failed(f"adb {words[0]}", f"{done.stdout}\n{done.stderr}")
        return done.stdout

    def _failed(self, what: str, text: str) -> DualTokenError:
        lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("* daemon")]
        last = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "no reason was given")
        if any(word in text for word in FULL):
            return InputError(f"{self.device.name}: the disk is full")
        if any(word in text for word in ("device offline", "not found", "unauthorized", "closed", "no devices")) and (
            what.startswith("adb")
        ):
            return MissingError(f"{self.device.name}: the connection cannot be made, or broke: {last}")
        return InputError(f"{self.device.name}: {what} failed: {last}")
