"""Rules for modules that nobody here wrote: the general ones of the deploy form, found by what a run of them shows.

Each finds its places in the calls of one run (observe.py) where the structure leaves no doubt, and rewrites parameters
and attributes of the modules there. What a rule made is held against the module before it, in float64 on pictures of
noise; where a place does not hold, it is undone. Docstrings are the algebra.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.deploy import algebra
from dualtoken_deploy.deploy.modules import Size
from dualtoken_deploy.deploy.observe import Call, Observed, Read, observe
from dualtoken_deploy.models.count import example_shape
from dualtoken_deploy.models.named_outputs import flatten

EXACT = 1e-10  # of the largest output: float64's rounding through a hundred layers
NARROW = 1e-5  # where the module computes a part in float32 whatever its parameters are
SEEDS = (0, 1)  # of the pictures of a proof
RESIZED = 2**16  # elements of an interpolation's matrix, above which interpolating is less work

# Calls that only say otherwise how a tensor's elements lie.
_MOVES = frozenset({"view", "reshape", "transpose", "permute", "flatten", "unflatten", "contiguous", "swapaxes"})

Change = Callable[[nn.Module], None]  # rewrites one place of a module in place


@dataclass(frozen=True)
class Places:
    """What a run showed, by the modules that own each parameter."""

    module: nn.Module
    seen: Observed
    shape: tuple[int, ...]  # of the input

    def owner(self, value: Any, kind: type[nn.Module], name: str) -> str | None:
        """The path of the module of that kind whose parameter `name` is read there, and nowhere else."""
        if not isinstance(value, Read) or not isinstance(value.value, str) or len(self.seen.readers(value.value)) != 1:
            return None
        path, _, parameter = value.value.rpartition(".")
        found = self.module.get_submodule(path)
        return path if parameter == name and isinstance(found, kind) else None

    def linear_of(self, call: Call | None) -> str | None:
        """The path of the linear layer that a call of torch's `linear` is."""
        if call is None or call.name != "linear":
            return None
        return self.owner(call.argument(1, "weight"), nn.Linear, "weight")


def batch_norms(places: Places) -> list[Change]:
    """BN(W * x) = (r W) * x + r b + (beta - r mean), r = gamma / sqrt(var + eps), where BN alone reads what W gives."""
    found: list[Change] = []
    for call in places.seen.calls:
        if call.name != "batch_norm" or call.argument(5, "training") is not False:
            continue
        source = call.argument(0, "input")
        maker = places.seen.maker(source)
        if maker is None or maker.name != "conv2d" or places.seen.only_reader(source.value) is not call:
            continue
        conv = places.owner(maker.argument(1, "weight"), nn.Conv2d, "weight")
        norm = places.owner(call.argument(1, "running_mean"), nn.BatchNorm2d, "running_mean")
        if conv is not None and norm is not None and type(places.module.get_submodule(norm)) is nn.BatchNorm2d:
            found.append(partial(_fold_batch_norm, conv_path=conv, norm_path=norm))
    return found


def _fold_batch_norm(module: nn.Module, conv_path: str, norm_path: str) -> None:
    conv, norm = module.get_submodule(conv_path), module.get_submodule(norm_path)
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)  # noqa: S101, PT018 (owner() saw to it)
    assert norm.running_mean is not None and norm.running_var is not None  # noqa: S101, PT018
    gamma = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    beta = torch.zeros_like(norm.running_var) if norm.bias is None else norm.bias
    weight, bias = algebra.norm_into_conv(conv.weight, norm.running_mean, norm.running_var, gamma, beta, norm.eps)
    if conv.bias is not None:
        bias = bias + conv.bias * gamma / torch.sqrt(norm.running_var + norm.eps)
    conv.weight, conv.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    module.set_submodule(norm_path, nn.Identity())


def layer_scales(places: Places) -> list[Change]:
    """gamma (W h + b) = (diag(gamma) W) h + gamma b, where the product alone reads what the linear layer gives.

    The product goes where its module does nothing else, or leaves gamma out where it is None.
    """
    found: list[Change] = []
    for call in places.seen.calls:
        if call.name not in ("mul", "__mul__", "__rmul__", "multiply") or len(call.values) != 2:
            continue
        gammas = [v for v in call.values if isinstance(v, str)]
        factors = [v for v in call.values if isinstance(v, int)]
        if len(gammas) != 1 or len(factors) != 1 or places.seen.only_reader(gammas[0]) is not call:
            continue
        linear = places.linear_of(places.seen.maker(factors[0]))
        if linear is None or places.seen.only_reader(factors[0]) is not call:
            continue
        layer, gamma = places.module.get_submodule(linear), places.module.get_parameter(gammas[0])
        if gamma.ndim != 1 or not isinstance(layer, nn.Linear) or len(gamma) != layer.out_features:
            continue
        alone = call.within == gammas[0].rpartition(".")[0] and _does_only(places, call)
        found.append(partial(_fold_gain, linear_path=linear, gamma_name=gammas[0], alone=alone))
    return found


