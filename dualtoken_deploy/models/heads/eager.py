"""What an eager dense model finds in pictures: the reference that bundles are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualtoken_deploy.dense_images import Size, boxes_to_picture, resize_map
from dualtoken_deploy.dense_metrics import Objects
from dualtoken_deploy.detection import detect
from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class Answer:
    """In the picture's own pixels: `boxes` of a detector, or `label_map` uint8 (h, w) of a segmenter."""

    boxes: Objects | None = None
    masks: Objects | None = None
    label_map: NDArray[np.uint8] | None = None


def eager_predictor(
    model: nn.Module, size: Size, device: str = "cpu"
) -> Callable[[NDArray[np.uint8], Sequence[Size]], list[Answer]]:
    """A predictor for `dense_evaluation.judge` of RetinaNet or a segmenter at (H, W), in float32."""
    model = model.eval().to(device)
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)

    def predict(batch: NDArray[np.uint8], sizes: Sequence[Size]) -> list[Answer]:
        normalised = ((batch / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        with torch.inference_mode():
            outputs = model(torch.from_numpy(np.ascontiguousarray(normalised)).to(device))
        return interpret(outputs, size, sizes)

    return predict


def interpret(outputs: Any, model_size: Size, sizes: Sequence[Size]) -> list[Answer]:
    """Outputs of a dense model in evaluation for pictures of `sizes` that were stretched to `model_size`.

    RetinaNet: class logits (B, A, classes) and offsets (B, A, 4). Segmenters: logits (B, classes, H, W).
    """
    if isinstance(outputs, Tensor):
        maps = outputs.argmax(1).to(torch.uint8).cpu().numpy()
        return [Answer(label_map=resize_map(labels, size)) for labels, size in zip(maps, sizes, strict=True)]
    answers = []
    logits, deltas = (t.float().cpu().numpy() for t in outputs)
    for scores, offsets, (height, width) in zip(logits, deltas, sizes, strict=True):
        found = detect(scores, offsets, model_size)
        boxes = boxes_to_picture(found.boxes, (model_size[0] / height, model_size[1] / width))
        answers.append(Answer(Objects(boxes, found.classes, found.scores)))
    return answers
