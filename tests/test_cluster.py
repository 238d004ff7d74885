"""A recipe over a Ray cluster of this machine with two workers, of which one is killed while it exports."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.cli import main
from tests.commands import fails, prints

RECIPE = """
output = "out"

[model]
model = "net.py:make"
image_size = 32
labels = "labels.txt"

[[export]]
targets = ["onnxruntime", "openvino"]

[gates]
sqnr_db = 60
"""

# A net whose making kills the worker of Ray that does it, with SIGKILL: the first, while there is a life to take.
NET = """
import os, signal, sys
from pathlib import Path
from torch import nn

HERE = Path(__file__).parent

def make():
    if Path(sys.argv[0]).name == "default_worker.py":
        with (HERE / "workers").open("a") as out:
            out.write(f"{os.getpid()}\\n")
        try:
            (HERE / "life").unlink()
        except FileNotFoundError:  # there is none, or the other worker took it
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "labels.txt").write_text("a\nb\n")
    monkeypatch.setenv("DUALTOKEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "recipe.toml"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 unless said: on a busy machine hardly anything comes
    pytest.importorskip("ray", reason="the extra [ray] is not installed")


def test_a_worker_that_is_killed_is_replaced(
    ray: None, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "life").touch()
    words = ("run", recipe, "--engine", "ray", "--workers", "2", "--json")
    found = prints(capsys, *words)["steps"]
    assert {f"{s['step']} {s['bundle']}": s["state"] for s in found} == {
        f"{step} make-{target}-fp32": "done" for step in ("export", "gates") for target in ("onnxruntime", "openvino")
    }
    assert not (tmp_path / "life").exists()  # one worker was killed
    workers = (tmp_path / "workers").read_text().split()
    assert len(set(workers)) >= 3  # two began, and one came in the place of that which was killed
    made = sorted((tmp_path / "out").glob("make*"))
    assert [Bundle.open(folder).manifest.target for folder in made] == ["onnxruntime", "openvino"]
    again = prints(capsys, *words)["steps"]  # all is in the record, and nothing is done twice
    assert {s["state"] for s in again} == {"skipped"}
    assert (tmp_path / "workers").read_text().split() == workers
    main(["run", str(recipe)])  # the same keys as without a cluster
    assert "skipped" in capsys.readouterr().out


def test_a_cell_that_no_worker_survives_is_one_line_and_leaves_its_later_steps_out(recipe: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    from dualtoken_deploy.recipe import cluster
    from dualtoken_deploy.recipe.file import read_recipe

    cell = cluster.Cell(read_recipe(recipe), str(recipe.parent), str(recipe.parent), {}, "a", ("export", "gates"))
    export, gates = cluster._lost(cell, ray, ray.exceptions.WorkerCrashedError())
    assert (export.state, gates.state, gates.error) == ("failed", "left out", None)
    assert export.error is not None
    assert export.error.exit_code == 3
    assert str(export.error).startswith("a was lost with its worker, after 3 retries (WorkerCrashedError)")
    fault = ray.exceptions.RayTaskError("run_cell", "Traceback", ValueError("a fault of ours"))
    with pytest.raises(ray.exceptions.RayTaskError):  # is no lost worker, and is not told as one
        list(cluster._lost(cell, ray, fault))


def test_what_is_timed_stays_here(recipe: Path) -> None:
    """An INT8 export that is raced against float would have the other cells in its figure."""
    from dualtoken_deploy.recipe import cluster
    from dualtoken_deploy.recipe.file import read_recipe
    from dualtoken_deploy.recipe.steps import Kitchen

    both = RECIPE.replace(
        '"openvino"]', '"openvino"]\nprecisions = ["fp32", "int8"]\nint8 = { calibration = "photographs" }'
    )
    for text, spread in (
        (both, ["fp32"]),
        (both.replace('"photographs" }', '"photographs", race = false }'), ["fp32", "int8"]),
    ):
        recipe.write_text(text)
        cells = cluster._by_bundle(Kitchen(read_recipe(recipe), recipe.parent))
        assert sorted({name.rpartition("-")[2] for name in cells}) == spread
        assert {step.name for steps in cells.values() for step in steps} == {"export", "gates"}


def test_what_is_wrong_is_said_before_a_cluster_starts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (("--engine", "spark"), "unknown engine 'spark'; valid engines: local, ray"),
        (("--workers", "2"), "are for --engine ray"),
        (("--engine", "ray", "--address", "auto", "--workers", "2"), "has its own"),
    ):
        code, line = fails(capsys, "run", recipe, *words)
        assert (code, said in line) == (2, True)
    assert not (recipe.parent / "out").exists()


def test_without_the_extra_it_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    code, line = fails(capsys, "run", recipe, "--engine", "ray")
    assert (code, "needs the extra [ray]" in line) == (3, True)