def _does_only(places: Places, call: Call) -> bool:
    """Whether the module that makes a call makes no other, nor has modules that do."""
    inside = any(True for _ in places.module.get_submodule(call.within).children())
    return not inside and [c for c in places.seen.calls if c.within == call.within] == [call]


def _fold_gain(module: nn.Module, linear_path: str, gamma_name: str, alone: bool) -> None:
    gamma = module.get_parameter(gamma_name)
    _scale(module.get_submodule(linear_path), gamma)
    path, _, name = gamma_name.rpartition(".")
    if alone and path:
        module.set_submodule(path, nn.Identity())
    else:
        setattr(module.get_submodule(path), name, None)


def attention_scales(places: Places) -> list[Change]:
    """(s q) . k with q = W x + b: the scale s of an attention, an attribute of its module, goes into W and b.

    Between the linear layer and the attention q is only laid out otherwise, and nothing else reads it.
    """
    found: list[Change] = []
    for call in places.seen.calls:
        scale = call.kwargs.get("scale")
        if call.name != "scaled_dot_product_attention" or not isinstance(scale, float) or scale == 1.0:
            continue
        owner = places.module.get_submodule(call.within)
        names = [n for n in ("scale", "scaling") if type(v := getattr(owner, n, None)) is float and v == scale]
        linear = _linear_behind(places, call.argument(0, "query"), call)
        if len(names) == 1 and linear is not None:
            found.append(partial(_fold_scale, linear_path=linear, path=call.within, name=names[0]))
    return found


def _linear_behind(places: Places, value: Any, reader: Call) -> str | None:
    """The linear layer that gives a value, moved at most, to one reader alone."""
    while isinstance(value, Read) and places.seen.only_reader(value.value) is reader:
        maker = places.seen.maker(value)
        if maker is None:
            return None
        if maker.name == "linear":
            return places.linear_of(maker)
        if maker.name not in _MOVES:
            return None
        value, reader = maker.args[0], maker
    return None


def _fold_scale(module: nn.Module, linear_path: str, path: str, name: str) -> None:
    attention = module.get_submodule(path)
    _scale(module.get_submodule(linear_path), getattr(attention, name))
    setattr(attention, name, 1.0)


def norm_affines(places: Places) -> list[Change]:
    """W (gamma z + beta) + b = (W diag(gamma)) z + (W beta + b), where linear layers alone read what the norm gives."""
    found: list[Change] = []
    for call in places.seen.calls:
        if call.name != "layer_norm" or len(call.results) != 1 or call.results[0] in places.seen.outputs:
            continue
        norm = places.owner(call.argument(2, "weight"), nn.LayerNorm, "weight")
        readers = places.seen.readers(call.results[0])
        linears = [places.linear_of(reader) for reader in readers]
        if norm is None or not readers or None in linears:
            continue
        named = [path for path in linears if path is not None]
        wide = getattr(places.module.get_submodule(norm), "normalized_shape", ())
        if len(wide) == 1:
            found.append(partial(_fold_affine, norm_path=norm, linears=named))
    return found


def _fold_affine(module: nn.Module, norm_path: str, linears: list[str]) -> None:
    norm = module.get_submodule(norm_path)
    assert isinstance(norm, nn.LayerNorm)  # noqa: S101 (owner() saw to it)
    beta = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
    for path in linears:
        layer = module.get_submodule(path)
        assert isinstance(layer, nn.Linear)  # noqa: S101
        weight, bias = algebra.affine_into_linear(layer.weight, layer.bias, norm.weight, beta)
        layer.weight, layer.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    norm.elementwise_affine = False
    norm.register_parameter("weight", None)
    norm.register_parameter("bias", None)


def _scale(layer: nn.Module, gain: Tensor | float) -> None:
    assert isinstance(layer, nn.Linear)  # noqa: S101 (owner() saw to it)
    rows = torch.as_tensor(gain, dtype=layer.weight.dtype)
    layer.weight = nn.Parameter(layer.weight * rows.reshape(-1, 1), False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias * rows, False)


def _fix_resize(module: nn.Module, path: str, shapes: tuple[Size, Size]) -> None:
    module.set_submodule(path, FixedResize(*shapes))


