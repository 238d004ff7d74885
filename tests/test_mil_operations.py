"""Every MIL operation alone, in float32 against PyTorch's operator or formula in float64, over shapes and edges."""

# ruff: noqa: E501 (a table: one case, one row)

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dualtoken_deploy.targets.coreml.mil.ops import OPERATIONS
from dualtoken_deploy.targets.coreml.mil.ops.compression import constexpr_lut_to_dense
from dualtoken_deploy.targets.coreml.mil.ops.pointwise import UNARY, apply_unary, erf_of
from dualtoken_deploy.targets.coreml.mil.weights import unpack_bits

TOLERANCE = 2e-6  # relative, of float32 arithmetic in another order
Case = tuple[str, dict[str, Any], Callable[..., Any]]


def r(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def i(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, np.int32)


def t(array: Any) -> Tensor:
    return (
        torch.from_numpy(np.ascontiguousarray(array)).double() if array.dtype.kind == "f" else torch.from_numpy(array)
    )


def conv_case(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, pad: int, dilation: int, groups: int, bias: bool
) -> Case:
    n = len(x) - 2
    arguments: dict[str, Any] = {
        "x": r(*x), "weight": r(*w, seed=1), "pad_type": "custom", "pad": i(*[pad] * 2 * n), "strides": i(*[stride] * n),
        "dilations": i(*[dilation] * n), "groups": np.int32(groups),
    }  # fmt: skip
    if bias:
        arguments["bias"] = r(w[0], seed=2)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[n]

    def want(a: dict[str, Any]) -> Tensor:
        return function(t(a["x"]), t(a["weight"]), t(a["bias"]) if bias else None, stride, pad, dilation, groups)

    return "conv", arguments, want


def pool_case(kind: str, size: int, kernel: int, stride: int, pad: int, ceil: bool, exclude: bool = False) -> Case:
    arguments: dict[str, Any] = {
        "x": r(2, 3, size, size + 1), "kernel_sizes": i(kernel, kernel), "strides": i(stride, stride), "pad_type": "custom",
        "pad": i(pad, pad, pad, pad), "ceil_mode": np.bool_(ceil),
    }  # fmt: skip
    if kind == "max_pool":
        return kind, arguments, lambda a: F.max_pool2d(t(a["x"]), kernel, stride, pad, ceil_mode=ceil)
    arguments["exclude_padding_from_average"] = np.bool_(exclude)
    return kind, arguments, lambda a: F.avg_pool2d(t(a["x"]), kernel, stride, pad, ceil, not exclude)


def norm_case(shape: tuple[int, ...], axes: tuple[int, ...], affine: bool, epsilon: float) -> Case:
    width = [shape[a] for a in sorted(a % len(shape) for a in axes)]
    arguments: dict[str, Any] = {"x": 3 * r(*shape) + 1, "axes": i(*axes), "epsilon": np.float32(epsilon)}
    if affine:
        arguments |= {"gamma": r(*width, seed=1), "beta": r(*width, seed=2)}

    def want(a: dict[str, Any]) -> Tensor:
        last = sorted(x % len(shape) for x in axes)
        order = [x for x in range(len(shape)) if x not in last] + last
        moved = t(a["x"]).permute(order)
        gamma, beta = (t(a["gamma"]), t(a["beta"])) if affine else (None, None)
        out = F.layer_norm(moved, width, gamma, beta, float(np.float32(epsilon)))
        return out.permute([order.index(x) for x in range(len(shape))])

    return "layer_norm", arguments, want


def attention_case(shape: tuple[int, ...], keys: int, width: int, mask: str | None) -> Case:
    *batch, length, e = shape
    arguments = {"query": r(*shape), "key": r(*batch, keys, e, seed=1), "value": r(*batch, keys, width, seed=2)}
    if mask == "float":
        arguments["attn_mask"] = r(length, keys, seed=3)
    elif mask == "bool":
        allowed = r(length, keys, seed=4) > 0
        allowed[:, 0] = True
        arguments["attn_mask"] = allowed

    def want(a: dict[str, Any]) -> Tensor:
        m = t(a["attn_mask"]) if mask else None
        return F.scaled_dot_product_attention(t(a["query"]), t(a["key"]), t(a["value"]), m)

    return "scaled_dot_product_attention", arguments, want


def transposed_case(
    x: tuple[int, ...], w: tuple[int, ...], stride: int, pad: int, dilation: int, groups: int, extra: int = 0
) -> Case:
    n = len(x) - 2
    arguments: dict[str, Any] = {
        "x": r(*x), "weight": r(*w, seed=1), "bias": r(groups * w[1], seed=2), "pad_type": "custom",
        "pad": i(*[pad] * 2 * n), "strides": i(*[stride] * n), "dilations": i(*[dilation] * n), "groups": np.int32(groups),
    }  # fmt: skip
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[n]

    def want(a: dict[str, Any]) -> Tensor:
        return function(t(a["x"]), t(a["weight"]), t(a["bias"]), stride, pad, extra, groups, dilation)

    if extra:
        arguments["output_shape"] = i(*want(arguments).shape)
    return "conv_transpose", arguments, want


CASES: list[Case] = [
    transposed_case((2, 3, 5, 4), (3, 6, 2, 2), 2, 0, 1, 1),
    transposed_case((1, 4, 5, 6), (4, 2, 3, 3), 2, 1, 1, 2),
    transposed_case((1, 4, 5, 6), (4, 3, 3, 3), 2, 1, 1, 1, extra=1),
    transposed_case((2, 4, 5, 6), (4, 1, 4, 4), 2, 1, 1, 4),
    transposed_case((1, 3, 7), (3, 5, 3), 1, 2, 2, 1),
    ("conv_transpose", {"x": r(1, 2, 3, 3), "weight": r(2, 3, 2, 2)}, lambda a: F.conv_transpose2d(t(a["x"]), t(a["weight"]))),
    ("clamped_relu", {"x": 3 * r(4, 5), "alpha": np.float32(0.5), "beta": np.float32(1.5)},
     lambda a: torch.where(t(a["x"]) >= 0, t(a["x"]), 0.5 * t(a["x"])).clamp(max=1.5)),
    ("elu", {"x": 9 * r(4, 5), "alpha": np.float32(0.5)}, lambda a: F.elu(t(a["x"]), 0.5)),
    ("linear_activation", {"x": r(4, 5), "alpha": np.float32(0.5), "beta": np.float32(2)}, lambda a: 0.5 * t(a["x"]) + 2),
    ("prelu", {"x": r(2, 3, 4, 5), "alpha": r(3, seed=1)}, lambda a: F.prelu(t(a["x"]), t(a["alpha"]))),
    ("scaled_tanh", {"x": r(4, 5), "alpha": np.float32(2), "beta": np.float32(0.5)}, lambda a: 2 * torch.tanh(0.5 * t(a["x"]))),
    ("sigmoid_hard", {"x": 9 * r(4, 5), "alpha": np.float32(1 / 6), "beta": np.float32(0.5)}, lambda a: F.hardsigmoid(t(a["x"]))),
    ("softplus", {"x": np.array([-200, -5, 0, 5, 200], np.float32)}, lambda a: F.softplus(t(a["x"]), threshold=1e9)),
    ("softplus_parametric", {"x": r(2, 3, 4, 5), "alpha": r(3, seed=1), "beta": r(3, seed=2)},
     lambda a: t(a["alpha"])[:, None, None] * F.softplus(t(a["beta"])[:, None, None] * t(a["x"]))),
    ("thresholded_relu", {"x": r(4, 5), "alpha": np.float32(0.25)}, lambda a: torch.where(t(a["x"]) >= 0.25, t(a["x"]), 0.0)),
    *((kind, {"x": r(2, 3, 4) ** 2 + 0.1, "axes": i(*axes), "keep_dims": np.bool_(keep)},
       lambda a, f=f: f(t(a["x"]), tuple(a["axes"].tolist()), bool(a["keep_dims"])))
      for kind, f in (
          ("reduce_l1_norm", lambda x, d, k: x.abs().sum(d, k)), ("reduce_l2_norm", lambda x, d, k: torch.linalg.vector_norm(x, 2, d, k)),
          ("reduce_log_sum", lambda x, d, k: x.sum(d, k).log()), ("reduce_log_sum_exp", lambda x, d, k: x.logsumexp(d, k)),
          ("reduce_sum_square", lambda x, d, k: x.square().sum(d, k)))
      for axes in ((1,), (-1, 0)) for keep in (True, False)),
    ("reduce_log_sum_exp", {"x": 200 * r(2, 3)}, lambda a: t(a["x"]).flatten().logsumexp(0)),
    ("floor_div", {"x": 9 * r(3, 4), "y": r(4, seed=1) ** 2 + 0.5}, lambda a: torch.floor(t(a["x"]) / t(a["y"]))),
    ("mod", {"x": i(7, -7, 8), "y": i(3, 3, 4)}, lambda a: t(a["x"]) % t(a["y"])),
    *((kind, {"x": r(3, 4) > 0, "y": r(4, seed=1) > 0}, lambda a, f=f: f(t(a["x"]), t(a["y"]))) for kind, f in (
        ("logical_and", torch.logical_and), ("logical_or", torch.logical_or), ("logical_xor", torch.logical_xor))),
    ("logical_not", {"x": r(3, 4) > 0}, lambda a: ~t(a["x"])),
    ("gather_along_axis", {"x": r(2, 5), "indices": np.array([[0, 3, 4], [1, 1, 2]], np.int32), "axis": np.int32(1)},
     lambda a: t(a["x"]).gather(1, t(a["indices"]).long())),
    ("gather_nd", {"x": r(4, 5, 2), "indices": np.array([[0, 3], [3, 1]], np.int32)}, lambda a: t(a["x"])[[0, 3], [3, 1]]),
    ("reverse", {"x": r(2, 3, 4), "axes": i(0, -1)}, lambda a: t(a["x"]).flip(0, 2)),
    ("reverse", {"x": r(2, 3)}, lambda a: t(a["x"]).flip(0, 1)),
    ("slice_update", {"x": r(4, 6), "update": r(2, 3, seed=1), "begin": i(1, 0), "end": i(3, 6), "stride": i(1, 2)},
     lambda a: t(a["x"]).slice_scatter(t(a["x"])[1:3].slice_scatter(t(a["update"]), 1, 0, 6, 2), 0, 1, 3)),
    ("slice_update", {"x": r(4, 6), "update": r(6, seed=1), "begin": i(2, 0), "end": i(0, 0), "end_mask": np.array([False, True]),
                      "squeeze_mask": np.array([True, False])},
     lambda a: t(a["x"]).select_scatter(t(a["update"]), 0, 2)),
    ("cumsum", {"x": r(2, 4, 3), "axis": np.int32(1)}, lambda a: t(a["x"]).cumsum(1)),
    ("cumsum", {"x": r(2, 4), "axis": np.int32(-1), "exclusive": np.bool_(True)}, lambda a: F.pad(t(a["x"]).cumsum(1), (1, 0))[:, :-1]),
    ("cumsum", {"x": r(2, 4), "axis": np.int32(-1), "reverse": np.bool_(True)}, lambda a: t(a["x"]).flip(1).cumsum(1).flip(1)),
    *(("reduce_argmin", {"x": r(2, 5, 3), "axis": np.int32(1), "keep_dims": np.bool_(keep), "output_dtype": "int32"},
       lambda q, keep=keep: t(q["x"]).argmin(1, keep).int()) for keep in (False, True)),
    *(("resize_bilinear", {"x": r(1, 2, 5, 7), "target_size_height": np.int32(h), "target_size_width": np.int32(w), "sampling_mode": mode},
       lambda q, h=h, w=w, mode=mode: F.interpolate(t(q["x"]), (h, w), mode="bilinear", align_corners=mode != "UNALIGN_CORNERS"))
      for h, w in ((10, 14), (3, 9)) for mode in ("UNALIGN_CORNERS", "STRICT_ALIGN_CORNERS", "ALIGN_CORNERS")),
    *(("resize_bilinear", {"x": np.array([[[0.0, 1.0]]], np.float32), "target_size_width": np.int32(len(want)), "sampling_mode": mode},
       lambda q, want=want: torch.tensor([[want]]).double())  # the examples of its documentation, unrounded
      for mode, want in (("DEFAULT", (0, 0.4, 0.8, 1, 1)), ("OFFSET_CORNERS", (0.1, 0.3, 0.5, 0.7, 0.9)), ("ALIGN_CORNERS", (0.5,)))),
    ("linear", {"x": r(2, 5, 7), "weight": r(3, 7), "bias": r(3)}, lambda a: F.linear(t(a["x"]), t(a["weight"]), t(a["bias"]))),
    ("linear", {"x": r(7), "weight": r(3, 7)}, lambda a: F.linear(t(a["x"]), t(a["weight"]))),
    ("linear", {"x": r(1, 2, 3, 4, 5), "weight": r(1, 5)}, lambda a: F.linear(t(a["x"]), t(a["weight"]))),
    ("matmul", {"x": r(2, 3, 4), "y": r(4, 5)}, lambda a: t(a["x"]) @ t(a["y"])),
    ("matmul", {"x": r(3, 1, 4, 2), "y": r(5, 3, 4), "transpose_x": np.bool_(True), "transpose_y": np.bool_(True)},
     lambda a: t(a["x"]).mT @ t(a["y"]).mT),
    ("matmul", {"x": r(2, 4, 3), "y": r(2, 4, 5), "transpose_x": np.bool_(True)}, lambda a: t(a["x"]).mT @ t(a["y"])),
    conv_case((2, 3, 9, 8), (4, 3, 3, 3), 1, 1, 1, 1, True),
    conv_case((1, 3, 11, 7), (6, 3, 3, 3), 2, 1, 1, 1, False),
    conv_case((2, 6, 9, 9), (6, 1, 5, 5), 1, 2, 1, 6, True),
    conv_case((1, 4, 8, 8), (8, 1, 3, 3), 2, 0, 1, 4, True),
    conv_case((1, 6, 9, 9), (4, 3, 3, 3), 1, 2, 2, 2, True),
    conv_case((2, 5, 1, 13), (7, 5, 1, 1), 1, 0, 1, 1, True),
    conv_case((2, 3, 12), (4, 3, 5), 3, 2, 1, 1, True),
    conv_case((1, 2, 5, 5, 5), (2, 2, 3, 3, 3), 1, 1, 1, 1, False),
    ("conv", {"x": r(1, 2, 7, 6), "weight": r(3, 2, 3, 3), "pad_type": "same"},
     lambda a: F.conv2d(t(a["x"]), t(a["weight"]), padding="same")),
    ("conv", {"x": r(1, 2, 6, 6), "weight": r(3, 2, 2, 2), "pad_type": "same"},
     lambda a: F.conv2d(F.pad(t(a["x"]), (0, 1, 0, 1)), t(a["weight"]))),
    ("conv", {"x": r(1, 2, 6, 6), "weight": r(3, 2, 2, 2), "pad_type": "same_lower"},
     lambda a: F.conv2d(F.pad(t(a["x"]), (1, 0, 1, 0)), t(a["weight"]))),
    ("conv", {"x": r(1, 2, 7, 6), "weight": r(3, 2, 3, 3), "pad_type": "valid"},
     lambda a: F.conv2d(t(a["x"]), t(a["weight"]))),
    ("conv", {"x": r(1, 2, 6, 6), "weight": r(3, 2, 3, 3), "pad_type": "custom", "pad": i(1, 0, 2, 1)},
     lambda a: F.conv2d(F.pad(t(a["x"]), (2, 1, 1, 0)), t(a["weight"]))),
    *(pool_case("max_pool", 7, k, s, p, c) for k, s, p, c in ((2, 2, 0, False), (3, 2, 1, False), (2, 2, 0, True), (3, 1, 1, True))),
    *(pool_case("avg_pool", 7, k, s, p, c, e) for k, s, p, c, e in (
        (2, 2, 0, False, False), (3, 2, 1, False, False), (3, 2, 1, False, True), (3, 3, 1, True, False), (2, 2, 0, True, True))),
    norm_case((2, 5, 8), (-1,), True, 1e-5),
    norm_case((2, 8, 1, 5), (1,), True, 1e-5),
    norm_case((2, 8, 1, 5), (1,), False, 1e-3),
    norm_case((2, 3, 4, 5), (2, 3), True, 1e-5),
    norm_case((3, 4), (1,), False, 0.0),
    ("batch_norm", {"x": r(2, 3, 4, 5), "mean": r(3), "variance": r(3, seed=1) ** 2, "gamma": r(3, seed=2), "beta": r(3, seed=3),
                    "epsilon": np.float32(1e-3)},
     lambda a: F.batch_norm(t(a["x"]), t(a["mean"]), t(a["variance"]), t(a["gamma"]), t(a["beta"]), eps=float(np.float32(1e-3)))),
    ("instance_norm", {"x": r(2, 3, 4, 5), "gamma": r(3, seed=2), "beta": r(3, seed=3), "epsilon": np.float32(1e-5)},
     lambda a: F.instance_norm(t(a["x"]), weight=t(a["gamma"]), bias=t(a["beta"]))),
    *(("softmax", {"x": 9 * r(2, 3, 4), "axis": np.int32(axis)}, lambda a: t(a["x"]).softmax(int(a["axis"]))) for axis in (-1, 0, 1)),
    ("softmax", {"x": np.array([[1e4, 1e4, -1e4]], np.float32), "axis": np.int32(-1)}, lambda a: t(a["x"]).softmax(-1)),
    *(("reduce_mean", {"x": r(2, 3, 4), "axes": i(*axes), "keep_dims": np.bool_(keep)},
       lambda a: t(a["x"]).mean(tuple(a["axes"].tolist()), bool(a["keep_dims"])))
      for axes in ((1,), (-1, 0), (0, 1, 2)) for keep in (True, False)),
    ("reduce_sum", {"x": r(2, 3, 4), "axes": i(1, 2)}, lambda a: t(a["x"]).sum((1, 2))),
    ("reduce_sum", {"x": r(2, 3)}, lambda a: t(a["x"]).sum()),
    ("reduce_max", {"x": r(2, 3, 4), "axes": i(1), "keep_dims": np.bool_(True)}, lambda a: t(a["x"]).amax(1, True)),
    ("reduce_min", {"x": r(2, 3, 4), "axes": i(-1)}, lambda a: t(a["x"]).amin(-1)),
    ("reduce_prod", {"x": r(2, 3, 4), "axes": i(2)}, lambda a: t(a["x"]).prod(2)),
    *(attention_case(shape, keys, width, mask) for shape, keys, width, mask in (
        ((1, 2, 5, 4), 7, 4, None), ((2, 3, 8), 3, 6, None), ((1, 2, 5, 4), 7, 4, "float"), ((2, 2, 5, 4), 7, 3, "bool"),
        ((1, 2, 3, 5, 4), 6, 4, None))),
    *((kind, {"x": r(2, 3, 1), "y": r(3, 4, seed=1) ** 2 + 0.5}, function) for kind, function in (
        ("add", lambda a: t(a["x"]) + t(a["y"])), ("sub", lambda a: t(a["x"]) - t(a["y"])),
        ("mul", lambda a: t(a["x"]) * t(a["y"])), ("real_div", lambda a: t(a["x"]) / t(a["y"])),
        ("maximum", lambda a: torch.maximum(t(a["x"]), t(a["y"]))), ("minimum", lambda a: torch.minimum(t(a["x"]), t(a["y"]))),
        ("equal", lambda a: t(a["x"]) == t(a["y"])), ("not_equal", lambda a: t(a["x"]) != t(a["y"])),
        ("greater", lambda a: t(a["x"]) > t(a["y"])), ("greater_equal", lambda a: t(a["x"]) >= t(a["y"])),
        ("less", lambda a: t(a["x"]) < t(a["y"])), ("less_equal", lambda a: t(a["x"]) <= t(a["y"])))),
    ("pow", {"x": np.abs(r(3, 4)), "y": r(4, seed=1)}, lambda a: t(a["x"]) ** t(a["y"])),
    ("real_div", {"x": np.array([1, -1, 0], np.float32), "y": np.zeros(3, np.float32)}, lambda a: t(a["x"]) / t(a["y"])),
    ("select", {"cond": r(3, 4) > 0, "a": r(3, 4, seed=1), "b": r(4, seed=2)}, lambda a: torch.where(t(a["cond"]), t(a["a"]), t(a["b"]))),
    ("clip", {"x": 3 * r(3, 4), "alpha": np.float32(-1), "beta": np.float32(2)}, lambda a: t(a["x"]).clamp(-1, 2)),
    ("leaky_relu", {"x": r(3, 4), "alpha": np.float32(0.1)}, lambda a: F.leaky_relu(t(a["x"]), float(np.float32(0.1)))),
    ("rsqrt", {"x": r(3, 4) ** 2, "epsilon": np.float32(1e-3)}, lambda a: (t(a["x"]) + float(np.float32(1e-3))).rsqrt()),
    ("inverse", {"x": r(3, 4) ** 2 + 1, "epsilon": np.float32(1e-3)}, lambda a: 1 / (t(a["x"]) + float(np.float32(1e-3)))),
    ("log", {"x": r(3, 4) ** 2 + 1, "epsilon": np.float32(1e-3)}, lambda a: (t(a["x"]) + float(np.float32(1e-3))).log()),
    ("gelu", {"x": 3 * r(5, 6), "mode": "EXACT"}, lambda a: F.gelu(t(a["x"]))),
    ("gelu", {"x": 3 * r(5, 6), "mode": "TANH_APPROXIMATION"}, lambda a: F.gelu(t(a["x"]), approximate="tanh")),
    ("gelu", {"x": 3 * r(5, 6), "mode": "SIGMOID_APPROXIMATION"}, lambda a: t(a["x"]) * torch.sigmoid(1.702 * t(a["x"]))),
    ("identity", {"x": r(2, 3)}, lambda a: t(a["x"])),
    ("transpose", {"x": r(2, 3, 4, 5), "perm": i(0, -1, 1, 2)}, lambda a: t(a["x"]).permute(0, 3, 1, 2)),
    ("reshape", {"x": r(2, 3, 4), "shape": i(6, -1)}, lambda a: t(a["x"]).reshape(6, 4)),
    ("reshape", {"x": r(2, 3, 4), "shape": i(0, -1, 2)}, lambda a: t(a["x"]).reshape(2, 6, 2)),
    ("reshape", {"x": r(2, 50), "shape": i(1, 0, -1, 0)}, lambda a: t(a["x"]).reshape(1, 1, 2, 50)),
    ("expand_dims", {"x": r(2, 3), "axes": i(0, -1)}, lambda a: t(a["x"])[None, :, :, None]),
    ("squeeze", {"x": r(1, 2, 1, 3), "axes": i(0, 2)}, lambda a: t(a["x"]).reshape(2, 3)),
    ("squeeze", {"x": r(1, 2, 1, 3)}, lambda a: t(a["x"]).squeeze()),
    ("concat", {"values": [r(2, 3), r(2, 4)], "axis": np.int32(-1)}, lambda a: torch.cat([t(v) for v in a["values"]], -1)),
    ("concat", {"values": [r(3, 2), r(3, 2, seed=1)], "axis": np.int32(0), "interleave": np.bool_(True)},
     lambda a: torch.stack([t(v) for v in a["values"]], 1).flatten(0, 1)),
    ("stack", {"values": [r(2, 3), r(2, 3, seed=1)], "axis": np.int32(1)}, lambda a: torch.stack([t(v) for v in a["values"]], 1)),
    ("tile", {"x": r(2, 1, 3), "reps": i(1, 4, 2)}, lambda a: t(a["x"]).repeat(1, 4, 2)),
    ("fill_like", {"ref_tensor": r(2, 3), "value": np.float32(1.5)}, lambda a: torch.full_like(t(a["ref_tensor"]), 1.5)),
    ("gather", {"x": r(5, 3), "indices": i(4, 0, -1), "axis": np.int32(0)}, lambda a: t(a["x"])[[4, 0, -1]]),
    ("gather", {"x": r(2, 5), "indices": i(1, 1), "axis": np.int32(1)}, lambda a: t(a["x"])[:, [1, 1]]),
    ("slice_by_index", {"x": r(4, 5, 6), "begin": i(1, 0, 5), "end": i(3, 5, 0), "stride": i(1, 2, 1),
                        "begin_mask": np.array([False, True, False]), "end_mask": np.array([False, False, True])},
     lambda a: t(a["x"])[1:3, ::2, 5:]),
    ("slice_by_index", {"x": r(4, 5), "begin": i(-1, 1), "end": i(0, -1), "squeeze_mask": np.array([True, False])},
     lambda a: t(a["x"])[-1, 1:-1]),
    ("slice_by_size", {"x": r(4, 5), "begin": i(1, 2), "size": i(2, -1)}, lambda a: t(a["x"])[1:3, 2:]),
    ("pad", {"x": r(2, 3, 4), "pad": i(1, 2, 0, 3)}, lambda a: F.pad(t(a["x"]), (0, 3, 1, 2))),
    ("pad", {"x": r(1, 2, 4, 5), "pad": i(0, 0, 0, 0, 1, 2, 3, 0), "mode": "constant", "constant_val": np.float32(-2)},
     lambda a: F.pad(t(a["x"]), (3, 0, 1, 2), value=-2)),
    ("pad", {"x": r(1, 2, 4, 5), "pad": i(1, 2, 3, 0), "mode": "reflect"}, lambda a: F.pad(t(a["x"]), (3, 0, 1, 2), "reflect")),
    ("pad", {"x": r(1, 2, 4, 5), "pad": i(1, 2, 3, 0), "mode": "replicate"}, lambda a: F.pad(t(a["x"]), (3, 0, 1, 2), "replicate")),
    ("pixel_unshuffle", {"x": r(2, 3, 4, 6), "downscale_factor": np.uint32(2)}, lambda a: F.pixel_unshuffle(t(a["x"]), 2)),
    ("pixel_shuffle", {"x": r(2, 12, 2, 3), "upscale_factor": np.uint32(2)}, lambda a: F.pixel_shuffle(t(a["x"]), 2)),
    ("cast", {"x": np.array([1.7, -1.7, 0], np.float32), "dtype": "int32"}, lambda a: torch.tensor([1, -1, 0])),
    ("cast", {"x": np.array([0.5, 0], np.float32), "dtype": "bool"}, lambda a: torch.tensor([True, False])),
    ("cast", {"x": np.array([1 + 2**-11], np.float32), "dtype": "fp16"}, lambda a: t(a["x"]).half()),
    ("constexpr_affine_dequantize",
     {"quantized_data": np.arange(-6, 6, dtype=np.int8).reshape(3, 4), "zero_point": np.array([1, 0, -2], np.int8),
      "scale": np.array([0.5, 0.25, 2], np.float32), "axis": np.int32(0)},
     lambda a: (t(a["quantized_data"]) - t(a["zero_point"])[:, None]).double() * t(a["scale"])[:, None]),
    ("constexpr_affine_dequantize",
     {"quantized_data": np.arange(250, 256, dtype=np.uint8), "zero_point": np.uint8(128), "scale": np.float32(0.5), "axis": np.int32(0)},
     lambda a: (torch.arange(250, 256) - 128).double() / 2),
    ("constexpr_blockwise_shift_scale",
     {"data": np.arange(-8, 8, dtype=np.int8).reshape(4, 4), "scale": np.array([[1, 2], [3, 4]], np.float32),
      "offset": np.array([[0, 1], [-1, 2]], np.int8)},
     lambda a: (t(a["data"]) - t(a["offset"]).repeat_interleave(2, 0).repeat_interleave(2, 1)).double()
     * t(a["scale"]).repeat_interleave(2, 0).repeat_interleave(2, 1)),
    ("constexpr_sparse_to_dense",
     {"nonzero_data": np.array([5, 6], np.float32), "mask": np.array([0b01100], np.uint8), "shape": np.array([5], np.uint32)},
     lambda a: torch.tensor([0, 0, 5, 6, 0]).double()),
    ("constexpr_sparse_to_dense", {"nonzero_data": np.array([5, 6], np.float32), "mask": np.array([[0, 1], [1, 0]], np.uint8)},
     lambda a: torch.tensor([[0, 5], [6, 0]]).double()),
    ("constexpr_cast", {"source_val": np.array([1.5], np.float16), "output_dtype": "fp32"}, lambda a: torch.tensor([1.5])),
    ("quantize", {"input": np.array([-9, -1.3, -0.25, 0.25, 0.75, 1.2, 99], np.float32), "scale": np.float32(0.5), "output_dtype": "int8"},
     lambda a: torch.quantize_per_tensor(t(a["input"]).float(), 0.5, 0, torch.qint8).int_repr()),
    ("quantize", {"input": r(3, 4), "scale": np.array([0.1, 0.2, 0.05, 0.01], np.float32), "output_dtype": "uint8",
                  "zero_point": np.array([128, 0, 255, 7], np.uint8), "axis": np.int32(1)},
     lambda a: torch.fake_quantize_per_channel_affine(t(a["input"]).float(), t(a["scale"]).float(), t(a["zero_point"]).int(), 1, 0, 255)
     .div(t(a["scale"]).float()).round().int() + t(a["zero_point"]).int()),
    ("dequantize", {"input": np.array([[-128, 127]], np.int8), "scale": np.float32(0.5), "zero_point": np.int8(-3)},
     lambda a: torch.tensor([[-62.5, 65.0]])),
    ("dequantize", {"input": np.array([[0, 255], [1, 2]], np.uint8), "scale": np.array([1, 0.5], np.float32), "axis": np.int32(0)},
     lambda a: torch.tensor([[0, 255], [0.5, 1]])),
    *(("upsample_nearest_neighbor", {"x": r(1, 2, 5, 7), "scale_factor_height": np.float32(a), "scale_factor_width": np.float32(b)},
       lambda q, a=a, b=b: F.interpolate(t(q["x"]), scale_factor=(a, b), mode="nearest")) for a, b in ((2, 2), (3, 1), (1.5, 2.5))),
    *(("upsample_bilinear", {"x": r(1, 2, 5, 7), "scale_factor_height": np.float32(h / 5), "scale_factor_width": np.float32(w / 7), "align_corners": np.bool_(corners)},
       lambda q, h=h, w=w, corners=corners: F.interpolate(t(q["x"]), (h, w), mode="bilinear", align_corners=corners))
      for h, w in ((10, 14), (6, 23), (64, 96), (5, 7)) for corners in (False, True)),
    ("upsample_bilinear", {"x": r(1, 2, 1, 1), "scale_factor_height": np.float32(6), "scale_factor_width": np.float32(9), "align_corners": np.bool_(False)},
     lambda q: F.interpolate(t(q["x"]), (6, 9), mode="bilinear", align_corners=False)),
    *(("reduce_argmax", {"x": r(2, 5, 3), "axis": np.int32(axis), "keep_dims": np.bool_(keep), "output_dtype": "int32"},
       lambda q, axis=axis, keep=keep: t(q["x"]).argmax(axis, keep).int()) for axis in (1, -1) for keep in (False, True)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "want"), CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)])
