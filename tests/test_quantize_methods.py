"""What makes a graph quantize better: each against what it is defined by, on small graphs made here."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.onnx.choose import choose_methods, parted
from dualtoken_deploy.targets.onnx.correct import round_rows
from dualtoken_deploy.targets.onnx.differentiable import TorchGraph
from dualtoken_deploy.targets.onnx.qdq import Methods, QdqQuantizer, Style
from dualtoken_deploy.targets.onnx.values import Prober

NONE = Methods(saturation=False, migration=False, bias=False)
ORT = Style("U8/S8", unsigned=True, reduce_range=False, conv_outputs=True)
SEVEN = Style("U8/S8, 7 bits", unsigned=True, reduce_range=True, conv_outputs=True)
FLOAT = onnx.TensorProto.FLOAT


def made(nodes: Sequence[onnx.NodeProto], constants: dict[str, Array], shape: Sequence[int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", FLOAT, [1, *shape])],
        [helper.make_tensor_value_info("y", FLOAT, None)],
        [numpy_helper.from_array(v.astype(np.float32), n) for n, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def chain() -> tuple[onnx.ModelProto, CalibrationSet]:
    """Convolution, GELU, depth-wise convolution, GELU, linear layer with a bias: the kinds that have one."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], pads=[1, 1, 1, 1]),
        helper.make_node("Gelu", ["c1"], ["g1"]),
        helper.make_node("Conv", ["g1", "w2", "b2"], ["c2"], pads=[1, 1, 1, 1], group=16),
        helper.make_node("Gelu", ["c2"], ["g2"]),
        helper.make_node("Transpose", ["g2"], ["t"], perm=[0, 2, 3, 1]),
        helper.make_node("MatMul", ["t", "w3"], ["m"]),
        helper.make_node("Add", ["m", "b3"], ["y"]),
    ]
    constants = {
        "w1": random.normal(size=(16, 3, 3, 3)), "b1": random.normal(size=16), "w2": random.normal(size=(16, 1, 3, 3)),
        "b2": random.normal(size=16), "w3": random.normal(size=(16, 24)), "b3": random.normal(size=24),
    }  # fmt: skip
    inputs = random.normal(size=(12, 3, 10, 10)).astype(np.float32).cumsum(-1)  # neighbours are alike, as in pictures
    return made(nodes, constants, (3, 10, 10)), CalibrationSet("made", inputs, "chain")


@pytest.mark.parametrize("style", [ORT, SEVEN], ids=lambda s: s.name)
@pytest.mark.parametrize("rounding", [False, True])
def test_biases_keep_the_mean_of_every_channel(
    chain: tuple[onnx.ModelProto, CalibrationSet], style: Style, rounding: bool
) -> None:
    """Read from the Q/DQ graph in ONNX Runtime, not from what corrected it."""
    model, calibration = chain
    exact = Prober(model, ["c2", "y"]).run_each(calibration.inputs)
    apart = {}
    for bias in (False, True):
        methods = Methods(migration=False, bias=bias, rounding=rounding)
        quantized = QdqQuantizer(model, calibration, style, methods=methods).quantize()
        found = Prober(quantized, ["c2", "y"]).run_each(calibration.inputs)
        apart[bias] = {
            "c2": np.abs((found["c2"] - exact["c2"]).mean((0, 2, 3))).max(),
            "y": np.abs((found["y"] - exact["y"]).mean((0, 1, 2))).max(),
        }
    for name, most in (("c2", 0.02), ("y", 0.02)):  # what is left is a step of the int32 bias and of the output's grid
        assert apart[True][name] < most < apart[False][name], apart


def test_each_method_can_be_left_out(chain: tuple[onnx.ModelProto, CalibrationSet]) -> None:
    model, calibration = chain
    plain = QdqQuantizer(model, calibration, ORT, methods=NONE).quantize()
    seen = {plain.SerializeToString(deterministic=True)}
    for name in ("saturation", "migration", "bias", "rounding"):
        methods = Methods(**{field: field == name for field in ("saturation", "migration", "bias", "rounding")})
        seen.add(
            QdqQuantizer(model, calibration, ORT, methods=methods).quantize().SerializeToString(deterministic=True)
        )
    assert len(seen) == 5
    assert str(NONE) == "no methods"


