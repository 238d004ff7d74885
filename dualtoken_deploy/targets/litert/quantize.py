"""INT8 for LiteRT, and weights alone in 8 or 4 bits: ai-edge-quantizer by our calibration, gate and search."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from torch import Tensor, nn, tensor

from dualtoken_deploy.deploy.traced import TRACED_RULES
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.histogram import BINS, METHODS, Range, add_counts, check_method
from dualtoken_deploy.quantize.latest import Latest, fingerprint
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.litert import export, flat
from dualtoken_deploy.targets.litert.compress import apply
from dualtoken_deploy.targets.litert.metadata import add_metadata
from dualtoken_deploy.targets.litert.products import read_products
from dualtoken_deploy.targets.litert.runner import MODEL, open_interpreter
from dualtoken_deploy.targets.litert.structure import PRODUCTS
from dualtoken_deploy.targets.mobile import noise
from dualtoken_deploy.targets.mobile.torch_program import Source, check_fixed, make_source
from dualtoken_deploy.targets.request import Prepared, Request, Tell

DYNAMIC, STATIC = "dynamic", "static"
WEIGHTS = MappingProxyType({"int8-weights": 8, "int4-weights": 4})  # precisions that leave activations in float
WITHOUT_4_BITS = ("DEPTHWISE_CONV_2D",)  # no kernel: they keep 8
# XNNPACK rounds inputs as they come for these alone; a depthwise convolution would run in the plain kernels, between
# two pieces of the delegate, and there are few multiplications in it
ROUNDED_AS_THEY_COME = ("FULLY_CONNECTED", "CONV_2D")


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """`quantizer` dynamic: activations in integers by the range of each input as it comes; static: by calibrated
    ranges. Of precisions that store weights alone in integers it is left out. Raises UsageError, ConversionError."""
    check_method(method)
    weights = request.precision in WEIGHTS
    if weights and quantizer != DYNAMIC:
        raise UsageError(f"{request.precision} leaves activations in float; leave --quantizer {quantizer} out")
    if (weights or quantizer == DYNAMIC) and method != "minmax":
        what = request.precision if weights else f"the quantizer {DYNAMIC}"
        raise UsageError(f"{what} measures no ranges; leave --calibrator {method} out, or take --quantizer {STATIC}")
    check_fixed(request, "LiteRT")
    known = fingerprint(module, request.contract, request.outputs, request.task)
    float_file = _FLOAT.get(known, lambda: FloatFile(module, request, tell))
    backend = LiteRtBackend(float_file, request, calibration, quantizer, method, tell)
    return Prepared(backend, export.describe(float_file.path, float_file.source))


class FloatFile:
    """The float32 model, converted once for all that is quantized from it."""

    def __init__(self, module: nn.Module, request: Request, tell: Tell) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dualtoken-litert.")
        self.path = Path(self._folder.name) / MODEL
        source = make_source(module, request, TRACED_RULES, tell, export.POOLS)
        tell("converting to LiteRT")
        export.convert(source, self.path)
        self.source: Source = export.finish(self.path, replace(request, precision="fp32"), source)
        self.model = flat.read(self.path)
        self.ranges: dict[tuple[str, str], dict[str, Range]] = {}  # by calibration set and method


_FLOAT: Latest[FloatFile] = Latest()


class LiteRtBackend:
    """model.tflite with integers in every product with weights but those left in float."""

    def __init__(
        self, made: FloatFile, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
    ) -> None:
        self._made, self._request, self._inputs = made, request, calibration.inputs
        self._bits = WEIGHTS.get(request.precision)
        self._static = self._bits is None and quantizer == STATIC
        kinds = flat.WEIGHTED if self._static or self._bits else ROUNDED_AS_THEY_COME
        self.products = read_products(made.model, kinds)
        how = f"{self._bits}-bit weights" if self._bits else f"{quantizer} int8"
        self.described = f"ai-edge-quantizer {how}, a scale for each output channel"
        self._ranges: dict[str, Range] = {}
        if self._static:
            key = calibration.sha256, method
            if key not in made.ranges:
                made.ranges[key] = collect_ranges(made.path, made.model, calibration.inputs, method, tell)
            self._ranges = made.ranges[key]
        said = made.path.read_bytes() + repr(sorted(self._ranges.items())).encode()
        self.source = hashlib.sha256(said).hexdigest()

    def sensitivity(self) -> Sensitivity:
        layers = frozenset(unit.name for unit in self.products.units)
        values = _border(self._made.model)
        by_layer = {layer_of(name): ends for name, ends in values.items()}

        def rounded(layer: str, kind: str, value: Tensor, conv: bool) -> Tensor:
            if kind == noise.WEIGHT:
                return noise.rounded_weight(value, self._bits or 8)
            if self._static:
                low, high = self._ranges[by_layer[layer][kind == noise.OUTPUT]]
                return noise.rounded_between(value, tensor(low), tensor(high))
            if kind == noise.OUTPUT or self._bits:
                return value
            # of a convolution the whole picture has one scale
            return noise.rounded_rows(value.flatten()).view_as(value) if conv else noise.rounded_rows(value)

        return noise.measure(self._made.source, layers, self._inputs, rounded)

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        kept = set(in_float)
        chosen = [name for name in self.products.macs if name in self.products.eligible and layer_of(name) not in kept]
        model = self._made.model if not chosen else apply(self._made.path, self._recipe(chosen), self._statistics())
        flat.write(model, folder / MODEL, add_metadata(model, self._request))

    def _recipe(self, chosen: Iterable[str]) -> Any:
        """One entry for each product, by the name of its value."""
        from ai_edge_quantizer import qtyping, recipe_manager

        kinds = {flat.tensor_name(self._made.model, op.outputs[0]): op.kind for op in flat.operators(self._made.model)}
        recipe = recipe_manager.RecipeManager()
        for name in chosen:
            scope, kind = f"^{re.escape(name)};?$", qtyping.TFLOperationName[kinds[name]]
            if self._static:
                recipe.add_static_config(scope, kind, activation_num_bits=8, weight_num_bits=8)
            elif self._bits:
                bits = 8 if kinds[name] in WITHOUT_4_BITS else self._bits
                recipe.add_weight_only_config(scope, kind, num_bits=bits)
            else:
                recipe.add_dynamic_config(scope, kind, num_bits=8)
        return recipe.get_quantization_recipe()

    def _statistics(self) -> Any:
        if not self._static:
            return None
        return {
            name: {"min": np.array([[low]], np.float32), "max": np.array([[high]], np.float32)}
            for name, (low, high) in self._ranges.items()
        }


def _border(model: Any) -> Mapping[str, tuple[str, str]]:
    """{value of a product: what it reads, what it makes}."""
    names = ((op, flat.tensor_name(model, op.outputs[0])) for op in flat.operators(model) if op.kind in PRODUCTS)
    return {name: (flat.tensor_name(model, op.inputs[0]), name) for op, name in names}


def collect_ranges(path: Path, model: Any, inputs: Array, method: str, tell: Callable[[str], None]) -> dict[str, Range]:
    """(lowest, highest) of what the products of a float file read and make, over `inputs` (N, ...), by a method of
    METHODS: the interpreter keeps every value of a run."""
    names = dict.fromkeys(name for ends in _border(model).values() for name in ends)
    places = {flat.tensor_name(model, i): i for i in range(len(model.subgraphs[0].tensors))}
    interpreter = open_interpreter(path, None, keep_all=True)
    (feed,) = interpreter.get_input_details()

    def runs(what: str) -> Iterable[None]:
        for number, picture in enumerate(inputs, 1):
            tell(f"calibrating{what}: image {number} of {len(inputs)}")
            interpreter.set_tensor(feed["index"], picture[None])
            interpreter.invoke()
            yield

    found: dict[str, Range] = {}
    for _ in runs(""):
        for name in names:
            value = interpreter.get_tensor(places[name])
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    if method == "minmax":
        return found
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for _ in runs(", second pass"):
        for name in names:
            add_counts(counts[name], interpreter.get_tensor(places[name]), found[name])
    return {name: METHODS[method](counts[name], found[name]) for name in names}