def test_operation(kind: str, arguments: dict[str, Any], want: Callable[..., Any]) -> None:
    with np.errstate(divide="ignore", invalid="ignore"):  # as the executor has it
        got = np.asarray(OPERATIONS[kind].function(**arguments))
    expected = torch.as_tensor(want(arguments)).numpy()
    assert got.shape == expected.shape
    np.testing.assert_allclose(got.astype(np.float64), expected.astype(np.float64), rtol=TOLERANCE, atol=TOLERANCE)


TORCH_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs, "acos": torch.acos, "asin": torch.asin, "atan": torch.atan, "ceil": torch.ceil, "cos": torch.cos,
    "cosh": torch.cosh, "exp2": torch.exp2, "sinh": torch.sinh, "erf": torch.erf, "exp": torch.exp, "floor": torch.floor,
    "relu": torch.relu, "relu6": F.relu6, "round": torch.round, "sigmoid": torch.sigmoid, "sign": lambda x: torch.where(x.isnan(), x, x.sign()),
    "silu": F.silu, "sin": torch.sin, "softsign": F.softsign, "sqrt": torch.sqrt, "square": torch.square, "tanh": torch.tanh,
    "EXACT": F.gelu, "TANH_APPROXIMATION": lambda x: F.gelu(x, approximate="tanh"),
    "SIGMOID_APPROXIMATION": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip


