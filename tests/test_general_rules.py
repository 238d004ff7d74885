"""Deploy rules on modules that nobody here wrote: they apply where the structure is certain, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.deploy import algebra, deploy_form
from dualtoken_deploy.deploy.general import GENERAL, FixedResize
from dualtoken_deploy.deploy.observe import observe
from dualtoken_deploy.deploy.rewrite import RULES
from dualtoken_deploy.models.source import Source

SIZE = (8, 8)


def _randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(1 + noise.abs() if name.endswith("running_var") else 0.5 * noise)
    return model.eval()


class Wired(nn.Module):
    """Modules by name, wired by a function (self, picture) -> outputs."""

    def __init__(self, wiring: Any, **modules: Any) -> None:
        super().__init__()
        self.wiring = wiring
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


class Scaled(nn.Module):
    """y * gamma, as a module of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, y: Tensor) -> Tensor:
        return y * self.gamma


class Block(nn.Module):
    """A block that leaves its layer scale out where it is None, like ConvNeXt's of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)
        self.layer_scale_parameter: nn.Parameter | None = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        if self.layer_scale_parameter is not None:
            y = self.layer_scale_parameter * y
        return y


class Attention(nn.Module):
    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.scaling, self.twice = 0.3, twice

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = F.scaled_dot_product_attention(q, k, v, scale=self.scaling).transpose(1, 2).flatten(2)
        return y * self.scaling if self.twice else y


class ActiveNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return super().forward(input).relu()


class Stubborn(nn.Module):
    """Takes float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x + torch.ones(3, 8, 8).to(x.device))) if x.dtype == torch.float32 else _refuse()


def _refuse() -> Tensor:
    raise TypeError("float32 alone")


def _tokens(x: Tensor) -> Tensor:
    return x.flatten(2)[..., :8]  # (B, 3, 8)


