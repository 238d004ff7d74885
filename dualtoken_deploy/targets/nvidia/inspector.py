"""What an engine executes, from the JSON of TensorRT's engine inspector (detailed verbosity)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualtoken_deploy.errors import BundleError

Layer = Mapping[str, Any]

# The words of TensorRT 8 to 11 for a tensor's type, in "Format/Datatype" ("Half", "Row major linear FP16 format").
_WORDS = {
    "bfloat16": re.compile(r"\b(BF16|BFloat16)\b", re.IGNORECASE),
    "float16": re.compile(r"\b(FP16|Half)\b", re.IGNORECASE),
    "float8": re.compile(r"\bFP8\b", re.IGNORECASE),
    "int8": re.compile(r"\bInt8\b", re.IGNORECASE),
    "float32": re.compile(r"\b(FP32|Float)\b", re.IGNORECASE),
}
_NARROW = ("int8", "float8", "float16", "bfloat16", "float32")  # a layer computes in the narrowest that it touches

# The exporter names a product by its value, "x/MatMul", or where that does not tell the operator "x@Conv"; TensorRT
# keeps the names of what it fused in "Metadata".
_PRODUCT_NODE = re.compile(r"([^\s\[\]:]+)([/@])(MatMul|Conv|Gemm)\b")
_PRODUCT_KIND = re.compile(r"gemm|conv|matrix_?multiply|matmul|mha|attention", re.IGNORECASE)


@dataclass(frozen=True)
class Layers:
    """Counts of layers by kind, their dtypes by kind (the most frequent first), and of the layers that hold matrix
    products the share in float32; None where the inspector names none of them. `nodes`: the dtype of each product,
    under the name of the value that it makes."""

    operators: Mapping[str, int]
    precision: Mapping[str, tuple[str, ...]]
    float32_share: float | None
    nodes: Mapping[str, str]


def read_layers(text: str) -> Layers:
    """Raises BundleError where the text is no detailed inspection."""
    try:
        layers: Sequence[Any] = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"TensorRT's engine inspector gave no list of layers ({error})") from error
    if not layers or not all(isinstance(layer, dict) for layer in layers):
        raise BundleError("the engine was built without detailed profiling verbosity, so its types cannot be read")
    operators: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {}
    products: list[str] = []
    nodes: dict[str, str] = {}
    for layer in layers:
        product = _product(layer)
        kind, dtype = product or str(layer.get("LayerType", "unknown")), _dtype(layer)
        operators[kind] += 1
        dtypes.setdefault(kind, Counter())[dtype] += 1
        if product:
            products.append(dtype)
            for name, mark, operator in _PRODUCT_NODE.findall(str(layer.get("Metadata", ""))):
                nodes[name if mark == "@" else f"{name}/{operator}"] = dtype
    precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
    share = products.count("float32") / len(products) if products else None
    return Layers(dict(sorted(operators.items())), precision, share, nodes)


def _product(layer: Layer) -> str | None:
    """The ONNX operator of the matrix product in a layer; None where it holds none."""
    if "reformat" in str(layer.get("LayerType", "")).lower():  # it has the name of the layer that it serves
        return None
    origin = _PRODUCT_NODE.search(str(layer.get("Metadata", ""))) or _PRODUCT_NODE.search(str(layer.get("Name", "")))
    if origin:
        return origin[3]
    named = f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"
    if not _PRODUCT_KIND.search(named):
        return None
    return "Conv" if "conv" in named.lower() else "MatMul"


def _dtype(layer: Layer) -> str:
    tensors = [t for t in (*layer.get("Inputs", ()), *layer.get("Outputs", ())) if isinstance(t, dict)]
    words = " ".join(str(t.get("Format/Datatype") or t.get("Datatype") or "") for t in tensors)
    return next((name for name in _NARROW if _WORDS[name].search(words)), "none")
