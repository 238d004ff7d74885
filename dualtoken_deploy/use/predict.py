"""What a bundle sees in pictures: the k most likely classes with their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import softmax
from dualtoken_deploy.targets.load import engine_of, load_runner
from dualtoken_deploy.use.validate import run_batches


@dataclass(frozen=True)
class Guess:
    """A class, its label and its softmax probability."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one picture, the likeliest first."""

    image: str
    guesses: tuple[Guess, ...]
    engine: str | None = None  # what stood in for the target's own runtime, if anything did

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    bundle: Bundle | str | Path,
    images: Sequence[str | Path],
    top: int = 5,
    device: str | None = None,
    threads: int | None = None,
) -> list[Prediction]:
    """Raises ImageError on the first picture that cannot be read, before anything is run."""
    if not images or top < 1:
        raise UsageError("predict needs at least one picture, and a top of at least 1")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.need_classifier("predict's most likely classes", "call predict_dense")
    contract = opened.manifest.input
    inputs = load_batch(images, contract)
    with load_runner(opened, device, threads) as runner:
        engine = engine_of(runner)
        probabilities = softmax(run_batches(runner, contract, inputs).astype("float64"))
    labels = opened.labels
    return [
        Prediction(str(image), tuple(Guess(int(i), labels[i], float(row[i])) for i in (-row).argsort()[:top]), engine)
        for image, row in zip(images, probabilities, strict=True)
    ]
