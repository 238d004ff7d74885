"""LightViT against the paper's tables, against a loop over its definition, and in its deploy form and bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.deploy import RULES, deploy_form
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.count import count_macs, count_params
from dualtoken_deploy.models.lightvit import Block, BroadcastAttention
from dualtoken_deploy.models.registry import build, create_model, make_config, random_model
from dualtoken_deploy.use.validate import validate
from tests.conftest import PORTABLE
from tests.numerics import assert_close

PARITY = 1e-10  # relative, float64; measured 1e-15
SQNR_DB = {"fp32": 105.0, "fp16": 45.0}

# Tables 3 and 6: parameters in millions (None: not printed) and multiply-accumulates in billions.
PAPER = [
    ("lightvit-t", {}, 9.4, 0.73),
    ("lightvit-s", {}, 19.2, 1.7),
    ("lightvit-b", {}, 35.2, 3.9),
    ("lightvit-t", {"global_tokens": 2}, None, 0.69),
    ("lightvit-t", {"global_tokens": 4}, None, 0.70),
    ("lightvit-t", {"global_tokens": 16}, None, 0.80),
    ("lightvit-t", {"global_tokens": 32}, None, 0.92),
]


@pytest.mark.parametrize(("variant", "options", "params_m", "macs_g"), PAPER)
def test_counts_are_the_papers(variant: str, options: dict[str, Any], params_m: float | None, macs_g: float) -> None:
    with torch.device("meta"):
        model = build(make_config(variant, **options)).eval()
    if params_m is not None:
        assert round(count_params(model) / 1e6, 1) == params_m
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(macs_g, rel=0.05)


def softmax_rows(q: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor], bias: Any = 0.0) -> Any:
    """One query's attention over lists of keys and values, by the definition."""
    scores = torch.stack([(q * k).sum() for k in keys]) / q.numel() ** 0.5 + bias
    weights = scores.exp() / scores.exp().sum()
    return sum(w * v for w, v in zip(weights, values, strict=True))


@pytest.mark.parametrize("grid", [(7, 14), (8, 10)], ids=["whole windows", "padded windows"])
def test_attention_is_the_pseudo_code_token_by_token(grid: tuple[int, int]) -> None:
    """Figure 6 as loops over tokens: windows, aggregation, broadcast; what pads a window is zero before qkv."""
    torch.manual_seed(0)
    heads, channels, tokens, d = 2, 6, 3, 3
    attention = BroadcastAttention(channels, heads, window=7).double()
    torch.nn.init.normal_(attention.position_bias)
    x = torch.randn(1, grid[0] * grid[1], channels, dtype=torch.float64)
    g = torch.randn(1, tokens, channels, dtype=torch.float64)
    with torch.no_grad():
        image, new = attention(x, g, grid)
        padded = F.pad(x.reshape(*grid, channels), (0, 0, 0, -grid[1] % 7, 0, -grid[0] % 7))
        q_all, k_all, v_all = attention.qkv(padded).split(channels, dim=-1)
        wanted = torch.zeros(*grid, channels, dtype=torch.float64)
        wanted_new = torch.zeros(tokens, channels, dtype=torch.float64)
        inside = [(i, j) for i in range(grid[0]) for j in range(grid[1])]
        g_q = attention.q_global(g[0])
        for head in range(heads):
            part = slice(d * head, d * head + d)
            q, k, v = q_all[..., part], k_all[..., part], v_all[..., part]
            for t in range(tokens):
                wanted_new[t, part] = softmax_rows(g_q[t, part], [k[p] for p in inside], [v[p] for p in inside])
        g_k, g_v = attention.kv_global(wanted_new).split(channels, dim=-1)
        for head in range(heads):
            part = slice(d * head, d * head + d)
            q, k, v = q_all[..., part], k_all[..., part], v_all[..., part]
            for i, j in inside:
                window = [(i // 7 * 7 + a, j // 7 * 7 + b) for a in range(7) for b in range(7)]
                bias = torch.stack([attention.position_bias[(i - y + 6) * 13 + (j - z + 6), head] for y, z in window])
                wanted[i, j, part] = softmax_rows(q[i, j], [k[p] for p in window], [v[p] for p in window], bias)
                wanted[i, j, part] += softmax_rows(q[i, j], list(g_k[:, part]), list(g_v[:, part]))
    assert_close(new[0], wanted_new, relative=1e-12)
    assert_close(image[0], wanted.flatten(0, 1), relative=1e-12)


def test_a_block_takes_global_tokens_through_the_same_norm_and_network() -> None:
    model = random_model("tiny-lightvit", image_size=64).double()
    block = model.get_submodule("stage2.block1")
    assert isinstance(block, Block)
    g, x = torch.randn(2, 4, 64, dtype=torch.float64), torch.randn(2, 16, 64, dtype=torch.float64)
    with torch.no_grad():
        image, new = block.attention(block.norm(x), block.norm(g), (4, 4))
        y = torch.cat((g + new, x + image), dim=1)
        assert_close(block(torch.cat((g, x), dim=1), (4, 4)), y + block.ffn(y), relative=1e-12)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (224, 224), (223, 301)])
