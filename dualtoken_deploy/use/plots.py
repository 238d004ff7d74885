"""Pictures of results, drawn with matplotlib in one style: a title, units, a caption with machine and command.

A file whose name ends in `-dark`, such as compare-dark.svg, is drawn for a dark page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.errors import UsageError, missing_extra
from dualtoken_deploy.files import write_atomically
from dualtoken_deploy.use.text import printable

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.blocks import Calibration, SearchResult

SUFFIXES = (".png", ".svg", ".pdf")
DARK = "-dark"  # at the end of a file's stem

# Okabe and Ito 2008, "Color Universal Design": told apart with any colour vision, on light and on dark.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#56B4E9", "#CC79A7", "#F0E442")
LIMIT = "#D55E00"  # theirs too: budgets, thresholds, and what is to be looked at
GREY = "#8b949e"  # what other things are seen against
TITLE, LABEL, TICK, CAPTION = 11, 9, 8, 7  # points
NAME_CHARACTERS = 40  # of a class
CAPTION_CHARACTERS = 16  # of a caption's line, for an inch of width


@dataclass(frozen=True)
class Page:
    """Colours of what a picture is drawn on and with."""

    paper: str
    ink: str
    faint: str


LIGHT_PAGE, DARK_PAGE = Page("#ffffff", "#1b1f24", "#8b949e"), Page("#0d1117", "#e6edf3", "#8b949e")


def is_dark(path: Path) -> bool:
    return path.stem.endswith(DARK)


def save_figure(
    path: Path, size: tuple[float, float], draw: Callable[[Any], None], title: str = "", caption: str = ""
) -> None:
    """Lets `draw` fill a matplotlib Figure of `size` inches, and writes it whole or not at all.

    Raises UsageError on another suffix than SUFFIXES, MissingError without matplotlib, OutputError.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} has none of the picture suffixes {', '.join(SUFFIXES)}")
    try:
        from matplotlib import rc_context
    except ModuleNotFoundError as error:
        raise missing_extra("plots", f"drawing {path.name}") from error
    page = DARK_PAGE if is_dark(path) else LIGHT_PAGE
    with rc_context(_settings(page)), warnings.catch_warnings():
        # a script that the font lacks is boxes in a PNG; in an SVG the reader's own font has it
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure = make_figure(size, draw, title, caption)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=144))


def make_figure(size: tuple[float, float], draw: Callable[[Any], None], title: str = "", caption: str = "") -> Any:
    """The filled figure, its title above and its caption below what `draw` makes."""
    import textwrap

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # without pyplot: no window, no state that outlives the call

    wrapped = textwrap.wrap(printable(caption, lines=True), round(CAPTION_CHARACTERS * size[0]))
    figure = Figure(figsize=(size[0], size[1] + 0.13 * len(wrapped)), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        wide = round(10 * size[0])
        lines = "\n".join(textwrap.fill(line, wide) for line in printable(title, lines=True).split("\n"))
        figure.suptitle(lines, fontsize=TITLE, fontweight="bold", x=0.01, ha="left")
    if wrapped:
        figure.supxlabel("\n".join(wrapped), fontsize=CAPTION, x=0.01, ha="left")
    draw(figure)
    return figure


def _settings(page: Page) -> dict[str, Any]:
    from cycler import cycler

    edges = dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), page.faint)
    words = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.labelcolor", "ytick.labelcolor"), page.ink
    )
    paper = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), page.paper)
    sizes = {"axes.labelsize": LABEL, "axes.titlesize": LABEL, "xtick.labelsize": TICK, "ytick.labelsize": TICK}
    lines = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    return {
        **edges, **words, **paper, **sizes, **lines, "legend.fontsize": TICK, "axes.axisbelow": True,
        "axes.prop_cycle": cycler(color=COLOURS), "svg.fonttype": "none", "svg.hashsalt": "dualtoken",
        "text.parse_math": False,  # names of others: $...$ would be TeX, or an error where it is none
    }  # fmt: skip


def label_points(
    axis: Any, points: Sequence[tuple[float, float]], texts: Sequence[str], size: float = TICK
) -> list[Any]:
    """Writes a text beside each point so that none covers another, a point, or the edge; one that finds no place in
    sixteen directions at three distances is left out. Gives what was written.

    To be called when all else is drawn.
    """
    figure = axis.figure
    figure.draw_without_rendering()
    renderer, frame = figure.canvas.get_renderer(), axis.get_window_extent()
    scale = figure.dpi / 72
    at = axis.transData.transform(np.array(points, float)) if points else np.zeros((0, 2))
    taken = [(x - 4 * scale, y - 4 * scale, x + 4 * scale, y + 4 * scale) for x, y in at]
    # over lines it can still be read
    paper = {"facecolor": axis.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    written = []
    for index, text in enumerate(texts):
        for distance, turn in ((d, t) for d in (9, 18, 30) for t in range(16)):
            angle = np.pi / 4 + turn * np.pi / 8
            dx, dy = distance * np.cos(angle), distance * np.sin(angle)
            ha = "left" if dx > 1 else "right" if dx < -1 else "center"
            va = "bottom" if dy > 1 else "top" if dy < -1 else "center"
            note = axis.annotate(
                text,
                points[index],
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=size,
                ha=ha,
                va=va,
                bbox=paper,
            )
            box = note.get_window_extent(renderer)
            own = (box.x0, box.y0, box.x1, box.y1)
            inside = box.x0 >= frame.x0 and box.x1 <= frame.x1 and box.y0 >= frame.y0 and box.y1 <= frame.y1
            if inside and all(apart(own, other) for other in taken):
                taken.append(own)
                written.append(note)
                break
            note.remove()
    return written


Box = tuple[float, float, float, float]  # x0, y0, x1, y1


def apart(one: Box, two: Box) -> bool:
    """Whether two boxes have nothing in common."""
    return one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path, figures: Sequence[str], caption: str = "") -> None:
    """Losses, and `figures` in 0..1, of a training run over its epochs."""
    save_figure(path, (9, 3.6), lambda figure: fill_curves(figure, rows, figures), _run_title(rows), caption)


