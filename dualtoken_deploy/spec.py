"""Frozen descriptions that travel in a manifest: tensors, the input contract, tolerances. No heavy imports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1, over ImageNet-1k's training set
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875  # 224 of 256: the evaluation crop of the paper's code base

CROP = "bicubic"  # how a picture is resized: to cover `size / crop_ratio`, whose centre is cut out; antialiased
STRETCH = "stretch"  # how a dense model's picture is resized: to `size`, whatever its sides; bilinear, antialiased
PICTURES = ("image", "tensor")  # the kinds of an input that a picture is prepared for

Dim = int | str  # a size, or the name of a dynamic one


@dataclass(frozen=True)
class TensorSpec:
    """Name, numpy dtype name, layout letters and shape of one tensor at a runner's border."""

    name: str
    dtype: str
    layout: str
    shape: tuple[Dim, ...]

    def concrete(self, batch: int = 1, side: int = 224) -> tuple[int, ...]:
        """The shape with numbers for its names: `batch` for "batch", `side` for every other."""
        return tuple(d if isinstance(d, int) else batch if d == "batch" else side for d in self.shape)

    @staticmethod
    def from_json(data: dict[str, Any]) -> TensorSpec:
        return TensorSpec(data["name"], data["dtype"], data["layout"], tuple(data["shape"]))


@dataclass(frozen=True)
class InputContract:
    """What a program has to feed, and what it need not do because the graph does it.

    `kind` "image": uint8 NHWC RGB, cast, mean and std are baked into the graph. "tensor": normalised float32 NCHW.
    The image is resized (bicubic, antialiased) to cover `size / crop_ratio`, then `size` is cropped from its centre;
    `resize` STRETCH (dense models) has no crop.
    """

    tensor: TensorSpec
    kind: str
    size: tuple[int, int]  # (H, W)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_ratio: float = CROP_RATIO
    resize: str = CROP
    color: str = "RGB"

    @property
    def baked(self) -> tuple[str, ...]:
        """Preprocessing steps that the graph itself performs."""
        return ("cast", "scale", "mean", "std", "transpose") if self.kind == "image" else ()

    @property
    def any_size(self) -> bool:
        """Whether the graph takes images of any size; `size` is then only what our own preprocessing makes."""
        return any(isinstance(dim, str) for dim in self.tensor.shape[1:])

    @property
    def batch(self) -> int | None:
        """Fixed batch size, or None where it is dynamic."""
        first = self.tensor.shape[0]
        return first if isinstance(first, int) else None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"baked": list(self.baked)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> InputContract:
        return InputContract(
            tensor=TensorSpec.from_json(data["tensor"]),
            kind=data["kind"],
            size=(data["size"][0], data["size"][1]),
            mean=tuple(data["mean"]),
            std=tuple(data["std"]),
            crop_ratio=data["crop_ratio"],
            resize=data["resize"],
            color=data["color"],
        )


@dataclass(frozen=True)
class Tolerance:
    """What the saved file must reach against eager: SQNR in dB over the logits, and the share of equal top-1."""

    sqnr_db: float
    top1_agreement: float = 1.0