@pytest.mark.parametrize("kind", TORCH_UNARY)
def test_unary_functions_over_every_float16_and_in_float32(kind: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    want = TORCH_UNARY[kind](torch.from_numpy(every.astype(np.float64))).numpy()
    got = apply_unary(kind, every)
    assert got.dtype == np.float16
    with np.errstate(over="ignore"):
        rounded = want.astype(np.float16)
    # half a unit in the last place may fall either way where float64 itself is not exact; subnormals are 6e-8 apart
    np.testing.assert_allclose(got.astype(np.float64), rounded.astype(np.float64), rtol=2**-10, atol=6e-8)
    same = (got == rounded) | (np.isnan(got) & np.isnan(rounded))
    assert same.mean() > 0.9999
    some = np.linspace(0 if kind == "sqrt" else -8, 8, 4001, dtype=np.float32)
    want32 = TORCH_UNARY[kind](torch.from_numpy(some.astype(np.float64))).numpy()
    np.testing.assert_allclose(apply_unary(kind, some), want32, rtol=TOLERANCE, atol=TOLERANCE)


def test_every_row_of_the_table_is_tested_here() -> None:
    tested = {kind for kind, _, _ in CASES} | (set(TORCH_UNARY) & set(UNARY))
    separately = {"split", "classify", "constexpr_lut_to_dense"}
    assert set(OPERATIONS) == tested | separately


def test_erf_is_math_erf() -> None:
    at = np.concatenate([np.linspace(-7, 7, 5001), [0.0, -0.0, 1e-300, np.inf, -np.inf]])
    np.testing.assert_allclose(erf_of(at), [math.erf(x) for x in at], rtol=0, atol=5e-13)
    assert np.isnan(erf_of(np.array([np.nan])))[0]


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [({"num_splits": np.int32(3)}, [2, 2, 2]), ({"split_sizes": i(1, 2, 3)}, [1, 2, 3]),
     ({"split_sizes": i(1, 2, 3), "num_splits": np.int32(3)}, [1, 2, 3])],
)  # fmt: skip
@pytest.mark.parametrize("axis", [1, -2])
def test_split(arguments: dict[str, Any], sizes: list[int], axis: int) -> None:
    x = r(2, 6, 3)
    parts = OPERATIONS["split"].function(x=x, axis=np.int32(axis), **arguments)
    for part, want in zip(parts, torch.split(torch.from_numpy(x), sizes, axis), strict=True):
        np.testing.assert_array_equal(part, want.numpy())


