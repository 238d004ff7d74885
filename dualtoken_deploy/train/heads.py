"""Detection and segmentation: pictures stretched to one size, their truth flipped with them, judged as bundles are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from dualtoken_deploy.data.objects import IGNORE
from dualtoken_deploy.data.samples import Sample, SampleSet, read_or_none
from dualtoken_deploy.data.stretch import boxes_to_model, resize_map, stretch
from dualtoken_deploy.errors import DatasetError, UsageError, WeightsError
from dualtoken_deploy.models.heads.eager import interpret_batch
from dualtoken_deploy.models.heads.table import create_dense_model, get_head
from dualtoken_deploy.models.weights import read_tensors, weights_path
from dualtoken_deploy.tasks.anchors import anchors
from dualtoken_deploy.tasks.base import Pair
from dualtoken_deploy.tasks.boxes import Array
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.data import normalise
from dualtoken_deploy.train.learned import Batch
from dualtoken_deploy.train.losses import detection_losses, segmentation_loss
from dualtoken_deploy.train.matching import UNDECIDED, match

# Photometric jitter of SSD (arXiv:1512.02325) in kornia's terms: brightness, contrast, saturation, hue (turns)
JITTER = (0.125, 0.5, 0.5, 0.05)
TRAINABLE = MappingProxyType({"detect": ("retinanet",), "segment": ("deeplabv3", "pspnet")})
Truth = tuple[NDArray[Any], ...]


class Anchored:
    """What a detector learns: classes (A,) and offsets (A, 4) of its anchors."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.width, self.anchors = size[1], anchors(size)

    def of(self, sample: Sample, scale: tuple[float, float], flip: bool) -> Truth | None:
        """The truth of a stretched picture, mirrored or not; None where the sample has none of this kind."""
        if sample.boxes is None:
            return None
        boxes = boxes_to_model(sample.boxes.shapes, scale)
        boxes = flipped(boxes, self.width) if flip else boxes
        classes, offsets = match(self.anchors, boxes, sample.boxes.classes)
        return classes, offsets.astype(np.float32)

    def nothing(self) -> Truth:
        """The truth that counts nowhere."""
        return np.full(len(self.anchors), UNDECIDED), np.zeros((len(self.anchors), 4), np.float32)

    @staticmethod
    def loss(outputs: tuple[Tensor, Tensor], truth: Batch) -> Tensor:
        by_class, by_box = detection_losses(*outputs, truth[0], truth[1])
        return by_class + by_box


