"""DualFormer against the paper's counts, against its equations token by token, and in its deploy form and bundles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from dualtoken_deploy import Bundle
from dualtoken_deploy.deploy import RULES, deploy_form
from dualtoken_deploy.deploy.forms import OneHotPartition
from dualtoken_deploy.models.count import count_macs, count_params
from dualtoken_deploy.models.dualformer import PartitionAttention, channel_to_spatial, smallest_margin
from dualtoken_deploy.models.registry import build, create_model, make_config, random_model
from tests.conftest import PORTABLE
from tests.numerics import assert_close, shown

PARITY = 1e-10  # relative, float64; measured 1e-15

# Tables 1 and 2: parameters in millions, multiply-accumulates in billions.
PAPER = [
    ("dualformer-t", 5.5, 1.3),
    ("dualformer-xs", 10.5, 2.3),
    ("dualformer-s", 22.6, 4.4),
    ("dualformer-b", 74.0, 15.8),
]


@pytest.mark.parametrize(("variant", "params_m", "macs_g"), PAPER)
def test_counts_are_the_papers_within_the_decision_records_bounds(variant: str, params_m: float, macs_g: float) -> None:
    with torch.device("meta"):
        model = build(make_config(variant)).eval()
    assert count_params(model) / 1e6 == pytest.approx(params_m, rel=0.02)
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(macs_g, rel=0.08)


@pytest.fixture
def attention() -> PartitionAttention:
    torch.manual_seed(0)
    return PartitionAttention(width=12, heads=3, hyperplanes=2).double()


def by_the_equations(attention: PartitionAttention, x: torch.Tensor) -> torch.Tensor:
    """Equations 4 to 9 with Python lists for the groups; one image (N, width) -> (N, width)."""
    d = x.shape[1] // attention.heads
    value = attention.value(x)
    intra, inter = torch.zeros_like(x), torch.zeros_like(x)
    for head in range(attention.heads):
        part = slice(head * d, head * d + d)
        groups: dict[int, list[int]] = {}
        for i, token in enumerate(x[:, part]):
            key = sum(2**j for j in range(2) if float(attention.planes[head, :, j] @ token) >= 0)
            groups.setdefault(key, []).append(i)
        descriptors, m = {}, {}
        for key, members in groups.items():
            features = [torch.sigmoid(x[i, part]) for i in members]
            total = torch.stack(features).sum(0)
            w = [f / total for f in features]
            for i, weight in zip(members, w, strict=True):
                intra[i, part] = weight * value[i, part] / torch.stack(w).sum(0)
            descriptors[key] = value[members][:, part].mean(0)
            m[key] = attention.importance(descriptors[key])
        for key, members in groups.items():
            for i in members:
                inter[i, part] = descriptors[key] * m[key] / torch.stack(list(m.values())).sum()
    mixed: torch.Tensor = attention.mix(torch.cat((intra, inter), dim=1))
    return mixed


@pytest.mark.parametrize("tokens", [1, 2, 5, 49])
def test_indexed_and_one_hot_forms_are_the_equations(attention: PartitionAttention, tokens: int) -> None:
    """With 1 and 2 tokens some groups are empty: they take no part and nothing is divided by zero."""
    x = torch.randn(2, tokens, 12, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([by_the_equations(attention, image) for image in x])
        assert_close(attention(x), wanted, relative=1e-12)
        assert_close(OneHotPartition(attention)(x), wanted, relative=1e-12)


@pytest.mark.parametrize("hyperplanes", [1, 2, 3])
def test_one_hot_rows_are_the_index(hyperplanes: int) -> None:
    torch.manual_seed(1)
    attention = PartitionAttention(width=8, heads=2, hyperplanes=hyperplanes)
    x = torch.randn(2, 2, 64, 4)
    x[0, 0, 0] = 0.0  # on every hyperplane: eq. 4 puts it on the side of 1
    one_hot = OneHotPartition(attention).one_hot(x)
    assert torch.equal(one_hot.argmax(-1), attention.groups(x))
    assert torch.equal(one_hot.sum(-1), torch.ones(2, 2, 64))
    assert attention.groups(x)[0, 0, 0] == 2**hyperplanes - 1


def test_channel_to_spatial_puts_a_tokens_channels_into_its_cell() -> None:
    x = torch.arange(2 * 6 * 8).reshape(2, 6, 8)  # 2 x 3 cells of 2 x 2 tokens with 2 channels
    out = channel_to_spatial(x, (4, 6), 2).reshape(2, 4, 6, 2)
    for i in range(4):
        for j in range(6):
            at = (i % 2 * 2 + j % 2) * 2
            assert torch.equal(out[:, i, j], x[:, i // 2 * 3 + j // 2, at : at + 2])


def test_the_hash_is_discontinuous_and_the_margin_says_how_near(attention: PartitionAttention) -> None:
    x = torch.randn(1, 20, 12, dtype=torch.float64)
    normal = attention.planes[0, :, 0]
    on_plane = x[0, 3, :4] - (x[0, 3, :4] @ normal) / (normal @ normal) * normal
    below, above = x.clone(), x.clone()
    below[0, 3, :4], above[0, 3, :4] = on_plane - 1e-9 * normal, on_plane + 1e-9 * normal
    with torch.no_grad():
        assert (attention(below) - attention(above)).abs().max() > 1e-3
        assert smallest_margin(attention, above) < 1e-8
        by_hand = min(
            abs(float(x[0, i, 4 * h : 4 * h + 4] @ p)) / float(x[0, i, 4 * h : 4 * h + 4].norm() * p.norm())
            for h in range(3) for p in attention.planes[h].T for i in range(20)
        )  # fmt: skip
        assert smallest_margin(attention, x).item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (224, 224), (223, 301)])
def test_features_have_strides_4_8_16_32_of_the_padded_image(height: int, width: int) -> None:
    model = create_model("tiny-dualformer", num_classes=3)
    rows, columns = -(-height // 32), -(-width // 32)
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in model.features(torch.randn(2, 3, height, width))]
    assert shapes == [(2, c, s * rows, s * columns) for c, s in zip((32, 48, 64, 96), (8, 4, 2, 1), strict=True)]


@pytest.mark.parametrize(
    ("variant", "size"),
    [("dualformer-t", (224, 224)), ("dualformer-xs", (95, 130)), ("dualformer-s", (70, 101)),
     ("dualformer-b", (64, 64)), ("tiny-dualformer", (288, 384))],
)  # fmt: skip
def test_the_deploy_form_keeps_what_the_model_computes(variant: str, size: tuple[int, int]) -> None:
    model = random_model(variant, num_classes=10).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert smallest_margin(model, image).min() > 1e-11  # float64 puts every token on the same side in both forms
    form = deploy_form(model, list(RULES), size)
    assert form.rules["one_hot_partitions"] == sum(model.config.blocks)  # type: ignore[attr-defined]
    with torch.no_grad():
        assert_close(form.module(image), model(image), relative=PARITY)


@pytest.mark.parametrize("rule", ["fold_batch_norm", "fold_norm_affine", "one_hot_partitions"])
def test_each_rule_alone_keeps_what_the_model_computes(rule: str) -> None:
    model = random_model("tiny-dualformer", num_classes=10).double()
    image = torch.randn(1, 3, 96, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    form = deploy_form(model, [rule], (96, 96))
    assert form.rules[rule] > 0
    with torch.no_grad():
        assert_close(form.module(image), model(image), relative=PARITY)


@pytest.mark.parametrize("target", PORTABLE)
def test_bundles_compute_what_eager_computes(small_bundle: Callable[..., Path], target: str) -> None:
    bundle = Bundle.open(small_bundle(target, variant="tiny-dualformer", image_size=96))
    assert shown(bundle).sqnr_db >= 105
    ties = bundle.manifest.measured.near_ties
    assert ties is not None
    assert ties.images + (shown(bundle).images or 0) == 16


def test_the_graph_scatters_and_gathers_nothing(small_bundle: Callable[..., Path]) -> None:
    folder = small_bundle("onnxruntime", variant="tiny-dualformer", image_size=96)
    kinds = Counter(node.op_type for node in onnx.load(folder / "model.onnx").graph.node)
    banned = ("Scatter", "Gather", "NonZero", "Loop", "If", "Where", "Shape", "OneHot")
    assert not [kind for kind in kinds if kind.startswith(banned)]
    assert kinds["GreaterOrEqual"] == 4  # one a block