def conv(bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(3, 4, 3, padding=1, bias=bias)


SHARED = conv()
# what is in the module, the rule, how often it applies, and the module
CASES: dict[str, tuple[str, int, nn.Module]] = {
    "norm behind a convolution": ("fold_batch_norm", 2, nn.Sequential(
        conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 1, groups=2, bias=False), nn.BatchNorm2d(8))),
    "norm without gain": ("fold_batch_norm", 1, nn.Sequential(conv(False), nn.BatchNorm2d(4, affine=False))),
    "norm by name and place": ("fold_batch_norm", 1, Wired(
        lambda m, x: m.b(m.a(x)), b=nn.BatchNorm2d(4), a=conv())),
    "convolution read twice": ("fold_batch_norm", 0, Wired(
        lambda m, x: (y := m.a(x)) + m.b(y), a=conv(), b=nn.BatchNorm2d(4))),
    "convolution that is an output": ("fold_batch_norm", 0, Wired(
        lambda m, x: (y := m.a(x), m.b(y)), a=conv(), b=nn.BatchNorm2d(4))),
    "convolution used twice": ("fold_batch_norm", 0, Wired(
        lambda m, x: m.b(m.a(x)) + m.a(2 * x), a=conv(), b=nn.BatchNorm2d(4))),
    "convolution changed in place": ("fold_batch_norm", 0, Wired(
        lambda m, x: m.b(m.a(x).add_(1.0)), a=conv(), b=nn.BatchNorm2d(4))),
    "norm used twice": ("fold_batch_norm", 0, Wired(
        lambda m, x: m.b(m.a(x)) + m.b(m.c(x)), a=conv(), b=nn.BatchNorm2d(4), c=conv())),
    "norm with more in it": ("fold_batch_norm", 0, nn.Sequential(conv(), ActiveNorm(4))),
    "norm before the convolution": ("fold_batch_norm", 0, nn.Sequential(nn.BatchNorm2d(3), conv())),
    "norm whose statistics are the batch's": ("fold_batch_norm", 0, nn.Sequential(
        conv(), nn.BatchNorm2d(4, track_running_stats=False))),
    "a function's weights": ("fold_batch_norm", 0, Wired(
        lambda m, x: m.b(F.conv2d(x, 2 * m.a.weight)), a=conv(), b=nn.BatchNorm2d(4))),
    "layer scale as a module": ("fold_layer_scale", 1, Wired(
        lambda m, x: m.s(m.fc(_tokens(x))), fc=nn.Linear(8, 5), s=Scaled(5))),
    "layer scale that may be None": ("fold_layer_scale", 1, Wired(lambda m, x: m.b(_tokens(x)), b=Block())),
    "layer scale behind an activation": ("fold_layer_scale", 0, Wired(
        lambda m, x: m.s(m.fc(_tokens(x)).relu()), fc=nn.Linear(8, 5), s=Scaled(5))),
    "layer scale that is needed": ("fold_layer_scale", 0, Wired(
        lambda m, x: m.fc(_tokens(x)) * m.gamma, fc=nn.Linear(8, 5), gamma=nn.Parameter(torch.ones(5)))),
    "a scale of rows": ("fold_layer_scale", 0, Wired(
        lambda m, x: m.s(m.fc(_tokens(x)).transpose(1, 2)), fc=nn.Linear(8, 5), s=Scaled(3))),
    "attention": ("fold_attention_scale", 1, Wired(lambda m, x: m.a(_tokens(x)), a=Attention())),
    "an attention's scale with two uses": ("fold_attention_scale", 0, Wired(
        lambda m, x: m.a(_tokens(x)), a=Attention(True))),
    "norm with three readers": ("fold_norm_affine", 1, Wired(
        lambda m, x: m.q(y := m.n(_tokens(x))) @ m.k(y).transpose(1, 2) @ m.v(y),
        n=nn.LayerNorm(8), q=nn.Linear(8, 5), k=nn.Linear(8, 5, bias=False), v=nn.Linear(8, 5))),
    "norm without a shift": ("fold_norm_affine", 1, Wired(
        lambda m, x: m.q(m.n(_tokens(x))), n=nn.LayerNorm(8, bias=False), q=nn.Linear(8, 5))),
    "norm with another reader": ("fold_norm_affine", 0, Wired(
        lambda m, x: m.q(y := m.n(_tokens(x))).sum(-1, keepdim=True) + y, n=nn.LayerNorm(8), q=nn.Linear(8, 5))),
    "norm that is an output": ("fold_norm_affine", 0, Wired(
        lambda m, x: {"h": (y := m.n(_tokens(x))), "q": m.q(y)}, n=nn.LayerNorm(8), q=nn.Linear(8, 5))),
    "norm over rows and columns": ("fold_norm_affine", 0, Wired(
        lambda m, x: m.q(m.n(_tokens(x))), n=nn.LayerNorm((3, 8)), q=nn.Linear(8, 5))),
    "upsampling": ("constant_resize", 1, nn.Sequential(conv(), nn.Upsample(scale_factor=2, mode="bilinear"))),
    "upsampling with level corners": ("constant_resize", 0, nn.Sequential(
        conv(), nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True))),
    "upsampling of two sizes": ("constant_resize", 0, Wired(
        lambda m, x: m.u(m.u(x)), u=nn.Upsample(scale_factor=2, mode="bilinear"))),
    "float32 alone": ("fold_batch_norm", 0, Stubborn()),
    "control flow": ("fold_batch_norm", 1, Wired(
        lambda m, x: m.b(m.a(x)) if bool(x.sum() > -1e9) else x, a=conv(), b=nn.BatchNorm2d(4))),
    "two at once": ("fold_batch_norm", 0, Wired(
        lambda m, x: m.b(torch.cat([SHARED(x[:1]), SHARED(x[1:])])), b=nn.BatchNorm2d(4), a=SHARED)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_rule_applies_where_it_holds_and_nowhere_else(case: str) -> None:
    rule, count, model = CASES[case]
    model = _randomised(model)
    before = copy.deepcopy(model.state_dict())
    form = deploy_form(model, [rule], SIZE)
    assert dict(form.rules) == {rule: count}
    image = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected, found = model(image), form.module(image)
    for a, b in zip(_list(expected), _list(found), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # the user's module is left alone


def _list(given: Any) -> list[Tensor]:
    return [given] if isinstance(given, Tensor) else list(given.values() if isinstance(given, dict) else given)


GONE: dict[str, type[nn.Module]] = {
    "norm behind a convolution": nn.BatchNorm2d,
    "layer scale as a module": Scaled,
    "upsampling": nn.Upsample,
}


@pytest.mark.parametrize("case", GONE)
def test_what_was_folded_is_gone(case: str) -> None:
    rule, _, model = CASES[case]
    form = deploy_form(_randomised(model), [rule], SIZE)
    assert not [m for m in form.module.modules() if type(m) is GONE[case]]


def test_an_affine_that_was_folded_is_no_parameter_any_more() -> None:
    rule, _, model = CASES["norm with three readers"]
    form = deploy_form(_randomised(model), [rule], SIZE)
    assert not [n for n, _ in form.module.named_parameters() if n.startswith("n.")]


@pytest.mark.parametrize(
    ("function", "rule", "case"),
    [
        ("norm_into_conv", "fold_batch_norm", "norm behind a convolution"),
        ("affine_into_linear", "fold_norm_affine", "norm with three readers"),
        ("bilinear_matrix", "constant_resize", "upsampling"),
    ],
)
def test_algebra_that_is_wrong_is_refused(function: str, rule: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(algebra, function)

    def wrong(*args: Any) -> Any:
        found = right(*args)
        return (found[0], found[1] + 1e-6) if isinstance(found, tuple) else found + 1e-6

    monkeypatch.setattr(algebra, function, wrong)
    assert deploy_form(_randomised(CASES[case][2]), [rule], SIZE).rules == {rule: 0}


def test_where_one_place_is_wrong_the_others_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    right = algebra.norm_into_conv

    def wrong(weight: Tensor, *args: Any) -> Any:
        found = right(weight, *args)
        return found if weight.shape[0] == 8 else (found[0] * 1.001, found[1])

    monkeypatch.setattr(algebra, "norm_into_conv", wrong)
    model = _randomised(CASES["norm behind a convolution"][2])
    form = deploy_form(model, ["fold_batch_norm"], SIZE)
    assert form.rules == {"fold_batch_norm": 1}
    image = torch.randn(1, 3, *SIZE)
    torch.testing.assert_close(form.module(image), model(image), rtol=1e-5, atol=1e-5)


def test_without_a_size_nothing_is_proved_and_nothing_done() -> None:
    model = CASES["norm behind a convolution"][2].eval()
    form = deploy_form(model)
    assert form.module is model
    assert set(form.rules.values()) == {0}
    assert deploy_form(model, image_size=SIZE, any_size=True).module is model


def test_every_general_rule_has_the_name_of_one() -> None:
    assert set(GENERAL) <= set(RULES)


def test_outputs_of_any_kind_are_rewritten_behind_their_names() -> None:
    net = Wired(lambda m, x: {"map": m.b(m.a(x)), "none": None}, a=conv(), b=nn.BatchNorm2d(4))
    source = Source.module(_randomised(net), task="tensors", image_size=SIZE)
    form = deploy_form(source.make(), image_size=SIZE)
    assert form.rules["fold_batch_norm"] == 1
    image = torch.randn(1, 3, *SIZE)
    torch.testing.assert_close(form.module(image)[0], source.make()(image)[0], rtol=1e-5, atol=1e-5)


def test_interpolation_by_matrices_is_torchs() -> None:
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for target in ((10, 14), (3, 4), (5, 9)):
        expected = F.interpolate(x, target, mode="bilinear", align_corners=False)
        torch.testing.assert_close(FixedResize((5, 7), target)(x), expected, rtol=1e-12, atol=1e-12)


def test_a_run_is_seen_with_its_readers_and_keeps_nothing_alive() -> None:
    net = Wired(lambda m, x: m.b(m.a(x)).relu_(), a=conv(), b=nn.BatchNorm2d(4)).eval()
    seen = observe(net, torch.randn(1, 3, *SIZE), lambda out: [out])
    assert [(c.name, c.within) for c in seen.calls] == [("conv2d", "a"), ("batch_norm", "b"), ("relu_", "")]
    first, second, third = seen.calls
    assert seen.only_reader(first.results[0]) is second
    assert second.results == third.results  # changed in place, so that neither made it alone
    assert seen.maker(third.results[0]) is None
    assert not [v for c in seen.calls for v in (*c.args, *c.kwargs.values()) if isinstance(v, Tensor)]
