"""Q/DQ pairs in an ONNX graph, by onnxruntime.quantization.

Rules that every style keeps: weights are int8, symmetric, with a scale for each output channel; Q/DQ pairs stand on the
weights and inputs of convolutions and matrix products; normalisation, softmax, GELU, sigmoid and residual sums stay
float. Products with a small side (SMALLEST) stay float too: no engine gains there.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import Products, layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.histogram import Range, check_method
from dualtoken_deploy.quantize.latest import Latest
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.onnx.correct import Corrections, correct, shift_biases
from dualtoken_deploy.targets.onnx.migrate import (
    Channels,
    Migration,
    channel_axes,
    migrate,
    plan_migration,
)
from dualtoken_deploy.targets.onnx.noise import measure
from dualtoken_deploy.targets.onnx.ranges import (
    bounds_of_readers,
    collect_extremes,
    collect_ranges,
    cut,
    cut_channels,
)
from dualtoken_deploy.targets.request import quiet

PRODUCTS = ("Conv", "MatMul", "Gemm")
SMALLEST = 16  # K and N of a matrix product below which TensorRT's documentation advises against INT8


@dataclass(frozen=True)
class Style:
    """How a backend wants its pairs. `conv_outputs`: a pair behind convolutions too (ONNX Runtime's integer kernel
    writes integers); `unsigned`: activations as uint8 with a zero point, else int8 without."""

    name: str
    unsigned: bool
    reduce_range: bool
    conv_outputs: bool

    @property
    def weight_limit(self) -> int:
        """The largest integer of a weight, as onnxruntime.quantization has it."""
        return 64 if self.reduce_range else 127


# What TensorRT takes, and any other engine with symmetric integers.
NEUTRAL = Style("S8/S8 symmetric", unsigned=False, reduce_range=False, conv_outputs=False)


def onnxruntime_style(flags: Iterable[str] | None = None) -> Style:
    """For this CPU: x86 multiplies uint8 by int8; without VNNI its 16-bit sums overflow unless a bit is left free."""
    known = set(describe_machine()["isa"] if flags is None else flags)
    if known & {"asimddp", "i8mm"}:
        return Style("S8/S8 (ARM dot product)", unsigned=False, reduce_range=False, conv_outputs=True)
    if known & {"avx512_vnni", "avx_vnni"}:
        return Style("U8/S8 (VNNI)", unsigned=True, reduce_range=False, conv_outputs=True)
    return Style("U8/S8, 7 bits (no VNNI)", unsigned=True, reduce_range=True, conv_outputs=True)


@dataclass(frozen=True)
class Methods:
    """What is done so that a graph quantizes well; each can be left out, to see what it gains."""

    saturation: bool = True  # ranges end where the activation that reads a value gives the same for all beyond
    migration: bool = True  # scales a channel for activations, moved into weights and pairs
    bias: bool = True  # means of the products kept, in their biases
    rounding: bool = False  # weights rounded together with what they read, not each to its nearest

    def __str__(self) -> str:
        names = {"saturation": "saturating ends", "migration": "moved channel scales", "bias": "bias correction",
                 "rounding": "second-order rounding"}  # fmt: skip
        return ", ".join(text for field, text in names.items() if getattr(self, field)) or "no methods"


ALL_METHODS = Methods()


def read_products(model: onnx.ModelProto) -> Products:
    """Counts the products of a graph with known shapes. Raises ConversionError where one's shape is not known."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = inferred.graph
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim]
              for v in (*graph.value_info, *graph.input, *graph.output)}  # fmt: skip
    shapes |= {t.name: list(t.dims) for t in graph.initializer}
    constants = {t.name for t in graph.initializer}
    macs: dict[str, int] = {}
    eligible = set()
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        left, right, out = (shapes.get(n) for n in (node.input[0], node.input[1], node.output[0]))
        if left is None or right is None or out is None:
            raise ConversionError(f"the shape of {node.output[0]} is not known, so its INT8 share cannot be counted")
        if node.op_type == "Conv":
            macs[node.output[0]] = math.prod(out) * math.prod(right[1:])
            eligible.add(node.output[0])
            continue
        inner = left[-1]
        macs[node.output[0]] = math.prod(out) * inner
        # a stack of matrices has no axis that a scale for each output channel may have in every engine
        stacked = node.input[1] in constants and len(right) > 2
        if min(inner, out[-1]) >= SMALLEST and not stacked:
            eligible.add(node.output[0])
    return Products(macs, frozenset(eligible))


