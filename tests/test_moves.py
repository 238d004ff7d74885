"""Moves that end where they began, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from dualtoken_deploy.targets.onnx.moves import without_idle_moves

FLOAT = onnx.TensorProto.FLOAT
SHAPES = {"map": (2, 4, 4, 6), "flat": (2, 6, 16), "tokens": (2, 16, 6), "wide": (2, 8, 2, 6)}


def moved(chain: list[tuple[str, object]]) -> onnx.ModelProto:
    """y = relu(moves(relu(x))), z = the last but one value in between."""
    nodes, last = [helper.make_node("Relu", ["x"], ["v0"])], "v0"
    for i, (kind, how) in enumerate(chain, 1):
        given: dict[str, Any] = {"perm": how} if kind == "Transpose" else {}
        nodes.append(helper.make_node(kind, [last, *([] if given else [str(how)])], [f"v{i}"], **given))
        last = f"v{i}"
    nodes += [helper.make_node("Relu", [last], ["y"]), helper.make_node("Neg", [f"v{len(chain) - 1}"], ["z"])]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, SHAPES["tokens"])],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in "yz"],
        [numpy_helper.from_array(np.array(shape), name) for name, shape in SHAPES.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


THERE = [("Reshape", "map"), ("Transpose", [0, 3, 1, 2]), ("Reshape", "flat")]


@pytest.mark.parametrize(
    ("chain", "idle"),
    [
        ([*THERE, ("Transpose", [0, 2, 1])], 4),
        ([*THERE, ("Transpose", [0, 2, 1]), *THERE, ("Transpose", [0, 2, 1])], 8),
        ([("Transpose", [0, 2, 1]), ("Transpose", [0, 2, 1])], 2),
        ([("Reshape", "wide"), ("Transpose", [0, 2, 1, 3]), ("Reshape", "tokens")], 0),  # the same shape, another order
        ([*THERE, ("Reshape", "tokens")], 0),
    ],
)
def test_only_moves_that_do_nothing_go(chain: list[tuple[str, object]], idle: int) -> None:
    model = moved(chain)
    found = without_idle_moves(model)
    reader = next(node for node in found.graph.node if node.output[0] == "y")
    assert reader.input[0] == f"v{len(chain) - idle}"
    x = np.random.default_rng(0).normal(size=SHAPES["tokens"]).astype(np.float32)
    want, got = (ort.InferenceSession(m.SerializeToString()).run(None, {"x": x}) for m in (model, found))
    for a, b in zip(want, got, strict=True):
        np.testing.assert_array_equal(a, b)
