"""An annotation file in COCO's format, and everything that is made of one: boxes, masks, label maps."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from pathlib import Path

from hypothesis import strategies as st
from PIL import Image

from dualtoken_deploy.data.annotated import MAPS, OBJECTS, open_annotated
from dualtoken_deploy.errors import DualTokenError
from tests.fuzz.inputs import edited
from tests.fuzz.place import folder

TOKENS = [
    *(b"null", b"-1", b"1e999", b"{}", b"[]", b"[[]]", b"NaN", b'"\\ud800"', b"true", b'"../../a.png"', b"9" * 400),
    *(b"[" * 2000, b"1e308", b"-0.5", b'"counts": "oooo"', b'"size": []', b"0"),
]


def seeds() -> list[bytes]:
    """Polygons, run lengths packed and plain, a crowd, an instance without a segmentation."""
    images = [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    one = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 4, 3]}
    shapes: list[object] = [
        [[1, 1, 5, 1, 5, 4, 1, 4]],
        {"size": [6, 8], "counts": [12, 3, 3, 3, 27]},
        {"size": [6, 8], "counts": "<3300K"},
        None,
    ]
    entries = [{**one, "id": i, "segmentation": shape, "iscrowd": i % 2} for i, shape in enumerate(shapes)]
    return [
        json.dumps({"images": images, "categories": categories, "annotations": part}).encode()
        for part in (entries[:1], entries[1:2], entries[2:3], entries, entries[3:])
    ]


@cache
def _place() -> Path:
    place = folder("coco")
    (place / "annotations").mkdir()
    (place / "val").mkdir()
    Image.new("RGB", (8, 6)).save(place / "val" / "a.png")
    return place


def one(data: bytes) -> None:
    """Raises nothing but DualTokenError."""
    (_place() / "annotations" / "val.json").write_bytes(data)
    for truth in (OBJECTS, MAPS):
        found = open_annotated(_place(), truth)
        for index in range(min(2, len(found.indices))):
            found.read(index)


CASES = edited(seeds(), TOKENS) | st.binary(max_size=200)


def check(data: bytes) -> None:
    """Raises where the readers raise what they may not."""
    with suppress(DualTokenError):
        one(data)
