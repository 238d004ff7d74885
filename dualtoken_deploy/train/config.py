"""The recipe of a run, frozen and saved with it. Defaults are those of the DualToken-ViT paper (section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any

import msgspec

from dualtoken_deploy.errors import UsageError

MOST = 2**31 - 1  # of any number: what libraries below take
MORE = f" (and at most {MOST})"
LR_BATCH = 1024  # the batch size that `lr` is for; it scales linearly
AUGMENTATIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(  # of each task
    {
        "classify": ("randaugment", "affine", "none"),
        "detect": ("photometric", "none"),
        "segment": ("photometric", "none"),
        "tokenize": ("none",),
        "forecast": ("none",),
    }
)
PRECISIONS = ("no", "bf16", "fp16")
IMAGES_ALONE = ("mixup", "cutmix", "erasing", "label_smoothing")  # what boxes and label maps do not go along with

WARMUP: Mapping[str, float] = MappingProxyType(  # share of the epochs, unless warmup_epochs is said: the papers'
    {"classify": 20 / 300, "detect": 0.5 / 12, "segment": 0.5 / 12}
)

# Dense tasks: the paper's sections 4.2 (lr 1e-4 at a batch of 16, 12 epochs) and 4.3 (2e-4 at 32, epochs not said).
DENSE: Mapping[str, Any] = MappingProxyType(
    {"lr": 6.4e-3, "weight_decay": 1e-4, "epochs": 12, "augment": "photometric"} | dict.fromkeys(IMAGES_ALONE, 0.0)
)
# Tokenizers: found here on `shapes`; pictures are cropped little, since small parts of them say nothing of the class.
TOKENIZE: Mapping[str, Any] = MappingProxyType(
    {"lr": 0.032, "weight_decay": 0.01, "epochs": 40, "warmup_epochs": 1.0, "batch_size": 32, "augment": "none"}
    | {"crop_scale": (0.6, 1.0), "clip_grad": 1.0, "init": "shapes", "drop_path": 0.0}
    | dict.fromkeys(IMAGES_ALONE, 0.0)
)
FORECAST: Mapping[str, Any] = MappingProxyType(  # found here on `lorenz`
    {"lr": 0.032, "weight_decay": 0.01, "epochs": 30, "warmup_epochs": 1.0, "batch_size": 64, "augment": "none"}
    | {"clip_grad": 1.0, "flip": 0.0, "drop_path": 0.0}
    | dict.fromkeys(IMAGES_ALONE, 0.0)
)
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "classify": {},
        "detect": {**DENSE, "head": "retinanet", "batch_size": 16},
        "segment": {**DENSE, "head": "pspnet", "batch_size": 32},
        "tokenize": TOKENIZE,
        "forecast": FORECAST,
    }
)


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `batch_size` is that of an optimiser step, over all processes and accumulated parts."""

    variant: str
    data: str
    task: str = "classify"
    head: str | None = None  # of a dense task
    width: int | None = None  # channels of that head; None: the paper's
    image_size: tuple[int, int] = (224, 224)
    options: Mapping[str, Any] = field(default_factory=dict)  # of create_model
    init: str | None = None  # weights to start from; a head of another class count is replaced
    epochs: int = 300
    batch_size: int = 1024
    accumulate: int = 1
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 20.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.04  # none on norms, biases, layer scales and tokens
    drop_path: float = 0.1
    label_smoothing: float = 0.0  # LightViT's code, which the paper builds on, has none
    augment: str = "randaugment"
    randaugment_n: int = 2
    randaugment_m: int = 9
    mixup: float = 0.2
    cutmix: float = 1.0
    erasing: float = 0.25
    flip: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    clip_grad: float = 0.0  # 0: none
    ema: float = 0.0  # decay of the averaged weights; 0: none
    precision: str = "no"  # mixed precision, Accelerate's names
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            _need(1 <= value <= MOST, f"{name} must be at least 1{MORE}, not {str(value)[:40]}")
        rest = ("lr", "min_lr", "warmup_epochs", "weight_decay", "mixup", "cutmix", "clip_grad", "workers", "seed")
        for name in rest:
            value = getattr(self, name)
            _need(0 <= value <= MOST, f"{name} must be 0 or more{MORE}, not {str(value)[:40]}")
        for name in ("erasing", "flip", "ema", "label_smoothing", "drop_path"):
            value = getattr(self, name)
            _need(0 <= value <= 1, f"{name} must lie in 0..1, not {value}")
        _need(self.task in AUGMENTATIONS, f"task {self.task!r} is not one of {', '.join(AUGMENTATIONS)}")
        known = AUGMENTATIONS[self.task]
        _need(self.augment in known, f"augment {self.augment!r} is not one of {', '.join(known)}")
        self._check_task()
        _need(self.precision in PRECISIONS, f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        low, high = self.crop_scale
        _need(0 < low <= high <= 1, f"crop_scale {low:g} to {high:g} is no range within 0..1")
        parts = f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}"
        _need(self.batch_size % self.accumulate == 0, parts)

    def _check_task(self) -> None:
        if "head" not in DEFAULTS[self.task]:
            _need(self.head is None and self.width is None, "a head and a width belong to --task detect or segment")
            return
        _need(self.head is not None, f"task {self.task} needs a head")
        whole = self.width is None or (isinstance(self.width, int) and self.width >= 1)
        _need(whole, f"width must be at least 1, not {self.width}")
        for name in IMAGES_ALONE:
            _need(getattr(self, name) == 0, f"{name} is for classification only; leave it out with --task {self.task}")

    @property
    def peak_lr(self) -> float:
        return self.lr * self.batch_size / LR_BATCH

    def lr_at(self, epoch: float) -> float:
        """Learning rate after `epoch` epochs (a fraction counts): linear warm-up, then half a cosine to min_lr."""
        floor = min(self.min_lr, self.peak_lr)
        if epoch < self.warmup_epochs:
            return max(self.peak_lr * epoch / self.warmup_epochs, floor)
        rest = max(self.epochs - self.warmup_epochs, 1e-9)
        done = min((epoch - self.warmup_epochs) / rest, 1.0)
        return floor + (self.peak_lr - floor) * (1 + math.cos(math.pi * done)) / 2

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainConfig:
        """Raises TypeError, KeyError, ValueError or OverflowError on data that is no configuration of this version."""
        known = {f.name for f in fields(TrainConfig)}
        if unknown := set(data) - known:
            raise KeyError(f"unknown settings {', '.join(sorted(unknown))}")
        return msgspec.convert(data, TrainConfig)  # checks the type of every value