class QdqQuantizer:
    """Calibrates once, then quantizes any choice of layers in a second or two."""

    def __init__(
        self,
        model: onnx.ModelProto,
        calibration: CalibrationSet,
        style: Style,
        method: str = "minmax",
        tell: Callable[[str], None] | None = None,
        methods: Methods = ALL_METHODS,
        slow: Collection[str] = (),
    ) -> None:
        """`method`: one of ranges.METHODS; `slow`: products that stay in float since their engine is faster so. Raises
        UsageError on another method."""
        check_method(method)
        self.model, self.style, self._inputs, self._tell = _named(model), style, calibration.inputs, tell
        self.products = read_products(self.model).without(slow)
        self._nodes = [n.name for n in self.model.graph.node if n.output[0] in self.products.eligible]
        axes = channel_axes(self.model)
        graph = hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()
        found, channels = _EXTREMES.get(
            f"{graph} {calibration.sha256} {len(calibration.inputs)}",
            lambda: collect_extremes(self.model, _activations(self.model), axes, calibration.inputs, tell),
        )
        self._methods = methods
        limits = bounds_of_readers(self.model, found, methods.saturation)
        cuts = {name: cut(bounds, limits.get(name, bounds)) for name, bounds in found.items()}
        channels = {k: cut_channels(v, limits[k]) if k in limits else v for k, v in channels.items()}
        empty = Migration({}, {})
        self._plan = (
            plan_migration(self.model, self._nodes, channels, style.conv_outputs) if methods.migration else empty
        )
        self.migrated = self._migrate(self._nodes)
        cuts |= _scaled_ranges(self._plan, channels)
        self.ranges = cuts
        if method != "minmax":
            whole = dict(found) | cuts
            counted = collect_ranges(
                self.migrated, _activations(self.migrated), calibration.inputs, method, tell, whole
            )
            self.ranges = cuts | {name: cut(bounds, cuts[name]) for name, bounds in counted.items()}

    def _migrate(self, chosen: Iterable[str]) -> onnx.ModelProto:
        return onnx.shape_inference.infer_shapes(migrate(self.model, self._plan, chosen))

    def quantize(self, in_float: Iterable[str] = ()) -> onnx.ModelProto:
        """The graph with Q/DQ pairs on every eligible layer but those `in_float`."""
        from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import QuantType, add_infer_metadata

        kept = set(in_float)
        chosen = [name for name in self._nodes if layer_of(name) not in kept]
        if not chosen:
            return self.model
        options = {
            "ActivationSymmetric": not self.style.unsigned,
            "WeightSymmetric": True,
            "QuantizeBias": self.style.conv_outputs,
            "OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"] + ([] if self.style.conv_outputs else ["Conv"]),
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
            "DedicatedQDQPair": False,
        }
        try:
            with quiet(logging.ERROR):  # its advice, such as to pre-process first
                migrated = self._migrate(chosen)
                corrections = self._correct(migrated, chosen)
                shift_biases(migrated, corrections.shifts)
                add_infer_metadata(migrated)
                float_ranges = {k: (np.float32(low), np.float32(high)) for k, (low, high) in self.ranges.items()}
                quantizer = QDQQuantizer(
                    migrated,
                    True,  # a scale for each output channel
                    self.style.reduce_range,
                    QuantType.QInt8,
                    QuantType.QUInt8 if self.style.unsigned else QuantType.QInt8,
                    TensorsData(CalibrationMethod.MinMax, float_ranges),
                    chosen,
                    [],
                    list(PRODUCTS),
                    options,
                )
                quantizer.quantize_model()
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise ConversionError(f"onnxruntime.quantization failed: {first_line(error)}") from error
        out: onnx.ModelProto = quantizer.model.model
        _set_integers(out, corrections.weights)
        _keep_bias_apart(out, _ranks(migrated))
        return out

    def _correct(self, migrated: onnx.ModelProto, chosen: Collection[str]) -> Corrections:
        methods = self._methods
        if not (methods.bias or methods.rounding):
            return Corrections()
        found = correct(
            migrated, chosen, self._inputs, self._rounded(migrated), self._behind,
            (lambda weight, kind: steps_of(weight, kind, self.style)) if methods.rounding else None,
            self.style.weight_limit,
        )  # fmt: skip
        return found if methods.bias else Corrections({}, found.weights)

    def _rounded(self, model: onnx.ModelProto) -> Callable[[str, Tensor, str], Tensor]:
        weights = {t.name for t in model.graph.initializer}

        def rounded(name: str, value: Tensor, kind: str) -> Tensor:
            return (
                round_weight(value, kind, self.style)
                if name in weights
                else round_value(value, self.ranges[name], self.style)
            )

        return rounded

    def _behind(self, kind: str) -> bool:
        return kind == "Conv" and self.style.conv_outputs

    def sensitivity(self, products: Products | None = None) -> Sensitivity:
        """What each unit's rounding does to the outputs; of other `products` than all that may be INT8, if given."""
        return measure(
            self.migrated, products or self.products, self._inputs, self._rounded(self.migrated), self._behind,
            self._tell,
        )  # fmt: skip


# Two targets that take one graph are calibrated once.
_EXTREMES: Latest[tuple[dict[str, Range], dict[str, Channels]]] = Latest()


def round_weight(weight: Tensor, kind: str, style: Style) -> Tensor:
    """In int8 with a scale for each output channel: axis 0 of a convolution, the last of a matrix product."""
    scale = steps_of(weight, kind, style)
    return torch.round(weight / scale) * scale


