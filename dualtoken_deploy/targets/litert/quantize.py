"""Weights of a .tflite in fewer bits, by ai-edge-quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.litert import flat
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
    for kind in ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D"):
        recipe.add_quantization_config(
            ".*", qtyping.TFLOperationName[kind], half, algorithm_key=AlgorithmName.FLOAT_CASTING
        )
    return apply(path, recipe.get_quantization_recipe())


def apply(path: Path, recipe: Any, statistics: Any = None) -> Any:
    """The model of a file quantized by a recipe of ai-edge-quantizer. Raises ConversionError."""
    from ai_edge_quantizer import quantizer

    made = path.with_suffix(".quantized.tflite")
    try:
        with quiet():
            tool = quantizer.Quantizer(str(path))
            tool.load_quantization_recipe(recipe)
            tool.quantize(statistics).export_model(str(made), overwrite=True)
        return flat.read(made)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ConversionError(f"ai-edge-quantizer cannot quantize the model: {first_line(error)}") from error
    finally:
        made.unlink(missing_ok=True)
