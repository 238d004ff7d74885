"""What is drawn: every text inside the picture, none over another, the same style in light and dark."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image, ImageDraw

from dualtoken_deploy.bench.report import BenchReport, Contestant, Ratio
from dualtoken_deploy.bundle.blocks import Calibration, SearchResult, Step
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.tasks.base import Found
from dualtoken_deploy.tasks.detect import FoundObject
from dualtoken_deploy.tasks.draw import colour, ink, paint_objects
from dualtoken_deploy.use import compare, diagnose, plots, visualize
from dualtoken_deploy.use.compare import Comparison, Row
from dualtoken_deploy.use.diagnose import Diagnosis, Drift
from dualtoken_deploy.use.plots import COLOURS, DARK_PAGE, LIGHT_PAGE, apart, save_figure

CAPTION = "dualtoken compare bundles/a bundles/b --data digits  AMD EPYC (x86_64: AVX2), 2 cores, 24 GiB, Python 3.11.7"


def trace(count: int) -> SearchResult:
    """Steps as close together as a search makes them."""
    steps = tuple(
        Step(f"stage{i % 3}.blocks.{i}.conv and {i} more in float", (), 2.4 / (i + 1), 12.0 + i, 0.93 + 0.006 * (i % 5))
        for i in range(count)
    )
    return SearchResult((), steps[-1].drop, 18.0, steps[-1].int8_share, True, 30.0, count, {}, steps)


CALIBRATION = Calibration(
    name="digits (train)", images=300, sha256="0", method="minmax", quantizer="qdq", metric="top1", max_drop=0.5
)


def layers(count: int, precision_db: float) -> Diagnosis:
    names = ["stem.conv1", *(f"stage{1 + i * 3 // count}.{i}.attention.query/MatMul" for i in range(count)), "head.fc"]
    drifts = tuple(Drift(name, "Conv", precision_db + 9 * (i % 7), 0.1, 1.0) for i, name in enumerate(names))
    return Diagnosis("bundles/t-mix-int8", "digits (val)", 4, 8.0, drifts, (), None, names[count // 2], 0)


def row(i: int, p50: float, drop: float) -> Row:
    return Row(
        f"bundles/{i}", ("onnxruntime", "openvino")[i % 2], ("fp32", "int8")[i // 2 % 2], 360, 0.98, drop, drop - 1.0,
        drop + 1.0, 40.0, 6.0 + 6 * (i % 3), 0.5, p50, Ratio(1.2, 1.1, 1.3), None, 0.9, "worth it",
    )  # fmt: skip


def contestant(one: Row) -> Contestant:
    assert one.p50_ms is not None
    rounds = (one.p50_ms * 0.9, one.p50_ms, one.p50_ms * 1.2)
    return Contestant(
        one.bundle, "bundle", one.target, one.precision, one.bundle, one.p50_ms, one.p50_ms, one.p50_ms, one.p50_ms, 9,
        rounds, 100.0, None, Ratio(1, 1, 1), None, None, None, 100.0, one.size_mib, 1, 1, "cpu",
    )  # fmt: skip


def comparison(*rows: Row) -> Comparison:
    machine = {
        "cpu": "EPYC", "architecture": "x86_64", "isa": ["AVX2"], "cores": 2, "memory_mib": 24576, "governor": None,
        "os": "Debian", "kernel": "Linux 6", "python": "3.11.7",
    }  # fmt: skip
    bench = BenchReport(machine, {}, "dualtoken bench", "eager", 1, 1, 3, 1.0, tuple(map(contestant, rows)), ())
    return Comparison("digits (val)", 360, "top1", 0.986, rows, bench)


def curves(epochs: int) -> list[dict[str, Any]]:
    return [
        {"epoch": i + 1, "train_loss": 2.3 / (i + 1), "val_loss": 2.4 / (i + 1), "top1": i / epochs}
        for i in range(epochs)
    ]


def patterns() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((4, 7, 7), dtype=np.float32)


PICTURES: dict[str, tuple[tuple[float, float], Callable[[Any], None]]] = {
    "search of 6": ((8, 4.5), lambda f: plots.fill_search(f, CALIBRATION, trace(6))),
    "search of 12": ((8, 4.5), lambda f: plots.fill_search(f, CALIBRATION, trace(12))),
    "diagnosis": ((11, 4.2), lambda f: diagnose.fill(f, layers(60, 4.0))),
    "diagnosis of fp32": ((11, 4.2), lambda f: diagnose.fill(f, replace(layers(60, 90.0), threshold_db=80.0))),
    "compare": ((8, 4.8), lambda f: compare.fill(f, comparison(*(row(i, 4.0 + i, i / 2) for i in range(6))))),
    "compare alike": ((8, 4.8), lambda f: compare.fill(f, comparison(*(row(i, 5.0, 0.0) for i in range(4))))),
    "compare of none": ((8, 4.8), lambda f: compare.fill(f, comparison())),
    "curves": ((9, 3.6), lambda f: plots.fill_curves(f, curves(7), ("top1",))),
    "curve of one epoch": ((9, 3.6), lambda f: plots.fill_curves(f, curves(1), ("top1",))),
    "confusion": (
        (5.4, 5.4),
        lambda f: plots.fill_confusion(f, np.eye(10, dtype=int) * 9, [f"class {i}" for i in range(10)]),
    ),
    "visualize": ((16, 4.4), lambda f: visualize._draw(f, np.zeros((64, 64, 3), np.uint8), patterns(), (2, 2))),
}


def made(name: str) -> Any:
    size, fill = PICTURES[name]
    figure = plots.make_figure(size, fill, f"A title of the picture {name}, as long as titles are", CAPTION)
    figure.draw_without_rendering()
    return figure


def drawn(figure: Any) -> Iterator[tuple[str, tuple[float, float, float, float]]]:
    """Each text that is seen with its place in pixels; labels of ticks beyond an axis are not."""
    renderer, beyond = figure.canvas.get_renderer(), set[int]()
    for line in (line for axis in figure.axes for line in (axis.xaxis, axis.yaxis)):
        low, high = sorted(line.get_view_interval())
        slack = 1e-6 * (high - low)
        out = [tick for tick in line.get_major_ticks() if not low - slack <= tick.get_loc() <= high + slack]
        beyond |= {id(text) for tick in out for text in (tick.label1, tick.label2)}
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible() and id(text) not in beyond:
            box = text.get_window_extent(renderer)
            yield text.get_text(), (box.x0 + 0.5, box.y0 + 0.5, box.x1 - 0.5, box.y1 - 0.5)


@pytest.mark.parametrize("name", PICTURES)
def test_every_text_is_in_the_picture_and_none_is_over_another(name: str) -> None:
    figure = made(name)
    width, height = figure.bbox.width, figure.bbox.height
    texts = list(drawn(figure))
    assert len(texts) >= 3
    for text, box in texts:
        assert box[0] >= -1, text
        assert box[1] >= -1, text
        assert box[2] <= width + 1, text
        assert box[3] <= height + 1, text
    for (one, first), (two, second) in itertools.combinations(texts, 2):
        assert apart(first, second), (one, two)


@pytest.mark.parametrize("name", ["$\\frac$", "a$_$", "\x1b[31mred", "x" * 300, "\u732b", "<script>"])
@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.filterwarnings("error")
def test_names_of_others_are_drawn_as_they_are(name: str, suffix: str, tmp_path: Path) -> None:
    """Not as TeX, which fails on most of what has two dollars; not as markup; and no library warns on the screen."""
    counts, file = np.eye(2, dtype=np.int64), tmp_path / f"confusion.{suffix}"
    plots.plot_confusion(counts, [name, "cat"], file, name, name)
    figure = plots.make_figure((4, 4), lambda one: plots.fill_confusion(one, counts, [name, "cat"]), name, name)
    texts = [text.get_text() for text in figure.findobj(Text)]
    assert any(text.startswith((name[:30], "\\x1b[31mred")) for text in texts)
    if suffix == "svg":
        assert "<script>" not in file.read_text("utf-8")


def test_labels_that_do_not_fit_are_left_out() -> None:
    """A hundred long labels at one place: as many as there is room for, and still none over another."""

    def fill(figure: Any) -> None:
        axis = figure.subplots()
        axis.scatter([1] * 100, [1] * 100)
        written.extend(plots.label_points(axis, [(1, 1)] * 100, ["a label that is rather long"] * 100))

    written: list[Any] = []
    figure = plots.make_figure((4, 3), fill)
    figure.draw_without_rendering()
    boxes = [note.get_window_extent() for note in written]
    assert 1 <= len(boxes) < 100
    assert all(apart(a.extents, b.extents) for a, b in itertools.combinations(boxes, 2))


def test_what_the_pictures_show() -> None:
    search = made("search of 6").axes[0]
    assert search.yaxis_inverted()
    (ring,) = [c for c in search.collections if c.get_label() == "chosen"]
    assert ring.get_offsets()[0].tolist() == pytest.approx([100 * trace(6).int8_share, trace(6).drop])
    drift = made("diagnosis of fp32").axes[0]
    assert max(max(line.get_ydata()) for line in drift.lines) <= 60  # clipped
    stages = {label.get_text() for label in made("diagnosis").axes[0].get_legend().get_texts()}
    assert {"stem", "stage1", "stage2", "stage3", "threshold 8 dB"} <= stages
    shown = compare.marks(comparison(row(0, 5.0, 1.0)))
    assert shown[0].p50 == pytest.approx((5.0, 4.5, 6.0))
    assert shown[0].value == pytest.approx((97.6, 96.6, 98.6))
    legend = {label.get_text() for label in made("compare").axes[0].get_legend().get_texts()}
    assert {"eager", "6 MiB", "20 MiB"} <= legend
    for name in ("curves", "curve of one epoch"):
        for axis in made(name).axes:
            ticks = [t for t in axis.get_xticks() if axis.get_xlim()[0] <= t <= axis.get_xlim()[1]]
            assert ticks
            assert all(float(t).is_integer() for t in ticks)


@pytest.mark.parametrize(("name", "page"), [("p.svg", LIGHT_PAGE), ("p-dark.svg", DARK_PAGE)])
def test_a_picture_is_light_or_dark_by_its_name(name: str, page: plots.Page, tmp_path: Path) -> None:
    size, fill = PICTURES["curves"]
    save_figure(tmp_path / name, size, fill, "Training", CAPTION)
    svg = (tmp_path / name).read_text()
    assert page.paper in svg
    assert "Training" in svg  # text stays text
    assert "Python 3.11.7" in svg
    save_figure(tmp_path / f"again-{name}", size, fill, "Training", CAPTION)
    png = tmp_path / name.replace(".svg", ".png")
    save_figure(png, size, fill, "Training", CAPTION)
    with Image.open(png) as picture:
        corner = picture.convert("RGB").getpixel((picture.width - 2, 2))
    assert corner == tuple(int(page.paper[i : i + 2], 16) for i in (1, 3, 5))


def test_the_colours_are_told_apart_without_red_and_green() -> None:
    """Simulated as Viénot, Brettel and Mollon 1999 do for deuteranopes and protanopes, in linear RGB."""

    def linear(text: str) -> np.ndarray[Any, Any]:
        values = np.array([int(text[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)

    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    protan = np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]])
    deutan = np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]])
    for blind in (protan, deutan):
        seen = [np.linalg.inv(to_lms) @ blind @ to_lms @ linear(c) for c in COLOURS[:4]]
        for one, two in itertools.combinations(seen, 2):
            assert np.abs(one - two).max() > 0.08


# boxes


def test_boxes_are_thick_and_their_labels_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the edges too: labels stay in the picture, in letters of 13 pixels at least, and stand out."""
    places: list[tuple[float, float, float, float]] = []
    real = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], words: str, **more: Any) -> None:
        places.append(self.textbbox(xy, words, font=more["font"], anchor=more["anchor"]))
        assert more["font"].size >= 13
        real(self, xy, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    boxes = [(0, 0, 40, 30), (290, 2, 320, 60), (100, 100, 180, 170), (270, 200, 319, 239)]
    answers = [FoundObject(i, "a rather long name", 0.9, tuple(map(float, b))) for i, b in enumerate(boxes)]  # type: ignore[arg-type]
    found = Found(boxes=Objects(np.array(boxes, float), np.arange(4), np.full(4, 0.9)))
    picture = paint_objects(np.full((240, 320, 3), 128, np.uint8), found, answers)
    assert len(places) == 4
    for left, top, right, bottom in places:
        assert left >= 0
        assert top >= 0
        assert right <= 320
        assert bottom <= 240
    column = picture[135, 98:106]  # across the left side of the third box
    assert (np.abs(column.astype(int) - np.array(colour(2))).sum(1) < 10).sum() >= 2
    for index in range(80):
        luminance = [(c / 255) ** 2.2 for c in colour(index)]
        bright = 0.2126 * luminance[0] + 0.7152 * luminance[1] + 0.0722 * luminance[2]
        other = 0.0 if ink(colour(index)) == "black" else 1.0
        assert (max(bright, other) + 0.05) / (min(bright, other) + 0.05) > 4.3
