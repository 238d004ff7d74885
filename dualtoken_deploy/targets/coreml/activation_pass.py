"""8-bit activations without a Mac: coremltools' quantize/dequantize pass, fed with ranges that the reference measured.

coremltools measures them by predicting with Core ML, hence on macOS alone; and its update of a range keeps the last
sample's alone (`_update_tensor_range` overwrites before it compares). The pass behind it takes the ranges as an option.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.apple.torch_program import quiet
from dualtoken_deploy.targets.coreml.mil import MilProgram, load_program
from dualtoken_deploy.targets.coreml.validation import validated_once
from dualtoken_deploy.targets.runner import Array

STEM_CONVOLUTIONS = 5  # the first of the program; in 8 bits they alone cost trained models their accuracy
QUANTIZED = ("conv", "linear")  # whose inputs become 8 bits; sums, norms, softmax, GELU and attention stay in float16

Ranges = Mapping[str, Mapping[str, float]]


def quantize_activations(model: Any, inputs: Sequence[Array]) -> tuple[Any, list[str]]:
    """The model with a symmetric int8 quantize/dequantize pair before each convolution and linear layer but the stem's,
    and the names of those that have none.

    `inputs`: calibration samples as the program takes them. Raises ConversionError.
    """
    import coremltools.optimize.coreml as cto
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models import utils

    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "float.mlpackage"
        model.save(str(package))
        program = MilProgram(load_program(package))
    ranges = measure_ranges(program, inputs)
    stem = [op.name for op in program.steps if op.kind == "conv"][:STEM_CONVOLUTIONS]
    quantizer = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
    config = cto.OptimizationConfig(
        op_type_configs=dict.fromkeys(QUANTIZED, quantizer), op_name_configs=dict.fromkeys(stem)
    )
    try:
        with quiet(), validated_once():
            pair = PASS_REGISTRY["compression::insert_prefix_quantize_dequantize_pair"]
            pair.set_options([PassOption("config", config), PassOption("activation_stats", ranges)])
            quantized = utils._apply_graph_pass(model, pair, skip_model_load=True)
    except Exception as error:  # coremltools raises what its passes raise
        raise ConversionError(f"coremltools cannot quantize activations: {first_line(error)}") from error
    return quantized, [name.removesuffix("_cast_fp16") for name in stem]


def measure_ranges(program: MilProgram, inputs: Sequence[Array]) -> Ranges:
    """{tensor: {"rmin", "rmax"}} over all samples, by executing the program on each."""
    ranges: dict[str, dict[str, float]] = {}

    def observe(name: str, value: Array) -> None:
        if value.dtype.kind != "f" or value.size == 0:
            return
        low, high = float(value.min()), float(value.max())
        known = ranges.setdefault(name, {"rmin": low, "rmax": high})
        known["rmin"], known["rmax"] = min(known["rmin"], low), max(known["rmax"], high)

    (name,) = program.program.inputs
    for sample in inputs:
        observe(name, np.asarray(sample, np.float32))
        program.run({name: sample}, observe)
    return ranges
