"""Dense bundles: the saved files against eager, the post-processing in the graph against numpy, and every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken_deploy import Bundle, export, load_runner, predict, validate
from dualtoken_deploy.bundle.blocks import HeldOutSet
from dualtoken_deploy.bundle.store import sha256
from dualtoken_deploy.data.scenes import CLASSES, CLUTTER, make_scene
from dualtoken_deploy.errors import DatasetError, ToleranceError, UsageError, WeightsError
from dualtoken_deploy.models.heads.mask_rcnn import BOX_SIDE, MASK_SIDE, STRIDES, MaskRCNN, roi_align
from dualtoken_deploy.models.heads.output_forms import MaskDetector, rpn_anchors
from dualtoken_deploy.models.heads.rebuild import random_dense_model
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.eager import load as load_eager
from dualtoken_deploy.targets.load import RunnerOptions
from dualtoken_deploy.targets.request import Artifact
from dualtoken_deploy.tasks.anchors import detect
from dualtoken_deploy.tasks.boxes import decode, suppress, suppress_by_class
from dualtoken_deploy.tasks.draw import colour
from dualtoken_deploy.tasks.table import TASKS, get_task
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from dualtoken_deploy.use.predict import draw
from dualtoken_deploy.use.validate import gate
from tests.commands import fails, prints
from tests.numerics import assert_close, shown

MakeBundle = Callable[..., Path]
Array = np.ndarray[Any, Any]

SIZE = (64, 96)
MASKS: tuple[str, str, str, dict[str, Any]] = ("mask-rcnn", "onnxruntime", "fp32", {})
ROWS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("retinanet", "onnxruntime", "fp32", {}),
    ("retinanet", "openvino", "fp32", {"suppress": True}),
    ("pspnet", "openvino", "fp32", {"input_kind": "tensor"}),
    ("pspnet", "tensorrt", "fp16", {}),
    ("deeplabv3", "coreml", "fp32", {"argmax": True}),
    MASKS,
]
IDS = ["-".join([head, target, precision]) for head, target, precision, _ in ROWS]


def noise(bundle: Bundle, seed: int = 3) -> Array:
    spec = bundle.manifest.input.tensor
    random = np.random.default_rng(seed)
    if spec.dtype == "uint8":
        return random.integers(0, 256, spec.concrete(), dtype=np.uint8)
    return random.normal(size=spec.concrete()).astype(np.float32)


@pytest.mark.parametrize(("head", "target", "precision", "options"), ROWS, ids=IDS)
def test_saved_files_compute_what_eager_computes(
    dense_bundle: MakeBundle, head: str, target: str, precision: str, options: dict[str, Any]
) -> None:
    bundle = Bundle.open(dense_bundle(head, target, precision, **options))
    manifest = bundle.manifest
    segments = head in ("pspnet", "deeplabv3")
    assert (manifest.task, manifest.head) == ("segment" if segments else "detect", head)
    assert bundle.labels == ((CLUTTER, *CLASSES) if segments else CLASSES)
    assert set(bundle.golden) == {"input", *(o.name for o in manifest.outputs)}
    if target == "tensorrt":
        assert manifest.state == "prepared"
        assert shown(bundle).sqnr_db >= 45
        return
    feed = {manifest.input.tensor.name: noise(bundle)}
    with load_runner(bundle, threads=1) as runner, load_eager(bundle, RunnerOptions()) as eager:
        actual, expected = runner.run(feed), eager.run(feed)
    for spec in manifest.outputs:
        assert (actual[spec.name].shape, actual[spec.name].dtype) == (spec.shape, np.dtype(spec.dtype))
        if spec.name in ("logits", "deltas"):
            assert_close(actual[spec.name], expected[spec.name], sqnr_db=100)
    found = get_task(manifest.task).compare(expected, actual)
    assert found.agreement is not None
    assert found.agreement >= 0.98
    assert found.sqnr_db >= 60


def test_suppression_in_the_graph_selects_what_numpy_selects(dense_bundle: MakeBundle) -> None:
    """OpenVINO's detections against `detect` on the raw outputs of the model in eager mode."""
    bundle = Bundle.open(dense_bundle("retinanet", "openvino", suppress=True))
    model = random_dense_model("retinanet", variant="tiny-mix", classes=4, width=16, image_size=SIZE)
    for seed in range(3):
        image = noise(bundle, seed)
        with load_runner(bundle, threads=1) as runner, load_eager(bundle, RunnerOptions()) as eager:
            actual = runner.run({"image": image})
            normalised = torch.from_numpy(eager.normalised(image))
        with torch.no_grad():
            logits, deltas = (x[0].numpy() for x in model(normalised))
        wanted = detect(logits, deltas, SIZE)
        assert len(wanted.boxes) > 20
        there = actual["classes"][0] >= 0
        assert there.sum() == len(wanted.boxes)
        assert not actual["scores"][0][~there].any()
        np.testing.assert_array_equal(actual["classes"][0][there], wanted.classes)
        np.testing.assert_allclose(actual["scores"][0][there], wanted.scores, atol=1e-5)
        np.testing.assert_allclose(actual["boxes"][0][there], wanted.boxes, atol=1e-2)


