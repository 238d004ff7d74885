"""Palettes of few values that keep what layers compute, not each weight by itself: the same file, some decibels more.

One pass over a few pictures carries two streams, exact and with all earlier layers rounded. Each layer, as it is met,
gets a palette and rounded weights with H = x x^T of what it reads in the second stream:

    target:    T = W + W (y - x) x^T H^-1      what gives W y of the exact stream from the x that there is, as near as
                                               least squares goes
    palette:   k-means of T, each weight weighted by 1 / (H^-1)_kk, what its error costs once the others give way
    weights:   argmin |(T - Q) x|^2, a column at a time with the error handed on (Frantar et al., arXiv:2210.17323)
    bias:      b += mean(W y - Q x)

A layer whose input does not hold the streams as its halves (tokens before pictures, a constant) is left for k-means.

Own code: of coremltools.optimize.torch, SKMPalettizer weighs k-means by gradients of a loss that it needs, and rounds
each weight to its nearest; LayerwiseCompressor has GPTQ, for uniform and normal-float grids, not for fitted tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dualtoken_deploy.deploy.ane import TokenLinear
from dualtoken_deploy.errors import ConversionError, first_line

PICTURES = 32  # T (mix), digits, 4 bits, held-out: 39.1 dB by 16 pictures, 40.7 by 32
DAMPING = 0.01  # of the mean of H's diagonal, added to it, as Frantar et al. do
BLOCK = 128  # columns of weights whose errors are handed on together
LEAST = 2048  # elements; coremltools leaves tensors up to so many in float16 (OpPalettizerConfig.weight_threshold)
LLOYD = 60  # iterations of k-means


def round_layers(module: nn.Module, run: Callable[[Tensor], Any], inputs: Tensor, bits: int, group: int | None) -> int:
    """Rounds the weights of `module`'s large layers in place, each to 2^bits float16 values a table; returns how many.

    `run` calls the module, perhaps within others, on a batch of `inputs`, of which PICTURES are taken. `group`: output
    channels that share a table, where it divides them; None for one table a layer. Raises ConversionError.
    """
    chosen = inputs[np.linspace(0, len(inputs) - 1, min(PICTURES, len(inputs))).astype(int)]
    done: dict[Any, tuple[Tensor, Tensor | None]] = {}
    apart: dict[Any, bool] = {}  # whether the two streams are the halves of what a layer reads

    def look(layer: Any, given: tuple[Tensor, ...]) -> None:
        exact, noisy = given[0].tensor_split(2)
        same = exact.shape == noisy.shape and _alike(exact, noisy)
        apart[layer] = apart.get(layer, True) and same

    def hook(layer: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not apart[layer]:
            return out
        exact, noisy = given[0].chunk(2)
        if layer not in done:
            done[layer] = _rounded(layer, exact, noisy, bits, group)
        return torch.cat([out[: len(exact)], _call(layer, noisy, *done[layer])])

    layers, twice = [layer for layer in module.modules() if _takes(layer)], torch.cat([chosen, chosen])
    hooks: list[RemovableHandle] = []
    try:
        with torch.no_grad():
            hooks = [layer.register_forward_pre_hook(look) for layer in layers]
            run(twice)
            while hooks:
                hooks.pop().remove()
            hooks = [layer.register_forward_hook(hook) for layer in layers]
            run(twice)
            for layer, (weight, bias) in done.items():
                layer.weight.copy_(weight)
                if bias is not None:
                    layer.bias.copy_(bias)
    except (RuntimeError, ValueError) as error:
        raise ConversionError(
            f"palettes of {bits} bits cannot be fitted to the model on {len(chosen)} pictures at once: "
            f"{first_line(error)}; take palettized8, which needs none"
        ) from error
    finally:
        for one in hooks:
            one.remove()
    return len(done)


def _alike(one: Tensor, other: Tensor) -> bool:
    """But for what the place in a batch does to rounding."""
    return float((one - other).abs().max()) <= 1e-4 * float(one.abs().max())


def _takes(layer: Any) -> bool:
    """Whether the weights become a palette, and are multiplied as here."""
    if isinstance(layer, nn.Conv2d):
        return layer.weight.numel() > LEAST and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return type(layer) in (nn.Linear, TokenLinear) and bool(layer.weight.numel() > LEAST)


def _call(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight, bias)


def _read(layer: Any, x: Tensor) -> Tensor:
    """(groups, weights of one output, positions): what each weight meets."""
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(1, -1, x.shape[-1]).mT
    padding = layer.padding
    assert not isinstance(padding, str)  # noqa: S101 (_takes)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and padding == (0, 0):
        columns = x.flatten(2)
    else:
        columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return columns.transpose(0, 1).reshape(layer.groups, -1, columns.shape[0] * columns.shape[2])


def _rounded(layer: Any, exact: Tensor, noisy: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor | None]:
    """A layer's weights on their palettes, and its bias."""
    y, x = _read(layer, exact), _read(layer, noisy)  # (G, K, P)
    weight = layer.weight.reshape(len(x), -1, x.shape[1]).double()  # (G, O/G, K)
    second = (x @ x.mT).double()
    mean = second.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    second = second + (DAMPING * mean + 1e-12) * torch.eye(x.shape[1], dtype=torch.double)
    inverse = torch.linalg.inv(second)
    target = weight + weight @ ((y - x) @ x.mT).double() @ inverse
    channels = len(layer.weight)
    shared = group if group is not None and channels % group == 0 else channels
    cost = (1 / inverse.diagonal(dim1=1, dim2=2))[:, None].expand_as(target)
    groups = [values.reshape(-1, shared * x.shape[1]) for values in (target, cost)]
    tables = (
        torch.stack([k_means(values, costs, 1 << bits) for values, costs in zip(*groups, strict=True)]).half().double()
    )
    entries = _choose(target, second, tables, shared)
    found = tables.repeat_interleave(shared, 0).gather(1, entries).reshape(target.shape)
    bias = layer.bias
    if bias is not None:
        apart = weight @ y.double().mean(2)[:, :, None] - found @ x.double().mean(2)[:, :, None]
        bias = bias + apart.reshape(-1).to(bias.dtype)
    return found.reshape(layer.weight.shape).to(layer.weight.dtype), bias


