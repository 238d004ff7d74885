"""What a bundle sees in pictures: classes, objects, areas, a vector, by the bundle's task. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.errors import OutputError, UsageError
from dualtoken_deploy.files import write_atomically
from dualtoken_deploy.tasks.base import Pixels
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.model import Model, Picture, Prediction, as_sample, names_of

__all__ = ["Prediction", "check_drawing", "draw", "predict"]


def predict(
    bundle: Model | Bundle | str | Path,
    images: Picture | list[Any] | tuple[Any, ...],
    top: int = 5,
    min_score: float = 0.5,
    device: str | None = None,
    threads: int | None = None,
) -> list[Prediction]:
    """The `top` likeliest classes, or objects of at least `min_score`: what the bundle's task answers with.

    `bundle`: a folder, or a Classifier, Detector or Segmenter, which stays loaded and has its own settings. `images`:
    paths, bytes, Pillow images, or frames uint8 (H, W, 3) in RGB.
    Raises UsageError, BundleError, MissingError; ImageError on the first picture that cannot be read, before anything
    is run.
    """
    pictures: list[Picture] = list(images) if isinstance(images, (list, tuple)) else [images]
    if not pictures or top < 1 or not 0 <= min_score <= 1:
        raise UsageError("predict needs at least one picture, a top of at least 1 and a least score in 0..1")
    if isinstance(bundle, Model):
        return bundle.many(pictures)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    samples = [as_sample(p, get_task(opened.manifest.task), what=f"picture {i}") for i, p in enumerate(pictures)]
    with Model(opened, device, threads, top, min_score) as model:
        return model.answer(list(zip(names_of(pictures), samples, strict=True)))


def check_drawing(bundle: Bundle, path: Path, pictures: int) -> None:
    """Raises UsageError where there is nothing to draw, or the path does not fit: one picture is drawn to a .png, of
    several each into the folder. OutputError where the folder above is not there. Before anything is run."""
    task = get_task(bundle.manifest.task)
    if task.paint is None:
        raise UsageError(f"{bundle.path} is for the task {task.name}, which has nothing to draw; leave --output out")
    if pictures == 1 and path.suffix.lower() != ".png" and not path.is_dir():
        raise UsageError(f"{path} does not end in .png; what was found is drawn as a PNG")
    if pictures != 1 and path.suffix:
        raise UsageError(f"{pictures} pictures are drawn into a folder, and {path} looks like a file; name a folder")
    if not path.parent.is_dir():
        raise OutputError(f"cannot write {path}: no folder {path.parent}; make it first")


def draw(prediction: Prediction, path: Path, pixels: Pixels | None = None) -> None:
    """Writes the picture with its answers over it. Raises UsageError, OutputError."""
    paint = get_task(prediction.task).paint
    if paint is None:
        raise UsageError(f"the task {prediction.task} has nothing to draw")
    picture = paint(load_image(prediction.image) if pixels is None else pixels, prediction.found, prediction.answers)
    write_atomically(path, lambda temporary: Image.fromarray(picture).save(temporary, format="PNG"))
