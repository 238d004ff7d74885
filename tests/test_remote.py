"""`--on ssh://...` against a real sshd on the loopback, with keys and a port of its own; removed at the end."""

from __future__ import annotations

import getpass
import inspect
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.store import sha256
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import InputError, MissingError, UsageError
from dualtoken_deploy.remote import agent
from dualtoken_deploy.remote.devices import Device, find_device, read_devices
from dualtoken_deploy.remote.link import Link
from dualtoken_deploy.remote.session import Session
from tests.commands import check_schema, fails, prints

SSHD = shutil.which("sshd") or next((p for p in ("/usr/sbin/sshd", "/usr/local/sbin/sshd") if Path(p).exists()), None)
MISSING = [name for name, path in (("sshd", SSHD), ("ssh", shutil.which("ssh"))) if path is None]
needs_sshd = pytest.mark.skipif(
    bool(MISSING), reason=f"no {' and no '.join(MISSING)} here; on Debian: apt-get install openssh-server"
)


@dataclass(frozen=True)
class Sshd:
    """A server of ours: the client's configuration for it, and its log."""

    folder: Path
    port: int
    config: Path
    log: Path

    @property
    def device(self) -> Device:
        """The loopback as a device whose interpreter has the package already: this one."""
        return Device(
            "loop", f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}", python=sys.executable, environment="own",
            folder=str(self.folder / "device"), config=str(self.config),
        )  # fmt: skip


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    assert SSHD is not None
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # what it separates its privileges in
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile {folder}/pid\n"
        f"AuthorizedKeysFile {folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
    )
    host = (folder / "host.pub").read_text()
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host}")
    (folder / "ssh_config").write_text(
        f"Host *\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  IdentityAgent none\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile /dev/null\n"
    )
    command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        while "Server listening" not in (folder / "log").read_text():
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.02)
        yield Sshd(folder, port, folder / "ssh_config", folder / "log")
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def named(sshd: Sshd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """named(**changes) -> the name of the device in a devices.toml of this test."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def write(**changes: Any) -> str:
        device = replace(sshd.device, **changes)
        lines = [f'{key} = "{value}"' for key, value in vars(device).items() if value is not None and key != "name"]
        file = tmp_path / "config" / "dualtoken" / "devices.toml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(["[loop]", *lines, ""]))
        return "loop"

    return write


def left_over(sshd: Sshd) -> list[str]:
    """What is in the device's work folder, and files that did not arrive whole."""
    device = sshd.folder / "device"
    return [p.name for p in (device / "work").iterdir()] + [p.name for p in (device / "files").glob(".*")]


# --- what a command brings ---


@needs_sshd
def test_validate_says_there_what_it_says_here(
    sshd: Sshd, named: Callable[..., str], small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = small_bundle()
    there = prints(capsys, "validate", bundle, "--reference", "golden", "--on", named(), "--json")
    here = prints(capsys, "validate", bundle, "--reference", "golden", "--json")
    on = there.pop("on")
    assert there == here  # the paths of this machine, too
    assert on["device"] == "loop"
    assert on["machine"]["cpu"]
    assert on["machine"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert left_over(sshd) == []
    # what is there by its hash does not travel again
    kept = {p.name for p in (sshd.folder / "device" / "files").iterdir()}
    assert {sha256(bundle / name) for name in ("model.onnx", "golden.npz", "manifest.json")} <= kept
    told: list[str] = []
    session = Session(sshd.device, told.append)
    session.add(bundle)
    session._copy()
    session.link.ask("clean", work=session.work)
    assert not [text for text in told if "copying" in text]


@needs_sshd
def test_pictures_travel_and_a_gate_that_is_missed_there_is_exit_5_here(
    named: Callable[..., str], small_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dualtoken_deploy.data.folders import open_dataset

    picture = open_dataset("photographs").images[0]
    for name in ("class 1", "class 2"):  # of the bundle's own
        (tmp_path / "set" / name).mkdir(parents=True)
        shutil.copy(picture, tmp_path / "set" / name / picture.name)
    options = ("--data", tmp_path / "set", "--reference", "golden", "--min-sqnr", "500", "--on", named())
    code, line = fails(capsys, "validate", small_bundle(), *options)
    assert code == 5
    assert line.startswith(f"error: loop: {small_bundle()}: sqnr_db")


# A net in the place of T (mix), and one precision: the way is the same, and takes seconds.
SHORTER = (
    ('variant = "t-mix"', 'model = "net.py:make"'), ('weights = "digits"', 'image_size = 32\nlabels = "labels.txt"'),
    ('precisions = ["fp32", "int8"]', 'precisions = ["fp32"]'), ("top1 = 0.98", "sqnr_db = 60\nlimit = 20"),
    ('tolerances = "tolerances.toml"', 'tolerances = "tolerances.toml"\nlimit = 20\nrounds = 0'),
    ('names = ["jetson"]', 'names = ["loop"]\nrounds = 1\nseconds = 0.05'),
    ('html = "report.html"', 'html = "report.html"\nlimit = 20\nrounds = 0'),
)  # fmt: skip
NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


@needs_sshd
def test_the_run_of_the_page_goes_all_the_way(
    named: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/ci.md's recipe: export, gates, verify against a baseline, bench over ssh, sign, report, in one command."""
    pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
    from tests.test_signature import make_keys

    root = Path(__file__).parent.parent
    recipe = (root / "docs/ci.md").read_text().partition("```toml\n# recipe.toml")[2].partition("```")[0]
    for said, shorter in SHORTER:
        assert recipe.count(said) == 1, said
        recipe = recipe.replace(said, shorter)
    monkeypatch.chdir(tmp_path)
    named()
    Path("recipe.toml").write_text(f"#{recipe}")
    Path("net.py").write_text(NET)
    Path("labels.txt").write_text("\n".join("0123456789"))
    shutil.copy(root / "examples/ci/tolerances.toml", "tolerances.toml")
    private, public = make_keys(tmp_path, "a")
    private.rename("key.pem")
    names = [f"make-{target}-fp32" for target in ("onnxruntime", "openvino")]
    steps = prints(capsys, "run", "recipe.toml", "--json")["steps"]
    each = [f"{step} {name}" for step in ("export", "gates", "verify") for name in names]
    each += ["bench on loop", *(f"sign {name}" for name in names), "report all"]
    assert [(f"{s['step']} {s['bundle']}", s["state"]) for s in steps] == [(name, "done") for name in each]

    measured = json.loads(Path("measured/loop.json").read_text())
    check_schema("bench", measured)
    assert [row["name"] for row in measured["contestants"]] == [*names, "gemm"]
    assert (measured["on"]["device"], bool(measured["on"]["machine"]["cpu"])) == ("loop", True)
    page = Path("report.html").read_text()
    assert all(name in page for name in names)
    bundle, baseline = Path("bundles", names[0]), Path("ci", f"{names[0]}.json")
    main(["verify", str(bundle), "--baseline", str(baseline), "--signature", str(public)])
    assert "held" in capsys.readouterr().out
    assert {s["state"] for s in prints(capsys, "run", "recipe.toml", "--json")["steps"]} == {"skipped"}
    Path("recipe.toml").write_text(f"#{recipe.replace('loop', 'nowhere')}")
    code, line = fails(capsys, "run", "recipe.toml")
    assert (code, "there is no device 'nowhere'" in line) == (2, True)


def test_options_and_paths_become_those_of_the_device(tmp_path: Path) -> None:
    """Of bench and evaluate: what is a folder here travels, words stay words, defaults are left out."""
    from dualtoken_deploy.cli import checking
    from dualtoken_deploy.cli.remote import _words

    (tmp_path / "b").mkdir()
    (tmp_path / "set").mkdir()
    session = Session(Device("d", "ssh://h"), lambda _: None)
    bench = {"against": str(tmp_path / "b"), "rounds": 2, "seconds": 0.5, "json_output": True, "device": "cpu"}
    words = "bench carried0/b --against carried1/b --rounds 2 --seconds 0.5 --device cpu --json"
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (checking.bench, bench, words),
        (checking.bench, {"against": "eager"}, "bench carried2/b --against eager"),
        (checking.evaluate, {"data": str(tmp_path / "set")}, "evaluate carried3/b --data carried4/set"),
        (checking.evaluate, {"data": "digits"}, "evaluate carried5/b --data digits"),
    ]
    for command, given, expected in cases:
        signature = inspect.signature(command, eval_str=True)
        values = {name: p.default for name, p in signature.parameters.items()} | given
        found, first = _words(command.__name__, signature, values, [tmp_path / "b"], session)
        assert (found, first) == (expected.split(), expected.split()[1])


@needs_sshd
def test_what_a_build_made_comes_back_whole(sshd: Sshd, own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command that changes the bundle there as a build does; the folder here is swapped once all has arrived."""
    session = Session(sshd.device, lambda _: None)
    name = session.add(own_bundle)
    before = (own_bundle / "model.onnx").read_bytes()
    code = (
        "import sys, pathlib; from dualtoken_deploy import Bundle; from dualtoken_deploy.bundle.store import "
        "write_bundle; p = pathlib.Path(sys.argv[1]); b = Bundle.open(p); (p / 'model.engine').write_bytes(b'e' * "
        "3000000); write_bundle(p, b.manifest, b.golden, b.labels)"
    )
    session._copy()
    assert session._execute([sys.executable, "-c", code, name])[0] == 0
    assert not (own_bundle / "model.engine").exists()
    session._bring_back(name)
    assert (own_bundle / "model.engine").read_bytes() == b"e" * 3000000
    assert (own_bundle / "model.onnx").read_bytes() == before
    assert Bundle.open(own_bundle)
    session.link.ask("clean", work=session.work)


@needs_sshd
def test_devices_are_listed_and_asked(
    sshd: Sshd, named: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    named()
    (row,) = prints(capsys, "devices", "--json")["devices"]
    assert (row["device"], row["answers"], row["why"]) == ("loop", True, None)
    assert row["python"] == ".".join(map(str, sys.version_info[:3]))
    named(url=f"ssh://127.0.0.1:{sshd.port + 1 if sshd.port < 65535 else 1}")
    (row,) = prints(capsys, "devices", "--json")["devices"]
    assert row["answers"] is False
    assert "Connection refused" in row["why"]


# --- what goes wrong ---


@needs_sshd
@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"python": "/no/python"}, 3, "there is no /no/python"),
        ({"url": "ssh://nobody-there@127.0.0.1:PORT"}, 3, "Permission denied"),
        ({"config": "CONFIG"}, 3, "Host key verification failed"),
        ({"folder": "/proc/no"}, 4, "loop: "),
        ({"environment": "made", "wheelhouse": "HOUSE"}, 4, "has no dualtoken_deploy-*.whl; put the wheel there"),
    ],
    ids=["no python", "no key", "unknown host", "no folder", "no wheel"],
)
def test_what_a_device_lacks_is_one_line(
    changes: dict[str, str], code: int, words: str, sshd: Sshd, named: Callable[..., str], tmp_path: Path,
    small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if changes.get("config"):  # the same, but nobody has seen the host's key
        text = sshd.config.read_text().replace("known_hosts", "none")
        (tmp_path / "ssh_config").write_text(text)
    words_of = {"PORT": str(sshd.port), "CONFIG": str(tmp_path / "ssh_config"), "HOUSE": str(tmp_path)}
    filled = dict(changes)
    for key in filled:
        for word, value in words_of.items():
            filled[key] = filled[key].replace(word, value)
    found, line = fails(capsys, "inspect", small_bundle(), "--on", named(**filled))
    assert found == code
    assert words in line
    assert left_over(sshd) == []


OLD = "import platform\nplatform.python_version = lambda: '3.9.18'\n"
# the kernel's own answer to a write where there is no room
FULL = (
    "import io, pathlib\nopened = pathlib.Path.open\n"
    "def full(path, mode='r', **more):\n"
    "    return io.open('/dev/full', mode, 0) if mode == 'wb' else opened(path, mode, **more)\n"
    "pathlib.Path.open = full\n"
)


@needs_sshd
@pytest.mark.parametrize(
    ("begins_with", "code", "words"),
    [(OLD, 3, "has Python 3.9.18 as "), (FULL, 4, "loop: the disk is full")],
    ids=["an old Python", "no room"],
)
def test_a_device_that_is_too_old_or_full_is_one_line(
    begins_with: str, code: int, words: str, sshd: Sshd, named: Callable[..., str], tmp_path: Path,
    small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "sitecustomize.py").write_text(begins_with)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    there = tmp_path / "device"
    name = named(python=str(python), folder=str(there))
    found, line = fails(capsys, "inspect", small_bundle(), "--on", name)
    assert found == code
    assert words in line
    assert [path for part in ("work", "files") for path in (there / part).iterdir()] == []


def make_wheel(folder: Path, requires: str = "", tag: str = "py3-none-any") -> Path:
    """The smallest wheel with our name: its program prints what it was asked, its machine is "tiny"."""
    folder.mkdir(exist_ok=True)
    wheel, info = folder / f"dualtoken_deploy-0.0.1-{tag}.whl", "dualtoken_deploy-0.0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("dualtoken_deploy/__init__.py", "")
        file.writestr("dualtoken_deploy/machine.py", "def describe_machine(): return {'cpu': 'tiny'}")
        file.writestr("dualtoken_deploy/__main__.py", "import json, sys; print(json.dumps({'asked': sys.argv[1:]}))")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: dualtoken-deploy\nVersion: 0.0.1\n{requires}")
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")
    return folder


@needs_sshd
def test_an_environment_is_made_once_from_a_wheelhouse_and_one_that_fails_is_not_kept(
    sshd: Sshd, named: Callable[..., str], tmp_path: Path, own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a network: the wheels travel. A package that is in none of them is named, and so is another machine's."""
    environments = sshd.folder / "device" / "env"
    lacking = make_wheel(tmp_path / "lacking", "Requires-Dist: no-such-package-here\n")
    named(environment="made", wheelhouse=str(lacking))
    code, line = fails(capsys, "inspect", own_bundle, "--on", "loop")
    assert code == 3
    assert "cannot install dualtoken_deploy-0.0.1-py3-none-any.whl: ERROR: No matching distribution" in line
    assert "no-such-package-here" in line
    named(environment="made", wheelhouse=str(make_wheel(tmp_path / "foreign", tag="cp311-cp311-linux_s390x")))
    code, line = fails(capsys, "inspect", own_bundle, "--on", "loop")
    assert code == 3
    assert "dualtoken_deploy-0.0.1-cp311-cp311-linux_s390x.whl is not a supported wheel on this platform" in line
    assert list(environments.iterdir()) == []
    named(environment="made")
    house = ["--wheelhouse", str(make_wheel(tmp_path / "whole"))]
    main(["inspect", str(own_bundle), "--on", "loop", *house, "--json"])  # whose answer is the tiny program's own
    found = json.loads(capsys.readouterr().out)
    assert found["asked"] == ["inspect", str(own_bundle), "--json"]  # there by its name there
    assert found["on"]["machine"] == {"cpu": "tiny"}
    (made,) = environments.iterdir()
    before = made.stat().st_ctime_ns
    main(["inspect", str(own_bundle), "--on", "loop", *house, "--json"])
    assert json.loads(capsys.readouterr().out)["asked"]
    assert [p.stat().st_ctime_ns for p in environments.iterdir()] == [before]


@pytest.mark.parametrize("version", [0, 22, 23, 26])
def test_an_environment_gets_a_pip_of_its_own_where_the_devices_is_too_old(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def quietly(command: list[str], _what: str) -> None:
        commands.append(command)
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()

    monkeypatch.setattr(agent, "quietly", quietly)
    monkeypatch.setattr(agent, "pip_version", lambda: version)
    monkeypatch.setattr(agent, "frame", lambda **_: None)
    request = {"folder": str(tmp_path), "key": "k", "wheels": {}, "wheel": "w.whl", "extras": "[e]", "index": True}
    assert agent.environment(request)["made"] is True
    make, install = commands
    bare = version >= 23
    assert ("--without-pip" in make) == bare
    assert (install[0] == sys.executable, "--python" in install) == (bare, bare)
    assert install[-1].endswith("wheels/w.whl[e]")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--wheelhouse is of wheels that travel to a device; give --on too"),
        (["--on", "loop"], "loop has an environment of its own"),
        (["--on", "adb://R5CT1234"], "runs no Python"),
    ],
)
def test_wheels_that_nothing_would_install_are_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    small_bundle: Callable[..., Path], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    file = tmp_path / "dualtoken" / "devices.toml"
    file.parent.mkdir()
    file.write_text('[loop]\nurl = "ssh://127.0.0.1"\nenvironment = "own"\n')
    code, line = fails(capsys, "inspect", small_bundle(), *words, "--wheelhouse", tmp_path)
    assert code == 2
    assert said in line


@needs_sshd
def test_another_version_in_its_own_environment_is_refused(
    sshd: Sshd, monkeypatch: pytest.MonkeyPatch, small_bundle: Callable[..., Path]
) -> None:
    monkeypatch.setattr("dualtoken_deploy.remote.session.metadata.version", lambda _: "9.9.9")
    session = Session(sshd.device, lambda _: None)
    name = session.add(small_bundle())
    with pytest.raises(MissingError, match=r"has dualtoken-deploy \d.*, here is 9\.9\.9; install that there"):
        session.run(["inspect", name], ())


@needs_sshd
def test_a_connection_that_breaks_leaves_whole_files_and_goes_on_from_there(sshd: Sshd, tmp_path: Path) -> None:
    """The second of three files breaks off in its middle: the first stays, and the next run sends the other two."""
    files = {}
    for number in range(3):
        path = tmp_path / str(number)
        path.write_bytes(os.urandom(300_000))
        files[sha256(path)] = path
    link = Link(sshd.device)

    def breaking() -> Iterator[bytes]:
        first, second, _ = files.values()
        yield first.read_bytes()
        yield second.read_bytes()[:1000]

    asked = [{"sha256": digest, "size": path.stat().st_size} for digest, path in files.items()]
    with pytest.raises(InputError, match="loop: the connection ended inside a file"):
        link.ask("put", breaking(), files=asked)
    assert link.ask("missing", hashes=list(files))["missing"] == list(files)[1:]
    assert left_over(sshd) == []


@needs_sshd
def test_bytes_that_change_on_the_way_are_not_kept(sshd: Sshd, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 1000)
    link, digest = Link(sshd.device), sha256(path)
    with pytest.raises(InputError, match="other bytes"):
        link.ask("put", [b"b" * 1000], files=[{"sha256": digest, "size": 1000}])
    assert link.ask("missing", hashes=[digest])["missing"] == [digest]


@needs_sshd
def test_a_path_that_leads_out_of_its_folder_is_not_written(sshd: Sshd) -> None:
    with pytest.raises(InputError, match="a path leads out of the folder"):
        Link(sshd.device).ask("place", work="w", tree={"../../out": "0" * 64})
    Link(sshd.device).ask("clean", work="w")


@needs_sshd
def test_an_interrupt_ends_the_command_there(sshd: Sshd, tmp_path: Path) -> None:
    """Ctrl-C here while it runs: SIGINT there, so that it clears up, and nothing of it lives on."""
    marks = tmp_path / "marks"
    marks.mkdir()
    code = (
        "import os, pathlib, sys, time\n"
        f"m = pathlib.Path({str(marks)!r}); (m / 'pid').write_text(str(os.getpid()))\n"
        "try:\n    print('begun', file=sys.stderr, flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt:\n    (m / 'cleared').touch()\n"
    )
    link = Link(sshd.device)

    def interrupt(frame: Any) -> None:
        if frame.get("err") == "begun":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        link.ask("run", (), interrupt, work="i", command=[sys.executable, "-c", code], environment={})
    pid = int((marks / "pid").read_text())
    while True:  # the device's own process ends by the signal, not by our looking
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    assert (marks / "cleared").exists()
    link.ask("clean", work="i")


@needs_sshd
def test_a_connection_that_dies_while_a_command_runs_is_one_line(sshd: Sshd) -> None:
    link = Link(sshd.device)
    code = "import os, signal; print('begun', flush=True); os.kill(os.getppid(), signal.SIGKILL)"  # our agent
    with pytest.raises(MissingError, match=r"loop: the (device ended with|connection cannot be made, or broke)"):
        link.ask("run", work="d", command=[sys.executable, "-c", code], environment={})
    link.ask("clean", work="d")


# --- names and addresses, without a server ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            '[a]\nurl = "ssh://h"\npyhton = "p"\n',
            "line 3: [a] has no 'pyhton'; did you mean python? Valid: url, python",
        ),
        ("[a]\nurl = 3\n", "line 2: url of [a] is no text"),
        ("[a]\n", "device 'a' is no table with a url"),
        ('[a]\nurl = "http://h"\n', "[a]: 'http://h' is no ssh://[USER@]HOST[:PORT]"),
        ('[a]\nurl = "ssh://h"\nenvironment = "some"\n', "environment 'some' is neither 'made' nor 'own'"),
        ("[a", "is no TOML"),
    ],
)
def test_a_typo_in_devices_toml_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "devices.toml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_devices(tmp_path / "devices.toml")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "said", ["ssh://-oProxyCommand=x", "ssh://h:1:2", "ssh://h h", "ssh://", "ftp://h", "ssh://a@-b"]
)
def test_an_address_that_is_none_never_reaches_ssh(said: str) -> None:
    with pytest.raises(UsageError):
        find_device(said)