def _run_title(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"Training, {len(rows)} epoch{'' if len(rows) == 1 else 's'}"


def fill_curves(figure: Any, rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> None:
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    losses, shares = figure.subplots(1, 2)
    marker = "o" if len(rows) < 30 else None
    for name in ("train_loss", "val_loss"):
        if name in rows[0]:
            losses.plot(epochs, [row[name] for row in rows], marker=marker, ms=3, label=name.replace("_", " "))
    for name in figures:
        shares.plot(
            epochs, [100 * row[name] for row in rows], marker=marker, ms=3, label=f"val {name.replace('_', ' ')}"
        )
    losses.set_ylabel("loss")
    shares.set_ylabel("on the held-out part (%)")
    for axis in (losses, shares):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(epochs) == 1:
            axis.set_xlim(epochs[0] - 1, epochs[0] + 1)
        if axis.lines:
            axis.legend(frameon=False)


def shortened(text: str) -> str:
    """A name of others, cut where it would leave no room for what it names."""
    return text if len(text) <= NAME_CHARACTERS else f"{text[: NAME_CHARACTERS - 1]}\N{HORIZONTAL ELLIPSIS}"


def plot_confusion(counts: NDArray[np.int64], labels: Sequence[str], path: Path, title: str, caption: str = "") -> None:
    """A confusion matrix (true class down, predicted across) as shares of each true class, counts written in."""
    longest = min(max(map(len, labels), default=0), NAME_CHARACTERS)
    side = min(max(4.0, 0.34 * len(labels) + 2) + 0.06 * longest, 30)
    save_figure(path, (side, side), lambda figure: fill_confusion(figure, counts, labels), title, caption)


def confusion_title(source: str, data: str, images: int, top1: float) -> str:
    return f"{source}\n{images} pictures of {data}: top-1 {100 * top1:.2f} %"


def fill_confusion(figure: Any, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    """What is right in blue on the diagonal, what is wrong in orange beside it; nothing is the page itself."""
    from matplotlib import rcParams
    from matplotlib.colors import to_rgb

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    weight = np.where(counts > 0, 0.15 + 0.85 * shares, 0.0)[..., None]  # one of many is still seen
    paper, right, wrong = (np.array(to_rgb(colour)) for colour in (rcParams["axes.facecolor"], COLOURS[0], LIMIT))
    ink = np.where(np.eye(len(counts), dtype=bool)[..., None], right, wrong)
    axis = figure.subplots()
    axis.imshow(paper * (1 - weight) + ink * weight)
    axis.set_title("shade: share of the true class; blue right, orange wrong", loc="left", fontsize=CAPTION)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.grid(visible=False)
    edges = np.arange(len(counts) - 1) + 0.5
    axis.set_xticks(edges, minor=True)
    axis.set_yticks(edges, minor=True)
    axis.tick_params(which="minor", length=0)
    axis.grid(which="minor", visible=True, color=rcParams["axes.edgecolor"], linewidth=0.3)
    if len(labels) <= 60:
        names = [shortened(printable(label)) for label in labels]
        axis.set_xticks(range(len(labels)), names, rotation=0 if max(map(len, names)) <= 3 else 90)
        axis.set_yticks(range(len(labels)), names)
        for i, j in zip(*np.nonzero(counts), strict=True):
            text = "white" if weight[i, j, 0] > 0.5 else rcParams["text.color"]
            axis.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=TICK, color=text)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")


def plot_search(calibration: Calibration, found: SearchResult, path: Path, caption: str = "") -> None:
    """The search behind an INT8 bundle: points lost against the share of the MACs in INT8, the chosen one marked."""
    where = calibration.name if calibration.held_out is None else calibration.held_out.name
    title = f"Search for the layers that stay in float: {calibration.metric} on {where}"
    save_figure(path, (8, 4.5), lambda figure: fill_search(figure, calibration, found), title, caption)


def fill_search(figure: Any, calibration: Calibration, found: SearchResult) -> None:
    axis = figure.subplots()
    steps = found.trace
    points = [(100 * s.int8_share, s.drop) for s in steps]
    axis.plot(*zip(*points, strict=True), linewidth=0.8, color=GREY, zorder=1)
    held = [step.drop <= (calibration.max_drop or 0.0) for step in steps]
    for kept, name, colour in ((True, "within the budget", COLOURS[0]), (False, "beyond it", COLOURS[1])):
        some = [point for point, holds in zip(points, held, strict=True) if holds == kept]
        if some:
            axis.scatter(*zip(*some, strict=True), s=30, color=colour, label=name, zorder=2)
    chosen = (100 * found.int8_share, found.drop)
    axis.scatter(*chosen, s=160, facecolors="none", edgecolors=COLOURS[2], linewidths=2, label="chosen", zorder=3)
    if calibration.max_drop is not None:
        axis.axhline(
            calibration.max_drop, color=LIMIT, linewidth=1, linestyle="--", label=f"budget {calibration.max_drop:g}"
        )
    axis.margins(0.12, 0.15)
    axis.invert_yaxis()  # better is up, as in a picture of accuracy
    axis.set_xlabel("multiplications in INT8 (%)")
    axis.set_ylabel(f"points of {calibration.metric} lost")
    axis.legend(frameon=False)
    label_points(axis, points, [f"{i}. {step.action}" for i, step in enumerate(steps, 1)])
