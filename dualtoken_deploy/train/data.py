"""From image files to batches: decoding and cropping a sample at a time, augmentation a batch at a time.

What is random in a sample follows from (seed, epoch, index), so that neither the number of workers nor a resumed run
changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dualtoken_deploy.data.folders import ImageSet
from dualtoken_deploy.data.images import Pixels, load_image, resize_and_crop
from dualtoken_deploy.errors import ImageError
from dualtoken_deploy.spec import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD
from dualtoken_deploy.train.config import TrainConfig

UNREADABLE = -1  # label of a sample whose file could not be decoded; it counts in no loss and no accuracy
RATIOS = (3 / 4, 4 / 3)  # aspect ratios of a random crop, as in Inception-style training
RANDAUGMENT_GROUP = 8  # kornia draws one chain of operations for all the images it gets; so it gets a few at a time

Sample = tuple[Tensor, int, int]


class TrainImages(Dataset[Sample]):
    """(uint8 (3, H, W), label, index) with a random crop and flip; label UNREADABLE where the file is damaged."""

    def __init__(self, images: ImageSet, config: TrainConfig) -> None:
        self.images, self.config = images, config
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        config = self.config
        random = np.random.default_rng((config.seed, self.epoch, index))
        try:
            image = load_image(self.images.images[index])
        except ImageError:
            return torch.zeros(3, *config.image_size, dtype=torch.uint8), UNREADABLE, index
        crop = random_resized_crop(image, config.image_size, config.crop_scale, random)
        if random.random() < config.flip:
            crop = crop[:, ::-1]
        return _chw(crop), _label(self.images, index), index


class EvalImages(Dataset[Sample]):
    """As TrainImages, but with the preprocessing of inference."""

    def __init__(self, images: ImageSet, size: tuple[int, int]) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        try:
            image = load_image(self.images.images[index])
        except ImageError:
            return torch.zeros(3, *self.size, dtype=torch.uint8), UNREADABLE, index
        return _chw(resize_and_crop(image, self.size, CROP_RATIO)), _label(self.images, index), index


def _label(images: ImageSet, index: int) -> int:
    return -1 if images.labels is None else images.labels[index]


def _chw(image: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class EpochOrder(Sampler[int]):
    """A permutation of the set for each epoch, from (seed, epoch)."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng((self.seed, self.epoch)).permutation(self.length).tolist()


def random_resized_crop(
    image: Pixels, size: tuple[int, int], scale: tuple[float, float], random: np.random.Generator
) -> Pixels:
    """A part of uint8 (h, w, 3) with a random share of its area and aspect ratio, resized (bicubic) to `size`.

    Ten tries for a part that fits, else the whole picture (Szegedy et al. 2015, as commonly implemented).
    """
    height, width = image.shape[:2]
    box = (0.0, 0.0, float(width), float(height))
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        ratio = math.exp(random.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = random.uniform(0, width - w), random.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            break
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    return np.asarray(resized)


class Augment:
    """What is done to a whole batch on the device: kornia's policies, erasing, normalisation, MixUp and CutMix."""

    def __init__(self, config: TrainConfig, classes: int) -> None:
        import kornia.augmentation as augmentation
        from kornia.augmentation.auto import RandAugment

        self.config, self.classes = config, classes
        self.policy: Any = None
        if config.augment == "randaugment":
            self.policy = RandAugment(n=config.randaugment_n, m=config.randaugment_m)
        elif config.augment == "affine":
            self.policy = augmentation.RandomAffine(12.0, (0.08, 0.08), (0.85, 1.15), 8.0)
        self.erase = augmentation.RandomErasing(p=config.erasing) if config.erasing else None

    def __call__(self, pixels: Tensor, labels: Tensor, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """uint8 (B, 3, H, W) and labels (B,) to normalised float32 images and target shares (B, classes)."""
        images = pixels.float() / 255
        if self.policy is not None:
            images = torch.cat([self.policy(part) for part in torch.split(images, RANDAUGMENT_GROUP)])
        images = normalise(images.clamp(0, 1))
        if self.erase is not None:
            images = self.erase(images)
        return mix(images, self._targets(labels), self.config, random)

    def _targets(self, labels: Tensor) -> Tensor:
        """One-hot shares with label smoothing; all zeros for UNREADABLE."""
        known = labels != UNREADABLE
        hot = torch.nn.functional.one_hot(labels.clamp(min=0), self.classes).float()
        smooth = self.config.label_smoothing
        return (hot * (1 - smooth) + smooth / self.classes) * known[:, None]


def mix(images: Tensor, targets: Tensor, config: TrainConfig, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """MixUp (arXiv:1710.09412) or CutMix (arXiv:1905.04899), one of the two for a batch, with its mirror image.

    kornia's MixUp draws its share uniformly instead of from a Beta distribution, so it does not fit the recipe.
    """
    kinds = [kind for kind, alpha in (("mixup", config.mixup), ("cutmix", config.cutmix)) if alpha > 0]
    if not kinds:
        return images, targets
    kind = kinds[int(random.integers(len(kinds)))]
    alpha = config.mixup if kind == "mixup" else config.cutmix
    share = float(random.beta(alpha, alpha))
    others = images.flip(0)
    if kind == "mixup":
        images = share * images + (1 - share) * others
    else:
        height, width = images.shape[2:]
        h, w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
        top, left = int(random.integers(height - h + 1)), int(random.integers(width - w + 1))
        images = images.clone()
        images[:, :, top : top + h, left : left + w] = others[:, :, top : top + h, left : left + w]
        share = 1 - h * w / (height * width)
    return images, share * targets + (1 - share) * targets.flip(0)


def normalise(images: Tensor) -> Tensor:
    """float32 (B, 3, H, W) of 0..1 with ImageNet's mean and deviation taken out."""
    mean, std = (images.new_tensor(v).reshape(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def names_of(images: ImageSet, indices: Sequence[int]) -> list[Path]:
    return [images.images[i] for i in indices]
