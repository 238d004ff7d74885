"""The matrix products of a .tflite, with their multiplications."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from dualtoken_deploy.quantize.backend import Products
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.litert.structure import PRODUCTS


def read_products(model: Any, kinds: Collection[str]) -> Products:
    """Of the main graph, by the name of the value that each makes; those of `kinds` with constant weights may be
    quantized."""
    macs: dict[str, int] = {}
    eligible = set()
    for op in flat.operators(model):
        if op.kind not in PRODUCTS:
            continue
        name = flat.tensor_name(model, op.outputs[0])
        left, right, out = (flat.shape(model, i) for i in (*op.inputs[:2], op.outputs[0]))
        macs[name] = math.prod(out) * _inner(op, left, right)
        if op.kind in kinds and flat.is_constant(model, op.inputs[1]):
            eligible.add(name)
    return Products(macs, frozenset(eligible))


def _inner(op: flat.Operator, left: list[int], right: list[int]) -> int:
    """Multiplications for one number of the output."""
    if op.kind == "CONV_2D":
        return math.prod(right[1:])  # (out, h, w, in of a group)
    if op.kind == "DEPTHWISE_CONV_2D":
        return right[1] * right[2]  # (1, h, w, channels)
    if op.kind == "BATCH_MATMUL" and op.options.adjX:
        return left[-2]
    return left[-1] if op.kind == "BATCH_MATMUL" else right[1]  # FULLY_CONNECTED: (out, in)