class Mapped:
    """What a segmenter learns: a label map (H, W)."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def of(self, sample: Sample, _scale: tuple[float, float], flip: bool) -> Truth | None:
        """The truth of a stretched picture, mirrored or not; None where the sample has none of this kind."""
        if sample.label_map is None:
            return None
        labels = resize_map(sample.label_map, self.size)
        return (np.ascontiguousarray(labels[:, ::-1] if flip else labels).astype(np.int64),)

    def nothing(self) -> Truth:
        """The truth that counts nowhere."""
        return (np.full(self.size, IGNORE, np.int64),)

    @staticmethod
    def loss(outputs: tuple[Tensor, Tensor], truth: Batch) -> Tensor:
        return segmentation_loss(*outputs, truth[0])


# What training adds to a task's row: its truth for a picture, and the loss of that.
LESSONS: Mapping[str, type[Anchored] | type[Mapped]] = MappingProxyType({"detect": Anchored, "segment": Mapped})


class LocatedImages(Dataset[tuple[Any, ...]]):
    """(uint8 (3, H, W), truth..., index, readable): of detection classes (A,) and offsets (A, 4) of the anchors, of
    segmentation a label map (H, W). A picture that cannot be decoded is black and its truth counts nowhere."""

    def __init__(self, data: SampleSet, config: TrainConfig) -> None:
        self.data, self.config = data, config
        self.epoch = 0
        self.lesson = LESSONS[config.task](config.image_size)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        size = self.config.image_size
        sample = read_or_none(self.data, index)
        if sample is None:
            return np.zeros((3, *size), np.uint8), *self.lesson.nothing(), index, False
        image, scale = stretch(sample.image, size)
        flip = np.random.default_rng((self.config.seed, self.epoch, index)).random() < self.config.flip
        truth = self.lesson.of(sample, scale, flip)
        if truth is None:
            raise DatasetError(f"{self.data.name} has neither boxes nor label maps for the task {self.config.task}")
        if flip:
            image = image[:, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1)), *truth, index, True


class CheckImages(Dataset[tuple[Any, ...]]):
    """(uint8 (3, H, W), index) to be judged; black where the picture cannot be decoded."""

    def __init__(self, data: SampleSet, size: tuple[int, int]) -> None:
        self.data, self.size = data, size

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = read_or_none(self.data, index)
        if sample is None:
            return np.zeros((3, *self.size), np.uint8), index
        return np.ascontiguousarray(stretch(sample.image, self.size)[0].transpose(2, 0, 1)), index


def flipped(boxes: Array, width: float) -> NDArray[np.float64]:
    """Boxes (N, 4) in an image of that width, mirrored left to right."""
    out: NDArray[np.float64] = boxes[:, [2, 1, 0, 3]] * (-1.0, 1.0, -1.0, 1.0) + (width, 0.0, width, 0.0)
    return out


class HeadTask:
    """The tasks detect and segment. A batch is what LocatedImages gives, collated."""

    lower = False

    def __init__(self, config: TrainConfig) -> None:
        head = str(config.head)
        known = TRAINABLE[config.task]
        if head not in known:
            raise UsageError(f"head {head!r} cannot be trained to {config.task}; heads that can: {', '.join(known)}")
        self.config, self.head = config, get_head(head)
        self.task = get_task(config.task)
        self.shares = self.task.metrics
        self.metric = self.shares[0]
        train, self.val_set = (self.task.open(config.data, part) for part in ("train", "val"))
        if train.labels != self.val_set.labels:
            odd = sorted(set(train.labels or ()) ^ set(self.val_set.labels or ()))
            raise DatasetError(f"{train.name} and {self.val_set.name} have different classes: {', '.join(odd[:5])}")
        self.data, self.labels = train.name, train.labels or ()
        self.digest = train.digest + self.val_set.digest
        self.samples = LocatedImages(train, config)
        self.checks = CheckImages(self.val_set, config.image_size)
        self.notes = [*train.notes, *self.val_set.notes]
        self.jitter: Any = None
        if config.augment == "photometric":
            from kornia.augmentation import ColorJitter

            self.jitter = ColorJitter(*JITTER)

    def model(self) -> nn.Module:
        config = self.config
        options = {"drop_path": config.drop_path, **config.options}
        model = create_dense_model(
            self.head.name, config.variant, len(self.labels), config.width, image_size=config.image_size,
            seed=config.seed, **options,
        )  # fmt: skip
        if config.init is not None:
            self.notes.append(begin_from(model, config.init))
        return model

    def path(self, index: int) -> str:
        return self.samples.data.where(index)

    def unreadable(self, batch: Batch) -> Tensor:
        return torch.where(batch[-1], -1, batch[-2])

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        random: np.random.Generator,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        images = batch[0].float() / 255
        if self.jitter is not None:
            images = self.jitter(images).clamp(0, 1)
        with autocast():
            first, second = (t.float() for t in model(normalise(images)))
        return self.samples.lesson.loss((first, second), batch[1:-2])

    def judge(self, forward: Callable[[Tensor], Any], checks: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """The task's scores, and how many pictures could not be decoded and were left out of them."""
        size = self.config.image_size
        pairs: dict[int, Pair | None] = {}
        for pixels, indices in checks:
            samples = [read_or_none(self.val_set, i) for i in indices.tolist()]
            sizes = [size if sample is None else sample.size for sample in samples]
            found = interpret_batch(self.task, forward(normalise(pixels.float() / 255)), size, sizes)
            for index, sample, answer in zip(indices.tolist(), samples, found, strict=True):
                pairs[index] = None if sample is None else (sample, answer)
        if accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            pairs = dict(gather_object(list(pairs.items())))  # the last batch may repeat samples: once is enough
        read = [pair for _, pair in sorted(pairs.items(), key=lambda item: item[0]) if pair is not None]
        return {**self.task.score(read, len(self.labels)), "val_unreadable": len(pairs) - len(read)}

    def describe(self) -> Mapping[str, Any]:
        width = self.config.width or self.head.width
        return {"task": self.config.task, "head": self.head.name, "width": width}


def begin_from(model: nn.Module, init: str) -> str:
    """Gives a dense model the weights of a classifier, or those of a dense run that fit; says what was taken.

    Raises WeightsError where the file is not of this variant: then not even the backbone fits.
    """
    given, wanted = read_tensors(weights_path(init)), model.state_dict()
    if not any(name.startswith("backbone.model.") for name in given):
        given = {f"backbone.model.{name}": t for name, t in given.items() if not name.startswith("head.")}
    fitting = {k: t for k, t in given.items() if k in wanted and t.shape == wanted[k].shape}
    needed = [name for name in wanted if name.startswith("backbone.model.")]
    if lacking := [name for name in needed if name not in fitting]:
        raise WeightsError(
            f"{init} does not fit the backbone: {len(lacking)} of its {len(needed)} tensors are missing or of another "
            f"shape ({lacking[0]}); give weights of the same variant and options"
        )
    model.load_state_dict({**wanted, **fitting})
    return f"{len(fitting)} of {len(wanted)} tensors begin as in {init}, the others anew"