def test_features_have_strides_8_16_32_of_the_padded_image(height: int, width: int) -> None:
    model = create_model("tiny-lightvit", num_classes=3)
    rows, columns = -(-height // 32), -(-width // 32)
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in model.features(torch.randn(2, 3, height, width))]
    assert shapes == [(2, 32, 4 * rows, 4 * columns), (2, 64, 2 * rows, 2 * columns), (2, 96, rows, columns)]


@pytest.mark.parametrize(
    ("variant", "size"),
    [("lightvit-t", (224, 224)), ("lightvit-t", (223, 301)), ("lightvit-s", (224, 96)), ("lightvit-b", (70, 101)),
     ("tiny-lightvit", (288, 288)), ("tiny-lightvit", (448, 224))],
)  # fmt: skip
def test_the_deploy_form_keeps_what_the_model_computes(variant: str, size: tuple[int, int]) -> None:
    model = random_model(variant, num_classes=10).double()
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(deploy_form(model, list(RULES), size).module(image), model(image), relative=PARITY)


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_alone_keeps_what_the_model_computes(rule: str) -> None:
    model = random_model("tiny-lightvit", num_classes=10).double()
    image = torch.randn(1, 3, 224, 224, dtype=torch.float64)
    form = deploy_form(model, [rule], (224, 224))
    with torch.no_grad():
        assert_close(form.module(image), model(image), relative=PARITY)
    idle = {
        "fold_layer_scale",
        "fold_fusion",
        "constant_resize",
        "join_queries",
        "fold_projection",
        "fold_pooling",
        "pool_by_convolution",
        "one_hot_partitions",
    }
    assert (form.rules[rule] == 0) is (rule in idle)


def test_counts_of_rules() -> None:
    """14 blocks: a norm each in front of attention, feed-forward and BiDim; merges, token merges, head."""
    model = random_model("lightvit-t")
    filled, padded = (deploy_form(model, image_size=size).rules for size in ((224, 224), (256, 256)))
    assert filled["fold_norm_affine"] == 3 * 14 + 2 + 2 + 1
    assert padded["fold_norm_affine"] == 2 * 14 + 2 + 2 + 1  # zero padding would see beta
    assert filled["fold_attention_scale"] == filled["split_bidim"] == 14


@pytest.mark.parametrize(("target", "precision"), [*((t, "fp32") for t in PORTABLE), ("onnxruntime", "fp16")])
def test_bundles_compute_what_eager_computes(small_bundle: Callable[..., Path], target: str, precision: str) -> None:
    bundle = Bundle.open(small_bundle(target, precision, variant="tiny-lightvit", image_size=96))
    (result,) = validate([bundle], "photographs", limit=4)
    assert result.sqnr_db >= SQNR_DB[precision]


def test_a_dynamic_batch_gives_each_image_its_own_logits(small_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(small_bundle("onnxruntime", variant="tiny-lightvit", image_size="70x101", batch="dynamic"))
    images = np.random.default_rng(3).integers(0, 256, (3, 70, 101, 3), dtype=np.uint8)
    with load_runner(bundle) as runner:
        alone = np.concatenate([runner.run({"image": images[i : i + 1]})["logits"] for i in range(3)])
        assert_close(runner.run({"image": images})["logits"], alone, sqnr_db=105)


@pytest.mark.parametrize("options", [{"token_mlp": "mix"}, {"global_tokens": 7}, {"alpha": 0.5}], ids=str)
def test_options_of_another_family_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"valid options: global_tokens|2, 4, 8, 16, 24, 32"):
        create_model("lightvit-t", **options)


@pytest.mark.parametrize(
    ("variant", "options"),
    [("tiny-lightvit", {}), ("tiny-dualformer", {}), ("tiny-mix", {"token_method": "normal", "global_tokens": 8})],
)
def test_core_mls_layout_is_plain_where_there_is_no_other(
    variant: str, options: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("coremltools", reason="the extra [coreml] is not installed")
    from dualtoken_deploy.targets.coreml.export import default_layout

    assert default_layout(create_model(variant, **options)) == "plain"
    assert default_layout(create_model("tiny-mix")) == "ane"
    with pytest.raises(UsageError, match="--layout plain"):
        export(variant, "coreml", image_size=64, layout="ane", output=tmp_path / "b", **options)