class FixedResize(nn.Module):
    """Bilinear interpolation between two sizes, R X R'. (B, C, h, w) -> (B, C, H, W)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, source: Size, target: Size) -> None:
        super().__init__()
        self.register_buffer("rows", algebra.bilinear_matrix(source[0], target[0]))
        self.register_buffer("columns", algebra.bilinear_matrix(source[1], target[1]).T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return self.rows @ x @ self.columns


def resizes(places: Places) -> list[Change]:
    """interpolate(X) = R_rows X R_columns', both constant at a fixed size, for nn.Upsample of one size and one use."""
    found: list[Change] = []
    for path, module in places.module.named_modules():
        if type(module) is not nn.Upsample or module.mode != "bilinear" or module.align_corners:
            continue
        shapes = _shapes(places, path)
        if shapes is not None and math.prod(shapes[0]) * math.prod(shapes[1]) <= RESIZED:
            found.append(partial(_fix_resize, path=path, shapes=shapes))
    return found


def _shapes(places: Places, path: str) -> tuple[Size, Size] | None:
    """Sizes of the map before and after the module; None where it runs more than once."""
    found: list[tuple[Size, Size]] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        found.append(((args[0].shape[2], args[0].shape[3]), (out.shape[2], out.shape[3])))

    handle = places.module.get_submodule(path).register_forward_hook(note)
    try:
        with torch.no_grad():
            places.module(_picture(places.shape, 0))
    finally:
        handle.remove()
    return found[0] if len(found) == 1 else None


GENERAL: Mapping[str, Callable[[Places], list[Change]]] = MappingProxyType(
    {
        "fold_batch_norm": batch_norms,
        "fold_layer_scale": layer_scales,
        "fold_attention_scale": attention_scales,
        "fold_norm_affine": norm_affines,
        "constant_resize": resizes,
    }
)


def apply_general(model: nn.Module, wanted: Iterable[str], size: Size) -> tuple[nn.Module, dict[str, int]]:
    """The module in float32 (float64, if it was) with the rules among `wanted` applied where they hold, and how often
    each did.

    A module that does not run in float64, or not while it is looked at, comes back as it is: nothing could be proved.
    """
    counts, shape = dict.fromkeys(GENERAL, 0), example_shape(model, size)
    chosen = [name for name in GENERAL if name in set(wanted)]
    try:
        working = copy.deepcopy(model).eval().requires_grad_(False).double()
        proof = Proof(shape, [_run(working, shape, seed) for seed in SEEDS])
        seen = observe(working, _picture(shape, SEEDS[0]), _tensors)
    except Exception:  # noqa: BLE001  # whatever the user's code raises in a precision that it was not written for
        return model, counts
    with torch.no_grad():
        for name in chosen:
            changes = GENERAL[name](Places(working, seen, shape))
            working, counts[name] = _apply(working, changes, proof, NARROW if seen.narrow else EXACT)
            if counts[name]:
                seen = observe(working, _picture(shape, SEEDS[0]), _tensors)
    exact = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return working if exact else working.float(), counts


@dataclass(frozen=True)
class Proof:
    """What the module gave before anything was rewritten, for the picture of each of SEEDS."""

    shape: tuple[int, ...]
    expected: list[list[Tensor]]

    def holds(self, module: nn.Module, bound: float) -> bool:
        """Whether the module still gives the same, but for `bound` of the largest element."""
        for seed, wanted in zip(SEEDS, self.expected, strict=True):
            try:
                found = _run(module, self.shape, seed)
            except Exception:  # noqa: BLE001  # code that cannot do without what was taken away
                return False
            if [t.shape for t in found] != [t.shape for t in wanted]:
                return False
            for a, b in zip(wanted, found, strict=True):
                if a.numel() and not float((a - b).abs().max()) <= bound * float(a.abs().max()):
                    return False
        return True


def _apply(working: nn.Module, changes: list[Change], proof: Proof, bound: float) -> tuple[nn.Module, int]:
    """The module with all changes that hold, and their number: together, or where one of them does not, one by one."""
    for tried in ([changes] if changes else [], [[change] for change in changes] if len(changes) > 1 else []):
        count = 0
        for some in tried:
            changed = copy.deepcopy(working)
            for change in some:
                change(changed)
            if proof.holds(changed, bound):
                working, count = changed, count + len(some)
        if count:
            return working, count
    return working, 0


def _run(module: nn.Module, shape: tuple[int, ...], seed: int) -> list[Tensor]:
    with torch.no_grad():
        return [t.double() for t in _tensors(module(_picture(shape, seed)))]


def _tensors(given: Any) -> list[Tensor]:
    return [tensor for _, tensor in flatten(given)]


def _picture(shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise, about as bright as a normalised picture, the second one brighter."""
    generator = torch.Generator().manual_seed(seed)
    return (1 + seed) * torch.randn(shape, generator=generator, dtype=torch.float64)
