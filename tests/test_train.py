"""Training on a set of coloured squares that any model learns, with the one-block variant at 64 x 64."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image

from dualtoken_deploy.data.folders import open_dataset, open_parts
from dualtoken_deploy.errors import DatasetError, OutputError, ToleranceError, UsageError, WeightsError
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.train import checkpoint, make_config, resume, train
from dualtoken_deploy.train.classify import soft_cross_entropy
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.data import UNREADABLE, Augment, TrainImages, mix, random_resized_crop
from dualtoken_deploy.train.loop import _groups, unmoved_loss
from dualtoken_deploy.use.evaluate import evaluate
from tests.small import TINY

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
# Deterministic and short: no augmentation but the crop.
PLAIN: dict[str, Any] = {
    "variant": TINY.name, "image_size": (64, 64), "batch_size": 6, "lr": 0.34, "warmup_epochs": 0.5, "mixup": 0,
    "cutmix": 0, "augment": "none", "erasing": 0, "flip": 0, "crop_scale": (0.8, 1), "drop_path": 0,
}  # fmt: skip


def write_set(folder: Path, train: int = 8, val: int = 4) -> Path:
    random = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for name, colour in COLOURS.items():
            place = folder / part / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 30, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("colours"))


@pytest.fixture(scope="module")
def finished(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs; read only."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    train(make_config(data=str(colours), epochs=3, **PLAIN), run)
    return run


def state_of(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_tensors(run / checkpoint.LAST)[0]


# Whole runs


def test_a_run_learns_and_leaves_its_files(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if path.is_file()}
    assert names == {"config.json", "last.safetensors", "best.safetensors", "best.json", "metrics.csv", "curve.svg"}
    assert len({path.stat().st_mode for path in finished.iterdir() if path.is_file()}) == 1  # weights are no secret
    lines = (finished / "metrics.csv").read_text().splitlines()
    assert len(lines) == 4
    info = json.loads((finished / "best.json").read_text())
    assert info["labels"] == list(COLOURS)
    assert info["metrics"]["top1"] == 1.0
    assert (info["train_images"], info["val_images"]) == (24, 12)


def test_tensorboard_reads_the_numbers_of_the_table(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "tensorboard")).Reload()
    with (finished / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in set(rows[0]) - {"epoch"}:
        seen = {e.step: e.value for e in events.Scalars(name)}
        assert seen == pytest.approx({int(row["epoch"]): float(row[name]) for row in rows}, rel=1e-5), name


def test_the_best_weights_give_the_accuracy_that_the_run_reports(finished: Path, colours: Path) -> None:
    found = evaluate(finished / "best.safetensors", colours)
    assert (found.images, found.scores["top1"]) == (12, 1.0)
    assert found.per_class == dict.fromkeys(COLOURS, 1.0)
    described = describe_weights(finished / "best.safetensors")
    assert described is not None
    assert (described.variant, described.labels) == (TINY.name, tuple(COLOURS))


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(finished: Path, colours: Path, tmp_path: Path) -> None:
    """Killed with SIGKILL in the middle of an epoch, then resumed: the same tensors, bit for bit."""
    code = """
    import ast, os, signal, sys
    from dualtoken_deploy.train import make_config, train
    from dualtoken_deploy.train.loop import _Run
    from tests import small
    small.make_known()
    once, seen = _Run._set_lr, []
    def killing(self, epoch):
        seen.append(epoch)
        if len(seen) == 7:  # four steps an epoch: the middle of the second one
            os.kill(os.getpid(), signal.SIGKILL)
        return once(self, epoch)
    _Run._set_lr = killing
    train(make_config(data=sys.argv[1], epochs=3, **ast.literal_eval(sys.argv[3])), sys.argv[2])
    """
    run = tmp_path / "killed"
    command = [sys.executable, "-c", textwrap.dedent(code), str(colours), str(run), repr(PLAIN)]
    done = subprocess.run(command, check=False)
    assert done.returncode == -signal.SIGKILL
    result = resume(run)
    assert result.epochs == 3
    expected, actual = state_of(finished), state_of(run)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, actual[name]), name


PROCESS = """
import ast, sys
from torch import nn
from dualtoken_deploy.train import make_config, train
from tests import small
small.make_known()
# The statistics of batch normalisation are a process's own: with those of one image less or more the curves differ.
nn.BatchNorm2d.forward = lambda self, x: nn.functional.batch_norm(
    x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
train(make_config(data=sys.argv[1], epochs=2, **ast.literal_eval(sys.argv[3])), sys.argv[2])
"""


def test_two_processes_give_the_loss_curve_of_one(colours: Path, tmp_path: Path) -> None:
    """Accelerate over gloo, the same global batch; float32 sums in another order, hence 1e-3."""
    script = tmp_path / "one.py"
    script.write_text(PROCESS)
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    launch = (
        "-m accelerate.commands.launch --cpu --num_processes 2 --num_machines 1 --mixed_precision no "
        "--dynamo_backend no"
    )
    curves = []
    for count, how in ((1, []), (2, launch.split())):
        run = tmp_path / f"run{count}"
        command = [sys.executable, *how, str(script), str(colours), str(run), repr(PLAIN)]
        done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = (run / "metrics.csv").read_text().splitlines()[1:]
        curves.append([[float(x) for x in row.split(",")[2:4]] for row in rows])
    assert_allclose(curves[0], curves[1], rtol=1e-3)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_epoch(
    finished: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "diverged"
    train(make_config(data=str(colours), epochs=1, **PLAIN), run)
    before = (run / checkpoint.LAST).read_bytes()
    monkeypatch.setattr(TrainConfig, "lr_at", lambda self, epoch: math.inf)
    with pytest.raises(
        ToleranceError, match=r"the loss is (nan|inf) in epoch 2, step \d+: .*last.safetensors has epoch 1"
    ):
        resume(run, epochs=2)
    assert (run / checkpoint.LAST).read_bytes() == before


def test_fine_tuning_replaces_the_head_and_says_so(finished: Path, tmp_path: Path) -> None:
    data = write_set(tmp_path / "two", train=2, val=1)
    for part in ("train", "val"):
        for file in (data / part / "red").iterdir():
            file.unlink()
        (data / part / "red").rmdir()
    said: list[str] = []
    settings = PLAIN | {"batch_size": 4, "init": str(finished / "best.safetensors")}
    train(make_config(data=str(data), epochs=1, **settings), tmp_path / "run", said.append)
    assert any("has 3 classes, the data 2: replaced" in text for text in said)
    assert describe_weights(tmp_path / "run/best.safetensors").labels == ("blue", "green")  # type: ignore[union-attr]


def test_an_unreadable_file_is_named_and_counted(tmp_path: Path) -> None:
    data = write_set(tmp_path / "data", train=3, val=1)
    (data / "train/red/1.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    said: list[str] = []
    train(make_config(data=str(data), epochs=1, **PLAIN | {"batch_size": 9}), tmp_path / "run", said.append)
    assert sum(text.endswith("train/red/1.png") for text in said) == 1
    header, row = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["unreadable"] == "1"


def test_averaged_weights_follow_their_formula(colours: Path, tmp_path: Path) -> None:
    """One step from W0 to W1 with decay 0.25: the average is W0 + 0.75 (W1 - W0); it is what `best` holds."""
    config = make_config(data=str(colours), epochs=1, ema=0.25, **PLAIN | {"batch_size": 24})
    train(config, tmp_path / "run")
    tensors = state_of(tmp_path / "run")
    start = create_model(TINY.name, 3, 64, seed=0).state_dict()["head.fc.weight"]
    expected = start + 0.75 * (tensors["model.head.fc.weight"] - start)
    torch.testing.assert_close(tensors["ema.head.fc.weight"], expected, rtol=1e-6, atol=1e-7)
    best = checkpoint.load_tensors(tmp_path / "run" / checkpoint.BEST)[0]
    assert torch.equal(best["head.fc.weight"], tensors["ema.head.fc.weight"])
    resume(tmp_path / "run", epochs=2, ema=0.0)
    assert not [name for name in state_of(tmp_path / "run") if name.startswith("ema.")]
    changed = checkpoint.read_config(tmp_path / "run")
    assert (changed.epochs, changed.ema) == (2, 0.0)


def test_accumulated_parts_step_once_a_batch(colours: Path, tmp_path: Path) -> None:
    config = make_config(data=str(colours), epochs=1, accumulate=2, **PLAIN | {"batch_size": 12})
    train(config, tmp_path / "run")
    assert state_of(tmp_path / "run")["optimiser.step.head.fc.weight"] == 2  # 24 images


# Parts


def test_the_schedule_against_torchs_own() -> None:
    config = TrainConfig("s", "x", epochs=10, warmup_epochs=2, lr=1e-3, batch_size=512, min_lr=1e-5)
    assert config.peak_lr == 5e-4
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=8, eta_min=1e-5)
    for epoch in range(2, 11):
        assert config.lr_at(epoch) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
        optimiser.step()
        cosine.step()
    assert config.lr_at(1) == pytest.approx(2.5e-4)


def test_decay_is_on_matrices_only() -> None:
    model = create_model("t", num_classes=3, local_attention="window")
    kept, free = _groups(model, 0.04)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = [names[id(p)] for p in kept["params"]]
    assert len(kept["params"]) + len(free["params"]) == len(names)
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert {"global_tokens", "stem.conv1.norm.weight", "head.fc.bias"} <= {names[id(p)] for p in free["params"]}
    assert (kept["weight_decay"], free["weight_decay"]) == (0.04, 0.0)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_keeps_the_shares_honest(kind: str) -> None:
    """Images of one grey value each: what is left of it in the mixture is what the targets say."""
    config = TrainConfig("s", "x", **{"mixup": 0.0, "cutmix": 0.0} | {kind: 1.0})  # type: ignore[arg-type]
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 20, 30)
    shares, random = [], np.random.default_rng(0)
    for _ in range(50):
        mixed, targets = mix(images, torch.eye(4), config, random)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(4.0), rtol=0, atol=1e-5)
        shares.append(float(targets[0, 0]))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.12)  # Beta(1, 1)


def test_targets_and_loss_against_torch() -> None:
    labels = torch.tensor([2, UNREADABLE, 0])
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    config = TrainConfig("s", "x", label_smoothing=0.1)
    targets = Augment(config, 4)._targets(labels)
    known = torch.tensor([0, 2])
    expected = torch.nn.functional.cross_entropy(logits[known], labels[known], label_smoothing=0.1)
    torch.testing.assert_close(soft_cross_entropy(logits, targets), expected)


def test_crops_lie_inside_and_have_the_area_asked_for() -> None:
    """A ramp across: the mean and the ends of a crop say where it was taken from."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 200, 0).repeat(3, 2)
    random = np.random.default_rng(1)
    widths = []
    for _ in range(200):
        crop = random_resized_crop(ramp, (64, 64), (0.25, 0.25), random)[:, :, 0].astype(float)
        assert crop.min() >= 0
        assert crop.max() <= 199
        widths.append(crop[0, -1] - crop[0, 0])
    # area 1/4 of 200 x 200 with ratios 3/4..4/3: widths of 86 to 116 pixels
    assert 80 < min(widths) < max(widths) < 120


def test_a_sample_follows_from_seed_epoch_and_index(colours: Path) -> None:
    images = open_dataset(colours, "train")
    first, second = (TrainImages(images, make_config(data=str(colours), **PLAIN)) for _ in range(2))
    second[5]
    assert torch.equal(first[3][0], second[3][0])
    second.epoch = 1
    assert not torch.equal(first[3][0], second[3][0])


def test_every_augmentation_gives_finite_normalised_images() -> None:
    pixels = torch.randint(0, 256, (10, 3, 64, 64), dtype=torch.uint8)
    for augment in ("randaugment", "affine", "none"):
        config = TrainConfig("s", "x", augment=augment)
        images, targets = Augment(config, 5)(pixels, torch.arange(10) % 5, np.random.default_rng(0))
        assert images.shape == (10, 3, 64, 64)
        assert images.isfinite().all()
        assert images.abs().max() < 4
        torch.testing.assert_close(targets.sum(1), torch.ones(10))


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: [f.unlink() for f in (d / "train/red").iterdir()], r"without images: red"),
        (lambda d: (d / "val/red").rename(d / "val/rouge"), r"different classes \(red, rouge\)"),
        (lambda d: (d / "val").rename(d / "test"), r"no folders train/ and val/|holds no images"),
    ],
    ids=["empty class", "other classes", "no val"],
)  # fmt: skip
def test_folders_that_cannot_be_trained_on(tmp_path: Path, change: Any, message: str) -> None:
    data = write_set(tmp_path / "data", 1, 1)
    change(data)
    with pytest.raises(DatasetError, match=message):
        open_parts(data)


