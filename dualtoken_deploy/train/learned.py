"""What the loop asks of a task: its data, its model, its loss and how a model is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = Sequence[Tensor]  # of the default collation


class Samples(Protocol):
    """A set of samples whose randomness follows from the seed, `epoch` and the index."""

    epoch: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class LearnedTask(Protocol):
    """`metric` names the figure of a row that makes weights the best, the least where `lower`; `shares` all figures in
    0..1 of a row."""

    metric: str
    lower: bool
    shares: tuple[str, ...]
    data: str  # what the train part is called
    labels: tuple[str, ...]
    digest: str  # of both parts
    notes: list[str]

    @property
    def samples(self) -> Samples:
        """What is trained on."""
        ...

    @property
    def checks(self) -> Dataset[Any]:
        """What is judged on."""
        ...

    def model(self) -> nn.Module:
        """The model to begin with. Raises UsageError, WeightsError."""
        ...

    def path(self, index: int) -> str:
        """What sample `index` of the train part is called."""
        ...

    def unreadable(self, batch: Batch) -> Tensor:
        """(B,): the index of each sample that could not be decoded, -1 for the others."""
        ...

    def loss(
        self,
        model: nn.Module,
        batch: Batch,
        random: np.random.Generator,
        autocast: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """The loss of a batch, augmented; the model's part of it runs in `autocast`."""
        ...

    def judge(self, forward: Callable[[Tensor], Any], checks: Iterable[Batch], accelerator: Any) -> dict[str, float]:
        """Figures of a row, over all processes, `metric` and `shares` among them; `forward` takes normalised images."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What a weights file says of the task, beside what every one says."""
        ...