def k_means(values: Tensor, costs: Tensor, number: int) -> Tensor:
    """`number` centres, rising, of values that weigh as much as they cost; begun as compress.palette begins."""
    order = torch.argsort(values)
    at, weights = values[order], costs[order]
    zero = at.new_zeros(1)
    mass, moment = torch.cat([zero, weights.cumsum(0)]), torch.cat([zero, (weights * at).cumsum(0)])
    spread = torch.cat([zero, (((weights[1:] + weights[:-1]) / 2).pow(1 / 3) * at.diff().pow(2 / 3)).cumsum(0)])
    places = (np.arange(number) + 0.5) / number * float(spread[-1])
    centres = torch.from_numpy(np.interp(places, spread.numpy(), at.numpy()))
    for _ in range(LLOYD):
        edges = torch.searchsorted(at, (centres[1:] + centres[:-1]) / 2)
        low, high = torch.cat([edges.new_zeros(1), edges]), torch.cat([edges, edges.new_tensor([len(at)])])
        total = mass[high] - mass[low]
        new = torch.where(total > 0, (moment[high] - moment[low]) / total.clamp_min(1e-300), centres).sort().values
        if torch.equal(new, centres):
            break
        centres = new
    return centres


def _choose(target: Tensor, second: Tensor, tables: Tensor, shared: int) -> Tensor:
    """(O, K) entries of the tables, each of `shared` rows, that change the outputs least."""
    rows = tables.repeat_interleave(shared, 0).reshape(*target.shape[:2], -1)
    return torch.cat([choose(w, h, table) for w, h, table in zip(target, second, rows, strict=True)])


def choose(weight: Tensor, second: Tensor, tables: Tensor) -> Tensor:
    """For (O, K) weights the entries of rising `tables` (O, n), a column of weights after the other, the error of each
    handed on to those that are left; `second` (K, K) = x x^T of what they multiply, damped."""
    order = torch.argsort(second.diag(), descending=True)  # what weighs most is rounded while all others can give way
    left = weight[:, order].clone()
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(second[order][:, order])), upper=True)
    entries = torch.zeros(left.shape, dtype=torch.long)
    borders = ((tables[:, 1:] + tables[:, :-1]) / 2).contiguous()
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        errors = left.new_zeros(len(left), end - start)
        for k in range(start, end):
            entries[:, k] = torch.searchsorted(borders, left[:, k : k + 1].contiguous())[:, 0]
            error = (left[:, k] - tables.gather(1, entries[:, k : k + 1])[:, 0]) / inverse[k, k]
            errors[:, k - start] = error
            left[:, k + 1 : end] -= error[:, None] * inverse[k, k + 1 : end]
        left[:, end:] -= errors @ inverse[start:end, end:]
    return entries[:, torch.argsort(order)]
