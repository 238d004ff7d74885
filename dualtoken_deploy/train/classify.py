"""Classification: folders of classes, soft cross entropy, top-1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dualtoken_deploy.data.folders import open_parts
from dualtoken_deploy.models.registry import create_model, load_weights
from dualtoken_deploy.models.weights import read_tensors, weights_path
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.data import UNREADABLE, Augment, EvalImages, TrainImages, normalise
from dualtoken_deploy.train.learned import Batch


class Classify:
    """A batch is (pixels uint8 (B, 3, H, W), labels (B,), indices (B,))."""

    metric = "top1"
    lower = False
    shares: tuple[str, ...] = ("top1", "top5")

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.train_set, val_set = open_parts(config.data)
        self.data = self.train_set.name
        self.labels = self.train_set.classes or ()
        self.digest = self.train_set.digest() + val_set.digest()
        self.samples = TrainImages(self.train_set, config)
        self.checks = EvalImages(val_set, config.image_size)
        self.augment = Augment(config, len(self.labels))
        self.notes: list[str] = []

    def model(self) -> nn.Module:
        config = self.config
        options = {"drop_path": config.drop_path, **config.options}
        model = create_model(config.variant, len(self.labels), config.image_size, seed=config.seed, **options)
        if config.init is not None:
            path = weights_path(config.init)
            given = read_tensors(path).get("head.fc.weight")
            if given is not None and len(given) != len(self.labels):
                self.notes.append(
                    f"the head of {config.init} has {len(given)} classes, the data {len(self.labels)}: replaced"
                )
            load_weights(model, path, replace_head=True, variant=config.variant)
        return model

    def path(self, index: int) -> str:
        return str(self.train_set.images[index])

    def unreadable(self, batch: Batch) -> Tensor:
        _, labels, indices = batch
        return torch.where(labels == UNREADABLE, indices, -1)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        random: np.random.Generator,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        images, targets = self.augment(batch[0], batch[1], random)
        with autocast():
            logits = model(images)
        return soft_cross_entropy(logits.float(), targets)

    def judge(self, forward: Callable[[Tensor], Any], checks: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Loss, top-1 and top-5 of the pictures that can be decoded."""
        sums = torch.zeros(4, dtype=torch.float64)
        for pixels, labels, _ in checks:
            logits = forward(normalise(pixels.float() / 255)).float()
            logits, known = (t.cpu() for t in accelerator.gather_for_metrics((logits, labels)))
            logits, known = logits[known != UNREADABLE], known[known != UNREADABLE]
            ranked = logits.topk(min(5, logits.shape[1])).indices == known[:, None]
            loss = nn.functional.cross_entropy(logits, known, reduction="sum")
            numbers = (float(loss), float(ranked[:, 0].sum()), float(ranked.sum()), float(len(known)))
            sums += torch.tensor(numbers, dtype=torch.float64)
        count = max(float(sums[3]), 1.0)
        return dict(zip(("val_loss", "top1", "top5"), (sums[:3] / count).tolist(), strict=True))

    def describe(self) -> Mapping[str, Any]:
        return {}


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the samples that have a target; `targets` (B, classes) are shares, all zero for none."""
    losses = -(targets * nn.functional.log_softmax(logits, dim=-1)).sum(-1)
    return losses.sum() / (targets.sum(-1) > 0).sum().clamp(min=1)