def by_the_definitions(model: MaskRCNN, image: torch.Tensor) -> dict[str, Array]:
    """Mask R-CNN after its learned parts as the papers say it, one level and one box after another, in numpy."""
    levels, outputs = model(image)
    grid = rpn_anchors(SIZE)
    boxes, scores = [], []
    for objectness, deltas in outputs:
        score = objectness[0].permute(1, 2, 0).reshape(-1).double().numpy()
        offsets = deltas[0].permute(1, 2, 0).reshape(-1, 4).numpy()
        own, grid = grid[: len(score)], grid[len(score) :]
        best = np.argsort(-score, kind="stable")[:1000]
        decoded = decode(offsets[best], own[best], SIZE)
        kept = suppress(decoded, score[best], 0.7)
        boxes.append(decoded[kept])
        scores.append(score[best][kept])
    proposals = np.concatenate(boxes)[np.argsort(-np.concatenate(scores), kind="stable")[:1000]]

    def cut_out(box: Array, side: int) -> torch.Tensor:
        area = max((box[2] - box[0]) * (box[3] - box[1]), 1e-12)
        level = int(np.clip(np.floor(4 + np.log2(np.sqrt(area) / 224)), 2, 5)) - 2
        return roi_align(levels[level][0], torch.from_numpy(box[None]).float(), STRIDES[level], side)

    found: list[tuple[Array, float, int]] = []
    for box in proposals:
        logits, deltas = model.boxes(cut_out(box, BOX_SIDE))
        for kind, probability in enumerate(logits.softmax(1)[0, :-1].tolist()):
            if probability > 0.05:
                found.append((decode(deltas[0, kind : kind + 1].numpy(), box[None], SIZE)[0], probability, kind))
    found = sorted(found, key=lambda f: -f[1])[:1000]
    every, values = np.array([f[0] for f in found]), np.array([f[1] for f in found])
    kinds = np.array([f[2] for f in found])
    kept = suppress_by_class(every, values, kinds, 0.5, 100)
    masks = [torch.sigmoid(model.masks(cut_out(every[k], MASK_SIDE))[0, kinds[k]]).numpy() for k in kept]
    return {
        "boxes": every[kept][None],
        "scores": values[kept][None],
        "classes": kinds[kept][None],
        "masks": np.array(masks)[None],
    }


def test_mask_rcnn_finds_what_the_definitions_find(dense_bundle: MakeBundle) -> None:
    bundle = Bundle.open(dense_bundle(MASKS[0]))
    form = rebuild(bundle.manifest)
    assert isinstance(form, MaskDetector)
    with load_eager(bundle, RunnerOptions()) as eager, load_runner(bundle, threads=1) as runner, torch.no_grad():
        image = bundle.golden["input"]
        wanted = by_the_definitions(form.model, torch.from_numpy(eager.normalised(image)))
        assert wanted["boxes"].shape[1] >= 20
        for found in (eager.run({"image": image}), runner.run({"image": image})):
            likeness = TASKS["detect"].compare(wanted, found)
            assert likeness.agreement is not None
            assert likeness.agreement >= 0.97
            assert likeness.sqnr_db >= 60


