"""A trained model that nobody here wrote: four photographs get their ImageNet classes from every target, in float and
in INT8 gated by agreement on photographs that calibration did not see."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dualtoken_deploy import export, predict
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.models.source import Preprocessing, Source
from dualtoken_deploy.quantize.gate import Int8Options
from tests.test_your_model import PAGE

EXAMPLE = Path(__file__).parents[1] / "examples" / "python" / "efficientnet_lite0.py"
# what a person sees in them, as indices of ImageNet's 1000 classes: tabby, tiger and Egyptian cat are all right
CLASSES = {
    "coffee.png": {967},
    "chelsea.png": {281, 282, 285},
    "motorcycle_left.png": {665, 670},
    "camera.png": {872},
}
NAMES = {282: "tiger cat", 285: "Egyptian cat", 665: "moped", 872: "tripod", 967: "espresso"}
CELLS = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("openvino", "fp32"), ("coreml", "fp16"))
INT8 = Int8Options("photographs", metric="agreement", max_drop=0.5, race=False)
PARAMETERS = 4_652_008  # EfficientNet-Lite0, TensorFlow's model card: 4.7 M


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("efficientnet_lite0", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> list[Path]:
    found = [image for image in open_dataset("photographs").images if image.name in CLASSES]
    assert len(found) == len(CLASSES)
    return found


@pytest.fixture(scope="module")
def bundle(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder = tmp_path_factory.mktemp("lite0")

    def make(target: str, precision: str) -> Path:
        place = folder / f"{target}-{precision}"
        if not place.exists():
            export(
                f"{EXAMPLE}:make",
                target,
                precision,
                output=place,
                labels=example.labels(),
                preprocess=Preprocessing(example.MEAN, example.STD),
                int8=INT8 if precision == "int8" else None,
            )
        return place

    return make


def test_the_module_itself_knows_the_photographs(example: ModuleType, pictures: list[Path]) -> None:
    source = Source.module(example.make(), labels=example.labels(), preprocess=Preprocessing(example.MEAN, example.STD))
    assert sum(p.numel() for p in example.make().parameters()) == PARAMETERS
    contract = source.contract("tensor", 1)
    for picture in pictures:
        with torch.no_grad():
            (logits,) = source.make()(torch.from_numpy(preprocess(load_image(picture), contract))[None])
        assert int(logits.argmax()) in CLASSES[picture.name], picture.name


def test_every_class_has_a_name_of_its_own(example: ModuleType) -> None:
    names = example.labels()
    assert len(names) == len(set(names)) == 1000
    assert {index: names[index] for index in NAMES} == NAMES


@pytest.mark.parametrize(("target", "precision"), CELLS)
def test_every_target_knows_the_photographs(
    bundle: Callable[[str, str], Path], example: ModuleType, pictures: list[Path], target: str, precision: str
) -> None:
    names = example.labels()
    for guess in predict(bundle(target, precision), pictures, top=1):
        wanted = {names[index] for index in CLASSES[Path(guess.image).name]}
        assert guess.answers[0].label in wanted, (guess.image, guess.answers[0])


def test_int8_agrees_on_photographs_that_calibration_did_not_see(bundle: Callable[[str, str], Path]) -> None:
    manifest = Bundle.open(bundle("onnxruntime", "int8")).manifest
    said = manifest.calibration
    assert said is not None
    assert said.held_out is not None
    assert (said.images, said.held_out.images, said.metric) == (10, 6, "agreement")
    assert said.drop is not None
    assert said.drop <= INT8.max_drop
    # ranges of convolutions end at the 6 of ReLU6, and means are kept: 11 dB without the first, 14 without the second
    assert (manifest.measured.int8_mac_share or 0) > 0.95
    shots = manifest.measured.photographs
    assert shots is not None
    assert shots.sqnr_db > 18


def test_the_page_prepares_pictures_as_the_model_was_trained(example: ModuleType) -> None:
    for option, values in (("--mean", example.MEAN), ("--std", example.STD)):
        assert f"{option} {','.join(f'{value:.6f}' for value in values)}" in PAGE
        assert f"{option} {','.join(f'{value:.6f}' for value in values)}" in EXAMPLE.read_text(encoding="utf-8")
