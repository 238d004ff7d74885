"""A small module of nobody's family, and the check that a target's bundle of it computes what it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dualtoken_deploy.models.source import Source
from dualtoken_deploy.pipeline.export import export
from dualtoken_deploy.targets.load import load_runner


class TwoOutputs(nn.Module):
    """A map and logits of its mean, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3, 2, 1), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        features = torch.relu_(self.stem(image))
        return {"scores": self.head(self.norm(features.mean((2, 3)))), "features": features}


def check_two_outputs(target: str, folder: Path) -> None:
    """Exports the module from memory, and holds both outputs of the bundle against it on a picture."""
    torch.manual_seed(4)
    model = TwoOutputs().eval()
    result = export(model, target, task="tensors", image_size=16, output=folder)
    assert result.sqnr_db > 90
    pixels = np.random.default_rng(3).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    how = Source.module(model, "tensors", 16).preprocessing
    mean, std = (np.array(values) for values in (how.mean, how.std))
    picture = torch.from_numpy(((pixels / 255.0 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        wanted = model(picture)
    with load_runner(folder) as runner:
        found = runner.run({"image": pixels})
    assert list(found) == ["scores", "features"]
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name].numpy(), rtol=1e-3, atol=1e-4)