def test_a_bundle_out_of_tolerance_is_not_left(
    dense_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of another seed: whole, loadable, and wrong."""
    made = dense_bundle("retinanet")

    def wrong(row: Any, model: Any, request: Any, folder: Path, tell: Any) -> Artifact:
        shutil.copyfile(made / "model.onnx", folder / "model.onnx")
        return Artifact((), {})

    monkeypatch.setattr("dualtoken_deploy.pipeline.make.run_exporter", wrong)
    with pytest.raises(ToleranceError, match=r"retinanet on tiny-mix as onnxruntime fp32 is out of tolerance"):
        export(
            head="retinanet", variant="tiny-mix", classes=4, width=16, image_size=SIZE, seed=1, output=tmp_path / "b"
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("head", "options", "text"),
    [
        ("yolo", {}, "valid heads: retinanet"),
        ("pspnet", {"suppress": True}, "--suppress belongs to detectors"),
        ("retinanet", {"argmax": True}, "--argmax belongs to segmenters"),
        ("mask-rcnn", {"target": "coreml"}, "targets that do: onnxruntime, openvino"),
        ("retinanet", {"target": "tensorrt", "suppress": True}, "no detections of retinanet in the graph"),
        ("retinanet", {"target": "aotinductor"}, "takes no retinanet"),
        ("pspnet", {"target": "aotinductor", "argmax": True}, "no labels of pspnet in the graph; leave --argmax out"),
        ("pspnet", {"precision": "bf16", "target": "aotinductor"}, "fp32 or fp16 or int8, not in bf16"),
        ("retinanet", {"image_size": "dynamic"}, "one size, takes no dynamic image size; give --image-size HxW"),
        ("retinanet", {"image_size": 32}, "too small"),
        ("retinanet", {"classes": 0}, "at least 1"),
        ("pspnet", {"classes": 300}, "at most 255 classes"),
        ("retinanet", {"width": 0}, "at least 1"),
        ("retinanet", {"seed": -1}, "out of range"),
        ("mask-rcnn", {"opset": 23}, "RoiAlign up to opset 21"),
        ("retinanet", {"precision": "int8"}, "needs a calibration set"),
        ("mask-rcnn", {"precision": "int8"}, "has no int8"),
        ("mask-rcnn", {"precision": "fp16"}, "was not measured in fp16"),
        ("pspnet", {"precision": "int8", "target": "tensorrt"}, "has no int8 for tensorrt"),
    ],
)
def test_what_cannot_be_exported_is_said_first(tmp_path: Path, head: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        export(head=head, output=tmp_path / "b", **{"image_size": SIZE, "variant": "tiny-mix", **options})
    assert list(tmp_path.iterdir()) == []


def test_changed_weights_are_noticed(dense_bundle: MakeBundle) -> None:
    manifest = Bundle.open(dense_bundle("retinanet")).manifest
    rebuilt = rebuild(manifest)
    assert sum(p.numel() for p in rebuilt.parameters()) == manifest.measured.params
    other = replace(manifest, weights=replace(manifest.weights, seed=5))
    with pytest.raises(WeightsError, match="export it again"):
        rebuild(other)


def test_int8_is_gated_by_mean_iou(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget that everything holds, every layer that may is in INT8, and really runs so."""
    few = {**TASKS, "segment": replace(TASKS["segment"], held_out=6)}
    monkeypatch.setattr("dualtoken_deploy.tasks.table.TASKS", few)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join((CLUTTER, *CLASSES)))
    result = export(
        "tiny-mix", "onnxruntime", "int8", head="pspnet", image_size=64, width=16, labels=labels, output=tmp_path / "b",
        int8=Int8Options("scenes", 10, max_drop=100.0, race=False),
    )  # fmt: skip
    bundle = Bundle.open(tmp_path / "b")
    said = bundle.manifest.calibration
    assert said is not None
    assert said.metric == "miou"
    assert said.in_float == ()
    assert said.held_out == HeldOutSet("scenes (val)", 6)
    assert result.int8_mac_share > 0.8
    assert 3 < result.sqnr_db < 60
    check_promise(inspect_bundle(bundle))
    (found,) = validate([bundle], "scenes", limit=6)
    assert found.scores is not None
    assert found.eager_scores is not None
    lost = 100 * (found.eager_scores["miou"] - found.scores["miou"])
    assert lost == pytest.approx(said.drop, abs=1e-6)  # validate's pictures of these six, measured by another way


