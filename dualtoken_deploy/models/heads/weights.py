"""What a weights file of a dense run says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import WeightsError
from dualtoken_deploy.models.weights import damaged, read_header, weights_path

BEST = "best.safetensors"  # of a run's folder


@dataclass(frozen=True)
class DenseDescription:
    """A dense model: `labels` name its classes (for segmentation the first is what lies behind everything)."""

    path: Path
    task: str  # detect or segment
    head: str
    variant: str
    labels: tuple[str, ...]
    image_size: tuple[int, int]
    width: int  # channels of the pyramid or of the context
    options: Mapping[str, Any]  # the classifier's
    data: str


def dense_weights_path(weights: str | Path) -> Path:
    """The file of a word of BUILT_IN_WEIGHTS, the best weights of a run's folder, or the path itself."""
    path = weights_path(weights)
    return path / BEST if path.is_dir() else path


def holds_dense_model(weights: str | Path) -> bool:
    """Whether a file says that it holds a dense model. Raises WeightsError where it is missing or damaged."""
    header = read_header(dense_weights_path(weights))
    return header is not None and "task" in header


def describe_dense(weights: str | Path) -> DenseDescription:
    """What the header of a dense run's weights says: a run's folder, a file, or a word of BUILT_IN_WEIGHTS.

    Raises WeightsError where the file is missing or damaged, or holds no dense model.
    """
    path = dense_weights_path(weights)
    header = read_header(path)
    if header is None or "task" not in header:
        raise WeightsError(
            f"{weights} does not say that it holds a detector or segmenter; give weights of dualtoken train --task"
        )
    try:
        height, width = header["image_size"]
        return DenseDescription(
            path=path,
            task=str(header["task"]),
            head=str(header["head"]),
            variant=str(header["variant"]),
            labels=tuple(header["labels"]),
            image_size=(int(height), int(width)),
            width=int(header["width"]),
            options=dict(header["options"]),
            data=str(header["data"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, error) from error
