"""Accuracy, the sets that need no download, and the picture of the attention."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.data import built_in, shapes
from dualtoken_deploy.data.folders import ImageSet, match_labels, open_dataset, open_parts
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import DatasetError, OutputError, UsageError, WeightsError
from dualtoken_deploy.models.dualtoken_vit import DualTokenViT
from dualtoken_deploy.models.heads.table import describe_head
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS, describe_weights
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.evaluate import evaluate
from dualtoken_deploy.use.visualize import broadcast_attention, strongest, visualize
from tests.contracts import run_batches


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return open_dataset("digits").limit(40)


def test_a_bundles_accuracy_is_that_of_its_logits(small_bundle: Callable[..., Path], digits: ImageSet) -> None:
    """Against a loop over the logits; the labels of random weights are "class 0" and so on, matched by order."""
    bundle = Bundle.open(small_bundle())
    found = evaluate(bundle, "digits", limit=40)
    with load_runner(bundle) as runner:
        logits = run_batches(runner, bundle.manifest.input, load_batch(digits.images, bundle.manifest.input))
    assert digits.labels is not None
    right = [int(row.argmax()) == label for row, label in zip(logits, digits.labels, strict=True)]
    five = [label in np.argsort(-row)[:5] for row, label in zip(logits, digits.labels, strict=True)]
    assert (found.images, found.scores) == (40, {"top1": sum(right) / 40, "top5": sum(five) / 40})
    assert np.array(found.confusion).sum() == 40
    assert np.trace(np.array(found.confusion)) == sum(right)
    for i, name in enumerate(found.labels):
        mine = [hit for hit, label in zip(right, digits.labels, strict=True) if label == i]
        assert found.per_class[name] == sum(mine) / len(mine)
    json.dumps(found.to_json(), allow_nan=False)


def test_labels_are_matched_by_name_before_order() -> None:
    images = ImageSet("x", (Path("a"), Path("b")), (0, 1), ("cat", "dog"))
    assert match_labels(images, ("ant", "bee", "dog", "cat")) == (3, 2)
    assert match_labels(images, ("class 0", "class 1")) == (0, 1)
    with pytest.raises(DatasetError, match=r"2 class folders, the model 3 classes, and none is called 'cat'"):
        match_labels(images, ("ant", "bee", "dog"))


def test_evaluation_needs_labels(small_bundle: Callable[..., Path]) -> None:
    with pytest.raises(DatasetError, match="needs labelled images"):
        evaluate(small_bundle(), "photographs")
    with pytest.raises(UsageError, match=r"is a folder without manifest\.json"):
        evaluate(small_bundle().parent, "digits")


CLASSIFIERS = {"digits": 224, "shapes": 64}  # with the sides of their images
DENSE = {"scenes-detect": "retinanet", "scenes-segment": "pspnet"}
OTHERS = {"lorenz", "shapes-tokens"}  # in test_forecast.py and test_tokenizer.py


def test_every_shipped_weights_are_tested_and_small() -> None:
    assert set(BUILT_IN_WEIGHTS) == {*CLASSIFIERS, *DENSE, *OTHERS}
    assert max(path.stat().st_size for path in BUILT_IN_WEIGHTS.values()) <= 10e6


@pytest.mark.parametrize("name", sorted(DENSE))
def test_shipped_dense_weights_say_what_they_are(name: str) -> None:
    said = describe_head(name)
    assert (said.task, said.head, said.variant, said.data) == (name.split("-")[1], DENSE[name], "t-mix", "scenes")
    beside = json.loads(BUILT_IN_WEIGHTS[name].with_suffix(".json").read_text())
    assert tuple(beside["labels"]) == said.labels
    train, val = (get_task(said.task).open("scenes", part) for part in ("train", "val"))
    assert train.labels == said.labels
    assert beside["data_sha256"] == train.digest + val.digest


@pytest.mark.parametrize(("name", "metric"), [("scenes-detect", "ap50"), ("scenes-segment", "miou")])
def test_shipped_dense_weights_are_as_good_as_they_say(name: str, metric: str) -> None:
    """On 40 scenes of the held-out part; the whole part's figure is in the JSON beside the weights."""
    assert evaluate(name, "scenes", limit=40).scores[metric] >= 0.55


@pytest.mark.parametrize("name", sorted(CLASSIFIERS))
def test_shipped_weights_say_what_they_are(name: str) -> None:
    info = describe_weights(name)
    assert info is not None
    side = CLASSIFIERS[name]
    assert (info.variant, info.data, info.image_size) == ("t-mix", name, (side, side))
    beside = json.loads(BUILT_IN_WEIGHTS[name].with_suffix(".json").read_text())
    assert tuple(beside["labels"]) == info.labels
    train, val = open_parts(name)
    assert beside["data_sha256"] == train.digest() + val.digest()  # trained on what this version draws


@pytest.mark.parametrize(("name", "share"), [("digits", 0.95), ("shapes", 0.75)])
def test_shipped_weights_are_as_good_as_they_say(name: str, share: float) -> None:
    """On 60 pictures of the held-out part; the whole part's figure is in the JSON beside the weights."""
    assert evaluate(name, name, limit=60).scores["top1"] >= share