@pytest.mark.parametrize("arguments", [{"num_splits": np.int32(4)}, {"split_sizes": i(1, 2)}, {}])
def test_split_that_does_not_fill_the_axis(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="split"):
        OPERATIONS["split"].function(x=r(2, 6, 3), axis=np.int32(1), **arguments)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_packed_elements(bits: int) -> None:
    """Against Python's integers: the packed bytes are one little-endian number of count * bits bits."""
    values = np.random.default_rng(bits).integers(0, 1 << bits, 37)
    number = sum(int(v) << (n * bits) for n, v in enumerate(values))
    packed = np.frombuffer(number.to_bytes(-(-37 * bits // 8), "little"), np.uint8)
    np.testing.assert_array_equal(unpack_bits(packed, 37, bits), values)
    signed = np.where(values >= 1 << (bits - 1), values - (1 << bits), values)
    np.testing.assert_array_equal(unpack_bits(packed, 37, bits, signed=True), signed)
    table = np.random.default_rng(0).standard_normal(1 << bits).astype(np.float16)
    found = constexpr_lut_to_dense(packed, table, shape=np.array([37, 1], np.uint32))
    np.testing.assert_array_equal(found, table[values][:, None])


def test_tables_for_groups_of_channels() -> None:
    """The example of the documentation of iOS18's constexpr_lut_to_dense: two groups over the first axis."""
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float16).reshape(2, 1, 4, 1)
    want = [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]
    np.testing.assert_array_equal(constexpr_lut_to_dense(indices, lut), want)


def test_tables_for_blocks_of_two_axes() -> None:
    """Each quarter of a 4 x 6 tensor has a table of its own: 10 a + b + index / 10 for block (a, b)."""
    indices = np.random.default_rng(0).integers(0, 2, (4, 6)).astype(np.uint8)
    lut = np.array([[[[10 * a + b], [10 * a + b + 0.1]] for b in range(3)] for a in range(2)], np.float32)
    rows, columns = np.indices((4, 6))
    want = 10 * (rows // 2) + columns // 2 + indices / 10
    np.testing.assert_allclose(constexpr_lut_to_dense(indices, lut), want, rtol=1e-6)


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (1, [[[1, 1], [2, 2], [3, 3], [4, 1], [5, 2], [6, 3]], [[4, 4], [5, 5], [6, 6], [1, 1], [2, 2], [3, 3]]]),
        (2, [[[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]], [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]]]),
    ],
)
def test_tables_of_vectors(axis: int, want: list[Any]) -> None:
    """The documentation's second example, with a0..b2 = 1..6."""
    indices = np.array([0, 0, 1, 0, 1, 1, 0, 0], np.uint8).reshape(2, 2, 2)
    lut = np.arange(1, 7, dtype=np.int8).reshape(1, 1, 1, 2, 3)
    np.testing.assert_array_equal(constexpr_lut_to_dense(indices, lut, vector_axis=np.array(axis)), want)