def test_one_class_only(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part / "only").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / part / "only" / "a.png")
    with pytest.raises(DatasetError, match=r"one class only \(only\)"):
        open_parts(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"), ({"lr": math.nan}, "lr must be 0 or more"),
        ({"augment": "magic"}, "not one of randaugment, affine, none"), ({"warmup": 3}, "unknown setting 'warmup'"),
        ({"epochs": 1.5}, "not of the kind"), ({"crop_scale": ("[0.5", "1.0]")}, "not of the kind"),
        ({"crop_scale": 0.5}, "not of the kind"), ({"augment": 3}, "not of the kind"),
        ({"crop_scale": (0.9, 0.1)}, "no range"),
        ({"accumulate": 5}, "not a multiple"), ({"lr": "fast"}, "not of the kind"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_config(variant="s", data="x", **settings)


def test_a_folder_that_is_there_is_never_written_over(finished: Path, colours: Path) -> None:
    before = (finished / checkpoint.LAST).read_bytes()
    with pytest.raises(UsageError, match=r"exists; go on with --resume"):
        train(make_config(data=str(colours), **PLAIN), finished)
    assert (finished / checkpoint.LAST).read_bytes() == before


def test_a_damaged_checkpoint_is_one_error(finished: Path, tmp_path: Path) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    whole = (run / checkpoint.LAST).read_bytes()
    (run / checkpoint.LAST).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=r"no whole checkpoint"):
        resume(run)
    with pytest.raises(WeightsError, match=r"is no training run"):
        resume(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda _: [1], WeightsError, "no JSON object"),
        (lambda header: header | {"progress": {"epoch": "x"}}, WeightsError, "another version"),
        (lambda header: header | {"progress": 5}, WeightsError, "another version"),
        (lambda header: {k: v for k, v in header.items() if k != "progress"}, WeightsError, "another version"),
        (lambda header: {k: v for k, v in header.items() if k != "data_sha256"}, DatasetError, "files differ"),
    ],
    ids=["a list", "an epoch of letters", "no progress but a number", "no progress", "no data"],
)
def test_the_header_of_a_checkpoint_is_read_without_trust(
    finished: Path, tmp_path: Path, change: Callable[[Any], Any], error: type[Exception], words: str
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tensors, header = checkpoint.load_tensors(run / checkpoint.LAST)
    checkpoint.save_tensors(run / checkpoint.LAST, tensors, change(header))
    with pytest.raises(error, match=words):
        resume(run, epochs=4)


@pytest.mark.parametrize("part", ["ema", "optimiser.exp_avg"])
def test_the_tensors_of_a_checkpoint_fit_its_model(finished: Path, tmp_path: Path, part: str) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    tensors, header = checkpoint.load_tensors(run / checkpoint.LAST)
    name = next(key for key in tensors if key.startswith("optimiser.exp_avg."))
    changed = {"ema.x": torch.ones(3)} if part == "ema" else {name: torch.ones(7, 7, 7)}
    checkpoint.save_tensors(run / checkpoint.LAST, tensors | changed, header)
    with pytest.raises(WeightsError, match="does not fit the model of its run"):
        resume(run, epochs=4)


def test_a_finished_run_takes_no_other_settings_in_silence(finished: Path, tmp_path: Path) -> None:
    """They would change its config.json and train nothing."""
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / checkpoint.CONFIG).read_bytes()
    with pytest.raises(UsageError, match=r"has its 3 epochs, so lr would change nothing; give --epochs above 3"):
        resume(run, lr=0.1)
    assert (run / checkpoint.CONFIG).read_bytes() == before


