"""INT8 for ExecuTorch: PT2E with XNNPACK's quantizer, by our ranges, gate and search.

PT2E would have the model run through observers for every choice of layers; ranges are taken once instead, from the
float program, and written into the observers.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn, tensor

from dualtoken_deploy.deploy.traced import Program
from dualtoken_deploy.errors import ConversionError, UsageError, first_line
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.backend import Products, layer_of
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.histogram import BINS, METHODS, Range, add_counts, check_method
from dualtoken_deploy.quantize.sensitivity import Sensitivity
from dualtoken_deploy.targets.executorch.export import lower, trace
from dualtoken_deploy.targets.executorch.products import LAYERS, every_product, is_product, macs_of
from dualtoken_deploy.targets.executorch.runner import MODEL, NAMES
from dualtoken_deploy.targets.mobile import noise
from dualtoken_deploy.targets.mobile.torch_program import Source
from dualtoken_deploy.targets.recorder import Recorder
from dualtoken_deploy.targets.request import Artifact, Prepared, Request, Tell, quiet

aten = torch.ops.aten
STATIC, DYNAMIC = "static", "dynamic"
ROUNDED_AS_THEY_COME = (aten.linear.default,)  # XNNPACK's convolutions of ExecuTorch take calibrated ranges alone


def prepare(
    module: nn.Module, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
) -> Prepared:
    """`quantizer` static: activations by calibrated ranges; dynamic: by the range of each row of an input as it comes,
    in linear layers alone. Raises UsageError, ConversionError."""
    check_method(method)
    if quantizer == DYNAMIC and method != "minmax":
        raise UsageError(
            f"the quantizer {DYNAMIC} measures no ranges; leave --calibrator {method} out, or take --quantizer {STATIC}"
        )
    source = trace(module, request, tell)
    backend = PteBackend(source, request, calibration, quantizer, method, tell)
    return Prepared(backend, Artifact(source.rules, {NAMES: every_product(source)}))


class PteBackend:
    """model.pte with 8-bit integers in every linear layer and convolution but those left in float."""

    def __init__(
        self, source: Source, request: Request, calibration: CalibrationSet, quantizer: str, method: str, tell: Tell
    ) -> None:
        self._source, self._inputs, self._tell = source, calibration.inputs, tell
        self._nodes = {node.name: node for node in source.program.graph.nodes if is_product(node)}
        macs = {source.names[name]: macs_of(node) for name, node in self._nodes.items()}
        self._static = quantizer == STATIC
        self._layers = LAYERS if self._static else ROUNDED_AS_THEY_COME
        layers = {source.names[name] for name, node in self._nodes.items() if node.target in self._layers}
        self.products = Products(macs, frozenset(layers))
        how = f"{quantizer}, per channel, {method}" if self._static else f"{quantizer}, per channel"
        self.described = f"PT2E XNNPACKQuantizer, {how}"
        self._ranges: dict[str, Range] = {}
        if self._static:
            self._ranges = collect_ranges(source, self._border(), calibration.inputs, method, tell)
        said = source.program.graph_module.code + repr(sorted(self._ranges.items()))
        key = hashlib.sha256(said.encode())
        for value in source.program.state_dict.values():
            key.update(value.detach().contiguous().numpy().tobytes())
        self.source = key.hexdigest()

    def _border(self) -> list[str]:
        """The nodes that quantized products read and make."""
        chosen = [node for node in self._nodes.values() if node.target in LAYERS]
        return list(dict.fromkeys(n.name for node in chosen for n in (node.all_input_nodes[0], node)))

    def sensitivity(self) -> Sensitivity:
        layers = {layer_of(self._source.names[n]): node for n, node in self._nodes.items() if node.target in LAYERS}

        def rounded(layer: str, kind: str, value: Tensor, conv: bool) -> Tensor:  # noqa: ARG001
            if kind == noise.WEIGHT:
                return noise.rounded_weight(value, 8)
            if not self._static:
                return noise.rounded_rows(value) if kind == noise.INPUT else value
            node = layers[layer]
            low, high = self._ranges[(node.all_input_nodes[0] if kind == noise.INPUT else node).name]
            return noise.rounded_between(value, tensor(low), tensor(high))

        return noise.measure(self._source, frozenset(unit.name for unit in self.products.units), self._inputs, rounded)

    def write(self, in_float: Iterable[str], folder: Path) -> None:
        kept = set(in_float)
        chosen = {
            name for name, node in self._nodes.items()
            if node.target in self._layers and layer_of(self._source.names[name]) not in kept
        }  # fmt: skip
        ranges = self._ranges if self._static else None
        program = quantize(self._source.program, chosen, ranges) if chosen else self._source.program
        self._tell("lowering to XNNPACK")
        lower(program, folder / MODEL)


def quantize(program: Program, chosen: set[str], ranges: dict[str, Range] | None) -> Program:
    """A float program with pairs around the chosen nodes, the ranges of what they read and make given by name; without
    ranges each is taken as the values come.

    Raises ConversionError.
    """
    try:
        with quiet(logging.ERROR), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
                XNNPACKQuantizer,
                get_symmetric_quantization_config,
            )
            from torchao.quantization.pt2e import MinMaxObserver
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

            dynamic = ranges is None
            config = copy.deepcopy(get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic))
            if not dynamic:
                fast = replace(config.input_activation, observer_or_fake_quant_ctr=MinMaxObserver.with_args(eps=2**-12))
                config = replace(config, input_activation=fast, output_activation=fast)
            quantizer = XNNPACKQuantizer().set_global(config)
            # batch norms are folded: their patterns are traced for each call, and are of training alone
            quantizer.SUPPORTED_PATTERNS = [p for p in quantizer.SUPPORTED_PATTERNS if not p.is_qat]
            # of a convolution its weight and bias are asked for too
            quantizer.set_filter_function(lambda node: node.name in chosen or node.op == "get_attr")
            observed = prepare_pt2e(program.module(), quantizer)
            set_ranges(observed, ranges or {})
            arguments, _ = program.example_inputs
            return torch.export.export(convert_pt2e(observed), arguments)
    except Exception as error:  # torchao raises what it raises
        raise ConversionError(f"PT2E cannot quantize the model: {first_line(error)}") from error


def set_ranges(observed: fx.GraphModule, ranges: dict[str, Range]) -> None:
    """Gives every observer of an activation its range, and has those of weights see them."""
    modules = dict(observed.named_modules(remove_duplicate=False))  # values that share a scale share an observer
    for node in observed.graph.nodes:
        if node.op != "call_module" or not hasattr(modules[node.target], "min_val"):
            continue
        (value,), observer = node.args, modules[node.target]
        while value.op == "call_module":  # two readers of one value have an observer each, in a row
            (value,) = value.args
        if value.op == "get_attr":
            observer(_attribute(observed, value.target))
            continue
        if value.name not in ranges:
            continue  # moved data, which shares the observer of what was moved
        low, high = ranges[value.name]
        observer.min_val, observer.max_val = tensor(low), tensor(high)


def _attribute(module: nn.Module, path: str) -> Tensor:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    value: Tensor = found
    return value


def collect_ranges(
    source: Source, names: list[str], inputs: Array, method: str, tell: Callable[[str], None]
) -> dict[str, Range]:
    """(lowest, highest) of nodes of a program over `inputs` (N, ...), by a method of METHODS."""
    module = source.program.module()
    assert isinstance(module, fx.GraphModule)  # noqa: S101 (for the type checker)
    recorder = Recorder(module, {name: name for name in names})

    def runs(what: str) -> Iterable[dict[str, Array]]:
        for number, picture in enumerate(inputs, 1):
            tell(f"calibrating{what}: image {number} of {len(inputs)}")
            with torch.no_grad():
                yield recorder.record(torch.from_numpy(picture[None]))

    found: dict[str, Range] = {}
    for values in runs(""):
        for name in names:
            low, high = found.get(name, (np.inf, -np.inf))
            found[name] = min(low, float(values[name].min())), max(high, float(values[name].max()))
    if method == "minmax":
        return found
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    for values in runs(", second pass"):
        for name in names:
            add_counts(counts[name], values[name], found[name])
    return {name: METHODS[method](counts[name], found[name]) for name in names}
