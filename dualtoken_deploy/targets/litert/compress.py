"""Weights, and activations, of a .tflite in fewer bits, by ai-edge-quantizer."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.litert import changes, flat
from dualtoken_deploy.targets.request import quiet


def to_half(path: Path) -> Any:
    """The model of a float32 file with weights of products in float16, widened as they are read. ConversionError."""
    from ai_edge_quantizer import qtyping, recipe_manager
    from ai_edge_quantizer.algorithm_manager import AlgorithmName

    recipe = recipe_manager.RecipeManager()
    half = qtyping.OpQuantizationConfig(
        weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
        compute_precision=qtyping.ComputePrecision.FLOAT,
        explicit_dequantize=True,
    )
    for kind in flat.WEIGHTED:
        recipe.add_quantization_config(
            ".*", qtyping.TFLOperationName[kind], half, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
    return apply(path, recipe.get_quantization_recipe())


def apply(path: Path, recipe: Any, statistics: Any = None) -> Any:
    """The model of a file quantized by a recipe of ai-edge-quantizer. Raises ConversionError."""
    from ai_edge_quantizer import quantizer

    made = path.with_suffix(".quantized.tflite")
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            tool = quantizer.Quantizer(str(path))
            tool.load_quantization_recipe(recipe)
            done = tool.quantize(statistics, enable_progress_bar=False, enable_progress_report=False)
            done.export_model(str(made), overwrite=True)
        model = flat.read(made)
        changes.name_dequantized(model)
        return model
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConversionError(f"ai-edge-quantizer cannot quantize the model: {first_line(error)}") from error
    finally:
        made.unlink(missing_ok=True)
