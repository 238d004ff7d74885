"""What a report says, before it is HTML or Markdown: sections of text, tables and charts, all of them plain text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """`columns` over `rows` of as many cells; the first column is what a row is about."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bar:
    """A bar with the interval that it was measured in."""

    label: str
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bars:
    """A chart of bars; `unit` stands behind each value. `at`: a line that they are held against, and its name."""

    title: str
    bars: tuple[Bar, ...]
    unit: str
    at: tuple[float, str] | None = None


@dataclass(frozen=True)
class Points:
    """A chart of points in the order of their making. `at`: a horizontal line, and its name."""

    title: str
    x: str
    y: str
    points: tuple[tuple[float, float, str], ...]
    at: tuple[float, str] | None = None


Block = str | Table | Bars | Points


@dataclass(frozen=True)
class Section:
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Document:
    """`lead` is one sentence under the title."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and what they are."""
    return Table(("", ""), tuple(rows))
