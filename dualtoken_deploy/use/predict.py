"""What a bundle sees in pictures: classes, objects, areas, a vector, by the bundle's task. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.errors import OutputError, UsageError
from dualtoken_deploy.targets.load import engine_of, load_runner
from dualtoken_deploy.targets.runner import run_each
from dualtoken_deploy.tasks.base import Ask, Found
from dualtoken_deploy.tasks.table import get_task


@dataclass(frozen=True)
class Prediction:
    """The answers for one picture of `size` (h, w), best first: guesses of a classifier, objects of a detector, areas
    of a segmenter, by `task`.

    `found` has the boxes, masks and label maps themselves, for drawing; to_json leaves it out.
    """

    image: str
    task: str
    size: tuple[int, int]
    answers: tuple[Any, ...]
    engine: str | None = None  # what stood in for the target's own runtime, if anything did
    found: Found = field(default_factory=Found, compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {
            "image": self.image,
            "task": self.task,
            "size": list(self.size),
            get_task(self.task).rows: [asdict(answer) for answer in self.answers],
            "engine": self.engine,
        }


def predict(
    bundle: Bundle | str | Path,
    images: Sequence[str | Path],
    top: int = 5,
    min_score: float = 0.5,
    device: str | None = None,
    threads: int | None = None,
) -> list[Prediction]:
    """The `top` likeliest classes, or objects of at least `min_score`: what the bundle's task answers with.

    Raises UsageError, BundleError, MissingError; ImageError on the first picture that cannot be read, before anything
    is run.
    """
    if not images or top < 1 or not 0 <= min_score <= 1:
        raise UsageError("predict needs at least one picture, a top of at least 1 and a least score in 0..1")
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    task, contract, labels = get_task(opened.manifest.task), opened.manifest.input, opened.labels
    pictures = [load_image(image) for image in images]
    inputs = [preprocess(picture, contract) for picture in pictures]
    sizes = [(picture.shape[0], picture.shape[1]) for picture in pictures]
    with load_runner(opened, device, threads) as runner:
        engine = engine_of(runner)
        results = []
        for name, size, outputs in zip(images, sizes, run_each(runner, contract, inputs), strict=True):
            found = task.interpret(outputs, contract.size, size)
            answers, found = task.describe(found, labels, size, Ask(top, min_score))
            results.append(Prediction(str(name), task.name, size, answers, engine, found))
    return results


def check_drawing(bundle: Bundle, path: Path, pictures: int) -> None:
    """Raises UsageError where there is nothing to draw, for another ending than .png and for more than one picture,
    OutputError where the folder is not there: before anything is run."""
    task = get_task(bundle.manifest.task)
    if task.paint is None:
        raise UsageError(f"{bundle.path} is for the task {task.name}, which has nothing to draw; leave --output out")
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path} does not end in .png; what was found is drawn as a PNG")
    if pictures != 1:
        raise UsageError(f"--output is one drawing, but {pictures} pictures were given; give one")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: no folder {path.parent}; make it first")


def draw(prediction: Prediction, path: Path) -> None:
    """Writes the picture with its answers over it. Raises UsageError, OutputError."""
    paint = get_task(prediction.task).paint
    if paint is None:
        raise UsageError(f"the task {prediction.task} has nothing to draw")
    picture = paint(load_image(prediction.image), prediction.found, prediction.answers)
    try:
        Image.fromarray(picture).save(path, format="PNG")
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
