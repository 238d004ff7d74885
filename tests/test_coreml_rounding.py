"""Palettes of few values: what layers compute is kept better than by rounding each weight, on pictures never seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.targets.coreml.compress import palette
from dualtoken_deploy.targets.coreml.rounding import choose, k_means, round_layers

GROUP = 32


def correlated(count: int, seed: int) -> Tensor:
    """Pictures (N, 3, 16, 16) whose neighbours are alike, as those of photographs are."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 5, 5, generator=random)
    return nn.functional.interpolate(coarse, size=(16, 16), mode="bicubic", align_corners=False)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 2, 1), nn.GELU(), nn.Conv2d(64, 64, 7, 1, 3, groups=64), nn.Conv2d(64, 96, 1), nn.GELU(),
        nn.Flatten(2), nn.Linear(64, 40), nn.GELU(), nn.AvgPool1d(10), nn.Flatten(1), nn.Linear(384, 10),
    ).eval()  # fmt: skip


def by_itself(model: nn.Module, bits: int) -> None:
    """Each weight to its nearest in a k-means of its own table, as compression alone does."""
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer.weight.numel() > 2048:
            shared = GROUP if len(layer.weight) % GROUP == 0 else len(layer.weight)
            for part in torch.split(layer.weight.detach(), shared):
                table, index = palette(part.half().numpy(), bits)
                part.copy_(torch.from_numpy(table[index].astype(np.float32)).reshape(part.shape))


@pytest.mark.parametrize(("bits", "gain"), [(4, 6.0), (6, 6.0)])
def test_outputs_are_nearer_than_by_rounding_each_weight(bits: int, gain: float) -> None:
    unseen = correlated(32, seed=2)
    exact, plain, ours = chain(), chain(), chain()
    with torch.no_grad():
        wanted = exact(unseen).numpy()
        by_itself(plain, bits)
        assert round_layers(ours, ours, correlated(32, seed=1), bits, GROUP) == 5
        before = compare(wanted, plain(unseen).numpy()).sqnr_db
        after = compare(wanted, ours(unseen).numpy()).sqnr_db
    assert after > before + gain, (before, after)


def test_each_group_of_channels_has_a_table_that_compression_finds_again() -> None:
    model = chain()
    round_layers(model, model, correlated(16, seed=1), 4, GROUP)
    for layer in (model[0], model[2], model[3], model[6], model[10]):
        weight: Tensor = layer.get_parameter("weight").detach()
        shared = GROUP if len(weight) % GROUP == 0 else len(weight)
        for part in torch.split(weight, shared):
            assert len(np.unique(part.numpy())) <= 16
            table, index = palette(part.half().numpy(), 4)
            assert (table[index].reshape(part.shape) == part.numpy()).all()


def test_without_correlation_each_weight_goes_to_its_nearest() -> None:
    random = np.random.default_rng(0)
    weights, tables = random.standard_normal((5, 200)), np.sort(random.standard_normal((5, 16)))
    found = choose(torch.from_numpy(weights), torch.eye(200, dtype=torch.double), torch.from_numpy(tables))
    nearest = np.abs(weights[:, :, None] - tables[:, None]).argmin(2)
    assert (found.numpy() == nearest).all()


def test_an_error_is_handed_on_to_what_is_read_together() -> None:
    """Of products with inputs of rank 40 among 200: half of the squared error, and less, of rounding to the nearest."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((200, 40)) @ random.standard_normal((40, 1000))
    second = inputs @ inputs.T + 0.01 * np.mean(np.sum(inputs**2, 1)) * np.eye(200)
    weights, tables = random.standard_normal((5, 200)), np.tile(np.linspace(-2, 2, 16), (5, 1))
    found = choose(*(torch.from_numpy(one) for one in (weights, second, tables))).numpy()
    nearest = np.abs(weights[:, :, None] - tables[:, None]).argmin(2)
    ours, plain = (float((((weights - tables[0][entries]) @ inputs) ** 2).sum()) for entries in (found, nearest))
    assert ours < 0.5 * plain


def test_centres_lie_where_errors_cost_most() -> None:
    """Weights of no cost pull no centre: the same as k-means of the others alone."""
    values = torch.cat([torch.linspace(-1, 1, 400, dtype=torch.double), torch.linspace(5, 9, 400, dtype=torch.double)])
    costs = torch.cat([torch.ones(400, dtype=torch.double), torch.full((400,), 1e-12, dtype=torch.double)])
    centres = k_means(values, costs, 4)
    assert int((centres < 2).sum()) >= 3


class TokensFirst(nn.Module):
    """A layer that reads (tokens, pictures, channels), one that reads no picture, and one that does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.turned, self.alone, self.usual = nn.Linear(48, 64), nn.Linear(48, 64), nn.Linear(48, 64)
        self.token = nn.Parameter(torch.randn(1, 48))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).reshape(len(x), 16, 48)
        turned: Tensor = self.turned(rows.transpose(0, 1)).transpose(0, 1)
        out: Tensor = turned + self.usual(rows) + self.alone(self.token)
        return out


def test_what_does_not_hold_both_streams_is_left_alone() -> None:
    model = TokensFirst().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert round_layers(model, model, correlated(16, seed=1), 4, GROUP) == 1
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"usual.weight", "usual.bias"}


def test_a_model_of_one_picture_at_a_time_is_one_line() -> None:
    class One(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(1, 3, 16, 16)

    model: Callable[[Tensor], Tensor] = One()
    with pytest.raises(ConversionError, match=r"4 bits cannot be fitted .* 16 pictures at once: .*; take palettized8"):
        round_layers(One(), model, correlated(16, seed=1), 4, GROUP)