def test_a_range_begins_where_a_gelu_is_flat(chain: tuple[onnx.ModelProto, CalibrationSet]) -> None:
    model, calibration = chain
    ranges = QdqQuantizer(model, calibration, ORT, methods=Methods(migration=False)).ranges
    whole = QdqQuantizer(model, calibration, ORT, methods=NONE).ranges
    assert whole["c1"][0] < -3.5 == ranges["c1"][0]
    assert whole["c1"][1] == ranges["c1"][1]
    flat = torch.nn.functional.gelu(torch.linspace(-60, -3.5, 1000))
    assert float(flat.abs().max()) < 1e-3  # what is lost by it


def test_second_order_rounding_is_near_the_best_of_all() -> None:
    """Of forty rows, against all 3^5 roundings of each to a neighbour or the one after."""
    random = np.random.default_rng(1)
    x = random.normal(size=(5, 40)) + 3 * random.normal(size=(1, 40))  # what weights multiply is alike
    weight, step = random.normal(size=(40, 5)), 0.5
    near = np.round(weight / step)

    def lost(whole: Array) -> Array:
        out: Array = (((whole * step - weight) @ x) ** 2).sum(1)
        return out

    best = np.min([lost(near + np.array(add)) for add in itertools.product((-1, 0, 1), repeat=5)], axis=0)
    steps = torch.full((40, 1), step, dtype=torch.float64)
    found = round_rows(torch.from_numpy(weight), steps, torch.from_numpy(x @ x.T), 127).numpy() / step
    assert np.allclose(found, np.round(found))
    assert (lost(found) >= best - 1e-9).all()
    assert lost(found).sum() < 0.5 * lost(near).sum()
    assert lost(found).sum() < 2 * best.sum()


def test_rounded_weights_are_those_in_the_file(chain: tuple[onnx.ModelProto, CalibrationSet]) -> None:
    """On a grid of seven bits, where rounding is most of the noise, second order loses less at the output."""
    model, calibration = chain
    exact = Prober(model, ["y"]).run_each(calibration.inputs)["y"]
    noise = []
    for rounding in (False, True):
        methods = Methods(saturation=False, migration=False, bias=False, rounding=rounding)
        quantized = QdqQuantizer(model, calibration, SEVEN, methods=methods).quantize()
        noise.append(float(((Prober(quantized, ["y"]).run_each(calibration.inputs)["y"] - exact) ** 2).sum()))
        weights = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer}
        assert np.abs(weights["w2_quantized"].astype(int)).max() == 64
    assert noise[1] != noise[0]


@pytest.mark.parametrize(("unseen", "moved"), [(1.0, True), (60.0, False)])
def test_scales_are_moved_where_pictures_that_ranges_did_not_see_say_so(unseen: float, moved: bool) -> None:
    """A channel a hundred times smaller than its neighbour is well served by its own scale, unless every third picture
    has it as large as the other."""
    random = np.random.default_rng(2)
    weight = np.ones((2, 1, 3, 3)) * np.array([1.0, 50.0]).reshape(2, 1, 1, 1)
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1], group=2)]
    model = made(nodes, {"w": weight, "b": np.zeros(2)}, (2, 8, 8))
    inputs = random.normal(size=(30, 2, 8, 8)).astype(np.float32) * np.array([1.0, 0.01]).reshape(1, 2, 1, 1)
    inputs[parted(30)[1], 1] *= unseen
    calibration = CalibrationSet("made", inputs.astype(np.float32), f"unseen {unseen}")
    style = Style("U8/S8", unsigned=True, reduce_range=False, conv_outputs=False)
    assert choose_methods(model, calibration, style, "minmax", lambda _: None).migration is moved


def test_pictures_that_judge_are_none_of_those_with_ranges() -> None:
    for count in (10, 11, 100, 301):
        seen, judges = parted(count)
        assert not set(seen) & set(judges)
        assert len(set(seen)) == len(seen) >= 6
        assert len(judges) >= 3


def test_steps_of_a_graph_are_its_runs(chain: tuple[onnx.ModelProto, CalibrationSet]) -> None:
    model, calibration = chain
    graph = TorchGraph(model)
    walk = graph.lockstep(calibration.inputs[:3])
    made_values = [walk.step(node, attributes) for node, attributes in graph.nodes][-1]
    assert made_values is not None
    expected = Prober(model, ["y"]).run_each(calibration.inputs[:3])["y"]
    np.testing.assert_allclose(np.concatenate([v.numpy() for v in made_values]), expected, rtol=1e-4, atol=1e-4)