# --- validate, predict, inspect, bench -------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "target", "options"), [(r[0], r[1], r[3]) for r in ROWS if r[1] != "tensorrt"])
def test_validate_scores_the_bundle_and_eager(
    dense_bundle: MakeBundle, head: str, target: str, options: dict[str, Any]
) -> None:
    bundle = dense_bundle(head, target, **options)
    (found,) = validate([bundle], "scenes", limit=3)
    names = {"miou"} if head in ("pspnet", "deeplabv3") else {"ap", "ap50", "ap75"}
    if head == "mask-rcnn":
        names |= {"mask_ap", "mask_ap50", "mask_ap75"}
    assert found.scores is not None
    assert found.eager_scores is not None
    assert found.scores.keys() == found.eager_scores.keys() == names
    for name, value in found.scores.items():
        assert value == pytest.approx(found.eager_scores[name], abs=1e-3)  # 0.1 points
    assert (found.images, found.reference) == (3, "eager")
    assert found.agreement is not None
    assert found.agreement >= 0.98
    (golden,) = validate([bundle])
    assert golden.reference == "golden"
    assert golden.sqnr_db >= 60


def test_gates(dense_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = dense_bundle("pspnet", "openvino", input_kind="tensor")
    code, text = fails(capsys, "validate", bundle, "--data", "scenes", "--limit", "2", "--min-miou", "0.99")
    assert code == 5
    assert "miou" in text
    assert "below 0.99" in text
    for arguments, hint in (
        (("--min-miou", "0.1"), "give --data"),
        (("--data", "scenes", "--limit", "1", "--min-ap", "0.1"), "a measure of the task detect"),
        (("--min-top1", "0.1"), "a measure of the task classify"),
    ):
        code, text = fails(capsys, "validate", bundle, *arguments)
        assert code == 2
        assert hint in text
    gate(validate([bundle]), sqnr_db=60)


def test_data_of_other_classes_is_refused(tmp_path: Path, dense_bundle: MakeBundle) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "val" / kind).mkdir(parents=True)
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "val/images/a.png")
    Image.fromarray(np.zeros((64, 96), np.uint8)).save(tmp_path / "val/masks/a.png")
    (tmp_path / "labels.txt").write_text("sky\nsea\n")
    with pytest.raises(DatasetError, match="sky"):
        validate([dense_bundle("pspnet", "openvino", input_kind="tensor")], tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(make_scene(5, (120, 150)).image).save(path)
    return path


@pytest.mark.parametrize("head", ["retinanet", "mask-rcnn"])
def test_objects_are_drawn_over_their_picture(
    dense_bundle: MakeBundle, picture: Path, tmp_path: Path, head: str, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = tmp_path / "found.png"
    arguments = ("--output", str(drawn), "--min-score", "0.6", "--json")
    (found,) = prints(capsys, "predict", dense_bundle(head), picture, *arguments)
    assert found["size"] == [120, 150]
    assert found["objects"]
    scores = [o["score"] for o in found["objects"]]
    assert scores == sorted(scores, reverse=True)
    assert min(scores) >= 0.6
    before, after = (np.array(Image.open(p).convert("RGB")) for p in (picture, drawn))
    assert before.shape == after.shape
    boxes = np.array([o["box"] for o in found["objects"]])
    assert (boxes >= 0).all()
    assert boxes[:, 0::2].max() <= 150
    assert boxes[:, 1::2].max() <= 120
    assert boxes[:, 0::2].max() > 96  # the model's width: they are the picture's pixels
    changed = (before != after).any(2)
    assert changed.any()
    for x1, y1, x2, y2 in boxes[:3].astype(int):
        if x2 - x1 > 3 and y2 - y1 > 3:
            edge = changed[y1 : y2 + 1, x1 : x2 + 1]
            assert edge[0].mean() > 0.5  # the upper edge of its frame
    if head == "mask-rcnn":
        (result,) = predict(dense_bundle(head), [picture], min_score=0.6)
        assert result.found.masks is not None
        for item, mask in zip(found["objects"], result.found.masks.shapes, strict=True):
            assert item["mask_pixels"] == mask.sum()


def test_areas_are_painted(dense_bundle: MakeBundle, picture: Path, tmp_path: Path) -> None:
    (found,) = predict(dense_bundle("pspnet", "openvino", input_kind="tensor"), [picture])
    assert sum(area.share for area in found.answers) == pytest.approx(1)
    draw(found, tmp_path / "areas.png")
    before, after = (np.array(Image.open(p).convert("RGB")).astype(float) for p in (picture, tmp_path / "areas.png"))
    labels = found.found.label_map
    assert labels is not None
    for area in found.answers:
        mine = labels == area.index
        assert mine.mean() == pytest.approx(area.share)
        np.testing.assert_allclose(after[mine], (before[mine] + np.array(colour(area.index))) / 2, atol=0.51)


def test_drawings_that_cannot_be_made(
    dense_bundle: MakeBundle, small_bundle: MakeBundle, picture: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bundle = dense_bundle("retinanet")
    cases: list[tuple[int, str, list[Path]]] = [
        (2, "does not end in .png", [bundle, picture, tmp_path / "a.jpg"]),
        (4, "no folder", [bundle, picture, tmp_path / "none" / "a.png"]),
        (2, "name a folder", [bundle, picture, picture, tmp_path / "a.png"]),
        (2, "leave --output out", [small_bundle(), picture, tmp_path / "a.png"]),
        (4, "no picture", [bundle, tmp_path / "lacking.png", tmp_path / "a.png"]),
    ]
    for code, hint, (*arguments, output) in cases:
        found, text = fails(capsys, "predict", *arguments, "--output", output)
        assert found == code
        assert hint in text
    assert [p.name for p in tmp_path.iterdir()] == ["scene.png"]


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (("visualize", "BUNDLE", "PICTURE", "--output", "a.png"), "dualtoken predict"),
        (("validate", "CLASSIFIER", "--min-ap", "0.5"), "a measure of the task detect"),
        (("evaluate", "BUNDLE", "--data", "scenes", "--limit", "1", "--confusion", "a.png"), "no confusion matrix"),
    ],
)
def test_commands_for_classifiers_say_so(
    dense_bundle: MakeBundle, small_bundle: MakeBundle, picture: Path, capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...], hint: str,
) -> None:  # fmt: skip
    places = {"BUNDLE": str(dense_bundle("retinanet")), "PICTURE": str(picture), "CLASSIFIER": str(small_bundle())}
    code, text = fails(capsys, *(places.get(word, word) for word in command))
    assert code == 2
    assert hint in text


