"""The layouts for ONNX Runtime: what they change, what they must leave alone, and that no number moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.targets.onnx.graph import Graph
from dualtoken_deploy.targets.onnxruntime.layout import attention_over_tokens, drop_unit_batch, transpose_first


def run(model: onnx.ModelProto, optimized: Path | None = None) -> list[np.ndarray[Any, Any]]:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if optimized is not None:
        settings.optimized_model_filepath = str(optimized)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.normal(size=i.shape).astype(np.float32) for i in session.get_inputs()}
    out: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return out


def graph(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[int]], output: list[int], **constants: Any
) -> onnx.ModelProto:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    out = [helper.make_tensor_value_info("out", TensorProto.FLOAT, output)]
    weights = [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    made = helper.make_graph(nodes, "g", info, out, weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def node(kind: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), output.split(), name=output, **attributes)


def weight(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def laid_out(model: onnx.ModelProto, rule: Callable[[onnx.ModelProto], int]) -> tuple[onnx.ModelProto, int]:
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    count = rule(changed)
    onnx.checker.check_model(changed, full_check=True)
    for before, after in zip(run(model), run(changed), strict=True):
        assert after.shape == before.shape
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    return changed, count


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in model.graph.node)


def test_an_exported_bundle_has_the_layouts(small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle(target="onnxruntime"))
    assert {"attention_over_tokens", "drop_unit_batch"} <= set(bundle.manifest.rules)
    model = onnx.load(bundle.path / "model.onnx")
    after, before = kinds(model), bundle.manifest.operators["simplified"]
    assert after["Attention"] == before["Attention"]
    assert after["Transpose"] == before["Transpose"] - 4 * before["Attention"]
    session = ort.SessionOptions()
    session.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(bundle.path / "model.onnx", session, providers=["CPUExecutionProvider"])
    executed = kinds(onnx.load(tmp_path / "optimized.onnx"))
    gemms = executed["Gemm"] + executed["FusedGemm"]
    assert gemms > before["MatMul"] / 2
    assert executed["Reshape"] < gemms  # a Gemm over (1, N, C) stands between two of them


def test_a_dynamic_batch_keeps_its_batch(small_bundle: Callable[..., Path]) -> None:
    rules = Bundle.open(small_bundle(target="onnxruntime", batch="dynamic")).manifest.rules
    assert "drop_unit_batch" not in rules


HEADS = np.array([2, 5, 2, 4], np.int64)
JOIN = np.array([2, 5, 8], np.int64)


def attention(perm: list[int], **attributes: Any) -> onnx.ModelProto:
    nodes = []
    for i in "qkv":
        nodes.append(node("Reshape", f"{i} heads", f"{i}4"))
        nodes.append(node("Transpose", f"{i}4", f"{i}t", perm=perm))
    nodes.append(node("Attention", "qt kt vt", "a", **attributes))
    nodes.append(node("Transpose", "a", "at", perm=perm))
    nodes.append(node("Reshape", "at join", "out"))
    shapes = {i: [2, 5, 8] for i in "qkv"}
    return graph(nodes, shapes, [2, 5, 8], heads=HEADS, join=JOIN)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.3}, {"scale": 1.0, "is_causal": 1}], ids=str)
def test_attention_takes_tokens(attributes: dict[str, Any]) -> None:
    changed, count = laid_out(attention([0, 2, 1, 3], **attributes), attention_over_tokens)
    assert count == 1
    assert kinds(changed) == {"Attention": 1}


def test_attention_over_another_axis_is_left_alone() -> None:
    nodes = [node("Attention", "q k v", "out")]
    model = graph(nodes, {i: [2, 3, 5, 4] for i in "qkv"}, [2, 3, 5, 4])
    assert laid_out(model, attention_over_tokens)[1] == 0


def test_rows_lose_their_unit_batch() -> None:
    """A linear layer, its residual and a mean over the tokens, between a convolution's map and a classifier."""
    model = graph(
        [
            node("Reshape", "map shape", "x"),
            node("LayerNormalization", "x gain", "n", axis=2),
            node("MatMul", "n w", "p"),
            node("Add", "p b", "y"),
            node("Add", "x y", "r"),
            node("ReduceMean", "r one", "m", keepdims=1),
            node("Mul", "r m", "s"),
            node("Split", "s", "left right", axis=2, num_outputs=2),
            node("Add", "left right", "h"),
            node("Add", "h offset", "o"),
            node("ReduceMean", "o one", "out", keepdims=0),
        ],
        {"map": [1, 2, 3, 8]},
        [1, 4],
        shape=np.array([1, 6, 8]), gain=weight(8), w=weight(8, 8), b=weight(8), one=np.array([1]),
        offset=weight(1, 6, 4),
    )  # fmt: skip
    changed, count = laid_out(model, drop_unit_batch)
    assert count == len(model.graph.node)
    assert kinds(changed) == kinds(model)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Softmax", "y", "z", axis=1)],
        [node("Transpose", "y", "t", perm=[0, 2, 1]), node("Transpose", "t", "z", perm=[0, 2, 1])],
        [node("LayerNormalization", "y whole", "z", axis=1)],
        [node("ReduceMean", "y two", "m", keepdims=1), node("Mul", "m y", "z")],
        [node("Split", "y", "a b c", axis=1, num_outputs=3), node("Concat", "a b c", "z", axis=1)],
        [node("ReduceMean", "y one", "m", keepdims=1), node("Softmax", "m", "s"), node("Mul", "s y", "z")],
    ],
    ids=lambda nodes: "-".join(n.op_type for n in nodes),
)
def test_others_keep_theirs_and_read_what_they_did(nodes: list[onnx.NodeProto]) -> None:
    model = graph(
        [node("MatMul", "x w", "y"), *nodes, node("Identity", "z", "out")], {"x": [1, 6, 8]}, [1, 6, 8],
        w=weight(8, 8), whole=weight(6, 8), one=np.array([1]), two=np.array([2]),
    )  # fmt: skip
    laid_out(model, drop_unit_batch)


