"""The picture route by the bundle's task: what `dualtoken predict` answers, over a real server; and Triton's layout."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dualtoken_deploy import Bundle, export, predict
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve.answers import Question, answers, packed, reads_quickly, unpacked
from dualtoken_deploy.serve.errors import ModelFailed
from dualtoken_deploy.serve.repository import merge_rows
from dualtoken_deploy.serve.settings import Settings
from dualtoken_deploy.serve.triton import TYPES, config
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.tasks.base import Ask
from dualtoken_deploy.tasks.boxes import mask_of, paste_mask
from dualtoken_deploy.tasks.draw import colour
from dualtoken_deploy.tasks.table import TASKS, get_task
from tests.serving import Server, serving


class Directions(nn.Module):
    """A vector a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 8, 8)

    def forward(self, image: Tensor) -> Tensor:
        found: Tensor = self.patches(image)
        return found.mean((2, 3))


class Moments(nn.Module):
    """Two outputs of different forms."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        found = self.patches(image)
        return {"mean": found.mean((2, 3)), "map": found}


@pytest.fixture(scope="module")
def bundles(
    dense_bundle: Callable[..., Path], small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    for module, task in ((Directions(), "embed"), (Moments(), "tensors")):
        export(module, task=task, image_size=32, output=folder / task)
    return {
        "classify": small_bundle(),
        "detect": dense_bundle("retinanet"),
        "segment": dense_bundle("pspnet", argmax=True),
        "logits": dense_bundle("pspnet"),
        "masks": dense_bundle("mask-rcnn"),
        "embed": folder / "embed",
        "tensors": folder / "tensors",
    }


@pytest.fixture(scope="module")
def server(bundles: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    given = (f"{name}={path}" for name, path in bundles.items())
    with serving(tmp_path_factory.mktemp("serve") / "log", *given, "--threads", "1") as running:
        yield running


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "a.png"
    noise = np.random.default_rng(3).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


NAMES = ("classify", "detect", "segment", "logits", "masks", "embed", "tensors")


@pytest.mark.parametrize("name", NAMES)
def test_a_bundle_of_every_task_answers_with_what_predict_says(
    name: str, server: Server, bundles: Mapping[str, Path], picture: Path
) -> None:
    """At a least score at which the random detector has found something."""
    reply = server.ask("POST", f"/v2/models/{name}/classify?top=3&min_score=0.01", picture.read_bytes())
    assert reply.code == 200, reply.body
    (want,) = predict(bundles[name], [picture], top=3, min_score=0.01, threads=1)
    got = reply.json
    assert (got["task"], got["size"]) == (want.task, [90, 130])
    assert len(got["predictions"]) == len(want.answers) > 0
    for ours, theirs in zip(got["predictions"], map(asdict, want.answers), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, (float, tuple)) and key != "shape":
                np.testing.assert_allclose(ours[key], value, rtol=1e-4, atol=1e-4)
            else:
                assert ours[key] == (list(value) if isinstance(value, tuple) else value)


def test_random_weights_are_said(server: Server, bundles: Mapping[str, Path], picture: Path) -> None:
    """And no others: those of a live module came with it."""
    listed = {row["name"]: row for row in server.get("/v2/models").json["models"]}
    assert listed.keys() == bundles.keys()
    for name, path in bundles.items():
        random = Bundle.open(path).manifest.weights.source == "random"
        answer = server.ask("POST", f"/v2/models/{name}/classify", picture.read_bytes()).json
        assert [row.get("weights") for row in (answer, listed[name])] == ["random" if random else None] * 2
        assert listed[name]["task"] == get_task(Bundle.open(path).manifest.task).name
    assert {row.get("weights") for row in listed.values()} == {"random", None}


@pytest.mark.parametrize("name", NAMES)
def test_what_belongs_to_the_answers_comes_as_a_picture_where_it_is_asked_for(
    name: str, server: Server, bundles: Mapping[str, Path], picture: Path
) -> None:
    """Of areas each colour covers the share that the answer says; of masks the best one covers all of its pixels."""
    reply = server.ask("POST", f"/v2/models/{name}/classify?top=3&min_score=0.01&overlay=true", picture.read_bytes())
    assert reply.code == 200, reply.body
    got = reply.json
    if name not in ("segment", "logits", "masks"):
        assert got["overlay"] is None
        return
    kind, _, data = got["overlay"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        over = np.array(image.convert("RGBA"))
    assert over.shape == (90, 130, 4)
    shown = over[..., 3] > 0
    for rank, one in enumerate(got["predictions"]):
        own = shown & (over[..., :3] == colour(one["index"])).all(-1)
        if name != "masks":
            assert own.sum() == round(one["share"] * 90 * 130)
        elif rank == 0:
            assert own.sum() >= one["mask_pixels"] > 0
    assert "overlay" not in server.ask("POST", f"/v2/models/{name}/classify", picture.read_bytes()).json


@pytest.mark.parametrize(
    "query", ["overlay=yes", "min_score=2", "min_score=x", "min_score=-1", "min_score=nan", "top=0"]
)
def test_what_cannot_be_asked(query: str, server: Server, picture: Path) -> None:
    reply = server.ask("POST", f"/v2/models/detect/classify?{query}", picture.read_bytes())
    assert (reply.code, query.partition("=")[0] in reply.json["error"]) == (400, True)


def test_requests_share_a_run_where_every_output_has_a_row_for_each(small_bundle: Callable[..., Path]) -> None:
    """Our exporters see to it; another's bundle may have an output without."""
    bundle, settings = Bundle.open(small_bundle(batch="dynamic")), Settings(max_batch=4)
    assert merge_rows(bundle, settings) == 4
    assert "max_batch_size: 8" in config(bundle)
    alone = TensorSpec("sum", "float32", "C", (8,))
    other = replace(bundle, manifest=replace(bundle.manifest, outputs=(*bundle.manifest.outputs, alone)))
    assert merge_rows(other, settings) == 1
    assert "max_batch_size: 0" in config(other)
    assert "dims: [ -1, 64, 64, 3 ]" in config(other)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_read_on_the_event_loop_is_small(name: str) -> None:
    small = TensorSpec("out", "float32", "NC", ("batch", 1000))
    assert reads_quickly(TASKS[name], [small]) is (name not in ("detect", "segment"))
    assert not reads_quickly(TASKS[name], [replace(small, shape=(1, 20_000))])
    assert not reads_quickly(TASKS[name], [replace(small, shape=(1, "height"))])


