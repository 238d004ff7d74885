"""The training loop: one process, several GPUs or several machines, through Hugging Face Accelerate."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import Dataset

from dualtoken_deploy.errors import DatasetError, OutputError, ToleranceError, UsageError, WeightsError, missing_extra
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.train import checkpoint
from dualtoken_deploy.train.classify import Classify
from dualtoken_deploy.train.config import TrainConfig, make_config
from dualtoken_deploy.train.data import EpochOrder
from dualtoken_deploy.train.forecast import Forecast
from dualtoken_deploy.train.heads import HeadTask
from dualtoken_deploy.train.learned import Batch, LearnedTask
from dualtoken_deploy.train.tokenize import Tokenize
from dualtoken_deploy.use.plots import plot_curves

Tell = Callable[[str], None]
LIBRARIES = ("torch", "kornia", "accelerate", "numpy", "pillow", "dualtoken-deploy")
TELL_EVERY_S = 5.0
UNMOVED = 0.98  # of the loss at the start: a run that ends above it has learned next to nothing
LEARNED: Mapping[str, Callable[[TrainConfig], LearnedTask]] = MappingProxyType(
    {"classify": Classify, "detect": HeadTask, "segment": HeadTask, "tokenize": Tokenize, "forecast": Forecast}
)
NO_DECAY = ("norm", "bias", "gamma", "global_tokens", "position_bias")


@dataclass(frozen=True)
class TrainResult:
    """Where a run ended. `last` and `best`: of `metric` on the val part, fractions of 1 or in its own unit; `seconds`
    of this call."""

    run: str
    weights: str
    epochs: int
    metric: str  # top1, ap or miou
    last: float
    best: float
    best_epoch: int
    seconds: float
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As the fields, with the figures also under the metric's own name: {"top1", "best_top1"}."""
        return vars(self) | {self.metric: self.last, f"best_{self.metric}": self.best}


@dataclass
class _Progress:
    """What a run has reached; kept in the header of its last checkpoint."""

    epoch: int = 0  # finished
    best: float = -1.0
    best_epoch: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def train(config: TrainConfig, output: str | Path, progress: Tell | None = None) -> TrainResult:
    """Starts a run in the new folder `output`. Raises UsageError where it exists, DatasetError, WeightsError,
    OutputError, and ToleranceError where the loss is no number any more (the last good checkpoint stays)."""
    run = Path(output)
    if run.exists() and any(run.iterdir() if run.is_dir() else [run]):
        raise UsageError(f"{run} exists; go on with --resume {run}, or give another --output")
    return _Run(config, run, progress or (lambda _: None)).go()


def resume(run: str | Path, progress: Tell | None = None, **changes: Any) -> TrainResult:
    """Goes on with a run after its last whole epoch. `changes`: settings that may differ, such as epochs."""
    folder = Path(run)
    before = checkpoint.read_config(folder)
    config = make_config(**before.to_json() | changes)
    _check_changes(folder, before, config)
    return _Run(config, folder, progress or (lambda _: None), resumed=True).go()


def _check_changes(folder: Path, before: TrainConfig, config: TrainConfig) -> None:
    """Raises UsageError where a run has all its epochs, so that its settings would change and nothing be trained."""
    if not (folder / checkpoint.LAST).exists():
        return
    _, header = checkpoint.load_tensors(folder / checkpoint.LAST)
    progress = header.get("progress")
    done = progress.get("epoch", 0) if isinstance(progress, dict) else 0
    done = done if isinstance(done, int) else 0  # _restore says what is wrong with it
    changed = [name for name, value in config.to_json().items() if value != before.to_json()[name]]
    if changed and done >= config.epochs:
        raise UsageError(
            f"{folder} has its {done} epochs, so {', '.join(changed)} would change nothing; give --epochs above {done} "
            f"to go on, or begin anew with --init {folder / checkpoint.BEST}"
        )