def steps_of(weight: Tensor, kind: str, style: Style) -> Tensor:
    """The step of each output channel, of as many dimensions as the weight."""
    axis = 0 if kind == "Conv" else weight.ndim - 1
    others = [i for i in range(weight.ndim) if i != axis]
    return weight.abs().amax(others, keepdim=True).clamp_min(1e-12) / style.weight_limit


def round_value(value: Tensor, bounds: Range, style: Style) -> Tensor:
    """An activation in a style's integers, over a range."""
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    if style.unsigned:  # eight bits with weights of seven too: 255 * 64 twice fits into 16 bits
        scale = max(high - low, 1e-12) / 255
        zero = round(-low / scale)
        return (torch.clamp(torch.round(value / scale) + zero, 0, 255) - zero) * scale
    scale = max(-low, high, 1e-12) / 127
    return torch.clamp(torch.round(value / scale), -127, 127) * scale


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose products are called after the values that they make."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    for node in out.graph.node:
        if node.op_type in PRODUCTS:
            node.name = node.output[0]
    return out


def _activations(model: onnx.ModelProto) -> list[str]:
    """What the products read and make, without weights."""
    weights = {t.name for t in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in PRODUCTS]
    return list(dict.fromkeys(v for n in nodes for v in (*n.input[:2], n.output[0]) if v not in weights))


def _scaled_ranges(plan: Migration, channels: Mapping[str, Channels]) -> dict[str, Range]:
    """Of the values that `migrate` puts in."""
    return {
        f"{value}/scaled": (float((channels[value][0] * factors).min()), float((channels[value][1] * factors).max()))
        for factors_of in (plan.inputs, plan.outputs)
        for value, factors in factors_of.items()
    }


def _set_integers(model: onnx.ModelProto, weights: Mapping[str, Array]) -> None:
    """Puts weights that lie on their grid already in the place of those that were rounded to the nearest."""
    constants = {t.name: t for t in model.graph.initializer}
    for name, weight in weights.items():
        old, steps = constants[f"{name}_quantized"], numpy_helper.to_array(constants[f"{name}_scale"])
        shape = [-1] + [1] * (weight.ndim - 1) if weight.ndim == 4 else [1, -1]
        whole = np.rint(weight / steps.reshape(shape))
        if np.abs(whole * steps.reshape(shape) - weight).max() > 1e-3 * float(steps.max()):
            raise ConversionError(f"onnxruntime.quantization gave {name} other scales than it was rounded for")
        old.CopyFrom(numpy_helper.from_array(whole.astype(np.int8), old.name))


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Axes of the values whose shapes are noted."""
    values = (*model.graph.value_info, *model.graph.output)
    return {v.name: len(v.type.tensor_type.shape.dim) for v in values if v.type.tensor_type.HasField("shape")}


def _keep_bias_apart(model: onnx.ModelProto, ranks: Mapping[str, int]) -> None:
    """Gives the bias behind a matrix product the shape (1, 1, N), which adds the same; behind one of a matrix the axis
    that comes with it is taken off again.

    ONNX Runtime joins MatMul and Add to a Gemm before it looks for Q/DQ pairs, and its integer Gemm then does not take
    the float bias: every linear layer would run in float32 on dequantized weights, slower than without INT8, and
    nothing would say so (onnxruntime 1.31). A bias of rank 3 is left alone by that fusion.
    """
    biases = {t.name: t for t in model.graph.initializer}
    products = {n.output[0] for n in model.graph.node if n.op_type == "MatMul"}
    readers = Counter(i for n in model.graph.node for i in n.input)
    for node in list(model.graph.node):
        if node.op_type != "Add" or node.input[0] not in products or node.input[1] not in biases:
            continue
        bias, rank = biases[node.input[1]], ranks.get(node.output[0], 0)
        if len(bias.dims) != 1 or readers[bias.name] != 1 or rank < 2:
            continue
        bias.dims[:] = [1, 1, bias.dims[0]]
        if rank == 2:
            axes = f"{node.output[0]}/axes"
            model.graph.initializer.append(numpy_helper.from_array(np.array([0]), axes))
            last = onnx.helper.make_node("Squeeze", [f"{node.output[0]}/wide", axes], [node.output[0]])
            model.graph.node.insert(list(model.graph.node).index(node) + 1, last)
            node.output[0] = f"{node.output[0]}/wide"


def without_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose symmetric weights have no zero point: ONNX takes a missing one for zero, and OpenVINO's IR is spared
    a constant, a conversion and a subtraction for each."""
    out = onnx.ModelProto()
    out.CopyFrom(model)
    constants = {t.name: t for t in out.graph.initializer}
    for node in out.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in constants and len(node.input) == 3:
            zero = constants.get(node.input[2])
            if zero is not None and not numpy_helper.to_array(zero).any():
                del node.input[2]
    return out
