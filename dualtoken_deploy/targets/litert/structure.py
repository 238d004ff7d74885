"""What a saved .tflite is made of, and which of its operators a phone's GPU would refuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dualtoken_deploy.targets.litert import flat

MOVES = ("RESHAPE", "TRANSPOSE", "SLICE", "SPLIT", "SPACE_TO_DEPTH", "CONCATENATION", "PAD")
PRODUCTS = (*flat.WEIGHTED, "BATCH_MATMUL")
# What LiteRT's GPU delegate takes, of the operators that models here are made of, and on what terms: its parser,
# tflite/delegates/gpu/common/model_builder.cc, and tflite/tools/versioning/gpu_compatibility.cc, as of 2026. The
# analyser of ai-edge-litert's wheel, which claims to know, says yes to every file.
GPU_KINDS = frozenset(
    {
        *("ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CAST", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D"),
        *("DEQUANTIZE", "DIV", "EXP", "FULLY_CONNECTED", "GELU", "GREATER_EQUAL", "LESS", "LOGISTIC", "MAX_POOL_2D"),
        *("MAXIMUM", "MEAN", "MINIMUM", "MUL", "NEG", "PAD", "PADV2", "QUANTIZE", "RELU", "RELU6", "RESHAPE"),
        *("RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR", "RSQRT", "SELECT", "SELECT_V2", "SLICE", "SOFTMAX", "SPLIT"),
        *("SPACE_TO_DEPTH", "SPLIT_V", "SQRT", "SQUARE", "SQUARED_DIFFERENCE", "STRIDED_SLICE", "SUB", "SUM", "TANH"),
        *("TILE",),
        *("TRANSPOSE", "TRANSPOSE_CONV"),
    }
)
MAX_RANK = 4
_CAST = {"BOOL", "FLOAT16", "FLOAT32", "INT32"}


def structure(model: Any) -> dict[str, int]:
    """operators, those that move data alone, matrix products, the highest rank of any value, the operators that a GPU
    would leave to the CPU, and the values whose first axis is not the batch, which OpenGL and Metal do not take."""
    (batch, *_) = flat.shape(model, model.subgraphs[0].inputs[0])
    made = [flat.shape(model, i) for op in flat.operators(model) for i in op.outputs if op.kind != "DEQUANTIZE"]
    kinds = Counter(op.kind for op in flat.operators(model))
    return {
        "operators": sum(kinds.values()),
        "moves": sum(kinds[kind] for kind in MOVES),
        "products": sum(kinds[kind] for kind in PRODUCTS),
        "max_rank": max((len(flat.shape(model, i)) for op in flat.operators(model) for i in op.outputs), default=0),
        "off_gpu": len(list(gpu_refusals(model))),
        "other_batch": sum(bool(sizes) and sizes[0] != batch for sizes in made),
    }


def gpu_refusals(model: Any) -> Iterator[str]:
    """A sentence for each operator that LiteRT's GPU delegate does not take. By structure alone: drivers differ."""
    types = flat.type_names()
    for op in flat.operators(model):
        name, shapes = flat.tensor_name(model, op.outputs[0]), [flat.shape(model, i) for i in op.inputs if i >= 0]
        dtypes = [types[model.subgraphs[0].tensors[i].type] for i in (*op.inputs[:1], *op.outputs[:1])]
        if op.kind not in GPU_KINDS:
            yield f"{name}: {op.kind} is not among its operators"
        elif max(len(s) for s in (*shapes, flat.shape(model, op.outputs[0]))) > MAX_RANK:
            yield f"{name}: {op.kind} has more than {MAX_RANK} axes"
        elif op.kind == "CAST" and not set(dtypes) <= _CAST:
            yield f"{name}: CAST from {dtypes[0]} to {dtypes[1]}"
        elif op.kind in ("ADD", "MUL") and not _broadcasts(*shapes[:2]):
            yield f"{name}: {op.kind} of shapes {shapes[0]} and {shapes[1]}"
        elif op.kind in ("SLICE", "STRIDED_SLICE") and len(shapes[0]) not in (3, 4):
            yield f"{name}: {op.kind} of {len(shapes[0])} axes"


def _broadcasts(a: list[int], b: list[int]) -> bool:
    """Of tensors of different rank it takes a vector, and to (1, h, w, c) a (h, w, c)."""
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    return len(short) <= 1 or len(long) == len(short) or (len(long) == 4 and len(short) == 3 and long[0] == 1)
