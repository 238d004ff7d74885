"""Tokenizing: a picture as two vocabularies of codes, and as what the pixel codes draw; judged by equal codes, PSNR,
SSIM and the linear probe of the semantic codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dualtoken_deploy.data.images import resize_and_crop
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.data.samples import Sample
from dualtoken_deploy.numerics import Array, softmax
from dualtoken_deploy.spec import CROP, CROP_RATIO, InputContract, Tolerance
from dualtoken_deploy.tasks.base import (
    Ask,
    Found,
    JointMeter,
    Likeness,
    OutputKind,
    Outputs,
    Pair,
    Pixels,
    Size,
    Task,
    gated_or,
)
from dualtoken_deploy.tasks.classify import match
from dualtoken_deploy.tasks.quality import psnr_db, ssim

CODES = ("pixel_codes", "semantic_codes")
DRAWN, LOGITS = "reconstruction", "logits"
GOLDEN_ANGLE = 0.618034  # of a turn: neighbouring codes get distant colours
# A code that flips changes its patch whole, so beyond float32 there is no use in decibels near those of logits.
NARROWER, BF16, FP32_EQUAL = Tolerance(15.0, 0.9), Tolerance(5.0, 0.5), 0.999


@dataclass(frozen=True)
class Tokens:
    """What a picture became: how many codes of each vocabulary, how many of them differ, PSNR of what they draw, and
    the probe's class with its softmax probability."""

    pixel_codes: int
    different_pixel_codes: int
    semantic_codes: int
    different_semantic_codes: int
    label: str
    probability: float

    def cells(self) -> tuple[str, ...]:
        return (
            f"{self.pixel_codes} ({self.different_pixel_codes} different)",
            f"{self.semantic_codes} ({self.different_semantic_codes} different)",
            self.label,
            f"{self.probability:.4f}",
        )


class TokenMeter:
    """SQNR of the reconstruction and of the probe, and shares of equal codes: of all as the agreement, and by depth."""

    def __init__(self) -> None:
        self._values = JointMeter(None)
        self._same: dict[str, list[Array]] = {name: [] for name in CODES}

    def add(self, expected: Outputs, actual: Outputs) -> None:
        names = (DRAWN, LOGITS)
        self._values.add({n: expected[n] for n in names}, {n: actual[n] for n in names})
        for name in CODES:
            want, got = expected[name], actual[name]
            if want.ndim == 3:  # golden keeps large outputs thinned, which these are not
                self._same[name].append((want == got).reshape(-1, want.shape[-1]))

    def likeness(self) -> Likeness:
        found = self._values.likeness()
        same = {name: np.concatenate(parts) for name, parts in self._same.items()}
        every = np.concatenate([part.ravel() for part in same.values()])
        depths = {
            f"equal_{name}_{depth + 1}": float(part[:, depth].mean())
            for name, part in same.items()
            for depth in range(part.shape[1])
        }
        return Likeness(found.sqnr_db, found.max_abs_error, float(every.mean()), depths)


def interpret(outputs: Outputs, _model_size: Size, _size: Size) -> Found:
    """The outputs of one picture, without the batch's axis."""
    return Found(tensors={name: outputs[name][0] for name in (DRAWN, *CODES, LOGITS)})


def _tensors(found: Found) -> Outputs:
    assert found.tensors is not None  # noqa: S101  # interpret gave them
    return found.tensors


def score(pairs: Sequence[Pair], _classes: int) -> dict[str, float]:
    """{"probe_top1" in 0..1, "psnr_db", "ssim"}: means over pictures, of those that the truth has kept."""
    hits = [float(_tensors(found)[LOGITS].argmax() == sample.label) for sample, found in pairs]
    qualities = [quality(sample, found) for sample, found in pairs]
    psnr, likeness = np.array(qualities).mean(0)
    return {"probe_top1": float(np.mean(hits)), "psnr_db": float(psnr), "ssim": float(likeness)}


def quality(sample: Sample, found: Found) -> tuple[float, float]:
    """PSNR in dB and SSIM of a reconstruction against the picture as the model saw it."""
    drawn = _tensors(found)[DRAWN].astype(np.float64)  # (3, H, W)
    seen = sample.image.transpose(2, 0, 1) / 255.0  # as `keep` made it
    return psnr_db(seen, drawn), ssim(seen, drawn)


