"""Generated scenes: boxes, masks and label maps agree with one another and with the seed."""

from __future__ import annotations

import numpy as np
import pytest

from dualtoken_deploy.data.scenes import CLASSES, SEEN, make_scene
from dualtoken_deploy.tasks.metrics import average_precision, mean_iou


@pytest.mark.parametrize("seed", range(12))
def test_boxes_masks_and_labels_say_the_same(seed: int) -> None:
    scene = make_scene(seed, (80, 112))
    assert scene.image.shape == (80, 112, 3)
    assert (scene.masks.shapes.sum(0) <= 1).all()  # a pixel shows one shape
    for box, mask, kind in zip(scene.boxes.shapes, scene.masks.shapes, scene.masks.classes, strict=True):
        inside = np.zeros((80, 112), bool)
        inside[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
        assert not (mask & ~inside).any()
        assert mask.sum() >= SEEN
        assert mask[int(box[1])].any()
        assert mask[int(box[3]) - 1].any()
        assert mask[:, int(box[0])].any()
        assert mask[:, int(box[2]) - 1].any()
        assert (scene.labels[mask] == kind + 1).all()


def test_a_seed_is_a_scene_and_all_classes_come() -> None:
    again, other = make_scene(3), make_scene(4)
    assert (make_scene(3).image == again.image).all()
    assert (other.image != again.image).any()
    kinds = np.concatenate([make_scene(s).boxes.classes for s in range(60)])
    assert set(kinds) == set(range(len(CLASSES)))


def test_the_truth_is_perfect_by_both_measures() -> None:
    scenes = [make_scene(s) for s in range(10)]
    for kind in ("boxes", "masks"):
        truth = [getattr(s, kind) for s in scenes]
        found = [type(t)(t.shapes, t.classes, np.ones(len(t.classes))) for t in truth]
        assert average_precision(truth, found)["ap"] == 1.0
    assert mean_iou([s.labels for s in scenes], [s.labels for s in scenes], 5) == 1.0