def test_classify() -> None:
    label, all_of_them = OPERATIONS["classify"].function(
        probabilities=np.array([[0.2, 0.7, 0.1]], np.float32), classes=["a", "b", "c"]
    )
    assert label == "b"
    assert all_of_them == pytest.approx({"a": 0.2, "b": 0.7, "c": 0.1})
    with pytest.raises(ValueError, match="2 classes for 3"):
        OPERATIONS["classify"].function(probabilities=np.zeros((1, 3), np.float32), classes=["a", "b"])


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("gelu", {"x": r(2), "mode": "FAST"}),
        ("pad", {"x": r(2), "pad": i(1, 1), "mode": "wrap"}),
        ("cast", {"x": r(2), "dtype": "fp8"}),
        ("conv", {"x": r(1, 1, 3, 3), "weight": r(1, 1, 1, 1), "pad_type": "full"}),
        ("gather", {"x": r(2, 2), "indices": i(0), "batch_dims": np.int32(1)}),
        ("constexpr_cast", {"source_val": r(2), "output_dtype": "int8"}),
    ],
)
def test_what_is_not_executed_is_an_error(kind: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"not executed|mode|cast|pad_type"):
        OPERATIONS[kind].function(**arguments)


def test_parameters_have_the_names_of_coremltools_own_definitions() -> None:
    """Each parameter of a row is one that coremltools' registry knows for that operation, and none is missing."""
    from dualtoken_deploy.targets.coreml.mil.vendor import coremltools

    coremltools("the test")
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    for kind, row in OPERATIONS.items():
        known: set[str] = set()
        for definition in SSAOpRegistry.core_ops[kind].values():
            known |= set(definition.input_spec.input_types)
        mine = set(inspect.signature(row.function).parameters)
        assert mine == known, kind
