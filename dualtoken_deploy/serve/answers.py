"""What a model's outputs say of one picture, by the bundle's task, as plain values. No transport and no event loop:
small ones are read where they arrive, the others in a decoder's process."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve.errors import ModelFailed
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.tasks.base import Ask, Size, Task
from dualtoken_deploy.tasks.draw import areas
from dualtoken_deploy.tasks.table import get_task

OVERLAY_SIDE = 512  # pixels; the page scales it over the photo
QUICK_BYTES = 64 * 1024  # of outputs: below this they are read faster than a decoder is woken


@dataclass(frozen=True)
class Question:
    """What is asked of the outputs: by which task, of a model with these labels and (H, W), for a picture of `size`;
    `overlay`: what belongs to the answers as a picture, too."""

    task: str
    labels: Sequence[str]
    model_size: Size
    size: Size
    ask: Ask
    overlay: bool = False


def reads_quickly(task: Task, outputs: Sequence[TensorSpec]) -> bool:
    """Whether the outputs of one picture are read in no time, whatever the picture."""
    sizes = [side for spec in outputs for side in spec.shape[1:]]
    if task.by_pixel or not all(isinstance(side, int) for side in sizes):
        return False
    return sum(math.prod(spec.concrete()[1:]) * np.dtype(spec.dtype).itemsize for spec in outputs) <= QUICK_BYTES


def answers(outputs: Mapping[str, Array], question: Question) -> list[dict[str, Any]]:
    """The answers for one picture, best first, with the fields of `dualtoken predict --json`."""
    return read(outputs, question)[0]


def read(outputs: Mapping[str, Array], question: Question) -> tuple[list[dict[str, Any]], str | None]:
    """The answers, and where it was asked for the overlay: a PNG as a data URI, None where a task has no areas.

    `outputs`: the batch first, of one picture. Raises ModelFailed where they are not finite, or are none of the task.
    """
    if not all(array.dtype.kind != "f" or np.isfinite(array).all() for array in outputs.values()):
        raise ModelFailed("the model's outputs are not finite")
    task = get_task(question.task)
    try:
        found = task.interpret(outputs, question.model_size, question.size)
        told, kept = task.describe(found, question.labels, question.size, question.ask)
        described: Sequence[Any] = told
        over = _data_uri(areas(kept, described, OVERLAY_SIDE)) if question.overlay else None
    except (LookupError, ValueError, TypeError, AssertionError) as error:  # a class without a label, an axis too many
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelFailed(f"the model's outputs are none of the task {task.name} ({said})") from error
    return [asdict(answer) for answer in described], over


def _data_uri(image: Image.Image | None) -> str | None:
    if image is None:
        return None
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def packed(outputs: Mapping[str, Array]) -> tuple[bytes, list[tuple[str, str, tuple[int, ...]]]]:
    """Outputs as bytes and what they are made of, for another process."""
    return (
        b"".join(np.ascontiguousarray(array).tobytes() for array in outputs.values()),
        [(name, str(array.dtype), array.shape) for name, array in outputs.items()],
    )


def unpacked(data: bytes, parts: Sequence[tuple[str, str, Sequence[int]]]) -> dict[str, Array]:
    """What was packed."""
    found, at = {}, 0
    for name, dtype, shape in parts:
        count = int(np.prod(shape, dtype=np.int64))
        found[name] = np.frombuffer(data, dtype, count, at).reshape(tuple(shape))
        at += found[name].nbytes
    return found
