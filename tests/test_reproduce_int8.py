"""INT8 bundles made again from their manifest alone, whoever made them: the command line, a recipe, Python."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy import Bundle, export
from dualtoken_deploy.cli import main
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.quantize.gate import Int8Options
from tests.commands import fails, prints
from tests.small import SMALL

IN_FLOAT = "stage1.block1.ffn.fc1"  # no search would end in it alone: all of the layers hold the budget
RECIPE = """
output = "out"

[model]
variant = "tiny-mix"
image_size = 64
classes = 10

[[export]]
targets = ["onnxruntime"]
precisions = ["int8"]
opset = 21
int8 = { calibration = "pictures", size = 10, metric = "sqnr", max_drop = 40, race = false }
"""


def by_the_command_line(folder: Path) -> Path:
    words = "--variant tiny-mix --image-size 64 --classes 10 --target onnxruntime --precision int8 --no-race"
    words += " --calibration photographs --calibration-size 10 --metric sqnr --max-drop 40"
    main(["export", *words.split(), "--output", str(folder / "bundle")])
    return folder / "bundle"


def by_a_recipe(folder: Path) -> Path:
    """Its pictures lie beside it, and its opset is not the target's own."""
    (folder / "pictures").mkdir()
    for number, image in enumerate(open_dataset("photographs").images):
        shutil.copyfile(image, folder / "pictures" / f"{number:02}{image.suffix}")
    (folder / "recipe.toml").write_text(RECIPE)
    main(["run", str(folder / "recipe.toml")])
    return folder / "out" / "tiny-mix-64-onnxruntime-int8"


def by_python(folder: Path) -> Path:
    options = Int8Options(
        "photographs", 10, metric="sqnr", max_drop=40.0, time_limit_s=60.0, in_float=(IN_FLOAT,), race=False
    )
    export(target="onnxruntime", precision="int8", output=folder / "bundle", int8=options, **SMALL)  # type: ignore[arg-type]
    return folder / "bundle"


WAYS = {"command": by_the_command_line, "recipe": by_a_recipe, "python": by_python}


@pytest.fixture(scope="module")
def made(once: Callable[[str, Callable[[Path], object]], Path], tiny_variant: None) -> Callable[[str], Path]:
    """made(way) -> a bundle; read only."""

    def make(way: str) -> Path:
        def into(folder: Path) -> None:
            folder.mkdir()
            (folder / "where").write_text(str(WAYS[way](folder)))

        return Path((once(f"int8-by-{way}", into) / "where").read_text())

    return make


@pytest.mark.parametrize("way", WAYS)
def test_it_is_made_again(way: str, made: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    bundle = made(way)
    capsys.readouterr()
    found = prints(capsys, "reproduce", bundle, "--json")
    assert found["same"] is True
    assert found["files"].keys() == {"model.onnx", "golden.npz", "labels.txt"}
    asked = Bundle.open(bundle).manifest.asked
    assert asked is not None
    assert asked.int8 is not None
    assert (asked.int8.size, asked.int8.metric, asked.int8.max_drop) == (10, "sqnr", 40)
    assert asked.opset == (21 if way == "recipe" else None)


def test_layers_in_float_are_those_of_the_manifest(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search would end elsewhere, as that of the command line did with the same pictures and budget."""
    bundle, other = made("python"), made("command")
    manifests = [Bundle.open(path).manifest for path in (bundle, other)]
    assert [m.calibration and m.calibration.in_float for m in manifests] == [(IN_FLOAT,), ()]
    assert (bundle / "model.onnx").read_bytes() != (other / "model.onnx").read_bytes()
    for name in ("manifest.json", "labels.txt"):
        shutil.copy2(bundle / name, tmp_path / name)
    capsys.readouterr()
    found = prints(capsys, "export", "--lock", tmp_path / "manifest.json", "--output", tmp_path / "again", "--json")
    assert found["lock"]["same"] is True
    again = Bundle.open(tmp_path / "again").manifest
    assert again.asked == manifests[0].asked
    assert again.calibration is not None
    assert [step.in_float for step in again.calibration.search.trace] == [(IN_FLOAT,)]  # type: ignore[union-attr]


def test_other_pictures_are_named(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, pictures = _manifest_with(made("recipe"), tmp_path, tmp_path / "pictures")
    shutil.copytree(made("recipe").parent.parent / "pictures", pictures)
    first = next(iter(sorted(pictures.iterdir())))
    first.unlink()
    capsys.readouterr()
    code, line = fails(capsys, "export", "--lock", manifest, "--output", tmp_path / "again")
    assert code == 5
    assert f"not as it was then: the pictures of {made('recipe').parent.parent / 'pictures'}, of which 10" in line
    shutil.rmtree(pictures)
    code, line = fails(capsys, "export", "--lock", manifest, "--output", tmp_path / "again")
    assert (code, str(pictures) in line) == (4, True)
    assert not (tmp_path / "again").exists()


def test_a_manifest_that_does_not_say_it_is_one_line(
    made: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As recipes and Python wrote them before manifests had `asked`; the command line's say it in their command."""
    for way in ("recipe", "command"):
        bundle = tmp_path / way
        shutil.copytree(made(way), bundle)
        _rewrite(bundle / "manifest.json", asked=None)
        if way == "recipe":
            code, line = fails(capsys, "reproduce", bundle)
            assert (code, "does not say by which options" in line) == (3, True)
        else:
            _rewrite(bundle / "manifest.json", command=_COMMAND)
            capsys.readouterr()
            assert prints(capsys, "reproduce", bundle, "--json")["same"] is True


_COMMAND = (
    "dualtoken export --variant tiny-mix --image-size 64 --classes 10 --target onnxruntime --precision int8 "
    "--calibration photographs --calibration-size 10 --metric sqnr --max-drop 40 --max-slowdown 2"
)


def _manifest_with(bundle: Path, folder: Path, pictures: Path) -> tuple[Path, Path]:
    """A manifest that names another folder of pictures."""
    for name in ("manifest.json", "labels.txt"):
        shutil.copy2(bundle / name, folder / name)
    data = json.loads((folder / "manifest.json").read_text())
    data["asked"]["int8"]["calibration"] = str(pictures)
    _rewrite(folder / "manifest.json", asked=data["asked"])
    return folder / "manifest.json", pictures


def _rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
