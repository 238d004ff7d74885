"""Folders of pictures as samples, read one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dualtoken_deploy.data.folders import ImageSet, open_dataset
from dualtoken_deploy.data.images import load_image
from dualtoken_deploy.data.samples import Sample, SampleSet


@dataclass(frozen=True)
class _PictureReader:
    images: ImageSet

    @property
    def paths(self) -> tuple[Path, ...]:
        return self.images.images

    def __call__(self, index: int) -> Sample:
        labels = self.images.labels
        return Sample(load_image(self.images.images[index]), None if labels is None else labels[index])


def open_pictures(source: str | Path, part: str = "val") -> SampleSet:
    """What open_dataset names, as samples: pictures with their class where there are class folders."""
    images = open_dataset(source, part)
    return SampleSet(images.name, images.classes, _PictureReader(images), tuple(range(len(images))), images.digest())
