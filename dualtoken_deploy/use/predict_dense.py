"""What a dense bundle sees in pictures: objects with boxes and masks, or the class of each pixel. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.data.stretch import prepare_input
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.targets.load import engine_of, load_runner
from dualtoken_deploy.tasks.dense_outputs import Found, interpret


@dataclass(frozen=True)
class FoundObject:
    """`box` (x1, y1, x2, y2) in the picture's pixels; `mask_pixels`: how many belong to it, where there are masks."""

    index: int
    label: str
    score: float
    box: tuple[float, float, float, float]
    mask_pixels: int | None = None


@dataclass(frozen=True)
class Area:
    """A class that a segmenter sees, and its share of the picture's pixels."""

    index: int
    label: str
    share: float


@dataclass(frozen=True)
class DensePrediction:
    """What is in one picture of `size` (h, w): `objects` of a detector, best first, or `areas`, largest first.

    `found` has the boxes, masks and label maps themselves, for drawing; to_json leaves it out.
    """

    image: str
    task: str
    size: tuple[int, int]
    objects: tuple[FoundObject, ...] = ()
    areas: tuple[Area, ...] = ()
    engine: str | None = None
    found: Found = field(default_factory=Found, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        rows = "areas" if self.task == "segment" else "objects"
        return {
            "image": self.image,
            "task": self.task,
            "size": list(self.size),
            rows: [asdict(row) for row in getattr(self, rows)],
            "engine": self.engine,
        }


def predict_dense(
    bundle: Bundle | str | Path,
    images: Sequence[str | Path],
    min_score: float = 0.5,
    device: str | None = None,
    threads: int | None = None,
) -> list[DensePrediction]:
    """What a dense bundle finds with at least `min_score`. Raises ImageError before anything is run."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if opened.manifest.task == CLASSIFY:
        raise UsageError(f"{opened.path} is a classifier; its predictions are those of dualtoken_deploy.use.predict")
    if not images or not 0 <= min_score <= 1:
        raise UsageError("predict needs at least one picture, and a least score in 0..1")
    pictures = [load_image(image) for image in images]
    with load_runner(opened, device, threads) as runner:
        engine = engine_of(runner)
        return [
            _describe(str(name), picture, opened, _find(opened, runner, picture), min_score, engine)
            for name, picture in zip(images, pictures, strict=True)
        ]


def _find(bundle: Bundle, runner: Any, picture: NDArray[np.uint8]) -> Found:
    contract = bundle.manifest.input
    outputs = runner.run({contract.tensor.name: prepare_input(picture, contract)})
    return interpret(outputs, bundle.manifest.task, contract.size, picture.shape[:2])


def _describe(
    name: str, picture: NDArray[np.uint8], bundle: Bundle, found: Found, least: float, engine: str | None
) -> DensePrediction:
    labels, task = bundle.labels, bundle.manifest.task
    size = picture.shape[0], picture.shape[1]
    if found.label_map is not None:
        counts = np.bincount(found.label_map.ravel(), minlength=len(labels))
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        areas = tuple(Area(i, labels[i], float(counts[i] / counts.sum())) for i in order)
        return DensePrediction(name, task, size, areas=areas, engine=engine, found=found)
    assert found.boxes is not None  # noqa: S101  # a detector's outputs always have boxes
    assert found.boxes.scores is not None  # noqa: S101
    chosen = np.flatnonzero(found.boxes.scores >= least)
    boxes = _take(found.boxes, chosen)
    masks = None if found.masks is None else _take(found.masks, chosen)
    objects = []
    for i, index in enumerate(chosen):
        kind, score = int(found.boxes.classes[index]), float(found.boxes.scores[index])
        x1, y1, x2, y2 = (float(v) for v in boxes.shapes[i])
        pixels = None if masks is None else int(masks.shapes[i].sum())
        objects.append(FoundObject(kind, labels[kind], score, (x1, y1, x2, y2), pixels))
    found = Found(boxes, masks)
    return DensePrediction(name, task, size, tuple(objects), engine=engine, found=found)


def _take(objects: Objects, chosen: NDArray[np.int64]) -> Objects:
    scores = None if objects.scores is None else objects.scores[chosen]
    return Objects(objects.shapes[chosen], objects.classes[chosen], scores)
