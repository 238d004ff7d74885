"""Charts as SVG text that takes the page's colours; what they show stands in the tables beside them too."""

from __future__ import annotations

from html import escape

from dualtoken_deploy.prove.document import Bars, Points

WIDTH, LEFT, RIGHT = 640, 190, 110
ROW, TOP = 30, 26
HEIGHT, BOTTOM, MARGIN, HEAD = 280, 54, 60, 32  # room for text that a phone shows larger


def bars(chart: Bars) -> str:
    """Horizontal bars with their intervals as whiskers."""
    most = max([b.high for b in chart.bars] + ([chart.at[0]] if chart.at else [])) or 1.0
    scale = (WIDTH - LEFT - RIGHT) / most
    height = TOP + ROW * len(chart.bars) + 10
    parts = [_open(height, chart.title, "bars")]
    for number, bar in enumerate(chart.bars):
        y = TOP + ROW * number
        middle, end = y + ROW / 2, LEFT + scale * bar.value
        low, high = LEFT + scale * bar.low, LEFT + scale * bar.high
        parts += [
            f'<text x="{LEFT - 8}" y="{middle + 4:.1f}" text-anchor="end">{escape(_short(bar.label))}</text>',
            f'<rect class="bar" x="{LEFT}" y="{y + 6}" width="{max(end - LEFT, 1):.1f}" height="{ROW - 12}" rx="3"/>',
            f'<path class="line" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {middle - 5:.1f}v10'
            f'M{high:.1f} {middle - 5:.1f}v10"/>',
            f'<text x="{high + 8:.1f}" y="{middle + 4:.1f}">{bar.value:.3g} {escape(chart.unit)}</text>',
        ]
    if chart.at is not None:
        x = LEFT + scale * chart.at[0]
        parts += [
            f'<path class="at" d="M{x:.1f} {TOP}V{height}"/>',
            f'<text x="{x:.1f}" y="{TOP - 8}" text-anchor="middle" class="small">{escape(chart.at[1])}</text>',
        ]
    return "".join([*parts, "</svg>"])


def points(chart: Points) -> str:
    """Points joined in their order, over both axes' ranges."""
    xs, ys = [p[0] for p in chart.points], [p[1] for p in chart.points]
    if chart.at is not None:
        ys.append(chart.at[0])
    (left, right), (low, high) = _range(xs), _range(ys)
    across, up = (WIDTH - MARGIN - 20) / (right - left), (HEIGHT - BOTTOM - HEAD) / (high - low)

    def place(x: float, y: float) -> tuple[float, float]:
        return MARGIN + across * (x - left), HEIGHT - BOTTOM - up * (y - low)

    spots = [place(x, y) for x, y, _ in chart.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots)
    parts = [
        _open(HEIGHT, chart.title, "points"),
        f'<path class="axis" d="M{MARGIN} {HEAD}V{HEIGHT - BOTTOM}H{WIDTH - 20}"/>',
        f'<path class="line" d="{path}"/>',
        *(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{escape(said)}</title></circle>'
            for (x, y), (_, _, said) in zip(spots, chart.points, strict=True)
        ),
        f'<text x="{MARGIN}" y="{HEAD - 12}" class="small">{escape(chart.y)}</text>',
        f'<text x="{WIDTH - 20}" y="{HEIGHT - 6}" text-anchor="end" class="small">{escape(chart.x)}</text>',
        *(
            f'<text x="{MARGIN - 6}" y="{place(left, y)[1] + 4:.1f}" text-anchor="end" class="small">{y:.3g}</text>'
            for y in _ends([p[1] for p in chart.points])
        ),
        *(
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" class="small">{value:.3g}</text>'
            for value, x in ((value, place(value, low)[0]) for value in _ends(xs))
        ),
    ]
    if chart.at is not None:
        _, y = place(left, chart.at[0])
        parts += [
            f'<path class="at" d="M{MARGIN} {y:.1f}H{WIDTH - 20}"/>',
            f'<text x="{WIDTH - 20}" y="{y - 5:.1f}" text-anchor="end" class="small">{escape(chart.at[1])}</text>',
        ]
    return "".join([*parts, "</svg>"])


def _ends(values: list[float]) -> list[float]:
    """The least and the greatest, which the axes name: figures that were measured, and no others."""
    return sorted({min(values), max(values)})


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 1.0
    return low - room, high + room


def _open(height: int, title: str, kind: str) -> str:
    name, box = escape(title, quote=True), f"0 0 {WIDTH} {height}"
    return f'<svg class="{kind}" viewBox="{box}" role="img" aria-label="{name}" xmlns="http://www.w3.org/2000/svg">'


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:27]}…"
