"""The rules over traced programs, each against the program it rewrites, in float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.traced import TRACED_RULES, Program, rewrite_program
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.layers import from_windows, to_windows
from dualtoken_deploy.models.registry import random_model
from tests.numerics import assert_close

PARITY = 1e-12  # relative, float64


class Of(nn.Module):
    """A module of one function."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Tensor:
        out: Tensor = self.function(*self.parts, *inputs)
        return out


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def traced(module: nn.Module, *inputs: Tensor) -> Program:
    with torch.no_grad():
        return torch.export.export(module.double().eval(), inputs)


def operations(program: Program) -> Counter[str]:
    return Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")


def highest_rank(program: Program) -> int:
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "call_function"]
    return max(value.ndim for value in values if isinstance(value, Tensor))


def apply(module: nn.Module, rules: list[str], *inputs: Tensor) -> tuple[Program, dict[str, int]]:
    """The rewritten program and its counts, once it is known to compute the same."""
    program, counts = rewrite_program(traced(module, *inputs), rules)
    with torch.no_grad():
        assert_close(program.module()(*inputs), module(*inputs), relative=PARITY)
    return program, counts


def apply_more(module: nn.Module, rules: list[str], more: Any, *inputs: Tensor) -> Program:
    """The program rewritten by rules that may add constants too, once it is known to compute the same."""
    program, _ = rewrite_program(traced(module, *inputs), rules, more)
    with torch.no_grad():
        assert_close(program.module()(*inputs), module(*inputs), relative=PARITY)
    return program


def heads(layer: nn.Module, x: Tensor, parts: int = 3, count: int = 2) -> Tensor:
    """A layer's parts, each made heads and turned, then multiplied."""
    b, n, _ = x.shape
    pieces = [p.reshape(b, n, count, -1).transpose(1, 2) for p in layer(x).chunk(parts, dim=-1)]
    out: Tensor = pieces[0]
    for piece in pieces[1:]:
        out = out * piece
    return out


def merge(x: Tensor) -> Tensor:
    """Space-to-depth of an 8 x 4 map of 3 channels, by rank 6."""
    b = x.shape[0]
    return x.reshape(b, 4, 2, 2, 2, 3).transpose(2, 3).reshape(b, 8, 12)


Case = tuple[str, Callable[..., Tensor], tuple[nn.Module, ...], tuple[tuple[int, ...], ...], int]
CASES: list[Case] = [
    ("plain_norm", lambda norm, x: norm(x), (nn.LayerNorm(6),), ((2, 5, 6),), 1),
    ("plain_norm", lambda norm, x: norm(x), (nn.LayerNorm(6, elementwise_affine=False),), ((5, 6),), 1),
    ("plain_norm", lambda norm, x: norm(x), (nn.LayerNorm((5, 6), eps=1e-3, bias=False),), ((2, 5, 6),), 1),
    ("plain_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), (), ((1, 2, 5, 4),) * 3, 1),
    ("plain_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=1.0), (), ((3, 2, 5, 4),) * 3, 1),
    ("plain_attention", lambda q, k, m: F.scaled_dot_product_attention(q, k, k, m), (),
     ((3, 2, 5, 4), (3, 2, 7, 4), (2, 5, 7)), 1),
    ("plain_attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (),
     ((1, 2, 5, 4),) * 3, 0),
    ("heads_before_split", heads, (nn.Linear(5, 24),), ((1, 7, 5),), 1),
    ("heads_before_split", heads, (nn.Linear(5, 24),), ((3, 7, 5),), 1),
    ("heads_before_split", lambda layer, x: heads(layer, x) + layer(x).chunk(3, -1)[0].sum(), (nn.Linear(5, 24),),
     ((1, 7, 5),), 1),
    ("heads_before_split", lambda x: x[..., :4] * x.chunk(2, -1)[1], (), ((1, 7, 8),), 0),
    ("merge_axes", merge, (), ((1, 32, 3),), 1),
    ("merge_axes", merge, (), ((2, 32, 3),), 1),
    ("merge_axes", lambda x: from_windows(to_windows(x, (14, 21), 7).exp(), (14, 21), 7), (), ((2, 294, 3),), 2),
    ("merge_axes", lambda x: x.permute(0, 2, 1, 3), (), ((2, 1, 5, 3),), 1),
    ("merge_axes", lambda x: x.permute(2, 0, 1), (), ((2, 5, 3),), 1),
    ("merge_axes", lambda x: x.permute(0, 2, 3, 1), (), ((2, 3, 4, 5),), 0),
    ("merge_axes", lambda x: x.transpose(1, 2), (), ((2, 3, 4),), 0),
    ("join_views", lambda x: x.reshape(2, 12).reshape(4, 6).reshape(2, 3, 4), (), ((2, 3, 4),), 2),
    ("join_views", lambda x: x.transpose(0, 1).reshape(12, 2).reshape(24), (), ((2, 3, 4),), 2),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "function", "parts", "shapes", "times"), CASES)
def test_each_rule_keeps_what_is_computed(
    rule: str, function: Callable[..., Tensor], parts: tuple[nn.Module, ...], shapes: Any, times: int
) -> None:
    _, counts = apply(Of(function, *parts).double(), [rule], *(random(*shape) for shape in shapes))
    assert counts == {rule: times}


def test_a_norm_is_seven_operators_and_two() -> None:
    program, _ = apply(Of(lambda norm, x: norm(x), nn.LayerNorm(6)).double(), ["plain_norm"], random(2, 5, 6))
    assert sum(operations(program).values()) == 9
    assert "aten.layer_norm.default" not in operations(program)


def test_heads_are_made_once_for_all_parts() -> None:
    program, _ = apply(Of(heads, nn.Linear(5, 24)).double(), ["heads_before_split", "merge_axes", "join_views"],
                       random(1, 7, 5))  # fmt: skip
    found = operations(program)
    assert found["aten.transpose.int"] + found["aten.permute.default"] == 1
    assert found["aten.slice.Tensor"] == 3


@pytest.mark.parametrize("variant", ["tiny-mix", "tiny-lightvit", "tiny-dualformer"])
@pytest.mark.parametrize("batch", [1, 2])
def test_no_family_has_more_than_four_axes_after_them(variant: str, batch: int) -> None:
    model = random_model(variant, 0, image_size=(64, 96), num_classes=5).double()
    form = deploy_form(model, None, (64, 96)).module
    program, counts = apply(form, list(TRACED_RULES), random(batch, 3, 64, 96))
    assert highest_rank(program) <= 4
    assert counts["plain_norm"] == sum(isinstance(m, nn.LayerNorm) for m in form.modules())
    assert "aten.scaled_dot_product_attention.default" not in operations(program)


def test_new_operators_belong_to_the_module_they_stand_for() -> None:
    """Names of saved values come from it."""
    program, _ = apply(Of(lambda norm, x: norm(x), nn.LayerNorm(6)).double(), ["plain_norm"], random(2, 5, 6))
    made = [n for n in program.graph.nodes if n.op == "call_function"]
    assert {next(reversed(n.meta["nn_module_stack"].values()))[0] for n in made} == {"parts.0"}


def test_an_unknown_rule_lists_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"nothing.*plain_norm, plain_attention"):
        rewrite_program(traced(Of(torch.exp), random(2)), ["nothing"])
