"""Dense heads against the paper's counts, shapes, and definitions written as loops."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.count import count_macs
from dualtoken_deploy.models.heads.mask_rcnn import BOX_SIDE, MASK_SIDE, MaskRCNN, roi_align
from dualtoken_deploy.models.heads.retinanet import RetinaNet
from dualtoken_deploy.models.heads.table import HEADS, create_dense_model, describe_heads
from dualtoken_deploy.models.listing import shipped
from dualtoken_deploy.tasks.anchors import anchors, detect
from dualtoken_deploy.tasks.boxes import decode, iou_matrix
from tests.commands import prints
from tests.numerics import assert_close

SMALL: dict[str, Any] = {"variant": "tiny-mix", "classes": 4}


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, Any]]:
    return {row["head"]: row for row in describe_heads()}


@pytest.mark.parametrize("head", HEADS)
def test_parameters_are_the_papers(head: str, counted: dict[str, dict[str, Any]]) -> None:
    # 0.5 %, which is the accuracy of three printed digits and a little more
    assert counted[head]["params"] / 1e6 == pytest.approx(HEADS[head].paper_params_m, rel=0.005)


@pytest.mark.parametrize(("head", "off"), [("retinanet", 0.05), ("deeplabv3", 0.05), ("pspnet", 0.17)])
def test_macs_are_the_papers(head: str, off: float, counted: dict[str, dict[str, Any]]) -> None:
    """PSPNet's are missed: docs/models-family.md."""
    assert counted[head]["macs"] / 1e9 == pytest.approx(HEADS[head].paper_macs_g, rel=off)


def test_mask_rcnns_regions_by_hand(counted: dict[str, dict[str, Any]]) -> None:
    with torch.device("meta"):
        model = create_dense_model("mask-rcnn")
    boxes = 256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320)
    masks = 4 * 256 * 256 * 9 * 196 + 256 * 256 * 4 * 196 + 256 * 80 * 784
    whole = count_macs(model, (800, 1280)) + 1000 * boxes + 100 * masks
    assert counted["mask-rcnn"]["macs"] == whole


def test_the_command_prints_the_heads(capsys: pytest.CaptureFixture[str], counted: dict[str, dict[str, Any]]) -> None:
    assert prints(capsys, "models", "--heads", "--json") == list(counted.values())
    assert shipped("heads") == list(counted.values()), "python -m dualtoken_deploy.models.listing"


@pytest.mark.parametrize("size", [(64, 64), (97, 150)])
def test_retinanet_has_an_anchor_for_every_output(size: tuple[int, int]) -> None:
    model = create_dense_model("retinanet", **SMALL)
    with torch.no_grad():
        logits, deltas = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, len(anchors(size)), 4)
    assert deltas.shape == (2, len(anchors(size)), 4)


def test_retinanets_outputs_are_in_the_anchors_order() -> None:
    """One cell of one level is disturbed: only the outputs of the anchors centred near it move."""
    model = create_dense_model("retinanet", **SMALL)
    assert isinstance(model, RetinaNet)
    maps = [torch.zeros(1, 256, 8, 12), torch.zeros(1, 256, 4, 6)]
    one = model.box_tower.predict
    assert one.bias is not None
    with torch.no_grad():
        for conv in model.box_tower.convs:
            conv.get_parameter("bias").zero_()
        maps[0][0, :, 5, 9] = 1.0
        out = model.box_tower(maps[0]).permute(0, 2, 3, 1).reshape(-1, 4) - one.bias.reshape(9, 4).repeat(8 * 12, 1)
    moved = out.abs().amax(1) > 0
    centres = (anchors((64, 96))[: 8 * 12 * 9, :2] + anchors((64, 96))[: 8 * 12 * 9, 2:]) / 2
    reach = np.abs(centres - np.array([9.5 * 8, 5.5 * 8])).max(1)
    assert moved.any()
    assert reach[moved.numpy()].max() <= 5 * 8  # five 3x3 convolutions


