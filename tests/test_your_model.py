"""docs/your-model.md: its file and its commands run as they stand there, and the bundles keep what the page says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from dualtoken_deploy import export
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import MissingError, WeightsError
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.validate import validate
from tests.commands import fails, prints
from tests.serving import serving

PAGE = (Path(__file__).parents[1] / "docs" / "your-model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
CODE = next(text for kind, text in BLOCKS if kind == "python")
COMMANDS = next(text for kind, text in BLOCKS if not kind and "serve" in text).splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page takes for there: the model's file, its checkpoint, names and a picture."""
    from dualtoken_deploy.data.folders import open_dataset

    folder = tmp_path_factory.mktemp("yours")
    (folder / "net.py").write_text(CODE)
    (folder / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    shutil.copy(open_dataset("photographs").images[0], folder / "photo.jpg")
    space: dict[str, object] = {}
    exec(CODE, space)  # the page's own
    torch.manual_seed(3)
    net = space["make"](4)  # type: ignore[operator]
    net(torch.randn(8, 3, 64, 64))  # statistics that are not those of no training
    torch.save(net.state_dict(), folder / "net.pt")
    return folder


def command(word: str, place: int = 0) -> list[str]:
    """The arguments of the page's command of that name."""
    found = [line for line in COMMANDS if line.startswith(f"dualtoken {word} ")]
    return shlex.split(found[place])[1:]


@pytest.fixture(scope="module")
def bundles(place: Path) -> Iterator[dict[str, Path]]:
    """Both bundles, made by the page's two exports."""
    import contextlib
    import io

    from dualtoken_deploy.cli import main

    with contextlib.chdir(place), contextlib.redirect_stdout(io.StringIO()):
        for turn in (0, 1):
            main([*command("export", turn), *(["--no-race"] if turn else []), "--json"])  # tests/test_speed.py races
        yield {name: place / "bundles" / name for name in ("net", "net-int8")}


def test_the_page_has_ten_lines_at_most() -> None:
    assert 5 <= len(COMMANDS) <= 10


def test_every_command_of_the_page_runs(
    bundles: dict[str, Path], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (near,) = prints(capsys, *command("validate"), "--json")["results"]
    assert near["reference"] == "eager"
    assert near["sqnr_db"] > 100
    (golden,) = prints(capsys, *command("validate", 1), "--json")["results"]
    assert golden["reference"] == "golden"
    stored = Bundle.open(bundles["net-int8"]).manifest.measured.golden
    assert stored is not None
    assert golden["sqnr_db"] == pytest.approx(stored.sqnr_db, abs=1e-3)  # the same file on the same machine
    compared = prints(capsys, *command("compare"), "--rounds", "1", "--seconds", "0.05", "--json")
    assert {row["precision"] for row in compared["rows"]} == {"fp32", "int8"}
    (guess,) = prints(capsys, *command("predict"), "--json")
    assert {one["label"] for one in guess["guesses"]} == {"ant", "bee", "cat", "dog"}
    with serving(place / "log", *command("serve")[1:]) as server:
        url = shlex.split(COMMANDS[-1])[-1]
        reply = server.ask("POST", url.partition(":8000")[2], (place / "photo.jpg").read_bytes())
        assert reply.code == 200
        served = reply.json["predictions"]
    assert [one["label"] for one in served] == [one["label"] for one in guess["guesses"][: len(served)]]


def test_int8_is_within_its_budget_and_runs_as_integers(bundles: dict[str, Path]) -> None:
    manifest = Bundle.open(bundles["net-int8"]).manifest
    said = manifest.calibration
    assert said is not None
    assert said.held_out is not None
    assert said.images + said.held_out.images == 16
    assert said.drop is not None
    assert said.max_drop is not None
    assert said.drop <= said.max_drop
    assert (manifest.measured.int8_mac_share or 0) > 0.9
    assert "fold_batch_norm" in manifest.rules
    assert manifest.origin is not None
    assert (manifest.origin.reference, manifest.origin.arguments) == ("net.py:make", {"classes": 4})


def test_it_validates_without_the_users_code(bundles: dict[str, Path], tmp_path: Path) -> None:
    """Elsewhere, with neither the file nor torch to be had."""
    copy = tmp_path / "net"
    shutil.copytree(bundles["net"], copy)
    code = (
        "import json, sys\n"
        "sys.modules['torch'] = None\n"
        "from dualtoken_deploy import validate\n"
        "print(json.dumps(validate([sys.argv[1]], reference='golden')[0].to_json()))\n"
        "assert 'net' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(copy)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["sqnr_db"] > 100


def test_other_weights_than_those_of_the_export_are_refused(
    bundles: dict[str, Path], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("net.py", "net.pt"):
        shutil.copy(place / name, tmp_path / name)
    manifest_file = tmp_path / "net" / "manifest.json"
    shutil.copytree(bundles["net"], tmp_path / "net")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "net.pt")
    manifest = json.loads(manifest_file.read_text())
    manifest["weights"]["source"] = str(tmp_path / "net.pt")
    manifest_file.write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="sha256"):
        validate([Bundle.open(tmp_path / "net", verify=False)], "photographs", limit=1)


def test_code_that_is_gone_is_one_line(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, line = fails(capsys, "validate", bundles["net"], "--data", "photographs")
    assert (code, "net.py" in line) == (2, True), line


def test_diagnose_names_the_users_own_layer(bundles: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundles["net"], broken)
    model = onnx.load(broken / "model.onnx")
    weight = next(t for t in model.graph.initializer if t.name == "body.0.weight")
    weight.CopyFrom(numpy_helper.from_array(np.float32(1.5) * numpy_helper.to_array(weight), weight.name))
    onnx.save(model, broken / "model.onnx")
    sound = diagnose(bundles["net"], limit=2)
    assert sound.suspect is None
    assert {"stem.0", "body.0"} <= {layer.name.partition("/")[0] for layer in sound.layers}
    found = diagnose(Bundle.open(broken, verify=False), limit=2)
    assert (found.suspect or "").partition("/")[0] == "body.0"


class Several(nn.Module):
    """Two outputs, of which one only moves what a layer made."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, 8, 8)
        self.scores = nn.Linear(20, 6)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        return {"scores": self.scores(tokens), "map": self.patches(image).flatten(2)}


def test_a_live_module_with_several_outputs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    export(Several(), task="tensors", image_size=32, output=tmp_path / "live")
    (found,) = validate([tmp_path / "live"])
    assert found.sqnr_db > 100
    with pytest.raises(MissingError, match="memory"):
        validate([tmp_path / "live"], "photographs", limit=1)
    file = tmp_path / "several.py"
    file.write_text("from tests.test_your_model import Several\n")
    export(f"{file}:Several", task="tensors", image_size=32, output=tmp_path / "named")
    layers = {layer.name.partition("/")[0] for layer in diagnose(tmp_path / "named", limit=1).layers}
    assert {"patches", "scores"} <= layers