def make_config(**settings: Any) -> TrainConfig:
    """A recipe from settings by name; what is not given is the paper's for the task (DEFAULTS); of the warm-up the
    paper's share of the epochs (WARMUP).

    Raises UsageError on an unknown name or a value of the wrong kind.
    """
    known = {f.name: f for f in fields(TrainConfig)}
    settings = {**DEFAULTS.get(settings.get("task", "classify"), {}), **settings}
    for name, value in settings.items():
        if name not in known:
            raise UsageError(f"unknown setting {name!r}; valid settings: {', '.join(known)}")
        if not _is_like(value, known[name].default):
            raise UsageError(f"setting {name}={value!r} is not of the kind of its default, {known[name].default!r}")
    if "warmup_epochs" not in settings and settings.get("task", "classify") in WARMUP:
        epochs = settings.get("epochs", known["epochs"].default)
        settings["warmup_epochs"] = WARMUP[settings.get("task", "classify")] * epochs
    return TrainConfig(**settings)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of its default's kind: a number where that is one, as many numbers where it is a pair."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(map(_is_like, value, default))
    if isinstance(default, float):
        return isinstance(value, int | float)
    return not isinstance(default, int | str) or isinstance(value, type(default))


def _need(condition: bool, otherwise: str) -> None:
    if not condition:
        raise UsageError(otherwise)