def test_inspect_and_bench_take_dense_bundles(dense_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = dense_bundle("retinanet")
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    assert inspection.operators["Conv"] >= 50  # ten of the towers on each of five levels
    report = prints(capsys, "bench", bundle, "--rounds", "1", "--seconds", "0.05", "--json")
    assert {c["name"] for c in report["contestants"]} == {bundle.name, "gemm"}


def test_the_command_line_exports_a_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code, hint, *arguments in (
        (2, "give --head as well", "--variant", "t", "--suppress"),
        (2, "give --variant", "--precision", "fp32"),
        (2, "one image at a time", "--head", "pspnet", "--batch", "2"),
        (2, "belongs to segmenters", "--head", "retinanet", "--argmax"),
        (4, "no weights", "--head", "retinanet", "--weights", str(tmp_path / "none.safetensors")),
    ):
        found, text = fails(capsys, "export", "--target", "onnx", "--output", tmp_path / "b", *map(str, arguments))
        assert (found, hint in text) == (code, True), text
    assert list(tmp_path.iterdir()) == []


def test_golden_shows_a_damaged_bundle(dense_bundle: MakeBundle, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(dense_bundle("retinanet"), copy)
    data = json.loads((copy / "manifest.json").read_text())
    with np.load(copy / "golden.npz") as golden:
        kept = {**golden, "logits": golden["logits"] * 1.1}
    np.savez_compressed(copy / "golden.npz", **kept)
    data["files"]["golden.npz"] = sha256(copy / "golden.npz")
    (copy / "manifest.json").write_text(json.dumps(data))
    (found,) = validate([copy])
    assert found.sqnr_db < 25
    with pytest.raises(ToleranceError, match="sqnr_db"):
        gate([found], sqnr_db=60)