def test_an_unknown_name_lists_the_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "dualtoken").mkdir()
    (tmp_path / "dualtoken" / "devices.toml").write_text('[jetson]\nurl = "ssh://j"\n[pi]\nurl = "ssh://me@pi:2222"\n')
    with pytest.raises(UsageError, match=r"no device 'orin' in .*devices\.toml \(it has: jetson, pi\); or give ssh://"):
        find_device("orin")
    words = find_device("pi").ssh
    assert words[-4:] == ["-l", "me", "--", "pi"]
    assert words[words.index("-p") + 1] == "2222"
    assert "StrictHostKeyChecking=yes" in words
    assert "BatchMode=yes" in words


def test_what_writes_on_the_machine_that_measures_is_refused(
    small_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, "bench", small_bundle(), "--markdown", tmp_path / "m", "--on", "ssh://nowhere")
    assert (code, "with --on take --json" in line) == (2, True)
    code, line = fails(capsys, "evaluate", "digits", "--data", "digits", "--on", "ssh://nowhere")
    assert (code, "--on takes bundles along" in line) == (2, True)


# --- several devices in one table ---


@needs_sshd
def test_several_devices_are_one_table_and_one_that_fails_is_a_row_of_it(
    sshd: Sshd, named: Callable[..., str], small_bundle: Callable[..., Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A device without torch gives the figures that compare gives here; another has no Python."""
    bundle = small_bundle()
    barred = tmp_path / "barred"
    barred.mkdir()
    (barred / "torch.py").write_text("raise ModuleNotFoundError('barred', name='torch')\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={barred} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    named(python=str(python))
    file = tmp_path / "config" / "dualtoken" / "devices.toml"
    broken = f'[broken]\nurl = "{sshd.device.url}"\nconfig = "{sshd.config}"\npython = "/no/p"\n'
    file.write_text(file.read_text() + broken)
    options = ("--data", "digits", "--limit", "12", "--rounds", "1", "--seconds", "0.05", "--threads", "1")
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(bundle), *options, "--on", "loop", "--on", "broken", "--json"])
    assert caught.value.code == 3
    found = json.loads(capsys.readouterr().out)
    check_schema("compare", found)
    good, bad = found["rows"]
    assert (good["device"], good["bundle"], good["error"]) == ("loop", str(bundle), None)
    assert good["machine"]["cpu"]
    assert good["p50_ms"] > 0
    assert good["against_eager"] is None  # which is not there
    from dualtoken_deploy.use.compare import expect
    from dualtoken_deploy.use.evaluate import evaluate
    from dualtoken_deploy.use.validate import validate

    (here,) = validate([bundle], "digits", 12, "eager")
    assert good["sqnr_db"] == pytest.approx(here.sqnr_db)
    assert good["score"] == pytest.approx(evaluate(bundle, "digits", 12).scores["top1"])
    assert found["eager_score"] == pytest.approx((here.eager_scores or {})["top1"])
    assert bad == {"device": "broken", "machine": {}, "error": {"code": 3, "message": bad["error"]["message"]}}
    assert "there is no /no/p" in bad["error"]["message"]
    assert found["error"]["message"].startswith("1 of 2 devices failed: broken: there is no /no/p")
    assert [d["other_pixels"] for d in found["devices"]] == [0, None]
    assert left_over(sshd) == []
    # the same as a table, and a file of other pictures is refused
    from dualtoken_deploy.use.report import across_table

    assert across_table(found).row_count == 2
    assert expect([bundle], "digits", tmp_path / "e.npz", 5) == "digits (val)"
    code, line = fails(capsys, "compare", bundle, *options, "--expected", tmp_path / "e.npz")
    assert code == 4
    assert "run compare --on again" in line


def test_pictures_that_a_device_decodes_otherwise_are_counted(
    small_bundle: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualtoken_deploy.data.folders import open_dataset
    from dualtoken_deploy.use.compare import compare, expect

    pictures = open_dataset("digits").images
    for i in range(10):  # the bundle's own classes
        (tmp_path / "set" / f"class {i}").mkdir(parents=True)
        shutil.copy(pictures[i], tmp_path / "set" / f"class {i}" / "0.png")
    expect([small_bundle()], tmp_path / "set", tmp_path / "e.npz")
    monkeypatch.setattr("dualtoken_deploy.use.compare.bench", lambda *_: None)
    assert compare([small_bundle()], tmp_path / "set", expected=tmp_path / "e.npz").other_pixels == 0
    shutil.copy(pictures[10], tmp_path / "set" / "class 3" / "0.png")
    assert compare([small_bundle()], tmp_path / "set", expected=tmp_path / "e.npz").other_pixels == 1
