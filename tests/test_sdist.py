"""What `python -m build` packs: all that git keeps, tests that run in it; and versions that are locked by hash."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    copy = folder / "tree"  # building writes into its tree, and other tests build as well
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".venv*", ".git", "build", "dist", "*.egg-info", ".*_cache")
    )
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (inside,) = (folder / "unpacked").iterdir()
    return inside


def test_the_sdist_has_every_file_that_git_keeps(unpacked: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is no clone, so there is no list of what belongs to it")
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = found.stdout.split("\n")
    lacking = [name for name in listed if name and (ROOT / name).exists() and not (unpacked / name).exists()]
    assert lacking == []


def test_the_sdist_runs_its_own_tests(unpacked: Path) -> None:
    """The tests of manifests, which read data beside them, on the package that lies there and not on this one."""
    code = (
        "import sys, pathlib, pytest, dualtoken_deploy\n"
        "assert pathlib.Path(dualtoken_deploy.__file__).is_relative_to(pathlib.Path.cwd()), dualtoken_deploy.__file__\n"
        "sys.exit(pytest.main(['tests/test_manifest.py', '-q', '-k', 'schema_1_reads or blocks_say']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def pins(path: Path) -> dict[str, str]:
    """Name -> version, as pip compares names, without the local part of a version (+cpu)."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;+]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def test_every_locked_version_is_the_pinned_one_and_has_hashes() -> None:
    pinned, locked = pins(ROOT / "constraints.txt"), pins(ROOT / "constraints-hashed.txt")
    assert len(locked) > 100
    assert {name: version for name, version in locked.items() if pinned.get(name) != version} == {}
    text = (ROOT / "constraints-hashed.txt").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[A-Za-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert [entry.split("\n")[0] for entry in entries if "--hash=sha256:" not in entry] == []
