"""Training detectors and segmenters: matching, losses, flips against definitions, and short runs on tiny sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dualtoken_deploy.cli import main
from dualtoken_deploy.data.objects import IGNORE, Objects
from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.errors import DatasetError, ToleranceError, UsageError, WeightsError
from dualtoken_deploy.models.heads.table import create_dense_model, describe_head
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.tasks.anchors import anchors
from dualtoken_deploy.tasks.base import Found
from dualtoken_deploy.tasks.boxes import decode, iou_matrix
from dualtoken_deploy.tasks.table import TASKS
from dualtoken_deploy.train import checkpoint, make_config, resume, train
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.heads import LocatedImages, begin_from, flipped
from dualtoken_deploy.train.losses import detection_losses, focal_loss, segmentation_loss
from dualtoken_deploy.train.matching import NOTHING, UNDECIDED, match
from dualtoken_deploy.use.evaluate import evaluate
from tests.numerics import assert_close
from tests.small import TINY

SIZE = (64, 64)
SETTINGS: dict[str, Any] = {
    "variant": TINY.name, "image_size": SIZE, "width": 8, "batch_size": 4, "drop_path": 0.0, "flip": 0.5,
}  # fmt: skip


def write_sets(folder: Path, pictures: int = 4) -> Path:
    """The same bright squares on grey in COCO's format and, in maps/, as label maps."""
    random = np.random.default_rng(0)
    maps = folder / "maps"
    (folder / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (folder / part).mkdir()
        for kind in ("images", "masks"):
            (maps / part / kind).mkdir(parents=True)
        images, entries = [], []
        for n in range(pictures):
            side = int(random.integers(24, 40))
            x, y = (int(v) for v in random.integers(0, 64 - side, 2))
            pixels = np.full((64, 64, 3), 90, np.uint8)
            labels = np.zeros((64, 64), np.uint8)
            pixels[y : y + side, x : x + side] = (250, 240, 30) if n % 2 else (30, 60, 250)
            labels[y : y + side, x : x + side] = 1 + n % 2
            for place in (folder / part, maps / part / "images"):
                Image.fromarray(pixels).save(place / f"{n}.png")
            Image.fromarray(labels).save(maps / part / "masks" / f"{n}.png")
            images.append({"id": n, "file_name": f"{n}.png", "height": 64, "width": 64})
            entries.append({"id": n, "image_id": n, "category_id": n % 2, "bbox": [x, y, side, side]})
        categories = [{"id": 0, "name": "blue"}, {"id": 1, "name": "yellow"}]
        data = {"images": images, "annotations": entries, "categories": categories}
        (folder / "annotations" / f"{part}.json").write_text(json.dumps(data))
    (maps / "labels.txt").write_text("grey\nblue\nyellow\n")
    return folder


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sets(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def detector(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; read only."""
    run = tmp_path_factory.mktemp("runs") / "detect"
    train(make_config(task="detect", data=str(squares), epochs=2, **SETTINGS), run)
    return run


# Matching


def match_by_loops(grid: Any, boxes: Any, classes: Any) -> tuple[list[int], dict[int, int]]:
    """For each anchor its class and, where it took one, the object."""
    wanted, taken = [], {}
    overlap = [[float(iou_matrix(a[None], b[None])[0, 0]) for b in boxes] for a in grid]
    for i, row in enumerate(overlap):
        best = max(range(len(boxes)), key=lambda n: (row[n], -n))
        if row[best] >= 0.5:
            taken[i] = best
        wanted.append(UNDECIDED if row[best] >= 0.4 else NOTHING)
    reach = [max(row[n] for row in overlap) for n in range(len(boxes))]
    for n in sorted(range(len(boxes)), key=lambda n: -reach[n]):
        for i, row in enumerate(overlap):
            if row[n] == reach[n] > 0:
                taken[i] = n
    for i, n in taken.items():
        wanted[i] = int(classes[n])
    return wanted, taken


@pytest.mark.parametrize("seed", range(6))
def test_matching_by_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = anchors(SIZE)
    low = rng.uniform(0, 40, (4, 2))
    boxes = np.concatenate((low, low + rng.uniform(5, 60, (4, 2))), axis=1).clip(0, 64)
    classes = rng.integers(0, 3, 4)
    found, deltas = match(grid, boxes, classes)
    wanted, taken = match_by_loops(grid, boxes, classes)
    assert found.tolist() == wanted
    assert {UNDECIDED, NOTHING} < set(wanted)
    rows = sorted(taken)
    np.testing.assert_allclose(
        decode(deltas[rows], grid[rows], (1000, 1000)), boxes[[taken[i] for i in rows]], atol=1e-9
    )
    assert not np.delete(deltas, rows, axis=0).any()


def test_a_picture_without_objects_is_background() -> None:
    found, deltas = match(anchors(SIZE), np.zeros((0, 4)), np.zeros(0, int))
    assert (found == NOTHING).all()
    assert not deltas.any()


# Losses


def test_the_focal_loss_is_its_formula_in_float64() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 3, (5, 7)), (rng.random((5, 7)) < 0.3).astype(float)
    p = 1 / (1 + np.exp(-logits))
    wanted = np.where(targets == 1, -0.25 * (1 - p) ** 2 * np.log(p), -0.75 * p**2 * np.log(1 - p))
    assert_close(focal_loss(torch.from_numpy(logits), torch.from_numpy(targets)), wanted, relative=1e-12)
    single = focal_loss(torch.from_numpy(logits).float(), torch.from_numpy(targets).float())
    assert_close(single, wanted, relative=1e-5)


def test_the_focal_loss_is_kornias() -> None:
    from kornia.losses import binary_focal_loss_with_logits

    torch.manual_seed(0)
    logits, targets = torch.randn(2, 6, 3), (torch.rand(2, 6, 3) < 0.3).float()
    theirs = binary_focal_loss_with_logits(logits, targets, alpha=0.25, gamma=2.0, reduction="none")
    assert_close(focal_loss(logits, targets), theirs, relative=1e-5)


def test_detection_losses_anchor_by_anchor() -> None:
    rng = np.random.default_rng(1)
    logits, deltas, offsets = rng.normal(0, 1, (2, 9, 3)), rng.normal(0, 1, (2, 9, 4)), rng.normal(0, 1, (2, 9, 4))
    classes = np.array([[0, 2, -1, -1, -2, 1, -1, -2, -1], [-1] * 9])
    by_class = by_box = 0.0
    for b in range(2):
        for a in range(9):
            if classes[b, a] == UNDECIDED:
                continue
            for c in range(3):
                p = 1 / (1 + np.exp(-logits[b, a, c]))
                by_class += -0.25 * (1 - p) ** 2 * np.log(p) if c == classes[b, a] else -0.75 * p**2 * np.log(1 - p)
            if classes[b, a] >= 0:
                for x in np.abs(deltas[b, a] - offsets[b, a]):
                    by_box += 0.5 * x**2 * 9 if x < 1 / 9 else x - 0.5 / 9
    found = detection_losses(*(torch.from_numpy(x) for x in (logits, deltas, classes, offsets)))
    np.testing.assert_allclose([float(f) for f in found], [by_class / 3, by_box / 3], rtol=1e-12)


def test_the_segmentation_loss_pixel_by_pixel() -> None:
    rng = np.random.default_rng(2)
    main, second = rng.normal(0, 1, (2, 3, 4, 5)), rng.normal(0, 1, (2, 3, 4, 5))
    labels = rng.integers(0, 3, (2, 4, 5))
    labels[:, 0] = IGNORE
    wanted = 0.0
    for share, logits in ((1.0, main), (0.4, second)):
        picked = [
            np.log(np.exp(logits[b, :, i, j]).sum()) - logits[b, labels[b, i, j], i, j]
            for b in range(2) for i in range(1, 4) for j in range(5)
        ]  # fmt: skip
        wanted += share * np.mean(picked)
    found = segmentation_loss(*(torch.from_numpy(x) for x in (main, second, labels)))
    assert float(found) == pytest.approx(wanted, rel=1e-12)


def test_nothing_that_counts_gives_a_loss_of_zero() -> None:
    """A picture that could not be decoded."""
    logits = torch.randn(1, 3, 4, 4)
    assert segmentation_loss(logits, logits, torch.full((1, 4, 4), IGNORE)) == 0
    undecided = torch.full((1, 9), UNDECIDED)
    assert sum(detection_losses(torch.randn(1, 9, 3), torch.randn(1, 9, 4), undecided, torch.zeros(1, 9, 4))) == 0


# Samples


def test_boxes_and_label_maps_are_flipped_with_their_picture() -> None:
    """What a flipped mask of a box shows is the flipped box; a label map follows its colour."""
    box = np.array([[3.0, 5.0, 20.0, 31.0]])
    mask = np.zeros((64, 64), bool)
    mask[5:31, 3:20] = True
    rows, columns = np.nonzero(mask[:, ::-1])
    assert flipped(box, 64).tolist() == [[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]]

    image = np.where(mask[..., None], np.uint8(200), np.zeros((64, 64, 3), np.uint8))
    for task in ("segment", "detect"):
        truth: dict[str, Any] = {"label_map": mask.astype(np.uint8)}
        if task == "detect":
            truth = {"boxes": Objects(box, np.array([1]))}
        sample = Sample(image, **truth)
        data = SampleSet("one", ("a", "b"), lambda _, sample=sample: sample, tuple(range(20)), "")  # type: ignore[arg-type]
        images = LocatedImages(data, make_config(task=task, data="one", **SETTINGS))
        turned = 0
        for i in range(20):
            pixels, *given, _, _ = images[i]
            seen = pixels[0] > 100
            turned += bool(seen[:, ::-1].any() and (seen == mask[:, ::-1]).all())
            if task == "segment":
                assert (given[0] == seen).all()
            else:
                at = np.flatnonzero(given[0] >= 0)
                rows, columns = np.nonzero(seen)
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                found = decode(given[1][at], anchors(SIZE)[at], SIZE)
                np.testing.assert_allclose(found, np.tile(edges, (len(at), 1)), atol=1e-3)
        assert 4 <= turned <= 16


def test_boxes_are_stretched_with_their_picture(squares: Path) -> None:
    data = TASKS["detect"].open(squares, "val")
    config = make_config(task="detect", data="", **SETTINGS | {"image_size": (64, 128), "flip": 0.0})
    images = LocatedImages(data, config)
    _, classes, deltas, _, _ = images[1]
    at = np.flatnonzero(classes >= 0)
    boxes = data[1].boxes
    assert boxes is not None
    found = decode(deltas[at], anchors((64, 128))[at], (64, 128))
    np.testing.assert_allclose(found, np.tile(boxes.shapes[0] * (2, 1, 2, 1), (len(at), 1)), atol=1e-3)


# The judge


def sure(objects: Objects | None) -> Objects:
    """The true objects as detections."""
    assert objects is not None
    return Objects(objects.shapes, objects.classes, np.ones(len(objects.classes)))


def test_the_truth_as_an_answer_scores_one() -> None:
    task = TASKS["detect"]
    data = task.open("scenes", "val").limit(3)
    samples = [data[i] for i in range(3)]
    pairs = [(sample, Found(boxes=sure(sample.boxes), masks=sure(sample.masks))) for sample in samples]
    names = ("ap", "ap50", "ap75", "mask_ap", "mask_ap50", "mask_ap75")
    assert task.score(pairs, 4) == dict.fromkeys(names, 1.0)
    assert set(task.score_classes(pairs, data.labels or ()).values()) == {1.0}
    with pytest.raises(DatasetError, match=r"has the classes disc, .* the model cat, dog"):
        task.match(data, ("cat", "dog"))


def test_mean_iou_is_split_by_class() -> None:
    task = TASKS["segment"]
    data = task.open("scenes", "val").limit(4)
    samples = [data[i] for i in range(4)]
    pairs = [(sample, Found(label_map=np.zeros((96, 96), np.uint8))) for sample in samples]
    clutter = float(np.mean([sample.label_map == 0 for sample in samples if sample.label_map is not None]))
    found = task.score_classes(pairs, data.labels or ())
    assert found["clutter"] == pytest.approx(clutter)
    assert all(value == 0 for name, value in found.items() if name != "clutter")
    assert task.score(pairs, len(data.labels or ()))["miou"] == pytest.approx(clutter / len(found))


# Runs


def test_a_detector_run_leaves_its_files_and_says_what_it_is(detector: Path, squares: Path) -> None:
    names = {path.name for path in detector.iterdir() if path.is_file()}
    assert names == {"config.json", "last.safetensors", "best.safetensors", "best.json", "metrics.csv", "curve.svg"}
    said = describe_head(detector)
    assert (said.task, said.head, said.variant, said.width) == ("detect", "retinanet", TINY.name, 8)
    assert (said.labels, said.image_size, said.data) == (("blue", "yellow"), SIZE, str(squares))
    header, *rows = (detector / "metrics.csv").read_text().splitlines()
    assert {"train_loss", "ap", "ap50", "ap75"} < set(header.split(","))
    first, second = (float(dict(zip(header.split(","), row.split(","), strict=True))["train_loss"]) for row in rows)
    assert second < first
    model = create_dense_model("retinanet", weights=detector)
    best = checkpoint.load_tensors(detector / "best.safetensors")[0]
    assert torch.equal(model.state_dict()["class_tower.predict.weight"], best["class_tower.predict.weight"])


def test_the_best_weights_have_the_ap_that_the_run_reports(detector: Path, squares: Path) -> None:
    found = evaluate(detector, squares)
    metrics = json.loads((detector / "best.json").read_text())["metrics"]
    assert found.images == 4
    assert {name: found.scores[name] for name in ("ap", "ap50", "ap75")} == pytest.approx(
        {name: metrics[name] for name in ("ap", "ap50", "ap75")}, abs=1e-6
    )


def test_a_stopped_detector_run_ends_where_a_whole_one_does(detector: Path, squares: Path, tmp_path: Path) -> None:
    """Stopped before its second epoch was written, then resumed: the same tensors, bit for bit."""

    def stop(text: str) -> None:
        if text.startswith("epoch 2/2"):
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train(make_config(task="detect", data=str(squares), epochs=2, **SETTINGS), run, stop)
    assert checkpoint.load_tensors(run / checkpoint.LAST)[1]["progress"]["epoch"] == 1
    resume(run)
    expected, actual = (checkpoint.load_tensors(r / checkpoint.LAST)[0] for r in (detector, run))
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


@pytest.mark.parametrize("head", ["pspnet", "deeplabv3"])
def test_a_segmenter_run(head: str, squares: Path, tmp_path: Path) -> None:
    said: list[str] = []
    data = str(squares / "maps")
    result = train(
        make_config(task="segment", head=head, data=data, epochs=1, **SETTINGS), tmp_path / "run", said.append
    )
    assert (result.metric, result.epochs) == ("miou", 1)
    assert result.to_json()["best_miou"] == result.best
    assert any(text.startswith("epoch 1/1: ") and "miou" in text for text in said)
    found = evaluate(tmp_path / "run/best.safetensors", data)
    assert found.scores["miou"] == pytest.approx(result.best, abs=1e-6)
    assert describe_head(tmp_path / "run").labels == ("grey", "blue", "yellow")


def test_an_unreadable_picture_is_named_and_counted(tmp_path: Path) -> None:
    squares = write_sets(tmp_path / "squares", pictures=3)
    for part in ("train", "val"):
        (squares / part / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    said: list[str] = []
    config = make_config(task="detect", data=str(squares), epochs=1, **SETTINGS | {"batch_size": 3})
    train(config, tmp_path / "run", said.append)
    assert sum(text.endswith("train/1.png") for text in said) == 1
    header, row = (tmp_path / "run/metrics.csv").read_text().splitlines()
    figures = dict(zip(header.split(","), row.split(","), strict=True))
    assert (figures["unreadable"], figures["val_unreadable"]) == ("1", "1")


def test_a_loss_that_is_no_number_stops_a_detector(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainConfig, "lr_at", lambda self, epoch: np.inf)
    with pytest.raises(ToleranceError, match=r"the loss is (nan|inf) in epoch 2, step 1"):
        train(make_config(task="detect", data=str(squares), epochs=2, **SETTINGS), tmp_path / "run")


# Weights to begin with, and weights of the wrong kind


def test_a_dense_model_begins_from_a_classifier(tmp_path: Path) -> None:
    classifier = create_model(TINY.name, 7, 64, seed=3)
    checkpoint.save_weights(tmp_path / "w.safetensors", classifier.state_dict(), {"variant": TINY.name})
    model = create_dense_model("pspnet", TINY.name, 3, width=8, image_size=64)
    before = model.state_dict()["classify.weight"].clone()
    said = begin_from(model, str(tmp_path / "w.safetensors"))
    taken = [name for name in classifier.state_dict() if not name.startswith("head.")]
    for name in taken:
        assert torch.equal(model.state_dict()[f"backbone.model.{name}"], classifier.state_dict()[name]), name
    assert torch.equal(model.state_dict()["classify.weight"], before)
    assert said.startswith(f"{len(taken)} of {len(model.state_dict())} tensors begin as in ")
    other = create_dense_model("pspnet", TINY.name, 3, width=8, image_size=64, token_mlp="mlp")
    with pytest.raises(WeightsError, match="does not fit the backbone"):
        begin_from(other, str(tmp_path / "w.safetensors"))


def test_a_dense_model_begins_from_another_dense_one(detector: Path) -> None:
    model = create_dense_model("retinanet", TINY.name, 5, width=8, image_size=64)
    begin_from(model, str(detector))
    mine, theirs = model.state_dict(), create_dense_model("retinanet", weights=detector).state_dict()
    same = {name for name in mine if mine[name].shape == theirs[name].shape and torch.equal(mine[name], theirs[name])}
    assert set(mine) - same == {"class_tower.predict.weight", "class_tower.predict.bias"}  # five classes, not two


def test_weights_of_the_wrong_kind_are_refused(detector: Path, squares: Path) -> None:
    with pytest.raises(WeightsError, match="a model for the task detect, not classify"):
        describe_weights(detector / "best.safetensors", "classify")
    with pytest.raises(WeightsError, match="does not say that it holds a detector or segmenter"):
        describe_head("digits")
    with pytest.raises(WeightsError, match="no weights at"):
        describe_head(squares)
    for given, message in (
        ({"head": "pspnet"}, "head retinanet"),
        ({"head": "retinanet", "width": 9}, "width 8, not 9"),
    ):
        with pytest.raises(WeightsError, match=f"are weights with {message}"):
            create_dense_model(**given, weights=detector)
    with pytest.raises(DatasetError, match="has the classes disc"):
        evaluate(detector, "scenes")


# Recipes


def test_defaults_are_the_papers_for_each_task() -> None:
    detect, segment = (make_config(task=task, variant="s", data="x") for task in ("detect", "segment"))
    assert (detect.head, detect.batch_size, detect.peak_lr, detect.epochs) == ("retinanet", 16, 1e-4, 12)
    assert (segment.head, segment.batch_size, segment.peak_lr) == ("pspnet", 32, 2e-4)
    assert detect.weight_decay == segment.weight_decay == 1e-4
    assert make_config(variant="s", data="x") == TrainConfig("s", "x")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "guess"}, "task 'guess' is not one of classify, detect, segment"),
        ({"task": "detect", "mixup": 0.2}, "mixup is for classification only"),
        ({"task": "detect", "augment": "affine"}, "not one of photometric, none"),
        ({"task": "classify", "head": "pspnet"}, "belong to --task detect or segment"),
        ({"task": "detect", "width": 0}, "width must be at least 1"),
        ({"task": "segment", "width": "wide"}, "width must be at least 1, not wide"),
    ],
)  # fmt: skip
def test_bad_recipes(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(variant="s", data="x", **settings)


@pytest.mark.parametrize(("task", "head"), [("detect", "pspnet"), ("segment", "mask-rcnn"), ("detect", "mask-rcnn")])
def test_a_head_that_does_not_learn_the_task(task: str, head: str, tmp_path: Path) -> None:
    config = make_config(task=task, head=head, data="scenes", **SETTINGS)
    with pytest.raises(UsageError, match=f"head '{head}' cannot be trained to {task}; heads that can: "):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The command line


def test_a_segmenter_is_trained_and_judged_from_the_command_line(
    squares: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = str(squares / "maps"), tmp_path / "run"
    options = ["--image-size", "64", "--width", "8", "--epochs", "1", "--batch-size", "4"]
    main(
        ["train", "--task", "segment", "--variant", TINY.name, "--data", data, "--output", str(run), *options, "--json"]
    )
    trained = json.loads(capsys.readouterr().out)
    assert (trained["metric"], trained["epochs"]) == ("miou", 1)
    main(["evaluate", str(run), "--data", data, "--json"])
    judged = json.loads(capsys.readouterr().out)
    assert (judged["task"], judged["images"]) == ("segment", 4)
    assert judged["miou"] == pytest.approx(trained["best_miou"], abs=1e-6)
    main(["evaluate", str(run), "--data", data, "--limit", "2"])
    table = capsys.readouterr().out
    assert all(word in table for word in ("miou", "grey", "all 2", "images/s"))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--task", "detect", "--head", "pspnet"], 2, "heads that can: retinanet"),
        (["train", "--task", "detect", "--set", "mixup=0.1"], 2, "mixup is for classification only"),
        (["train", "--task", "detect", "--data", "nowhere"], 4, "no folder at nowhere"),
        (["train", "--resume", "run", "--task", "detect"], 2, "--resume takes task, variant"),
        (["evaluate", "WEIGHTS", "--data", "scenes"], 4, "use data with the same classes"),
    ],
)  # fmt: skip
def test_what_the_command_line_refuses(
    arguments: list[str], code: int, message: str, detector: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments = [*arguments, "--variant", TINY.name, "--output", str(tmp_path / "run")]
        arguments += [] if "--data" in arguments else ["--data", "scenes"]
    with pytest.raises(SystemExit) as caught:
        main([str(detector) if a == "WEIGHTS" else a for a in arguments])
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert caught.value.code == code
    assert message in line
    assert not (tmp_path / "run").exists()
