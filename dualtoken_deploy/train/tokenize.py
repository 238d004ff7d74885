"""Two vocabularies of pictures: reconstruction, distillation from the backbone that training began with, commitment.

The losses are DualToken's (arXiv:2503.14324) but for the adversarial one; the perceptual loss compares features of the
same frozen backbone, trained by this project, where the paper has LPIPS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.data.folders import open_parts
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.models.registry import create_model, make_config
from dualtoken_deploy.models.systems import create_system, systems_of
from dualtoken_deploy.models.tokenizer import Tokenizer, Told
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.tasks.quality import psnr_db, ssim
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.data import UNREADABLE, EvalImages, TrainImages, normalise
from dualtoken_deploy.train.learned import Batch

PERCEPTUAL, SEMANTIC, COMMITMENT = 0.3, 1.0, 0.5  # weights of the losses beside the reconstruction's


class Tokenize:
    """A batch is (pixels uint8 (B, 3, H, W), labels (B,), indices (B,))."""

    metric = "psnr_db"
    lower = False
    shares: tuple[str, ...] = ("probe_top1", "ssim")

    def __init__(self, config: TrainConfig) -> None:
        if config.variant not in (known := systems_of("tokenize")):
            raise UsageError(f"{config.variant} is no tokenizer; give --variant {' or '.join(known)}")
        if config.init is None:
            raise UsageError("a tokenizer begins with a trained backbone, which teaches it; give --init shapes")
        self.config = config
        self.train_set, val_set = open_parts(config.data)
        self.data = self.train_set.name
        self.labels = self.train_set.classes or ()
        self.digest = self.train_set.digest() + val_set.digest()
        self.samples = TrainImages(self.train_set, config)
        self.checks = EvalImages(val_set, config.image_size)
        self.notes: list[str] = []
        self.teacher: Backbone | None = None

    def model(self) -> nn.Module:
        config = self.config
        options = {"num_classes": len(self.labels), **config.options}
        model = create_system(config.variant, config.seed, image_size=config.image_size, **options)
        assert isinstance(model, Tokenizer)  # noqa: S101  # its task says so
        self.teacher = self._teacher(model)
        model.backbone.model.load_state_dict(self.teacher.model.state_dict())
        return model

    def _teacher(self, model: Tokenizer) -> Backbone:
        """The trained classifier without its head, its features through norms that nothing has trained."""
        init, wanted = str(self.config.init), model.config.backbone
        said = describe_weights(init, "classify")
        if said is None or said.variant != wanted:
            raise UsageError(f"{init} is no classifier of variant {wanted}, which teaches this tokenizer; give --init")
        known = create_model(wanted, len(said.labels), self.config.image_size, weights=init, **dict(said.options))
        channels: tuple[int, int, int] = make_config(wanted).channels  # type: ignore[attr-defined]
        teacher = Backbone(known, channels)
        return teacher.eval().requires_grad_(False)

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
        images = normalise(batch[0].float() / 255)
        assert self.teacher is not None  # noqa: S101  # model() made it
        teacher = self.teacher.to(images.device)
        with autocast():
            told: Told = model(images)
            some = len(images) // 2 + 1  # half of the pictures say enough, and looking at them costs a third of a step
            seen = teacher(told.picture[:some])
            with torch.no_grad():
                known = teacher(images)
        pixels = F.mse_loss(told.picture.float(), images)
        features = sum(
            (F.mse_loss(a.float(), b[:some].float()) for a, b in zip(seen[:2], known[:2], strict=True)), pixels * 0
        )
        semantics = distillation(told.semantics.float(), known[2].float())
        probe = F.cross_entropy(told.logits.float(), batch[1].clamp(min=0))
        return pixels + PERCEPTUAL * features + SEMANTIC * semantics + COMMITMENT * told.commitment.float() + probe

    def judge(self, forward: Callable[[Tensor], Any], checks: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Mean PSNR and SSIM of the reconstructions, and top-1 of the probe."""
        found: list[tuple[float, float, float]] = []
        for pixels, labels, _ in checks:
            images = pixels.float() / 255
            drawn, _, _, logits = forward(normalise(images))
            both = accelerator.gather_for_metrics((images, drawn.float(), logits.float(), labels))
            for want, got, answer, label in zip(*(t.cpu().numpy() for t in both), strict=True):
                if label != UNREADABLE:
                    found.append((psnr_db(want, got), ssim(want, got), float(answer.argmax() == label)))
        means = np.array(found).mean(0) if found else np.zeros(3)
        return dict(zip(("psnr_db", "ssim", "probe_top1"), means.tolist(), strict=True))

    def describe(self) -> Mapping[str, Any]:
        return {"task": "tokenize"}


def distillation(said: Tensor, known: Tensor) -> Tensor:
    """||F - F0||^2 - cos(F, F0) over the channels of maps (B, C, h, w), from 0 on."""
    return F.mse_loss(said, known) + 1 - F.cosine_similarity(said, known, dim=1).mean()
