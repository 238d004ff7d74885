"""`--on adb://` against a stand-in of adb's command line (tests/fake_adb.py), which is no phone. Not run on one."""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.store import sha256, write_bundle
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.remote.adb import Adb
from dualtoken_deploy.remote.devices import find_device
from dualtoken_deploy.remote.programs import PROGRAMS
from dualtoken_deploy.targets.table import get_target
from tests.commands import fails, prints
from tests.fake_adb import Phone


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Phone:
    """Its name in devices.toml is `pixel`."""
    (tmp_path / "phone").mkdir()
    made = Phone(tmp_path / "phone")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    file = tmp_path / "config" / "dualtoken" / "devices.toml"
    file.parent.mkdir(parents=True)
    file.write_text(f'[pixel]\nurl = "adb://P9"\nfolder = "{made.device}/base"\nprograms = "{made.folder}/programs"\n')
    return made


@pytest.fixture
def as_target(small_bundle: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """as_target(name) -> a bundle that says it is for that target, with files that the stand-in knows for models."""

    def make(target: str) -> Path:
        source, folder = Bundle.open(small_bundle()), tmp_path / f"for-{target}"
        folder.mkdir()
        for name in get_target(target).files:
            (folder / name).write_bytes(b"model" + name.encode())
        write_bundle(folder, replace(source.manifest, target=target), source.golden, source.labels)
        return folder

    return make


def test_bench_asks_each_targets_own_program(
    phone: Phone, as_target: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are those that the programs print; a command leaves nothing but files by their hash."""
    bundles = [as_target(name) for name in PROGRAMS]
    found = prints(
        capsys, "bench", *bundles, "--on", "pixel", "--rounds", "2", "--seconds", "0.1", "--threads", "2", "--json"
    )
    litert, executorch, ncnn = found["contestants"]
    assert (litert["p50_ms"], litert["mean_ms"], litert["min_ms"], litert["runs"]) == (3.99, 4.0005, 3.8, 50)
    assert executorch["p50_ms"] == pytest.approx(9.0, abs=0.01)
    assert executorch["runs"] == 2 * 12  # 100 ms of calls that the three of the probe say take 9 ms
    assert (ncnn["p50_ms"], ncnn["mean_ms"], ncnn["max_ms"]) == (None, 11.0, 12.0)
    assert ncnn["ratio"]["median"] == pytest.approx(4.0005 / 11)
    assert found["notes"] == ["for-ncnn: benchncnn times the graph with weights of its own"]
    machine = found["on"]["machine"]
    assert (machine["model"], machine["cpu"], machine["os"]) == ("Acme Phone 9", "Chips C1000", "Android 16")
    assert machine["architecture"] == "arm64-v8a"
    assert machine["cores"] > 0
    assert phone.left_over == []
    kept = {p.name for p in (phone.device / "base" / "files").iterdir()}
    assert sha256(bundles[0] / "model.tflite") in kept
    programs = [words[-1] for words in phone.asked if words[-1].startswith("(sh -c")]
    assert "--num_threads=2" in programs[0] or "--num_threads=2" in "".join(programs)
    assert any("2 0 -1 0 " in text and "shape=[64,64,3]" in text for text in programs)
    pushed = len([words for words in phone.asked if "push" in words])
    prints(capsys, "bench", bundles[0], "--on", "pixel", "--rounds", "1", "--json")
    assert len([words for words in phone.asked if "push" in words]) == pushed  # all of it is there by its hash


@pytest.mark.parametrize("target", ["litert", "executorch"])
def test_validate_holds_the_outputs_there_against_the_golden_ones(
    target: str, phone: Phone, as_target: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = as_target(target)
    phone.play(golden=str(bundle / "golden.npz"), error=0.25)
    code, line = fails(capsys, "validate", bundle, "--on", "pixel")
    assert (code, "on golden, and its export asks for" in line) == (5, True)
    (row,) = prints(capsys, "validate", bundle, "--on", "pixel", "--min-sqnr", "0", "--json")["results"]
    logits = Bundle.open(bundle).golden["logits"].astype(np.float64)
    assert row["max_abs_error"] == pytest.approx(0.25, rel=1e-4)
    assert row["sqnr_db"] == pytest.approx(10 * np.log10((logits**2).mean() / 0.25**2), abs=0.05)
    assert row["engine"] == f"{PROGRAMS[target].name} on Acme Phone 9"
    code, line = fails(capsys, "validate", bundle, "--on", "pixel", "--min-sqnr", "500")
    assert code == 5
    assert "sqnr_db" in line
    assert phone.left_over == []


def test_devices_asks_a_phone_what_it_is(phone: Phone, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = prints(capsys, "devices", "--json")["devices"]
    assert (row["answers"], row["system"], row["architecture"]) == (True, "Android 16", "arm64-v8a")
    phone.say({"P9": "unauthorized"})
    (row,) = prints(capsys, "devices", "--json")["devices"]
    assert (row["answers"], row["why"]) == (
        False, "pixel: P9 has not allowed this computer; accept the question on its screen"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        ({"devices": {"P9": "offline"}}, 3, "pixel: P9 is offline; unlock it"),
        ({"devices": {"P9": "unauthorized"}}, 3, "has not allowed this computer"),
        ({"devices": {"P9": "no permissions (user in plugdev group; are your udev rules wrong?)"}}, 3, "udev rules"),
        ({"devices": {"X1": "device"}}, 3, "adb sees no P9 (it sees: X1)"),
        ({"devices": {}}, 3, "adb sees no P9 (it sees: none)"),
        ({"devices": {"P9": "recovery"}}, 3, "is in the state 'recovery'"),
        ({"full": True}, 4, "pixel: the disk is full"),
        ({"flip": True}, 4, "arrived with other bytes (sha256 differs)"),
        ({"lost": "--graph="}, 3, "the connection cannot be made, or broke: error: closed"),
    ],
    ids=["offline", "unauthorized", "udev", "another", "none", "recovery", "full", "changed", "lost"],
)
def test_what_a_phone_refuses_is_one_line_and_nothing_stays(
    state: dict[str, object], code: int, words: str, phone: Phone, as_target: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    phone.say(**state)  # type: ignore[arg-type]
    found, line = fails(capsys, "bench", as_target("litert"), "--on", "pixel", "--rounds", "1")
    assert found == code
    assert words in line
    assert phone.left_over == []


def test_programs_that_lack_fail_or_are_for_another_abi_are_named(
    phone: Phone, as_target: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, program = as_target("litert"), phone.folder / "programs" / "benchmark_model"
    phone.play(fails="failed to allocate tensors")
    code, line = fails(capsys, "bench", bundle, "--on", "pixel")
    assert (code, line.endswith(f"ended with 1 on {bundle}: Error: failed to allocate tensors")) == (4, True)
    own = program.read_bytes()
    program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 62) + bytes(40))
    code, line = fails(capsys, "bench", bundle, "--on", "pixel")
    assert (code, line) == (3, f"error: {program} is for x86_64, pixel is arm64-v8a; build it for that")
    program.write_bytes(own.replace(b"count=", b"n="))
    phone.play()
    code, line = fails(capsys, "bench", bundle, "--on", "pixel")
    assert code == 4
    assert "benchmark_model printed no times that are known" in line
    program.unlink()
    code, line = fails(capsys, "bench", bundle, "--on", "pixel")
    assert code == 3
    assert f"{program} is not there; build benchmark_model for arm64-v8a" in line
    assert phone.left_over == []


def test_without_adb_it_says_what_to_install(
    phone: Phone, as_target: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(phone.device))
    code, line = fails(capsys, "bench", as_target("litert"), "--on", "pixel")
    assert (code, line) == (3, "error: there is no adb here; install Android's platform tools (Debian: adb)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("inspect", "litert"), "inspect does not run on Android, where there is no Python: bench and validate do"),
        (("bench", "litert", "--batch", "2"), "--batch is not known to the programs on Android"),
        (
            ("bench", "onnxruntime"),
            "a bundle of onnxruntime fp32 has no program on Android; those of litert, executorch",
        ),
        (("bench", "ncnn", "--device", "gpu"), "benchncnn takes no --device gpu"),
        (("bench", "litert", "--against", "eager"), "on Android the baseline is one of the bundles (for-litert)"),
        (("validate", "ncnn"), "benchncnn gives no outputs"),
        (("validate", "litert", "--reference", "eager"), "so it is golden"),
    ],
)
def test_what_cannot_be_asked_of_a_phone_is_usage(
    words: tuple[str, ...], said: str, phone: Phone, as_target: Callable[[str], Path],
    small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    command, target, *options = words
    bundle = small_bundle() if target == "onnxruntime" else as_target(target)
    code, line = fails(capsys, command, bundle, *options, "--on", "pixel")
    assert code == 2
    assert said in line


def test_a_phone_in_a_comparison_is_a_row_with_its_reason(
    phone: Phone, small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, "compare", small_bundle(), "--data", "digits", "--limit", "3", "--on", "pixel")
    assert code == 2
    assert "1 of 1 devices failed: pixel: there is no Python on Android" in line


def test_an_address_of_adb_is_checked_and_keys_are_of_their_kind(tmp_path: Path) -> None:
    assert find_device("adb://192.168.1.5:5555").serial == "192.168.1.5:5555"
    for said in ("adb://-x", "adb://a b", "adb://"):
        with pytest.raises(UsageError):
            find_device(said)
    from dualtoken_deploy.remote.devices import Device

    with pytest.raises(UsageError, match="device d: wheelhouse is for ssh:// alone"):
        Device("d", "adb://P9", wheelhouse="w")
    with pytest.raises(UsageError, match="device d: programs is for adb:// alone"):
        Device("d", "ssh://h", programs="p")


def test_what_was_interrupted_does_not_run_on(phone: Phone) -> None:
    """The client that is gone does not end a process on a phone; clearing up does."""
    adb = Adb(find_device("pixel"))
    adb.begin()
    ended: list[int] = []
    thread = Thread(target=lambda: ended.append(adb.program(["sleep", "600"], 600)[0]))
    thread.start()
    while not (Path(adb.work) / "pid").exists() or not (Path(adb.work) / "pid").read_text().strip():
        time.sleep(0.02)
    adb.clean()
    thread.join()
    assert ended == [128 + 15]
    assert phone.left_over == []


@pytest.mark.skipif(shutil.which("adb") is None, reason="no adb here; on Debian: apt-get install adb")
def test_the_real_client_says_that_no_such_device_is_there(
    as_target: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a machine without phones: the form of the real client's list is what is read."""
    code, line = fails(capsys, "bench", as_target("litert"), "--on", "adb://NO-SUCH-SERIAL")
    assert code == 3
    assert "adb sees no NO-SUCH-SERIAL" in line
