"""Pictures of results, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.errors import UsageError, missing_extra
from dualtoken_deploy.files import write_atomically

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.blocks import Calibration, SearchResult

SUFFIXES = (".png", ".svg", ".pdf")


def save_figure(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Lets `draw` fill a matplotlib Figure of `size` inches, and writes it whole or not at all.

    Raises UsageError on another suffix than SUFFIXES, MissingError without matplotlib, OutputError.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} has none of the picture suffixes {', '.join(SUFFIXES)}")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no state that outlives the call
    except ModuleNotFoundError as error:
        raise missing_extra("plots", f"drawing {path.name}") from error
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120))


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, figures: Sequence[str]) -> None:
    """Losses, and `figures` in 0..1, of a training run over its epochs."""
    epochs = [row["epoch"] for row in rows]

    def draw(figure: Any) -> None:
        losses, shares = figure.subplots(1, 2)
        for name in ("train_loss", "val_loss"):
            if name in rows[0]:
                losses.plot(epochs, [row[name] for row in rows], label=name.replace("_", " "))
        for name in figures:
            shares.plot(epochs, [100 * row[name] for row in rows], label=f"val {name} (%)")
        for axis in (losses, shares):
            axis.set_xlabel("epoch")
            axis.grid(alpha=0.3)
            axis.legend()

    save_figure(path, (9, 3.5), draw)


def plot_confusion(counts: NDArray[np.int64], labels: Sequence[str], path: Path, title: str) -> None:
    """A confusion matrix (true class down, predicted across) as shares of each true class, counts written in."""
    total = counts.sum(1, keepdims=True)
    shares = counts / np.maximum(total, 1)
    side = min(max(4.0, 0.34 * len(labels) + 2), 30)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if len(labels) <= 60:
            axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
            axis.set_yticks(range(len(labels)), labels, fontsize=7)
            for i, j in zip(*np.nonzero(counts), strict=True):
                colour = "white" if shares[i, j] > 0.5 else "black"
                axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=6, color=colour)
        axis.set_xlabel("predicted")
        axis.set_ylabel("true")
        axis.set_title(title, fontsize=9)

    save_figure(path, (side, side), draw)


def plot_search(calibration: Calibration, found: SearchResult, path: Path) -> None:
    """The search behind an INT8 bundle: points lost against the share of the MACs in INT8, step by step."""

    def fill(figure: Any) -> None:
        axis = figure.subplots()
        steps = found.trace
        shares, drops = [100 * s.int8_share for s in steps], [s.drop for s in steps]
        axis.plot(shares, drops, marker="o", linewidth=0.8)
        for step, x, y in zip(steps, shares, drops, strict=True):
            axis.annotate(step.action, (x, y), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axis.axhline(calibration.max_drop or 0.0, color="red", linewidth=0.8, label=f"budget {calibration.max_drop:g}")
        axis.set_xlabel("MACs in INT8 (%)")
        axis.set_ylabel(f"points of {calibration.metric} lost")
        axis.grid(alpha=0.3)
        axis.legend()

    save_figure(path, (8, 4.5), fill)