class _Run:
    def __init__(self, config: TrainConfig, folder: Path, tell: Tell, resumed: bool = False) -> None:
        self.config, self.folder, self.tell = config, folder, tell
        self.started = time.monotonic()
        self.progress = _Progress()
        self.accelerator = _accelerator(config)
        self.task = LEARNED[config.task](config)
        self.notes = self.task.notes
        self.losses: list[float] = []  # of each step of this call
        if config.warmup_epochs >= config.epochs:
            self.notes.append(
                f"the warm-up of {config.warmup_epochs:g} epochs is as long as the run of {config.epochs}, so lr never "
                f"gets to its peak of {config.peak_lr:.2g}; leave warmup_epochs out"
            )
        self.main = self.accelerator.is_main_process
        torch.manual_seed(config.seed)
        self.model = self.task.model()
        self.optimiser = torch.optim.AdamW(_groups(self.model, config.weight_decay), lr=config.lr, betas=config.betas)
        self.average: dict[str, Tensor] = {}
        if resumed:
            self._restore()
        else:
            self._begin()
        if self.main:  # a resumed run may have other settings than it began with
            checkpoint.write_json(self.folder / checkpoint.CONFIG, self.config.to_json())
        self._prepare()

    def _begin(self) -> None:
        if not self.main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot write {self.folder}: {error.strerror}; choose another --output") from error

    def _restore(self) -> None:
        path = self.folder / checkpoint.LAST
        if not path.exists():
            self.notes.append("no epoch was finished yet: begun anew")
            return
        tensors, header = checkpoint.load_tensors(path)
        if header.get("data_sha256") != self.task.digest:
            raise DatasetError(f"{self.config.data} is not what {self.folder} was trained on (files differ)")
        average = checkpoint.unpack(tensors, self.model, self.optimiser, path)
        self.average = average if self.config.ema else {}
        try:
            self.progress = msgspec.convert(header.get("progress"), _Progress)
        except (ValueError, OverflowError) as error:  # msgspec's ValidationError is the first
            raise WeightsError(f"{path} is of another version of this program; train anew") from error

    def _prepare(self) -> None:
        config = self.config
        self.samples = self.task.samples
        self.order = EpochOrder(len(self.samples), config.seed)
        part = min(config.batch_size // config.accumulate, len(self.samples))
        processes = self.accelerator.num_processes
        if part % processes:
            raise UsageError(f"a batch of {part} cannot be split over {processes} processes; change --batch-size")
        loader = torch.utils.data.DataLoader(
            cast("Dataset[Any]", self.samples), part, sampler=self.order, num_workers=config.workers, drop_last=True
        )
        val = torch.utils.data.DataLoader(self.task.checks, part, num_workers=config.workers)
        self.plain = self.model
        if processes > 1 and self.accelerator.device.type == "cuda":
            self.plain = nn.SyncBatchNorm.convert_sync_batchnorm(self.plain)  # type: ignore[no-untyped-call]
        device = self.accelerator.device
        self.average = {k: t.to(device) for k, t in self.average.items()}
        if config.ema and not self.average:
            self.average = {k: t.detach().clone().to(device) for k, t in self.plain.state_dict().items()}
        self.model, self.optimiser, self.loader, self.val = self.accelerator.prepare(
            self.plain, self.optimiser, loader, val
        )

    def go(self) -> TrainResult:
        for note in self.notes:
            self._say(note)
        # on the CPU the backward pass of the fused attention takes longer than that of its parts (1.9 s and 1.6 s for
        # 32 images of t-mix in bfloat16, one thread)
        kernel = sdpa_kernel(SDPBackend.MATH) if self.accelerator.device.type == "cpu" else nullcontext()
        with kernel:
            if self.progress.epoch >= self.config.epochs:
                self._note(f"all {self.progress.epoch} epochs were there already: nothing was trained")
            for epoch in range(self.progress.epoch, self.config.epochs):
                row = self._epoch(epoch)
                self._finish(epoch, row)
        if (unmoved := unmoved_loss(self.losses)) is not None:
            self._note(unmoved)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        rows = self.progress.rows
        best = self.folder / checkpoint.BEST
        return TrainResult(
            str(self.folder), str(best), self.progress.epoch, self.task.metric, rows[-1][self.task.metric],
            self.progress.best, self.progress.best_epoch, round(time.monotonic() - self.started, 1), tuple(self.notes),
        )  # fmt: skip

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """One pass over the train part and one over the val part."""
        config, began = self.config, time.monotonic()
        self.samples.epoch = self.order.epoch = epoch
        self.model.train()
        steps = max(len(self.loader) // config.accumulate, 1)
        total, seen, told, damaged = 0.0, 0, began, 0
        for number, batch in enumerate(self.loader):
            lr = self._set_lr(epoch + min(number // config.accumulate, steps - 1) / steps)
            # what is random in a step follows from the seed, the step and the process: a resumed run repeats it
            key = (config.seed, epoch, number, self.accelerator.process_index)
            random = np.random.default_rng(key)
            torch.manual_seed(int(random.integers(2**62)))
            damaged += self._note_damaged(batch)
            with self.accelerator.accumulate(self.model):
                loss = self.task.loss(self.model, batch, random, self.accelerator.autocast)
                self._check(loss, epoch, number)
                self.accelerator.backward(loss)
                if config.clip_grad and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
                self.optimiser.step()
                self.optimiser.zero_grad()
            if config.ema and self.accelerator.sync_gradients:
                self._average()
            everyone = self.accelerator.gather(loss.detach().reshape(1))
            self.losses.append(float(everyone.mean()))
            total, seen = total + float(everyone.mean()), seen + 1
            now = time.monotonic()
            if now - told > TELL_EVERY_S:
                told = now
                self._tell_step(epoch + seen / len(self.loader), epoch, total / seen, lr, now - began)
        if damaged * 2 > len(self.samples):
            raise DatasetError(f"{damaged} of {len(self.samples)} images of {self.task.data} cannot be read")
        trained = time.monotonic() - began
        count = seen * min(config.batch_size // config.accumulate, len(self.samples))
        return {
            "epoch": epoch + 1,
            "lr": lr,
            "train_loss": total / seen,
            **self.evaluate(),
            "images_per_s": round(count / trained, 2),
            "unreadable": damaged,
            "seconds": round(time.monotonic() - began, 2),
        }

    def evaluate(self) -> dict[str, float]:
        """The task's figures on the val part, with the averaged weights where there are any."""
        own = {k: t.detach().clone() for k, t in self.plain.state_dict().items()} if self.average else {}
        if self.average:
            self.plain.load_state_dict(self.average)
        self.plain.eval()
        # float32, as a bundle is held against: Accelerate's own forward would go through its mixed precision
        forward = getattr(self.plain, "_original_forward", self.plain)
        with torch.no_grad():
            found = self.task.judge(forward, self.val, self.accelerator)
        if own:
            self.plain.load_state_dict(own)
        return found

    def _set_lr(self, epoch: float) -> float:
        lr = self.config.lr_at(epoch)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        return lr

    def _average(self) -> None:
        decay = self.config.ema
        for name, tensor in self.plain.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.average[name].copy_(tensor)

    def _check(self, loss: Tensor, epoch: int, step: int) -> None:
        if not math.isfinite(loss.item()):
            kept = f"; {self.folder / checkpoint.LAST} has epoch {self.progress.epoch}" if self.progress.epoch else ""
            raise ToleranceError(
                f"the loss is {loss.item()} in epoch {epoch + 1}, step {step + 1}: lower --lr or lengthen the "
                f"warm-up{kept}"
            )

    def _note_damaged(self, batch: Batch) -> int:
        """Names each unreadable file once; counts those of this batch over all processes."""
        bad = self.accelerator.gather(self.task.unreadable(batch))
        found = [self.task.path(i) for i in bad[bad >= 0].tolist()]
        for name in found:
            if name not in self.progress.unreadable:
                self.progress.unreadable.append(name)
                self._say(f"unreadable, left out: {name}")
        return len(found)

    def _finish(self, epoch: int, row: Mapping[str, Any]) -> None:
        """Writes what an epoch gave; the last checkpoint comes last, so that a kill before it repeats the epoch."""
        progress, value = self.progress, row[self.task.metric]
        better = progress.best_epoch == 0 or (value < progress.best if self.task.lower else value > progress.best)
        progress.epoch = epoch + 1
        progress.rows.append(dict(row))
        if better:
            progress.best, progress.best_epoch = value, epoch + 1
        figures = "" if self.task.metric in self.task.shares else f", {self.task.metric} {value:.4f}"
        figures += "".join(f", {name} {100 * row[name]:.2f} %" for name in self.task.shares)
        line = f"loss {row['train_loss']:.4f}{figures}, {row['seconds']:.0f} s"
        self._say(f"epoch {epoch + 1}/{self.config.epochs}: {line}")
        if self.main:
            header = self.header(row)
            if better:
                weights = self.average or self.plain.state_dict()
                checkpoint.save_weights(self.folder / checkpoint.BEST, weights, header)
            checkpoint.write_metrics(self.folder / checkpoint.METRICS, progress.rows)
            plot_curves(progress.rows, self.folder / checkpoint.CURVE, self.task.shares, self._caption())
            _tensorboard(self.folder, row)
            optimiser = getattr(self.optimiser, "optimizer", self.optimiser)
            state = checkpoint.pack(self.plain, self.average, optimiser)
            checkpoint.save_tensors(self.folder / checkpoint.LAST, state, header | {"progress": vars(progress)})
        self.accelerator.wait_for_everyone()

    def _caption(self) -> str:
        config, machine = self.config, describe_machine()
        return (
            f"{config.variant} on {config.data}, {len(self.samples)} pictures, batch {config.batch_size}, "
            f"lr {config.lr:g}; {machine['cpu']}, {machine['cores']} cores"
        )

    def header(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a weights file says of itself."""
        return {
            "variant": self.config.variant,
            "options": dict(self.config.options),
            "image_size": list(self.config.image_size),
            **self.task.describe(),
            "labels": list(self.task.labels),
            "data": self.config.data,
            "data_sha256": self.task.digest,
            "train_images": len(self.samples),
            "val_images": len(cast("Sized", self.task.checks)),
            "metrics": dict(row),
            "config": json.loads(json.dumps(self.config.to_json())),
            "versions": library_versions(LIBRARIES),
        }

    def _tell_step(self, at: float, epoch: int, loss: float, lr: float, seconds: float) -> None:
        per_epoch = seconds / (at - epoch)
        left = (self.config.epochs - at) * per_epoch
        self._say(
            f"epoch {at:.2f} of {self.config.epochs}: loss {loss:.4f}, lr {lr:.2e}, "
            f"{len(self.samples) / per_epoch:.1f} images/s, about {left / 60:.0f} min left"
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)

    def _say(self, text: str) -> None:
        if self.main:
            self.tell(text)


def unmoved_loss(losses: Sequence[float]) -> str | None:
    """What to say of a run whose loss, in the means of its first and last tenth of steps, has not fallen by 2 %."""
    part = max(len(losses) // 10, 1)
    if len(losses) < 2 * part:
        return None
    first, last = (sum(some) / part for some in (losses[:part], losses[-part:]))
    if last <= UNMOVED * first:
        return None
    return (
        f"the loss has not fallen: {first:.4f} in the first {part} steps, {last:.4f} in the last; train longer, or "
        "with another --lr"
    )


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices and convolutions only."""
    kept: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter.ndim < 2 or any(word in name for word in NO_DECAY) else kept).append(parameter)
    return [{"params": kept, "weight_decay": decay}, {"params": free, "weight_decay": 0.0}]


def _accelerator(config: TrainConfig) -> Any:
    try:
        import kornia  # noqa: F401  # fail before anything is written
        from accelerate import Accelerator
        from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
    except ModuleNotFoundError as error:
        raise missing_extra("train", "training") from error
    # split_batches: a batch is that of all processes together, however many there are
    return Accelerator(
        mixed_precision=config.precision,
        gradient_accumulation_steps=config.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # RetinaNet has the paper's parameters of a level that its head does not read
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.head is not None)],
    )


def _tensorboard(folder: Path, row: Mapping[str, Any]) -> None:
    """The same numbers for TensorBoard, where it is installed."""
    import importlib.util

    if importlib.util.find_spec("tensorboard") is None:
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard") as writer:
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
