"""What the rules share: finding modules of a model, and putting others in their places."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from dualtoken_deploy.deploy import algebra

Size = tuple[int, int]  # (H, W) of the image or of a map
M = TypeVar("M", bound=nn.Module)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen linear layer of these tensors, (out, in) and (out,)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer


def replace(model: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Puts `make(module)` in the place of every module of that very type, where it does not give None."""
    count = 0
    for name, module in list(model.named_modules()):
        if type(module) is kind and (new := make(module)) is not None:
            model.set_submodule(name, new)
            count += 1
    return count


def modules_of(model: nn.Module, kind: type[M]) -> list[M]:
    return [m for m in model.modules() if type(m) is kind]


def scale_rows(layer: nn.Linear, start: int, stop: int, gain: Tensor | float) -> None:
    weight, bias = algebra.gain_into_linear(layer.weight[start:stop], layer.bias[start:stop], gain)
    layer.weight[start:stop], layer.bias[start:stop] = weight, bias
