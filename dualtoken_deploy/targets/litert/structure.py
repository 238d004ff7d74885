"""What a saved .tflite is made of, and what LiteRT's own analyser says of it for the GPU delegate."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from dualtoken_deploy.targets.litert import flat

MOVES = ("RESHAPE", "TRANSPOSE", "SLICE", "SPLIT", "CONCATENATION", "PAD")
PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
_COMPLAINT = re.compile(r"GPU COMPATIBILITY WARNING: (.*)")


def structure(path: Path, model: Any) -> dict[str, int]:
    """operators, those that move data alone, matrix products, the highest rank of any value, and the kinds of
    operators that the analyser of this ai-edge-litert says the GPU delegate does not take as they are."""
    kinds = Counter(op.kind for op in flat.operators(model))
    tensors = model.subgraphs[0].tensors
    ranks = [len(tensors[i].shape) for op in flat.operators(model) for i in op.outputs if tensors[i].shape is not None]
    return {
        "operators": sum(kinds.values()),
        "moves": sum(kinds[kind] for kind in MOVES),
        "products": sum(kinds[kind] for kind in PRODUCTS),
        "max_rank": max(ranks, default=0),
        "off_gpu": len(gpu_complaints(path)),
    }


def gpu_complaints(path: Path) -> list[str]:
    """The analyser's sentences on what the GPU delegate of this version cannot take; none: it takes the whole file.

    Structure alone: the drivers of a phone may still refuse.
    """
    from ai_edge_litert import _pywrap_analyzer_wrapper as analyzer

    return sorted(set(_COMPLAINT.findall(analyzer.ModelAnalyzer(str(path), True, True))))
