"""What an eager model with a head finds in pictures, while it is trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dualtoken_deploy.tasks.base import Found, Size, Task

NAMES = ("logits", "deltas")  # of RetinaNet's two outputs; a segmenter has the first


def interpret_batch(
    task: Task, outputs: Tensor | tuple[Tensor, ...], model_size: Size, sizes: Sequence[Size]
) -> list[Found]:
    """Outputs of a model in evaluation, the batch first, for pictures of `sizes` stretched to `model_size`."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    arrays = {name: part.float().cpu().numpy() for name, part in zip(NAMES, parts, strict=False)}
    return [
        task.interpret({name: array[i : i + 1] for name, array in arrays.items()}, model_size, size)
        for i, size in enumerate(sizes)
    ]
