"""Anchors, coding, suppression and pasting against slow versions written from the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dualtoken_deploy.tasks import boxes
from dualtoken_deploy.tasks.boxes import Array


def random_boxes(count: int, seed: int, side: float = 100.0) -> Array:
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, side * 0.8, (count, 2))
    return np.concatenate((low, low + rng.uniform(0.5, side * 0.4, (count, 2))), axis=1)


def slow_iou(a: Array, b: Array) -> float:
    """By counting: the share of a fine lattice of points that lie in both, of those that lie in either (integers)."""
    points = [(x, y) for x in range(40) for y in range(40)]

    def inside(box: Array, p: tuple[int, int]) -> bool:
        return bool(box[0] <= p[0] < box[2] and box[1] <= p[1] < box[3])

    both = sum(inside(a, p) and inside(b, p) for p in points)
    either = sum(inside(a, p) or inside(b, p) for p in points)
    return both / either if either else 0.0


def test_iou_is_the_share_of_common_points() -> None:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 25, (12, 2))
    integer = np.concatenate((low, low + rng.integers(0, 15, (12, 2))), axis=1)
    wanted = [[slow_iou(a, b) for b in integer] for a in integer]
    np.testing.assert_allclose(boxes.iou_matrix(integer, integer), wanted, rtol=1e-12)


def slow_suppress(given: Array, scores: Array, iou: float) -> list[int]:
    kept: list[int] = []
    for i in sorted(range(len(given)), key=lambda j: (-scores[j], j)):
        if all(boxes.iou_matrix(given[i : i + 1], given[k : k + 1])[0, 0] <= iou for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("iou", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_suppression_keeps_what_overlaps_no_better_one(iou: float, seed: int) -> None:
    given = random_boxes(60, seed)
    scores = np.round(np.random.default_rng(seed).random(60), 1)  # with ties
    assert boxes.suppress(given, scores, iou).tolist() == slow_suppress(given, scores, iou)


def test_suppression_by_class_lets_classes_overlap() -> None:
    rng = np.random.default_rng(4)
    given, scores, classes = random_boxes(80, 4), rng.random(80), rng.integers(0, 3, 80)
    kept = [
        i for c in range(3) for members in [np.flatnonzero(classes == c)]
        for i in members[slow_suppress(given[members], scores[members], 0.5)]
    ]  # fmt: skip
    wanted = sorted(kept, key=lambda i: -scores[i])
    assert boxes.suppress_by_class(given, scores, classes, 0.5, 1000).tolist() == wanted
    assert boxes.suppress_by_class(given, scores, classes, 0.5, 7).tolist() == wanted[:7]
    assert boxes.suppress_by_class(given[:0], scores[:0], classes[:0], 0.5, 7).tolist() == []


def test_coding_there_and_back() -> None:
    anchors, targets = random_boxes(50, 1), random_boxes(50, 2)
    back = boxes.decode(boxes.encode(targets, anchors), anchors, (1000, 1000))
    np.testing.assert_allclose(back, targets, rtol=1e-12)


def test_decoding_by_hand_and_its_bounds() -> None:
    anchor = np.array([[10.0, 20.0, 30.0, 60.0]])  # centre (20, 40), 20 wide, 40 high
    out = boxes.decode(np.array([[0.1, -0.2, np.log(2.0), np.log(0.5)]]), anchor, (1000, 1000))
    np.testing.assert_allclose(out, [[22 - 20, 32 - 10, 22 + 20, 32 + 10]], rtol=1e-12)
    huge = boxes.decode(np.array([[0.0, 0.0, 50.0, 50.0]]), anchor, (10**6, 10**6))
    assert huge[0, 2] - huge[0, 0] < 20 * 1000 / 16
    clipped = boxes.decode(np.array([[0.0, 0.0, 3.0, 3.0]]), anchor, (50, 25))
    assert clipped.tolist() == [[0, 0, 25, 50]]


def test_anchors_by_hand() -> None:
    anchors = boxes.make_anchors((2, 3), stride=8, scales=(4.0, 5.0), ratios=(0.5, 2.0))
    assert anchors.shape == (2 * 3 * 4, 4)
    sides = anchors[:, 2:] - anchors[:, :2]
    np.testing.assert_allclose(sides.prod(1).reshape(-1, 4), np.tile([32.0**2, 40.0**2, 32.0**2, 40.0**2], (6, 1)))
    np.testing.assert_allclose((sides[:, 1] / sides[:, 0]).reshape(-1, 4), np.tile([0.5, 0.5, 2, 2], (6, 1)))
    centres = ((anchors[:, :2] + anchors[:, 2:]) / 2).reshape(6, 4, 2)
    wanted = [(4 + 8 * c, 4 + 8 * r) for r in range(2) for c in range(3)]
    np.testing.assert_allclose(centres, np.repeat(np.array(wanted, float)[:, None], 4, axis=1))


def slow_paste(mask: Array, box: Array, size: tuple[int, int]) -> Array:
    """Pixel by pixel: bilinear between the four cells around it, cells outside of the mask are zero."""
    out = np.zeros(size)
    padded = np.pad(mask, 1)
    for r in range(size[0]):
        for c in range(size[1]):
            y = (r + 0.5 - box[1]) / (box[3] - box[1]) * mask.shape[0] - 0.5
            x = (c + 0.5 - box[0]) / (box[2] - box[0]) * mask.shape[1] - 0.5
            if not (-1 < y < mask.shape[0] and -1 < x < mask.shape[1]):
                continue
            i, j = int(np.floor(y)), int(np.floor(x))
            for a, b in itertools.product((0, 1), repeat=2):
                weight = (1 - abs(y - i - a)) * (1 - abs(x - j - b))
                out[r, c] += weight * padded[i + a + 1, j + b + 1]
    return out


@pytest.mark.parametrize("box", [(3.0, 2.0, 17.0, 12.0), (-4.5, 1.25, 9.0, 30.0), (5.0, 5.0, 6.0, 7.5)])
def test_pasting_pixel_by_pixel(box: tuple[float, ...]) -> None:
    mask = np.random.default_rng(0).random((7, 5))
    at = np.array(box)
    np.testing.assert_allclose(boxes.paste_mask(mask, at, (16, 20)), slow_paste(mask, at, (16, 20)), atol=1e-12)


def test_an_empty_box_pastes_nothing() -> None:
    assert not boxes.paste_mask(np.ones((4, 4)), np.array([5.0, 5.0, 5.0, 9.0]), (10, 10)).any()