def test_weights_of_another_variant_are_refused() -> None:
    with pytest.raises(WeightsError, match="are weights of variant t-mix, not of s"):
        evaluate("digits", "digits", variant="s")


# The sets


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    train, val = open_parts("digits")
    assert (len(train), len(val), train.classes) == (1437, 360, tuple("0123456789"))
    known = {
        (np.rint(i * (255 / 16)).astype(np.uint8).tobytes(), int(t))
        for i, t in zip(*load_digits(return_X_y=True), strict=True)
    }
    for images in (train, val):
        for path, label in list(zip(images.images, images.labels or (), strict=True))[::37]:
            pixels = np.asarray(Image.open(path))
            assert pixels.shape == (10, 10)
            assert (pixels[1:-1, 1:-1].reshape(-1).tobytes(), label) in known
    assert not {p.name for p in train.images} & {p.name for p in val.images}


def test_shapes_have_at_least_20_balanced_classes() -> None:
    train, val = open_parts("shapes")
    assert len(train.classes or ()) == len(shapes.CLASSES) >= 20
    for images, count in ((train, built_in.SHAPES_TRAIN), (val, built_in.SHAPES_VAL)):
        assert set(Counter(images.labels).values()) == {count}


@pytest.mark.parametrize("name", list(shapes.CLASSES))
def test_a_picture_follows_from_its_seed(name: str) -> None:
    first, again, other = (shapes.draw_picture(name, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (shapes.SIDE, shapes.SIDE, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DUALTOKEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="set DUALTOKEN_CACHE to a folder with room"):
        open_dataset("digits")


def test_an_interrupted_drawing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DUALTOKEN_CACHE", str(tmp_path))

    def broken() -> object:
        yield "val", "a", np.zeros((2, 2), np.uint8)
        raise KeyboardInterrupt

    monkeypatch.setattr(built_in, "BUILT_IN", {"digits": ("v1", broken)})
    with pytest.raises(KeyboardInterrupt):
        built_in.built_in_folder("digits")
    assert list(tmp_path.iterdir()) == []


# The attention


def test_attention_is_what_the_broadcast_computes(photograph: Path) -> None:
    """The maps, applied to v head by head, are not to be had from their mean; so hold one head against torch's own."""
    model = create_model("t-mix", num_classes=10, image_size=64)
    assert isinstance(model, DualTokenViT)
    pixels = np.asarray(Image.open(photograph).convert("RGB").resize((64, 64)))
    maps, grid = broadcast_attention(model, pixels)
    assert (maps.shape, grid) == ((4, 7, 7), (2, 2))
    np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    last: Any = model.get_submodule("stage3.block4.token.broadcast")
    seen: dict[str, torch.Tensor] = {}
    last.register_forward_pre_hook(lambda _m, inputs: seen.update(x=inputs[0], g=inputs[1]))
    image = torch.from_numpy(pixels / 255.0 - np.array([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    model(image.permute(2, 0, 1)[None].float())
    heads, width = last.heads, 192 // last.heads
    q, k = last.q(seen["x"])[0], last.kv(seen["g"])[0][:, :192]
    expected = np.zeros((4, 49))
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = (q[:, part] @ k[:, part].T / width**0.5).detach().numpy().astype(np.float64)
        weights = np.exp(scores)
        expected += weights / weights.sum(1, keepdims=True) / heads
    np.testing.assert_allclose(maps.reshape(4, 49), expected, rtol=1e-4, atol=1e-7)


def test_the_strongest_eight() -> None:
    values = np.random.default_rng(0).permutation(49).reshape(7, 7).astype(np.float32)
    assert sorted(strongest(values)[strongest(values) > 0].tolist()) == list(range(41, 49))


def test_visualize_draws(small_bundle: Callable[..., Path], photograph: Path, tmp_path: Path) -> None:
    maps = visualize(small_bundle(), photograph, tmp_path / "a.png")
    assert maps.shape == (4, 7, 7)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size[0] > 1000
    with pytest.raises(UsageError, match=r"none of the picture suffixes \.png, \.svg, \.pdf"):
        visualize(small_bundle(), photograph, tmp_path / "a.txt")


def test_the_command_line(
    small_bundle: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "confusion.png"
    main(["evaluate", str(small_bundle()), "--data", "digits", "--limit", "20", "--confusion", str(picture), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert {"images", "top1", "top5", "images_per_s", "per_class", "confusion"} <= found.keys()
    assert picture.stat().st_size > 1000


def test_export_finds_shipped_weights_by_their_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line: variant, classes, labels and image size come from the file."""
    output = tmp_path / "b"
    main(["export", "--variant", "t-mix", "--target", "onnx", "--weights", "shapes", "--output", str(output), "--json"])
    json.loads(capsys.readouterr().out)
    bundle = Bundle.open(output)
    assert bundle.labels == tuple(sorted(shapes.CLASSES))
    assert bundle.manifest.weights.source == "shapes"
    assert bundle.manifest.input.size == (64, 64)
    assert evaluate(bundle, "shapes", limit=60).scores["top1"] == evaluate("shapes", "shapes", limit=60).scores["top1"]