@pytest.mark.parametrize("head", ["deeplabv3", "pspnet"])
@pytest.mark.parametrize("size", [(64, 64), (70, 101)])
def test_segmenters_give_logits_for_every_pixel(head: str, size: tuple[int, int]) -> None:
    model = create_dense_model(head, **SMALL)
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).shape == (1, 4, *size)
        main, auxiliary = model.train()(torch.randn(2, 3, *size))
    assert main.shape == auxiliary.shape == (2, 4, *size)


@pytest.mark.parametrize(("stride", "side"), [(4, BOX_SIDE), (8, MASK_SIDE)])
def test_roi_align_reads_by_reading(stride: int, side: int) -> None:
    torch.manual_seed(0)
    features = torch.randn(3, 10, 14, dtype=torch.float64)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 25.5], [0.0, 0.0, 14.0 * stride, 10.0 * stride], [9.0, 9.0, 9.5, 20.0]])
    boxes = boxes.double()
    wanted = torch.zeros(3, 3, side, side, dtype=torch.float64)
    for r, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        for i in range(side):
            for j in range(side):
                for a in (0.25, 0.75):
                    for b in (0.25, 0.75):
                        y = (y1 + (i + a) * (y2 - y1) / side) / stride - 0.5
                        x = (x1 + (j + b) * (x2 - x1) / side) / stride - 0.5
                        y, x = min(max(y, 0.0), 9.0), min(max(x, 0.0), 13.0)
                        top, left = min(int(y), 8), min(int(x), 12)
                        for p, q in ((0, 0), (0, 1), (1, 0), (1, 1)):
                            weight = (1 - abs(y - top - p)) * (1 - abs(x - left - q))
                            wanted[r, :, i, j] += weight * features[:, top + p, left + q] / 4
    assert_close(roi_align(features, boxes, stride, side), wanted, relative=1e-10)


def test_mask_rcnn_has_levels_of_strides_4_to_64_and_heads_on_them() -> None:
    model = create_dense_model("mask-rcnn", **SMALL)
    assert isinstance(model, MaskRCNN)
    with torch.no_grad():
        levels, proposals = model(torch.randn(1, 3, 96, 128))
        assert [tuple(x.shape[2:]) for x in levels] == [(24, 32), (12, 16), (6, 8), (3, 4), (2, 2)]
        assert [o.shape[1] + d.shape[1] for o, d in proposals] == [3 + 12] * 5
        rois = torch.tensor([[4.0, 4.0, 60.0, 50.0], [10.0, 0.0, 128.0, 96.0]])
        scores, deltas = model.boxes(roi_align(levels[0][0], rois, 4, BOX_SIDE))
        assert (scores.shape, deltas.shape) == ((2, 5), (2, 4, 4))
        assert model.masks(roi_align(levels[0][0], rois, 4, MASK_SIDE)).shape == (2, 4, 28, 28)


def test_an_unknown_head_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="retinanet, mask-rcnn, deeplabv3, pspnet"):
        create_dense_model("yolo")


# --- detections ---


def test_detections_by_the_definitions() -> None:
    """Every score above the bound, best first, unless a better box of its class overlaps it by more than a half."""
    size, rng = (64, 64), np.random.default_rng(0)
    grid = anchors(size)
    logits = rng.normal(-3.0, 1.5, (len(grid), 3))
    deltas = rng.normal(0.0, 0.3, (len(grid), 4))
    found = detect(logits, deltas, size, limit=10**6)
    wanted: list[tuple[float, int, np.ndarray[Any, Any]]] = []
    ranked = sorted(((1 / (1 + np.exp(-logits[a, c])), a, c) for a in range(len(grid)) for c in range(3)), reverse=True)
    for score, a, c in [r for r in ranked if r[0] > 0.05][:1000]:
        (box,) = decode(deltas[a : a + 1], grid[a : a + 1], size)
        if all(k != c or iou_matrix(box[None], b[None])[0, 0] <= 0.5 for _, k, b in wanted):
            wanted.append((score, c, box))
    assert found.classes.tolist() == [c for _, c, _ in wanted]
    np.testing.assert_allclose(found.scores, [s for s, _, _ in wanted], rtol=1e-12)
    np.testing.assert_allclose(found.boxes, [b for _, _, b in wanted], rtol=1e-12)
