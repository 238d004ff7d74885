"""INT8 for ONNX Runtime's CPU kernels: what is joined, what stays in float for the sake of speed, and that no value
moves by more than rounding."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.quantize.calibration import CalibrationSet, open_calibration
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.targets.onnx.inner import float_graph
from dualtoken_deploy.targets.onnx.qdq import Methods, QdqQuantizer, Style, read_products
from dualtoken_deploy.targets.onnx.slow import slow_in_integers
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.onnxruntime.integers import lay_out
from dualtoken_deploy.tasks.classify import CLASSIFY
from tests.contracts import make_contract

CPU = Style("U8/S8", unsigned=True, reduce_range=False, conv_outputs=True)
PLAIN = Methods(bias=False)
FLOAT = onnx.TensorProto.FLOAT


@pytest.fixture(scope="module")
def graph(small_bundle: Callable[..., Path]) -> onnx.ModelProto:
    manifest = dataclasses.replace(Bundle.open(small_bundle()).manifest, precision="int8")
    return float_graph(manifest, lambda _: None)


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    return open_calibration(CLASSIFY, "digits", make_contract("image", (64, 64), 1), 12, tuple("0123456789"))[0]


@pytest.fixture(scope="module")
def pairs(graph: onnx.ModelProto, calibration: CalibrationSet) -> onnx.ModelProto:
    slow = slow_in_integers(graph)
    return QdqQuantizer(graph, calibration, CPU, methods=PLAIN, slow=slow).quantize()


@pytest.fixture(scope="module")
def laid(pairs: onnx.ModelProto) -> onnx.ModelProto:
    return lay_out(pairs)


def made(
    nodes: Sequence[onnx.NodeProto], constants: dict[str, Any], shape: Sequence[int], opset: int = 20
) -> onnx.ModelProto:
    body = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def executed(model: onnx.ModelProto, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of a graph, as it writes it."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(folder / "optimized.onnx"))


def test_no_number_moves_by_more_than_rounding(
    graph: onnx.ModelProto, pairs: onnx.ModelProto, laid: onnx.ModelProto, calibration: CalibrationSet
) -> None:
    exact, before, after = (
        Prober(m, ["logits"]).run_each(calibration.inputs[:6])["logits"] for m in (graph, pairs, laid)
    )
    assert compare(before, after).sqnr_db > compare(exact, before).sqnr_db + 3
    assert compare(exact, after).sqnr_db > compare(exact, before).sqnr_db - 0.5


def test_every_linear_layer_in_integers_takes_its_bias_along(pairs: onnx.ModelProto, laid: onnx.ModelProto) -> None:
    made_by = {value: node for node in pairs.graph.node for value in node.output}
    weights = {t.name for t in pairs.graph.initializer}
    in_integers = [
        n.output[0] for n in pairs.graph.node
        if n.op_type == "MatMul" and n.input[1] in made_by and made_by[n.input[1]].input[0] in weights
    ]  # fmt: skip
    joined = {n.name: n for n in laid.graph.node if n.op_type == "MatMulIntegerToFloat"}
    assert set(joined) == set(in_integers)
    assert len(in_integers) > 20
    with_bias = [name for name, node in joined.items() if node.input[6]]
    assert len(with_bias) > 0.9 * len(joined)
    sums = {name for n in laid.graph.node if n.op_type == "Add" for name in n.input}
    assert not sums & {f"{name.removesuffix('/MatMul')}.bias" for name in with_bias}


def test_only_what_has_integers_reads_a_pair(laid: onnx.ModelProto, tmp_path: Path) -> None:
    """What ONNX Runtime is left with: no DequantizeLinear in front of a float operator but behind a convolution."""
    made_by = {value: node for node in laid.graph.node for value in node.output}
    for node in laid.graph.node:
        for name in node.input:
            end = made_by.get(name)
            if end is None or end.op_type != "DequantizeLinear" or node.op_type in ("Conv", "MatMul", "Gemm"):
                continue
            start = made_by[end.input[0]]
            assert made_by[start.input[0]].op_type == "Conv", (node.name, name)
    assert kinds(laid)["Softmax"] == 0
    assert executed(laid, tmp_path)["Attention"] == kinds(laid)["Attention"] == 4  # two a block


def test_every_layer_that_was_quantized_runs_in_integers(
    pairs: onnx.ModelProto, laid: onnx.ModelProto, small_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    onnx.save(laid, tmp_path / "model.onnx")
    with load_runner(Bundle(tmp_path, Bundle.open(small_bundle()).manifest), threads=1) as runner:
        nodes = runner.execution().nodes
    read = {n.output[0] for n in pairs.graph.node if n.op_type == "DequantizeLinear"}
    wanted = [
        n.output[0].removesuffix("/scaled") for n in pairs.graph.node
        if n.op_type in ("MatMul", "Conv", "Gemm") and set(n.input[:2]) <= read
    ]  # fmt: skip
    assert len(wanted) > 25
    assert {name: nodes.get(name) for name in wanted} == dict.fromkeys(wanted, "uint8")


def test_the_opset_stays_where_it_is_asked_for(pairs: onnx.ModelProto, laid: onnx.ModelProto) -> None:
    def opset(model: onnx.ModelProto) -> int:
        return next(o.version for o in model.opset_import if o.domain == "")

    assert (opset(pairs), opset(lay_out(pairs, newer=False)), opset(laid)) == (20, 20, 23)


def test_a_stack_of_matrices_stays_in_float() -> None:
    """ONNX Runtime's kernel takes no scale for each column of it, which is told when it runs and not before."""
    found = {}
    for name, shape in (("one", (32, 24)), ("stack", (4, 32, 24))):
        product = helper.make_node("MatMul", ["x", "w"], ["y"], name="y")
        found[name] = read_products(made([product], {"w": np.ones(shape, np.float32)}, (4, 6, 32)[-len(shape) :]))
    assert found["one"].eligible == {"y"}
    assert found["stack"].eligible == frozenset()
    assert found["stack"].macs == {"y": 4 * 6 * 32 * 24}


