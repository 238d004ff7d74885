"""Forecasting: windows of a series, mean squared error, judged as bundles are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dualtoken_deploy.data.samples import SampleSet
from dualtoken_deploy.data.series import open_series
from dualtoken_deploy.errors import DatasetError, UsageError
from dualtoken_deploy.models.registry import load_weights
from dualtoken_deploy.models.systems import create_system, system_config, systems_of
from dualtoken_deploy.models.weights import weights_path
from dualtoken_deploy.train.config import TrainConfig
from dualtoken_deploy.train.learned import Batch


class Windows(Dataset[tuple[Any, ...]]):
    """(past (L, M), future (H, M), index), float32."""

    def __init__(self, data: SampleSet, lookback: int, horizon: int) -> None:
        self.data, self.lookback, self.horizon = data, lookback, horizon
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = self.data[index]
        assert sample.series is not None and sample.future is not None  # noqa: PT018, S101  # of open_series
        if len(sample.series) < self.lookback or len(sample.future) < self.horizon:
            raise DatasetError(
                f"{self.data.name} has {len(sample.series)} steps before a window and {len(sample.future)} after it; "
                f"a lookback of {self.lookback} and a horizon of {self.horizon} are too long"
            )
        return sample.series[-self.lookback :], sample.future[: self.horizon], index


class Forecast:
    """A batch is what Windows gives, collated."""

    metric = "mse"
    lower = True
    shares: tuple[str, ...] = ()

    def __init__(self, config: TrainConfig) -> None:
        if config.variant not in (known := systems_of("forecast")):
            raise UsageError(f"{config.variant} does not forecast; give --variant {' or '.join(known)}")
        train, val = (open_series(config.data, part) for part in ("train", "val"))
        self.data, self.labels = train.name, train.labels or ()
        self.digest = train.digest + val.digest
        self.config = config
        own = system_config(config.variant, **{**config.options, "variates": len(self.labels)})
        self.samples = Windows(train, own.lookback, own.horizon)
        self.checks = Windows(val, own.lookback, own.horizon)
        self.notes: list[str] = []

    def model(self) -> nn.Module:
        config = self.config
        options = {**config.options, "variates": len(self.labels)}
        model = create_system(config.variant, config.seed, **options)
        if config.init is not None:
            load_weights(model, weights_path(config.init), variant=config.variant)
        return model

    def path(self, index: int) -> str:
        return self.samples.data.where(index)

    def unreadable(self, batch: Batch) -> Tensor:
        return torch.full_like(batch[2], -1)

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        random: np.random.Generator,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        with autocast():
            ahead = model(batch[0])
        return F.mse_loss(ahead.float(), batch[1])

    def judge(self, forward: Callable[[Tensor], Any], checks: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Mean squared and absolute error over all windows."""
        sums = np.zeros(3)
        for past, future, _ in checks:
            both = accelerator.gather_for_metrics((forward(past).float(), future))
            ahead, came = (t.double().cpu().numpy() for t in both)
            error = ahead - came
            sums += ((error**2).sum(), np.abs(error).sum(), error.size)
        return {"val_loss": float(sums[0] / sums[2]), "mse": float(sums[0] / sums[2]), "mae": float(sums[1] / sums[2])}

    def describe(self) -> Mapping[str, Any]:
        lookback, variates = self.samples.lookback, len(self.labels)
        options = {**self.config.options, "variates": variates}
        return {"task": "forecast", "options": options, "image_size": [lookback, variates]}
