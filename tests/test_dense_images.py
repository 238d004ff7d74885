"""Stretching a picture to a model's size, and boxes and label maps there and back."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy.data.stretch import boxes_to_model, boxes_to_picture, resize_map, stretch


@pytest.mark.parametrize("size", [(64, 64), (96, 128), (300, 200)])
def test_an_objects_box_is_where_the_object_is(size: tuple[int, int]) -> None:
    """A bright rectangle is stretched with its picture: its box, scaled, surrounds what is bright now."""
    image = np.zeros((120, 240, 3), np.uint8)
    image[30:60, 80:200] = 255
    prepared, scale = stretch(image, size)
    assert prepared.shape == (*size, 3)
    assert prepared.dtype == np.uint8
    x1, y1, x2, y2 = boxes_to_model(np.array([[80, 30, 200, 60]]), scale)[0]
    rows, columns = (np.flatnonzero((prepared[..., 0] > 127).any(axis)) for axis in (1, 0))
    np.testing.assert_allclose((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), (x1, y1, x2, y2), atol=0.51)
    np.testing.assert_allclose(boxes_to_picture(np.array([[x1, y1, x2, y2]]), scale), [[80, 30, 200, 60]], rtol=1e-12)


def test_a_picture_of_the_right_size_is_left_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    prepared, scale = stretch(image, (64, 96))
    assert (prepared == image).all()
    assert scale == (1.0, 1.0)


@pytest.mark.parametrize("size", [(10, 7), (64, 33), (5, 40)])
def test_a_label_map_is_resized_as_pillow_does_with_nearest(size: tuple[int, int]) -> None:
    labels = np.random.default_rng(1).integers(0, 5, (23, 31), dtype=np.uint8)
    wanted = np.array(Image.fromarray(labels).resize((size[1], size[0]), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(resize_map(labels, size), wanted)
