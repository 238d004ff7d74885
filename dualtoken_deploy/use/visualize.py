"""Which global tokens the image tokens read: the paper's Figure 4 for any picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.bundle.store import MANIFEST, Bundle
from dualtoken_deploy.data.images import Pixels, load_image, resize_and_crop
from dualtoken_deploy.errors import UsageError, WeightsError
from dualtoken_deploy.models.dualtoken_vit import DualTokenViT, GlobalBroadcast
from dualtoken_deploy.models.layers import split_heads
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.models.registry import create_model
from dualtoken_deploy.models.weights import describe_weights
from dualtoken_deploy.spec import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD
from dualtoken_deploy.use.plots import save_figure

STRONGEST = 8  # tokens that the figure marks


def visualize(source: str | Path, image: str | Path, output: str | Path, caption: str = "") -> NDArray[np.float32]:
    """Draws the attention of the last block's Global Broadcast and returns it, (H/32 * W/32, n, n).

    `source`: a bundle's folder or weights (of a training run, or a word of BUILT_IN_WEIGHTS). The picture has four
    parts: the image; over it the mean over the image tokens with its eight strongest marked; for each image token the
    n x n global tokens; the same with the eight strongest alone.
    Raises UsageError (a model without global tokens), BundleError, WeightsError, ImageError, OutputError.
    """
    model = _model(source, image, output)
    if not isinstance(model, DualTokenViT) or not model.config.global_tokens:
        raise UsageError(f"{source} has no position-aware global tokens to look at")
    pixels = resize_and_crop(load_image(image), model.config.image_size, CROP_RATIO)
    maps, grid = broadcast_attention(model, pixels)
    side = model.config.global_tokens
    title = f"Global tokens of the last block, {side} x {side} over {Path(image).name}"
    said = f"{caption}  A square is one of {grid[0]} x {grid[1]} image tokens; in it the {side} x {side} global tokens."
    save_figure(Path(output), (16, 4.4), lambda figure: _draw(figure, pixels, maps, grid), title, said.strip())
    return maps


def _model(source: str | Path, image: str | Path, output: str | Path) -> nn.Module:
    if (Path(source) / MANIFEST).is_file():
        bundle = Bundle.open(source)
        if bundle.manifest.task != CLASSIFY:  # what is drawn are the classifier's global tokens
            raise UsageError(
                f"{bundle.path} is for the task {bundle.manifest.task}, and visualize is for classifiers; to draw what "
                f"it found: dualtoken predict {bundle.path} {image} --output {output}"
            )
        return rebuild(bundle.manifest)
    info = describe_weights(source, CLASSIFY)
    if info is None:
        raise WeightsError(f"{source} does not say its variant and classes; give a bundle or the weights of a run")
    return create_model(info.variant, len(info.labels), info.image_size, source, **info.options)


def broadcast_attention(model: DualTokenViT, pixels: Pixels) -> tuple[NDArray[np.float32], tuple[int, int]]:
    """softmax(q k^T / sqrt(d)) of the last Global Broadcast (eq. 3.5), mean of the heads: (N, n, n) and the grid of N.

    `pixels`: uint8 (H, W, 3) of the model's size.
    """
    broadcasts = [m for m in model.modules() if isinstance(m, GlobalBroadcast)]
    last, seen = broadcasts[-1], {}

    def keep(_module: torch.nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
        seen["x"], seen["g"] = inputs

    handle = last.register_forward_pre_hook(keep)
    try:
        image = (torch.from_numpy(pixels.copy()).float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(
            IMAGENET_STD
        )
        with torch.no_grad():
            model(image.permute(2, 0, 1)[None])
            q = split_heads(last.q(seen["x"]), last.heads)  # (1, heads, N, d)
            k = split_heads(last.kv(seen["g"]).chunk(2, dim=-1)[0], last.heads)  # (1, heads, n*n, d)
            attention = (q @ k.transpose(-1, -2) * last.scale).softmax(-1).mean(1)[0]  # (N, n*n)
    finally:
        handle.remove()
    side = model.config.global_tokens
    grid = -(-pixels.shape[0] // 32), -(-pixels.shape[1] // 32)
    return attention.reshape(-1, side, side).numpy(), grid


def _draw(figure: Any, pixels: Pixels, maps: NDArray[np.float32], grid: tuple[int, int]) -> None:
    axes = figure.subplots(1, 4)
    mean = maps.mean(0)
    high, (height, width) = float(maps.max()), pixels.shape[:2]
    axes[0].imshow(pixels)
    axes[0].set_title("the photograph, cut as the model sees it")
    axes[1].imshow(pixels)
    whole = (0, width, height, 0)
    shown = axes[1].imshow(mean, cmap="viridis", vmin=0, alpha=0.6, extent=whole, interpolation="bilinear")
    rows, columns = np.nonzero(strongest(mean))
    tall, wide = height / mean.shape[0], width / mean.shape[1]
    axes[1].scatter((columns + 0.5) * wide, (rows + 0.5) * tall, s=70, facecolors="none", edgecolors="#D55E00", lw=2)
    axes[1].set_title(f"where all look, the {STRONGEST} strongest circled")
    figure.colorbar(shown, ax=axes[1], shrink=0.7, label="attention")
    axes[2].imshow(_tiles(maps, grid), cmap="viridis", vmin=0, vmax=high)
    axes[2].set_title("where each image token looks")
    axes[3].imshow(_tiles(np.stack([strongest(m) for m in maps]), grid), cmap="viridis", vmin=0, vmax=high)
    axes[3].set_title(f"the {STRONGEST} strongest of each")
    for axis in axes:
        axis.grid(visible=False)
        axis.set_xticks([])
        axis.set_yticks([])


def strongest(attention: NDArray[np.float32]) -> NDArray[np.float32]:
    """The map with all but its STRONGEST largest entries at zero."""
    kept = np.argsort(-attention, axis=None, kind="stable")[:STRONGEST]
    out = np.zeros_like(attention)
    out.flat[kept] = attention.flat[kept]
    return out


def _tiles(maps: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    """(N, n, n) as one picture of H x W tiles, with an empty line between them."""
    n = maps.shape[1]
    out = np.full((grid[0] * (n + 1) - 1, grid[1] * (n + 1) - 1), np.nan, dtype=np.float32)
    for i, tile in enumerate(maps):
        row, column = (i // grid[1]) * (n + 1), (i % grid[1]) * (n + 1)
        out[row : row + n, column : column + n] = tile
    return out
