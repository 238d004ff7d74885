"""Draws docs/images/pipeline.svg, the picture at the head of README: from a model to a device, with what is proved at
each step.

    python benchmarks/readme_picture.py

Plain SVG: text stays text, colours follow the reader's light or dark scheme, the same bytes every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

FILE = Path(__file__).resolve().parent.parent / "docs" / "images" / "pipeline.svg"
BOX, GAP, TOP, HIGH, MARGIN = 170, 34, 18, 78, 12  # pixels
TITLE, SMALL, LINE = 16, 12, 16
PROVED = TOP + HIGH + 34

STYLE = """
text { font-family: system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; fill: #1b1f24; }
.title { font-size: 16px; font-weight: 600; }
.small { font-size: 12px; }
.said { font-size: 12px; fill: #00583f; }
.box { fill: #f2f5f8; stroke: #0072b2; stroke-width: 1.5; }
.last { stroke: #009e73; stroke-width: 2.5; }
.arrow { stroke: #57606a; stroke-width: 1.5; fill: none; }
.head { fill: #57606a; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; } .said { fill: #5fd3b3; } .box { fill: #161b22; stroke: #56b4e9; }
  .last { stroke: #5fd3b3; } .arrow { stroke: #9aa4af; } .head { fill: #9aa4af; }
}
"""


@dataclass(frozen=True)
class Stage:
    title: str
    lines: tuple[str, ...]  # what it is
    proved: tuple[str, ...]  # what is proved on the way to it


STAGES = (
    Stage("model", ("PyTorch, yours", "or one of ours"), ("read only:", "its code is not changed")),
    Stage("deploy form", ("exact rewrites", "for the target"), ("equal to the model", "in float64")),
    Stage(
        "file",
        ("fp32, fp16, INT8", "by the vendor's tools"),
        ("run here against the", "model on photographs;", "INT8: loss on held-out", "pictures in budget"),
    ),
    Stage(
        "bundle",
        ("file, manifest,", "golden, labels"),
        ("a hash for each file,", "what executes in", "which precision"),
    ),
    Stage(
        "device",
        ("runtime of the", "vendor, no torch"),
        ("golden: a stored input,", "the same answers", "as PyTorch gave"),
    ),
)


@dataclass(frozen=True)
class Words:
    """A piece of text where it is drawn, its middle at x, its base line at y."""

    x: float
    y: float
    size: int
    text: str
    kind: str


def width() -> int:
    return 2 * MARGIN + len(STAGES) * BOX + (len(STAGES) - 1) * GAP


def height() -> int:
    return PROVED + LINE * max(len(stage.proved) for stage in STAGES)


def left_of(index: int) -> int:
    return MARGIN + index * (BOX + GAP)


def words() -> list[Words]:
    """Every piece of text."""
    out = []
    for i, stage in enumerate(STAGES):
        middle = left_of(i) + BOX / 2
        out.append(Words(middle, TOP + 26, TITLE, stage.title, "title"))
        out += _lines(stage.lines, middle, TOP + 48, "small")
        out += _lines(stage.proved, middle, PROVED, "said")
    return out


def _lines(lines: Sequence[str], x: float, y: float, kind: str) -> list[Words]:
    return [Words(x, y + LINE * i, SMALL, text, kind) for i, text in enumerate(lines)]


def draw() -> str:
    """The whole picture."""
    said = "From a model to a device: model, deploy form, file, bundle, device, with what is proved at each step"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width()} {height()}" role="img" aria-label="{said}">',
        f"<title>{said}</title><style>{STYLE}</style>",
    ]
    for i in range(len(STAGES)):
        kind = "box last" if i == len(STAGES) - 1 else "box"
        out.append(f'<rect class="{kind}" x="{left_of(i)}" y="{TOP}" width="{BOX}" height="{HIGH}" rx="8"/>')
        if i:
            start, end, y = left_of(i) - GAP + 4, left_of(i) - 5, TOP + HIGH / 2
            out.append(f'<path class="arrow" d="M{start} {y}H{end - 6}"/>')
            out.append(f'<path class="head" d="M{end} {y}l-8 -5v10z"/>')
    out += [
        f'<text class="{w.kind}" x="{w.x:g}" y="{w.y:g}" text-anchor="middle">{escape(w.text)}</text>' for w in words()
    ]
    return "\n".join([*out, "</svg>", ""])


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(draw(), encoding="utf-8")
    print(FILE)
