"""What an eager dense model finds in pictures: the reference that bundles are held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualtoken_deploy.data.stretch import Size
from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD
from dualtoken_deploy.tasks.dense_outputs import Found, interpret


def eager_predictor(
    model: nn.Module, size: Size, device: str = "cpu"
) -> Callable[[NDArray[np.uint8], Sequence[Size]], list[Found]]:
    """A predictor for `dense_evaluation.judge` of RetinaNet or a segmenter at (H, W), in float32."""
    model = model.eval().to(device)
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)

    def predict(batch: NDArray[np.uint8], sizes: Sequence[Size]) -> list[Found]:
        normalised = ((batch / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        with torch.inference_mode():
            outputs = model(torch.from_numpy(np.ascontiguousarray(normalised)).to(device))
        return interpret_batch(outputs, size, sizes)

    return predict


def interpret_batch(outputs: Any, model_size: Size, sizes: Sequence[Size]) -> list[Found]:
    """Outputs of a dense model in evaluation for pictures of `sizes` that were stretched to `model_size`.

    RetinaNet: class logits (B, A, classes) and offsets (B, A, 4). Segmenters: logits (B, classes, H, W).
    """
    task, names = ("segment", ("logits",)) if isinstance(outputs, Tensor) else ("detect", ("logits", "deltas"))
    arrays = [t.float().cpu().numpy() for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    return [
        interpret({name: array[i : i + 1] for name, array in zip(names, arrays, strict=True)}, task, model_size, size)
        for i, size in enumerate(sizes)
    ]
