"""Pictures with what is true of them, whatever a task needs; sets of them are read one at a time. No torch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.errors import DatasetError, ImageError, Note, UsageError


@dataclass(frozen=True)
class Sample:
    """`image` uint8 (H, W, 3). Of a class folder `label`; of objects `boxes` and, where the set has them, `masks`: the
    same objects; of a label map `label_map` uint8 (H, W) of indices into the set's labels, IGNORE where there is none.
    Of a time series, in place of a picture, `series` (T, M) that was seen and `future` (F, M), the steps that followed.
    None: the set does not say."""

    image: NDArray[np.uint8]
    label: int | None = None
    boxes: Objects | None = None
    masks: Objects | None = None
    label_map: NDArray[np.uint8] | None = None
    series: NDArray[np.float32] | None = None
    future: NDArray[np.float32] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the picture, or (T, M) of the series."""
        height, width = self.image.shape[:2] if self.series is None else self.series.shape
        return height, width

    @property
    def truth(self) -> Sample:
        """The same without its pixels, for what is kept of a whole set; of a series its last step is kept."""
        last = None if self.series is None else self.series[-1:]
        return replace(self, image=np.zeros((0, 0, 3), np.uint8), series=last)


class Reader(Protocol):
    """Makes the samples of a set; `paths` are their pictures, empty where they are generated."""

    @property
    def paths(self) -> Sequence[Path]: ...
    def __call__(self, index: int) -> Sample: ...


@dataclass(frozen=True)
class SampleSet:
    """Samples for one task. `labels`: the classes of the truth, None where nothing is known of the pictures.
    `read(i)` makes sample i; `digest` says whether two sets are the same; `notes` what was left out and why."""

    name: str
    labels: tuple[str, ...] | None
    read: Reader
    indices: tuple[int, ...]
    digest: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        return self.read(self.indices[index])

    def where(self, index: int) -> str:
        """What sample `index` is called: its picture's path, or the set and its number."""
        paths = self.read.paths
        return str(paths[self.indices[index]]) if paths else f"{self.name} {self.indices[index]}"

    def limit(self, count: int) -> SampleSet:
        """At most `count` samples, spread evenly over the set. Raises UsageError on a count below 1."""
        if count < 1:
            raise UsageError(f"a limit of {count} images leaves none; give at least 1")
        total = len(self)
        if count >= total:
            return self
        return replace(self, indices=tuple(self.indices[i * total // count] for i in range(count)))

    def without(self, other: SampleSet) -> SampleSet:
        """The samples of this set that `other`, a part of it, does not have."""
        taken = set(other.indices)
        return replace(self, indices=tuple(i for i in self.indices if i not in taken))


MOST_UNREADABLE = 0.5  # of a set; training has the same bound


def left_out(data: SampleSet, unreadable: Sequence[str]) -> None:
    """Says which pictures of a set were left out. Raises DatasetError where they are more than half of it."""
    if not unreadable:
        return
    said = f"{len(unreadable)} of {len(data)} pictures of {data.name} cannot be read"
    if len(unreadable) > MOST_UNREADABLE * len(data):
        raise DatasetError(f"{said} ({unreadable[0]} is one); save them again, or take other data")
    more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
    warnings.warn(f"{said} and are left out: {', '.join(unreadable[:3])}{more}", Note, stacklevel=3)


def readable(data: SampleSet) -> SampleSet:
    """The set without the pictures that cannot be decoded, which are named in a Note; each is decoded once for it.

    Raises DatasetError where more than half cannot.
    """
    if not data.read.paths:
        return data
    bad = [i for i in range(len(data)) if read_or_none(data, i) is None]
    left_out(data, [data.where(i) for i in bad])
    missing = set(bad)
    return replace(data, indices=tuple(index for i, index in enumerate(data.indices) if i not in missing))


def read_or_none(data: SampleSet, index: int) -> Sample | None:
    """Sample `index`, or None where its picture cannot be decoded; what is wrong with its truth still raises."""
    try:
        return data[index]
    except ImageError:
        return None