def test_the_warm_up_is_a_share_of_the_run_unless_it_is_said() -> None:
    one = make_config(variant="t-mix", data="digits", epochs=1)
    assert one.warmup_epochs == pytest.approx(20 / 300)  # the paper's: 20 of 300 epochs
    assert one.lr_at(0.5) > 0.4 * one.peak_lr, "half a run of one epoch is not spent at its floor"
    assert make_config(variant="t-mix", data="digits", epochs=1, warmup_epochs=0.5).warmup_epochs == 0.5


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.0] * 50, True),
        ([2.0 - 0.02 * i for i in range(50)], False),
        ([1.0 + i for i in range(50)], True),
        ([1.0], False),
    ],
    ids=["flat", "falling", "rising", "one step"],
)
def test_a_loss_that_has_not_fallen_is_said(losses: list[float], said: bool) -> None:
    assert ("the loss has not fallen" in (unmoved_loss(losses) or "")) is said


def test_data_that_changed_is_not_resumed_on(finished: Path, tmp_path: Path) -> None:
    import shutil

    run, data = tmp_path / "run", write_set(tmp_path / "data", 2, 1)
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text()) | {"data": str(data)}
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(DatasetError, match=r"is not what .* was trained on"):
        resume(run)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    checkpoint.save_tensors(path, {"a": torch.ones(2)}, {})
    before = path.read_bytes()

    def full(_tensors: Any, file: Path, _header: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match=r"No space left on device; the file that was there is unchanged"):
        checkpoint.save_tensors(path, {"a": torch.zeros(2)}, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_progress_is_told(finished: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualtoken_deploy.train import loop

    monkeypatch.setattr(loop, "TELL_EVERY_S", 0.0)
    said: list[str] = []
    began = time.monotonic()
    train(make_config(data=str(colours), epochs=1, **PLAIN), tmp_path / "run", said.append)
    assert time.monotonic() - began < 120
    steps = [text for text in said if "images/s" in text]
    assert len(steps) == 4
    assert all(word in steps[-1] for word in ("loss", "lr", "min left", "epoch 1.00 of 1"))
