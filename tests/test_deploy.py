"""The deploy form against the eager model, in float64, with every parameter and statistic random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dualtoken_deploy.deploy import RULES, algebra, deploy_form
from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.dualtoken_vit import T
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD
from tests.numerics import assert_close

PARITY = 1e-10  # relative, float64; measured 1e-15

SIZES = [(224, 224), (256, 320), (223, 301)]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"global_tokens": 0},
    {"global_tokens": 3},
    {"global_tokens": 8, "token_mlp": "mix"},
    {"downsampling": "onestep"},
    {"local_attention": "window"},
    {"alpha": 0.7},
    {"token_method": "normal", "global_tokens": 8},
    {"token_method": "normal-star", "global_tokens": 8, "token_mlp": "mix"},
    {"local_attention": "window", "downsampling": "onestep", "global_tokens": 4, "token_mlp": "mix"},
]


def parity(model: ImageModel, size: tuple[int, int], *sets_of_rules: list[str] | None) -> dict[str, int]:
    """Holds the deploy form under each set of rules against one eager run; the counts of the last set."""
    image = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts: dict[str, int] = {}
    with torch.no_grad():
        wanted = model(image)
        for rules in sets_of_rules:
            form = deploy_form(model, rules, size)
            assert_close(form.module(image), wanted, relative=PARITY)
            counts = dict(form.rules)
    return counts


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("variant", ["t", "t-mix", "s", "s-mix"])  # other families have their own files
def test_all_variants_keep_what_they_compute(variant: str, size: tuple[int, int]) -> None:
    model = random_model(variant, num_classes=10).double()
    parity(model, size, None, list(RULES))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_options_keep_what_they_compute(options: dict[str, Any], size: tuple[int, int]) -> None:
    """On two blocks, which have each kind of layer; those of T repeat them."""
    model = random_model("tiny-mix", num_classes=10, **{"token_mlp": T.token_mlp, **options}).double()
    parity(model, size, None, list(RULES))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"global_tokens": 3}, {"local_attention": "window"}], ids=str)
def test_each_rule_alone_keeps_what_the_model_computes(rule: str, options: dict[str, Any]) -> None:
    counts = parity(random_model("t-mix", num_classes=10, **options).double(), (96, 160), [rule])
    others = ("one_hot_partitions", "own_global_query")  # of other families
    expected_none = rule in (*others, "pool_by_convolution") or (  # which builds on fold_pooling
        rule == "fold_layer_scale" and options.get("local_attention") == "window"
    )
    assert (counts[rule] == 0) is expected_none


def test_counts_of_s() -> None:
    """14 blocks, 8 of them with a Conv Encoder, 6 in stage 3, two merges, two attentions a block."""
    form = deploy_form(random_model("s"), list(RULES))
    assert form.rules == {
        "fold_batch_norm": 4,
        "own_global_query": 0,
        "fold_layer_scale": 8,
        "fold_attention_scale": 28,
        "fold_fusion": 14,
        "fold_norm_affine": 8 + 14 + 14 + 2 + 2 + 1 + 14,
        "split_bidim": 14,
        "reshape_merge": 2,
        "constant_tokens": 1,
        "constant_resize": 14,
        "join_queries": 6,
        "fold_projection": 8,
        "fold_pooling": 8,
        "pool_by_convolution": 8,
        "one_hot_partitions": 0,
    }


def test_the_model_is_left_as_it_is() -> None:
    model = random_model("t", num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [type(m).__name__ for m in model.modules()]
    deploy_form(model)
    assert [type(m).__name__ for m in model.modules()] == names
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_folding_in_float64_leaves_a_float32_model() -> None:
    model = random_model("t", num_classes=10)
    form = deploy_form(model)
    assert {p.dtype for p in form.module.state_dict().values() if p.is_floating_point()} == {torch.float32}
    image = torch.randn(1, 3, 64, 64)
    form = deploy_form(model, image_size=(64, 64))
    with torch.no_grad():
        assert_close(form.module(image), model(image), sqnr_db=115)


def test_an_unknown_rule_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="fold_batch_norm"):
        deploy_form(random_model("t", num_classes=10), ["fold_everything"])


def test_windows_that_do_not_fill_the_map_keep_their_affine() -> None:
    """The zero padding behind the normalisation would see beta: folding there is refused, not approximated."""
    model = random_model("t", num_classes=10, local_attention="window").double()
    filled = parity(model, (224, 224), ["fold_norm_affine"])["fold_norm_affine"]
    padded = parity(model, (256, 320), ["fold_norm_affine"])["fold_norm_affine"]
    assert filled - padded == 8  # the window attentions of stages 1 and 2


# --- the algebra, each against a definition ---


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 6])
def test_norm_into_conv(groups: int) -> None:
    conv = nn.Conv2d(6, 12, 3, padding=1, groups=groups, bias=False).double()
    norm = nn.BatchNorm2d(12).double().eval()
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(rand(12).abs() + 0.1)
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None
    assert variance is not None
    weight, bias = algebra.norm_into_conv(conv.weight, mean, variance, norm.weight, norm.bias, norm.eps)
    x = rand(2, 6, 5, 7)
    assert_close(F.conv2d(x, weight, bias, padding=1, groups=groups).detach(), norm(conv(x)).detach(), relative=1e-12)


@pytest.mark.parametrize("with_bias", [True, False])
def test_affine_into_linear(with_bias: bool) -> None:
    w, b, gamma, beta, x = rand(4, 3), rand(4) if with_bias else None, rand(3), rand(3), rand(5, 3)
    weight, bias = algebra.affine_into_linear(w, b, gamma, beta)
    assert_close(F.linear(x, weight, bias), F.linear(gamma * x + beta, w, b), relative=1e-12)


@pytest.mark.parametrize("target", [(1, 1), (3, 3), (7, 7), (8, 5), (14, 1)])
@pytest.mark.parametrize("source", [(1, 1), (2, 2), (7, 7), (8, 10), (3, 20)])
def test_resize_matrix_is_interpolate(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = rand(2, 5, *source)
    wanted = F.interpolate(x, target, mode="bilinear", align_corners=False).flatten(2)
    matrix = algebra.resize_matrix(source, target)
    torch.testing.assert_close(x.flatten(2) @ matrix.T, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(matrix.sum(1), torch.ones(target[0] * target[1], dtype=torch.float64))


def test_project_values() -> None:
    heads, d, tokens = 3, 4, 5
    c = heads * d
    v_w, v_b, proj, g = rand(c, c), rand(c), rand(c, c), rand(tokens, c)
    attention = rand(heads, 7, tokens).softmax(-1)
    values = F.linear(g, v_w, v_b).reshape(tokens, heads, d).transpose(0, 1)
    wanted = (attention @ values).transpose(0, 1).reshape(7, c) @ proj.T
    weight, bias = algebra.project_values(v_w, v_b, proj, heads)
    projected = F.linear(g, weight, bias).reshape(tokens, heads, c).transpose(0, 1)
    assert_close((attention @ projected).sum(0), wanted, relative=1e-12)


def test_image_input_is_the_normalisation_of_the_contract() -> None:
    image = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    actual = ImageInput(IMAGENET_MEAN, IMAGENET_STD, torch.float64)(image)
    mean, std = (torch.tensor(t, dtype=torch.float64) for t in (IMAGENET_MEAN, IMAGENET_STD))
    wanted = ((image.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    assert_close(actual, wanted, relative=1e-14)