def keep(sample: Sample, contract: InputContract) -> Sample:
    """The picture as the model sees it, with its class."""
    return Sample(resize_and_crop(sample.image, contract.size, contract.crop_ratio), sample.label)


def score_classes(pairs: Sequence[Pair], labels: Sequence[str]) -> dict[str, float]:
    """Top-1 of the probe for each class that occurs."""
    hits: dict[int, list[bool]] = {}
    for sample, found in pairs:
        if sample.label is not None:
            hits.setdefault(sample.label, []).append(bool(_tensors(found)[LOGITS].argmax() == sample.label))
    return {labels[i]: float(np.mean(hits[i])) for i in sorted(hits)}


def describe(found: Found, labels: Sequence[str], _size: Size, _ask: Ask) -> tuple[tuple[Tokens, ...], Found]:
    tensors = _tensors(found)
    shares = softmax(tensors[LOGITS].astype(np.float64))
    best = int(shares.argmax())
    pixel, semantic = (tensors[name] for name in CODES)
    counts = (pixel.size, len(np.unique(pixel)), semantic.size, len(np.unique(semantic)))
    return (Tokens(*counts, labels[best], float(shares[best])),), found


def paint(picture: Pixels, found: Found, _answers: Sequence[object]) -> Pixels:
    """Side by side: the picture as the model sees it, its reconstruction, the first pixel codes and the first semantic
    codes, a colour a code. uint8 (H, 4 W + 12, 3)."""
    tensors = _tensors(found)
    drawn = np.rint(tensors[DRAWN].transpose(1, 2, 0).astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    size = (drawn.shape[0], drawn.shape[1])
    maps = [code_map(tensors[name][:, 0], size) for name in CODES]
    gap = np.full((size[0], 4, 3), 255, np.uint8)
    seen = resize_and_crop(picture, size, CROP_RATIO)
    return np.concatenate([seen, gap, drawn, gap, maps[0], gap, maps[1]], axis=1)


def code_map(codes: Array, size: Size) -> Pixels:
    """A colour a code, in the place that it is of: (N,) of a grid of the picture's shape -> uint8 (H, W, 3)."""
    rows = round((len(codes) * size[0] / size[1]) ** 0.5)
    hues = (codes.astype(np.float64) * GOLDEN_ANGLE) % 1.0
    hsv = np.stack([hues * 255, np.full_like(hues, 150), np.full_like(hues, 230)], axis=-1).astype(np.uint8)
    grid = Image.fromarray(hsv.reshape(rows, -1, 3), mode="HSV").convert("RGB")
    return np.array(grid.resize((size[1], size[0]), Image.Resampling.NEAREST))


def tolerance(base: Tolerance, precision: str, gated: bool, _outputs: Sequence[str]) -> Tolerance:
    """In float32 nearly every code has to be the same, otherwise at most what NARROWER says."""
    narrower = Tolerance(min(base.sqnr_db, NARROWER.sqnr_db), min(base.top1_agreement, NARROWER.top1_agreement))
    wanted = {"fp32": Tolerance(base.sqnr_db, FP32_EQUAL), "bf16": BF16}.get(precision, narrower)
    return gated_or(wanted, gated)


TOKENIZE = Task(
    name="tokenize",
    classes=True,
    resize=CROP,
    agreement="agreement",
    alike="codes",
    metrics=("probe_top1", "psnr_db", "ssim"),
    rows="tokens",
    columns=("pixel codes", "semantic codes", "probe", "probability"),
    open=open_pictures,
    match=match,
    known=lambda data: data.labels is not None,
    meter=TokenMeter,
    interpret=interpret,
    score=score,
    score_classes=score_classes,
    describe=describe,
    paint=paint,
    tolerance=tolerance,
    outputs=(
        (
            OutputKind(DRAWN, 4, layout="NCHW"),
            OutputKind(CODES[0], 3, indices=True, layout="NLC"),
            OutputKind(CODES[1], 3, indices=True, layout="NLC"),
            OutputKind(LOGITS, 2, layout="NC"),
        ),
    ),
    keep=keep,
    plain=("psnr_db", "ssim"),
)
