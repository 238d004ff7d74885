"""A bundle that is loaded once and asked many times: frames of a camera, pictures, bytes. No torch.

with Classifier("bundles/efficientnet-lite0-onnxruntime-fp32") as classify:
    print(classify(frame, color="BGR").label)
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np
from PIL import Image

from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.images import as_pixels
from dualtoken_deploy.data.samples import Sample
from dualtoken_deploy.errors import DatasetError, UsageError
from dualtoken_deploy.numerics import Array, softmax
from dualtoken_deploy.targets.load import engine_of, load_runner
from dualtoken_deploy.targets.runner import run_each
from dualtoken_deploy.tasks.base import Ask, Found, Pixels, Task
from dualtoken_deploy.tasks.table import get_task

Picture = str | Path | bytes | Image.Image | Array


@dataclass(frozen=True)
class Prediction:
    """The answers for one picture of `size` (h, w), best first: guesses of a classifier, objects of a detector, areas
    of a segmenter, by `task`.

    `found` has the boxes, masks and label maps themselves, for drawing; to_json leaves it out. `weights`: what the
    model's are; "random" where its answers mean nothing.
    """

    image: str
    task: str
    size: tuple[int, int]
    answers: tuple[Any, ...]
    engine: str | None = None  # what stood in for the target's own runtime, if anything did
    weights: str = ""
    found: Found = field(default_factory=Found, compare=False, repr=False)

    @property
    def label(self) -> str | None:
        """The name of the best answer; None where nothing was found, or answers have none."""
        return getattr(self.answers[0], "label", None) if self.answers else None

    @property
    def probabilities(self) -> Array:
        """Of a classifier the softmax over all classes, (classes,). Raises UsageError for other tasks."""
        if self.found.logits is None:
            raise UsageError(f"the task {self.task} has no probabilities of a whole picture; see answers")
        return softmax(self.found.logits.astype(np.float64))

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "task": self.task,
            "size": list(self.size),
            get_task(self.task).rows: [asdict(answer) for answer in self.answers],
            "engine": self.engine,
            "weights": self.weights,
        }


def names_of(pictures: Sequence[Any]) -> list[str]:
    """What each is called in answers: its path, or its place."""
    return [str(p) if isinstance(p, (str, Path)) else f"picture {i}" for i, p in enumerate(pictures)]


def as_sample(given: Any, task: Task, color: str = "RGB", what: str = "the picture") -> Sample:
    """What a model of the task is asked about: a picture in any form, or a series. Raises ImageError, DatasetError."""
    if task.kinds[0] != "series":
        return Sample(as_pixels(given, color, what))
    if isinstance(given, (str, Path)):
        return task.load(given)
    if not (isinstance(given, np.ndarray) and given.ndim == 2 and given.dtype.kind in "fiu"):
        raise DatasetError(f"{what} is no series: give numbers (L, M), a row a step, or the path of a CSV file")
    return Sample(np.zeros((0, 0, 3), np.uint8), series=given.astype(np.float32))


class Model:
    """A loaded bundle of any task; call it with one picture or several. Safe to call from many threads.

    `top`: classes that a classifier answers with; `min_score`: least score of a detector's objects. `device`: in the
    runtime's own words, its CPU unless given. Raises UsageError, BundleError, MissingError.
    """

    task_name: str | None = None  # of a subclass: the one task that it takes

    def __init__(
        self,
        bundle: Bundle | str | Path,
        device: str | None = None,
        threads: int | None = None,
        top: int = 5,
        min_score: float = 0.5,
    ) -> None:
        if top < 1 or not 0 <= min_score <= 1:
            raise UsageError("predict needs a top of at least 1 and a least score in 0..1")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        manifest = self.bundle.manifest
        if self.task_name not in (None, manifest.task):
            fitting = next((kind.__name__ for kind in KINDS if kind.task_name == manifest.task), Model.__name__)
            raise UsageError(
                f"{self.bundle.path} is for the task {manifest.task}, which {type(self).__name__} is not for; open it "
                f"with {fitting}"
            )
        self.task, self.contract = get_task(manifest.task), manifest.input
        self.ask = Ask(top, min_score)
        self.weights = manifest.weights.source
        self._lock = threading.Lock()
        self._runner: Any = load_runner(self.bundle, device, threads)
        self._runner.__enter__()
        self.engine = engine_of(self._runner)

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.bundle.labels

    @property
    def random_weights(self) -> bool:
        """Whether nothing was trained, so that answers mean nothing."""
        return self.weights == RANDOM

    @overload
    def __call__(self, pictures: Picture, color: str = "RGB") -> Prediction: ...
    @overload
    def __call__(self, pictures: list[Any] | tuple[Any, ...], color: str = "RGB") -> list[Prediction]: ...
    def __call__(self, pictures: Any, color: str = "RGB") -> Any:
        """What is in a picture, or in each of several (a list, or a stack (N, H, W, 3)); of a forecaster: what follows
        a series, float32 (L, M) or the path of a CSV file.

        A picture is a frame, uint8 (H, W, 3) in RGB or as `color` says "BGR"; a Pillow image; a path; or the bytes of a
        file. Raises ImageError on another shape or dtype and on what cannot be decoded, UsageError where the model is
        closed.
        """
        if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
            return self.many(pictures, color)
        if isinstance(pictures, (list, tuple)):
            return self.many(pictures, color)
        return self.many([pictures], color)[0]

    def many(self, pictures: Iterable[Picture], color: str = "RGB") -> list[Prediction]:
        """One answer for each picture, in their order."""
        given = list(pictures)
        samples = [as_sample(p, self.task, color, f"picture {i}") for i, p in enumerate(given)]
        return self.answer(list(zip(names_of(given), samples, strict=True)))

    def answer(self, named: Sequence[tuple[str, Sample | Pixels]]) -> list[Prediction]:
        """One answer for each (name, a sample or uint8 RGB pixels)."""
        samples = [s if isinstance(s, Sample) else Sample(s) for _, s in named]
        inputs = [self.task.prepare(sample, self.contract) for sample in samples]
        with self._lock:
            if self._runner is None:
                raise UsageError(f"the model of {self.bundle.path} is closed; open it again")
            outputs = list(run_each(self._runner, self.contract, inputs))
        results = []
        for (name, _), sample, out in zip(named, samples, outputs, strict=True):
            size = sample.size
            found = self.task.interpret(out, self.contract.size, size)
            answers, found = self.task.describe(found, self._names(), size, self.ask)
            results.append(Prediction(name, self.task.name, size, answers, self.engine, self.weights, found))
        return results

    def _names(self) -> Sequence[str]:
        return self.bundle.labels

    def draw(self, picture: Picture, prediction: Prediction, color: str = "RGB") -> Pixels:
        """The picture, uint8 RGB, with its answers over it. Raises UsageError where the task has nothing to draw."""
        paint = self.task.paint
        if paint is None:
            raise UsageError(f"{self.bundle.path} is for the task {self.task.name}, which has nothing to draw")
        return paint(as_pixels(picture, color), prediction.found, prediction.answers)

    def warm_up(self, runs: int = 2) -> None:
        """Runs the stored input, so that the first frame does not wait for what a runtime does once."""
        for _ in range(runs):
            with self._lock:
                if self._runner is None:
                    raise UsageError(f"the model of {self.bundle.path} is closed; open it again")
                self._runner.run({self.contract.tensor.name: self.bundle.golden["input"]})

    def close(self) -> None:
        """Gives back what the runtime holds; calls after it are errors, a second close is none."""
        with self._lock:
            runner, self._runner = self._runner, None
        if runner is not None:
            runner.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Classifier(Model):
    """Names what is in a picture: `classify(frame).label`, `.probabilities`, `.answers` (the `top` guesses)."""

    task_name = "classify"


class Detector(Model):
    """Finds objects: `.answers` have label, score and box (x1, y1, x2, y2) in the picture's pixels."""

    task_name = "detect"


class Segmenter(Model):
    """Says of each pixel what it belongs to: `.found.label_map` (h, w), `.answers` the areas, largest first."""

    task_name = "segment"


KINDS: tuple[type[Model], ...] = (Classifier, Detector, Segmenter)
