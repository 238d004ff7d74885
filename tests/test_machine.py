"""The description of a machine, read from made-up /proc and /sys trees and from what sysctl prints on a Mac."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dualtoken_deploy import machine

X86 = "processor\t: 0\nmodel name\t: Xeon 8488C\nflags\t\t: fpu avx2 fma avx512f avx512_vnni amx_int8 amx_bf16 ht\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n"
SYSCTL = """machdep.cpu.brand_string: Apple M2
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_this_machine_is_plain_data_without_its_name() -> None:
    found = machine.describe_machine()
    text = json.dumps(found, allow_nan=False)
    assert list(found) == [
        "cpu", "architecture", "isa", "cores", "memory_mib", "governor", "os", "kernel", "python",
    ]  # fmt: skip
    assert 1 <= found["cores"] <= (os.cpu_count() or 1)
    assert found["cpu"] != "unknown"
    assert set(found["isa"]) <= set(machine.ISA_FLAGS)
    if len(platform.node()) > 4:  # a shorter one may be part of a word
        assert platform.node() not in text


@pytest.mark.parametrize(
    ("cpuinfo", "name", "isa"),
    [
        (X86, "Xeon 8488C", ["avx2", "fma", "avx512f", "avx512_vnni", "amx_int8", "amx_bf16"]),
        (ARM, "ARM implementer 0x41 part 0xd40", ["asimd", "asimddp", "i8mm"]),
        (ARM + "Model\t\t: Raspberry Pi 5\n", "Raspberry Pi 5", ["asimd", "asimddp", "i8mm"]),
        ("", None, []),
    ],
    ids=["x86", "arm", "board", "nothing"],
)
def test_cpu_and_instruction_sets(tmp_path: Path, cpuinfo: str, name: str | None, isa: list[str]) -> None:
    assert machine._linux_cpu(tree(tmp_path, {"proc/cpuinfo": cpuinfo})) == (name, isa)


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    done = subprocess.CompletedProcess([], 1, stdout=SYSCTL)  # 1: some of the names are not known to that Mac
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    found = machine.describe_machine()
    assert (found["cpu"], found["isa"]) == ("Apple M2", ["asimd", "asimddp", "i8mm"])
    assert found["os"].startswith("macOS")


def test_a_mac_without_sysctl(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("sysctl")

    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.describe_machine()["isa"] == []


V2 = "0::/user/app\n"
V1 = "4:cpu:/app\n3:memory:/app\n"


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/app/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/cpu.max": "50000 100000"}, 0.5),  # set on the group above
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/user/app/cpu.max": "max 100000"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3.0),  # inside a container
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/app/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/app/cpu.cfs_period_us": "100000",
            },
            None,
        ),
        ({}, None),
    ],
)
def test_cpu_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert machine._cpu_quota(tree(tmp_path, files)) == quota


def test_cores_are_cut_to_the_quota_and_never_none(tmp_path: Path) -> None:
    half = tree(tmp_path, {"proc/self/cgroup": V2, "sys/fs/cgroup/user/app/cpu.max": "50000 100000"})
    assert machine.available_cores(half) == 1
    assert machine.available_cores(tmp_path / "nowhere") >= 1


def test_memory_is_cut_to_the_limit(tmp_path: Path) -> None:
    limit = {"proc/self/cgroup": V2, "sys/fs/cgroup/user/app/memory.max": str(64 * 2**20)}
    assert machine._memory_mib(tree(tmp_path, limit)) == 64


def test_governors(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu"
    assert machine._governor(tmp_path) is None
    tree(tmp_path, {f"{cpu}/cpu{i}/cpufreq/scaling_governor": "powersave\n" for i in range(2)})
    assert machine._governor(tmp_path) == "powersave"
    tree(tmp_path, {f"{cpu}/cpu10/cpufreq/scaling_governor": "performance\n"})
    assert machine._governor(tmp_path) == "performance, powersave"


def test_busy_cores_from_two_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = iter(["cpu 100 0 100 800 0 0 0 0 0 0\n", "cpu 130 0 110 850 5 0 0 5 0 0\n"])  # 45 busy of 100 ticks
    monkeypatch.setattr(machine, "_read", lambda _: next(samples))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert machine.busy_cores(tmp_path, seconds=0) == pytest.approx(0.45 * 4)


def test_library_versions_leave_out_what_is_not_installed() -> None:
    assert machine.library_versions(["numpy", "no-such-distribution"]) == {"numpy": np.__version__}
