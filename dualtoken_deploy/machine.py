"""What a measurement was made on: CPU, instruction sets, cores, memory, governor, system. Linux (x86, ARM) and macOS.

Standard library only, so that a manifest or a bench can be written on any device. No host or user name is read.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

# The flags that decide which kernels an inference library picks, in the words of Linux's /proc/cpuinfo.
ISA_X86 = ("avx", "f16c", "avx2", "fma", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16")
ISA_X86_MATRIX = ("amx_tile", "amx_int8", "amx_bf16", "amx_fp16")
ISA_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "sme", "sme2")
ISA_FLAGS = (*ISA_X86, *ISA_X86_MATRIX, *ISA_ARM)

_MAC_BRAND = "machdep.cpu.brand_string"
_MAC_FLAGS = {
    "hw.optional.avx1_0": "avx",
    "hw.optional.f16c": "f16c",
    "hw.optional.avx2_0": "avx2",
    "hw.optional.fma": "fma",
    "hw.optional.avx512f": "avx512f",
    "hw.optional.avx512bw": "avx512bw",
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
}


def describe_machine() -> dict[str, Any]:
    """This machine as plain data for a manifest or a report.

    Keys: "cpu" (model), "architecture", "isa" (flags present, of ISA_FLAGS), "cores" (logical, that this process may
    use), "memory_mib" (that it may use, or null), "governor" (or null), "os", "kernel", "python".
    """
    cpu, isa = _mac_cpu() if platform.system() == "Darwin" else _linux_cpu(Path("/"))
    return {
        "cpu": cpu or platform.processor() or platform.machine() or "unknown",
        "architecture": platform.machine(),
        "isa": isa,
        "cores": available_cores(),
        "memory_mib": _memory_mib(Path("/")),
        "governor": _governor(Path("/")),
        "os": _os_name(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions in `names` that are installed, in the order given."""
    return {name: version for name in names if (version := _version(name)) is not None}


@functools.cache  # a distribution is looked for in every folder of sys.path
def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def available_cores(root: Path = Path("/")) -> int:
    """Logical cores that this process may keep busy: its affinity, cut to its control group's quota; at least 1."""
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quota = _cpu_quota(root)
    return max(1, allowed if quota is None else min(allowed, int(quota)))


def busy_cores(root: Path = Path("/"), seconds: float = 0.3) -> float:
    """How many cores the whole machine keeps busy now, sampled over `seconds`; off Linux its load average instead.

    A load average lags by a minute and would count the export that ran just before.
    """
    before = _cpu_ticks(root)
    if before is None:
        return os.getloadavg()[0]
    time.sleep(seconds)
    after = _cpu_ticks(root) or before
    total = after[1] - before[1]
    return (after[0] - before[0]) / total * (os.cpu_count() or 1) if total else 0.0


def _cpu_ticks(root: Path) -> tuple[int, int] | None:
    """(busy, all) ticks over all cores since boot, from /proc/stat."""
    text = _read(root / "proc/stat")
    if not text:
        return None
    ticks = [int(t) for t in text.splitlines()[0].split()[1:9]]  # user nice system idle iowait irq softirq steal
    return sum(ticks) - sum(ticks[3:5]), sum(ticks)


def _linux_cpu(root: Path) -> tuple[str | None, list[str]]:
    fields: dict[str, str] = {}
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())  # the first core stands for all
    present = set(fields.get("flags", fields.get("Features", "")).split())
    board = (_read(root / "proc/device-tree/model") or "").rstrip("\0")
    part = fields.get("CPU part")  # ARM kernels print no name: implementer and part are what there is
    named = fields.get("model name") or fields.get("Hardware") or fields.get("Model") or board
    arm = f"ARM implementer {fields.get('CPU implementer', '?')} part {part}" if part else None
    return named or arm, [flag for flag in ISA_FLAGS if flag in present]


def _mac_cpu() -> tuple[str | None, list[str]]:
    try:
        # Without -n, so that values stay beside their names: sysctl skips the ones that this Mac does not have.
        done = subprocess.run(
            ["sysctl", _MAC_BRAND, *_MAC_FLAGS], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, []
    values = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    present = {flag for key, flag in _MAC_FLAGS.items() if values.get(key, "0").strip() == "1"}
    return values.get(_MAC_BRAND), [flag for flag in ISA_FLAGS if flag in present]


def _memory_mib(root: Path) -> int | None:
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    limits = [physical]
    for group in _control_groups(root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(group / name)
            if text and text.isdigit():
                limits.append(int(text))
    return min(limits) // 2**20


def _cpu_quota(root: Path) -> float | None:
    """The smallest CPU quota, in cores, of this process's control groups; None where there is none."""
    quotas = []
    for group in _control_groups(root):
        v1 = f"{_read(group / 'cpu.cfs_quota_us') or ''} {_read(group / 'cpu.cfs_period_us') or ''}"
        words = (_read(group / "cpu.max") or v1).split()
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:  # "max" in v2, -1 in v1: no quota
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _control_groups(root: Path) -> list[Path]:
    """Folders of the control groups (v1 and v2) that this process is in, and of those above them."""
    mount = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        top = mount / controllers
        group = top / path.lstrip("/")
        folders += [f for f in (group, *group.parents) if f == top or top in f.parents]
    return folders


def _governor(root: Path) -> str | None:
    files = sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))
    found = {text for text in map(_read, files) if text}
    return ", ".join(sorted(found)) or None


def _os_name() -> str:
    if platform.system() == "Darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        return platform.system()


def _read(path: Path) -> str | None:
    """A small file's text without the space around it; None where it is not there or not readable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