def test_outputs_come_back_from_another_process() -> None:
    outputs: dict[str, Array] = {
        "a": np.arange(6, dtype=np.int64).reshape(1, 2, 3),
        "b": np.array(2.5, np.float32),
        "c": np.zeros((1, 0)),
    }
    found = unpacked(*json_like(packed(outputs)))
    for name, array in outputs.items():
        np.testing.assert_array_equal(found[name], array)
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)


def json_like(given: tuple[bytes, Any]) -> tuple[bytes, Any]:
    return given[0], json.loads(json.dumps(given[1]))


@pytest.mark.parametrize(
    ("task", "outputs", "why"),
    [
        ("classify", {"logits": np.full((1, 3), np.nan)}, "not finite"),
        ("classify", {"logits": np.zeros((1, 4))}, "none of the task classify"),
        ("segment", {"labels": np.full((1, 4, 4), 9)}, "none of the task segment"),
        ("detect", {"boxes": np.zeros((1, 1, 4)), "scores": np.ones((1, 1)), "classes": np.full((1, 1), 7)}, "detect"),
        ("detect", {"logits": np.zeros((1, 5))}, "none of the task detect"),
    ],
)
def test_outputs_that_are_none_of_the_task_are_the_models_failure(task: str, outputs: Any, why: str) -> None:
    question = Question(task, ("a", "b", "c"), (4, 4), (8, 8), Ask(top=4, min_score=0.0))
    with pytest.raises(ModelFailed, match=why):
        answers(outputs, question)


def test_a_mask_is_worked_out_around_its_box() -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        mask, size = draw.random((7, 5)), (40, 60)
        corner = draw.uniform(-20, 50, 2)
        box = np.array([*corner, *(corner + draw.uniform(-1, 40, 2))])
        np.testing.assert_array_equal(mask_of(mask, box, size, 0.5), paste_mask(mask, box, size) >= 0.5)


def test_a_large_picture_and_its_masks_do_not_fill_the_memory(server: Server) -> None:
    """24 megapixels and every mask that the model has room for: in the server none of them lies."""
    out = io.BytesIO()
    Image.new("RGB", (5600, 4200), (90, 120, 30)).save(out, "PNG")
    before = server.memory_kib()
    reply = server.ask("POST", "/v2/models/masks/classify?min_score=0", out.getvalue(), timeout=60)
    assert reply.code in (200, 400), reply.body  # as many masks as there are may be too many for one decoder, in a line
    assert server.memory_kib(field="VmHWM") < before + 150 * 1024
    assert server.get("/v2/health/ready").code == 200


def test_triton_has_a_type_for_every_dtype_of_a_bundle(bundles: Mapping[str, Path]) -> None:
    from dualtoken_deploy.bundle.consistency import DTYPES

    assert TYPES.keys() == DTYPES
    for name, path in bundles.items():
        text = config(Bundle.open(path))
        assert ("label_filename" in text) is (name == "classify"), name
        assert len(re.findall(r"^output \{$", text, re.MULTILINE)) == len(Bundle.open(path).manifest.outputs)