# By table


def convolution(read: str, weights: str, out: str, group: int = 1) -> onnx.NodeProto:
    return helper.make_node("Conv", [read, weights], [out], pads=[1, 1, 1, 1], group=group)


def unary(kind: str, read: str, out: str) -> onnx.NodeProto:
    return helper.make_node(kind, [read], [out])


CONSTANTS: dict[str, Any] = {
    "first": np.ones((16, 3, 3, 3), np.float32), "deep": np.ones((16, 1, 3, 3), np.float32),
    "wide": np.ones((16, 16, 3, 3), np.float32),
}  # fmt: skip


@pytest.mark.parametrize(
    ("between", "slow"),
    [("Gelu", {"a", "b"}), ("Relu", set()), ("Identity", {"a", "b"})],
    ids=["values leave integers", "integers go on", "an operator that is not known"],
)
def test_a_small_convolution_stays_in_float_where_it_stands_alone(between: str, slow: set[str]) -> None:
    nodes = [
        convolution("x", "first", "a"), unary(between, "a", "a1"), convolution("a1", "deep", "b", 16),
        unary(between, "b", "b1"), convolution("b1", "wide", "y"),
    ]  # fmt: skip
    assert slow_in_integers(made(nodes, CONSTANTS, (3, 8, 8))) == slow


def attention(scaled: bool = False, masked: bool = False) -> onnx.ModelProto:
    """Of x (1, 12, 3 * 32) over two heads: as torch writes it in opset 20."""
    nodes = [helper.make_node("Split", ["x"], ["q", "k", "v"], axis=2, num_outputs=3)]
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [name, "heads"], [f"{name}1"]))
        nodes.append(helper.make_node("Transpose", [f"{name}1"], [f"{name}2"], perm=[0, 2, 1, 3]))
    nodes += [
        helper.make_node("Reshape", ["k2", "joined"], ["k3"]),
        helper.make_node("Transpose", ["k3"], ["k4"], perm=[0, 2, 1]),
        helper.make_node("Reshape", ["k4", "apart"], ["k5"]),
        helper.make_node("MatMul", ["q2", "k5"], ["scores"]),
    ]
    last = "scores"
    if scaled:
        nodes.append(helper.make_node("Mul", [last, "factor"], ["smaller"]))
        last = "smaller"
    if masked:
        nodes.append(helper.make_node("Add", [last, "mask"], ["seen"]))
        last = "seen"
    nodes += [
        helper.make_node("Softmax", [last], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v2"], ["read"]),
        helper.make_node("Transpose", ["read"], ["turned"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["turned", "tokens"], ["y"]),
    ]
    constants = {
        "heads": np.array([1, 12, 2, 16]), "joined": np.array([2, 12, 16]), "apart": np.array([1, 2, 16, 12]),
        "tokens": np.array([1, 12, 32]), "factor": np.float32(0.25), "mask": np.zeros((12, 12), np.float32),
    }  # fmt: skip
    return made(nodes, constants, (12, 96))


def test_an_attention_is_one_operator_in_float() -> None:
    model = attention()
    assert slow_in_integers(model) == {"scores", "read"}
    assert slow_in_integers(model, attention=False) == set()
    changed = lay_out(model)
    assert kinds(changed) == {"Split": 1, "Attention": 1}
    x = np.random.default_rng(0).normal(size=(1, 12, 96)).astype(np.float32)
    before, after = (Prober(m, ["y"]).run(x)["y"] for m in (model, changed))
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("different", [{"scaled": True}, {"masked": True}])
def test_an_attention_of_another_form_is_left_alone(different: dict[str, bool]) -> None:
    model = attention(**different)
    assert slow_in_integers(model) == set()
    assert kinds(lay_out(model))["Softmax"] == 1


@pytest.mark.parametrize(
    ("name", "kind", "own"),
    [
        ("stem.conv1/WithoutBiases", "Convolution", "stem.conv1"),
        ("head.fc/MatMul/DequantizationMultiply", "FullyConnected", "head.fc/MatMul"),
        ("qkv/MatMul/DequantizationMultiply", "FullyConnectedQuantizedLegacy", "qkv/MatMul"),
        ("stem.dw/WithoutBiases", "GroupConvolution", "stem.dw"),
        ("scan.select", "FullyConnected", "scan.select"),
        # of OpenVINO 2026.4's profile of TSM2, where three readers of a product each scale it by themselves
        ("scan.select/DequantizationMultiply", "Subgraph", "scan.select/DequantizationMultiply"),
    ],
)
def test_what_scales_a_product_is_not_the_product(name: str, kind: str, own: str) -> None:
    from dualtoken_deploy.targets.openvino.runner import own_name

    assert own_name(name, kind) == own