def test_a_batch_of_two_is_left_alone() -> None:
    model = graph([node("MatMul", "x w", "y"), node("Gelu", "y", "out")], {"x": [2, 6, 8]}, [2, 6, 8], w=weight(8, 8))
    assert laid_out(model, drop_unit_batch)[1] == 0


@pytest.mark.parametrize("kind", ["Sub", "Mul"])
def test_a_picture_is_transposed_before_it_is_normalised(kind: str) -> None:
    nodes = [
        node("Mul", "x gain", "scaled"),
        node(kind, "shift scaled", "moved"),
        node("Transpose", "moved", "planes", perm=[0, 3, 1, 2]),
        node("Conv", "planes kernel", "out"),
    ]
    model = graph(
        nodes, {"x": [1, 8, 6, 3]}, [1, 4, 8, 6], gain=weight(3), shift=weight(1, 1, 1, 3), kernel=weight(4, 3, 1, 1)
    )
    changed, count = laid_out(model, transpose_first)
    assert count == 2
    assert [n.op_type for n in changed.graph.node] == ["Transpose", "Mul", kind, "Conv"]
    made = {value for n in changed.graph.node for value in n.output}
    assert "planes" in made
    assert not made & {"scaled", "moved"}  # which lie otherwise now


def test_a_picture_that_is_read_elsewhere_too_is_not_turned() -> None:
    nodes = [
        node("Mul", "x gain", "scaled"),
        node("Transpose", "scaled", "planes", perm=[0, 3, 1, 2]),
        node("Transpose", "scaled", "again", perm=[0, 3, 1, 2]),
        node("Add", "planes again", "out"),
    ]
    assert laid_out(graph(nodes, {"x": [1, 8, 6, 3]}, [1, 3, 8, 6], gain=weight(3)), transpose_first)[1] == 0


def test_shapes_are_inferred_without_the_weights_and_they_come_back() -> None:
    """A product of a large weight and a Reshape by a small constant, beside what onnx infers from the whole model."""
    weight = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "w"], ["y"]),
                helper.make_node("Reshape", ["y", "s"], ["z"]),
            ],
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 64])],
            [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.array([3, 4, 8]), "s")],
        )
    )
    whole = {v.name: v for v in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info}
    shapes = Graph(model).shapes
    assert shapes["y"] == [d.dim_value for d in whole["y"].type.tensor_type.shape.dim] == [3, 32]
    assert shapes["z"] == [3, 4, 8]
    assert (numpy_helper.to_array(model.graph.initializer[0]) == weight).all()
