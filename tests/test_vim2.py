"""ViM2: the paper's counts, the scan against its definition, averages against equations 19 and 20, bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from dualtoken_deploy import Bundle
from dualtoken_deploy.data.images import preprocess
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.deploy import RULES, deploy_form
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.models.count import count_params
from dualtoken_deploy.models.own_sources import variant_source
from dualtoken_deploy.models.registry import build, create_model, make_config, random_model, takes_any_size
from dualtoken_deploy.models.scan import chunk_length, chunked_scan, stepwise_scan
from dualtoken_deploy.models.vim2 import cross_merge, cross_scan
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.nvidia.binding import RTX
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, QdqQuantizer
from dualtoken_deploy.targets.onnx.quantize import float_graph
from dualtoken_deploy.targets.onnx.values import Prober
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.use.validate import validate
from tests.conftest import PORTABLE
from tests.numerics import assert_close

SQNR_DB = {"fp32": 100.0, "fp16": 45.0}


# Table of results: parameters in millions. T is printed as 20; every reading that gives S and B gives it 22.1.
@pytest.mark.parametrize(("variant", "params_m"), [("vim2-s", 43.0), ("vim2-b", 74.0)])
def test_counts_are_the_papers_within_two_percent(variant: str, params_m: float) -> None:
    with torch.device("meta"):
        assert count_params(build(make_config(variant))) / 1e6 == pytest.approx(params_m, rel=0.02)


def test_t_counts_what_the_docs_say() -> None:
    with torch.device("meta"):
        assert round(count_params(build(make_config("vim2-t"))) / 1e6, 1) == 22.1


# --- the scan ---


def tensors(length: int, steps: float = 1.0, width: int = 6, states: int = 5) -> tuple[torch.Tensor, ...]:
    """x, delta, a, b, c of random numbers in float64; the decays go from none to all within a step."""
    generator = torch.Generator().manual_seed(length)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    delta = steps * F.softplus(3 * rand(2, 4, length, width))
    a = -torch.exp(2 * rand(4, 1, states, width))
    return rand(2, 4, length, width), delta, a, rand(2, 4, length, states), rand(2, 4, length, states)


def test_stepwise_is_the_sum_over_all_earlier_tokens() -> None:
    """y_t = sum over j <= t of C_t exp(A (D_j+1 + ... + D_t)) B_j D_j x_j, as loops over numbers."""
    x, delta, a, b, c = (t.numpy() for t in tensors(7, width=2, states=3))
    wanted = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        image, direction, t, e = i
        for j in range(t + 1):
            passed = delta[image, direction, j + 1 : t + 1, e].sum()
            for n in range(3):
                decay = np.exp(a[direction, 0, n, e] * passed)
                given = b[image, direction, j, n] * delta[image, direction, j, e] * x[image, direction, j, e]
                wanted[i] += c[image, direction, t, n] * decay * given
    assert_close(stepwise_scan(*tensors(7, width=2, states=3)), wanted, relative=1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 3, 8, 1000])
@pytest.mark.parametrize("length", [1, 2, 4, 49, 60, 196])
def test_chunks_are_the_steps(length: int, chunk: int | None) -> None:
    x, delta, a, b, c = tensors(length)
    q = None if chunk is None else min(chunk, length)
    wanted = stepwise_scan(x, delta, a, b, c)
    assert_close(chunked_scan(x, delta, a, b, c, q), wanted, relative=1e-10)  # measured 6e-16


@pytest.mark.parametrize(("dtype", "sqnr_db"), [(torch.float32, 120.0), (torch.float16, 50.0)], ids=str)
@pytest.mark.parametrize("steps", [1e-3, 1.0, 50.0])
def test_nothing_grows_in_low_precision(dtype: torch.dtype, sqnr_db: float, steps: float) -> None:
    """Steps so small that everything is kept, and so large that e^-D A is 0 in any precision."""
    x, delta, a, b, c = given = [t.to(dtype) for t in tensors(196, steps)]
    actual = chunked_scan(x, delta, a, b, c)
    assert torch.isfinite(actual).all()
    assert_close(actual.double(), stepwise_scan(*(t.double() for t in given)), sqnr_db=sqnr_db)


@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (49, 7), (196, 14), (784, 28), (3136, 28), (50, 8)])
def test_chunks_are_as_long_as_there_are_many(length: int, chunk: int) -> None:
    assert chunk_length(length) == chunk


def test_a_scan_has_few_nodes() -> None:
    graph = torch.export.export(Scan(), tuple(t.float() for t in tensors(784))).graph
    assert len(graph.nodes) < 555  # what groups of chunks one by one had


class Scan(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, delta: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
    ) -> torch.Tensor:
        return chunked_scan(x, delta, a, b, c)


def test_one_operation_stands_for_a_scan() -> None:
    """What ONNX is written from, and what that writes, are the definition."""
    import onnxruntime as ort

    from dualtoken_deploy.models.scan import as_operator
    from dualtoken_deploy.targets.onnx.scan import TRANSLATIONS

    for length in (5, 196):
        given = tuple(t[:1].float() if t.shape[0] == 2 else t.float() for t in tensors(length))
        with as_operator():
            program = torch.onnx.export(
                Scan(), given, dynamo=True, custom_translation_table=dict(TRANSLATIONS), verbose=False
            )
            assert_close(Scan()(*given), stepwise_scan(*given), relative=1e-6)
        assert program is not None
        kinds = [node.op_type for node in program.model_proto.graph.node]
        assert not {"Loop", "Scan", "If"} & set(kinds)
        session = ort.InferenceSession(program.model_proto.SerializeToString())
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=True)}
        (found,) = session.run(None, feeds)
        assert_close(found, stepwise_scan(*(t.double() for t in given)), sqnr_db=110)


def test_the_four_orders_of_a_map() -> None:
    grid = (2, 3)
    row_by_row = torch.arange(6.0).reshape(1, 6, 1)
    column_by_column = [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]
    wanted = torch.tensor([list(range(6)), column_by_column, list(range(6))[::-1], column_by_column[::-1]])
    assert torch.equal(cross_scan(row_by_row, grid)[0, :, :, 0], wanted.to(torch.float32))
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0]).reshape(1, 4, 1, 1)
    assert torch.equal(cross_merge(cross_scan(row_by_row, grid) * weights, grid), 1111 * row_by_row)


# --- the network ---


def test_averages_are_equations_19_and_20() -> None:
    """Layers 1 and 2 of a stage: x_token from all earlier y, x_channel also from the layer's own y_token."""
    stage: Any = random_model("tiny-vim2", image_size=64).double().get_submodule("stage3")
    grid = (4, 4)
    x = torch.randn(2, 16, 48, dtype=torch.float64)
    w = {name: getattr(stage, name).weights for name, _ in stage.named_children() if "average" in name}
    with torch.no_grad():
        token1 = stage.token1(w["average1"][0] * x, grid)
        token2 = stage.token2(w["average2"][0] * x + w["average2"][1] * token1, grid)
        read1 = w["channel_average1"][0] * x + w["channel_average1"][1] * token1
        read2 = w["channel_average2"] @ torch.stack((x, token1, token2)).flatten(1)
        both = stage.channel1(torch.cat((read1, read2.reshape(x.shape)), dim=-1), grid)
        every = torch.stack((x, token1, token2, both[..., :48], both[..., 48:]))
        assert_close(stage(x, grid), (w["average"] @ every.flatten(1)).reshape(x.shape), relative=1e-12)


def test_a_stage_begins_as_a_residual_network() -> None:
    stage: Any = create_model("tiny-vim2", image_size=64).double().get_submodule("stage4")  # D = C: layer 2's alone
    grid = (2, 2)
    x = torch.randn(1, 4, 64, dtype=torch.float64)
    with torch.no_grad():
        y = x + stage.token1(x, grid)
        y = y + stage.token2(y, grid)
        assert_close(stage(x, grid), y + stage.channel1(y, grid), relative=1e-12)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (71, 101)])
def test_features_have_strides_4_8_16_32_of_the_padded_image(height: int, width: int) -> None:
    model = create_model("tiny-vim2", num_classes=3)
    rows, columns = -(-height // 32), -(-width // 32)
    with torch.no_grad():
        shapes = [tuple(m.shape) for m in model.features(torch.randn(2, 3, height, width))]
    assert shapes == [(2, c, s * rows, s * columns) for c, s in zip((32, 32, 48, 64), (8, 4, 2, 1), strict=True)]


@pytest.mark.parametrize("rules", [["fold_norm_affine"], None, list(RULES)], ids=["norms", "default", "all"])
def test_the_deploy_form_keeps_what_the_model_computes(rules: list[str] | None) -> None:
    model = random_model("tiny-vim2", num_classes=10).double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    form = deploy_form(model, rules, (64, 96))
    assert form.rules["fold_norm_affine"] == 2 * (4 + 2) + 3 + 1  # mixers, merges, head
    with torch.no_grad():
        assert_close(form.module(image), model(image), relative=1e-10)


@pytest.mark.parametrize(("target", "precision"), [*((t, "fp32") for t in PORTABLE), ("onnxruntime", "fp16")])
def test_bundles_compute_what_eager_computes(small_bundle: Callable[..., Path], target: str, precision: str) -> None:
    bundle = Bundle.open(small_bundle(target, precision, variant="tiny-vim2", image_size=64))
    (result,) = validate([bundle], "photographs", limit=4)
    assert result.sqnr_db >= SQNR_DB[precision]


@pytest.mark.parametrize(("target", "precision"), [("tensorrt", "fp16"), ("tensorrt-rtx", "fp16")])
def test_nvidias_files_hold_their_accuracy(small_bundle: Callable[..., Path], target: str, precision: str) -> None:
    """Prepared; and compiled by the real builder of TensorRT for RTX, which takes every node of the scans."""
    if target == "tensorrt-rtx":
        pytest.importorskip(RTX.module, reason="the extra [tensorrt-rtx] has wheels for x86-64 alone")
    manifest = Bundle.open(small_bundle(target, precision, variant="tiny-vim2", image_size=64)).manifest
    assert manifest.measured.photographs is not None
    assert manifest.measured.photographs.sqnr_db >= SQNR_DB[precision]  # measured 67.8
    assert manifest.state == {"tensorrt": "prepared", "tensorrt-rtx": "compiled"}[target]
    if manifest.build is not None and target == "tensorrt-rtx":
        details = manifest.build.details
        assert details["nodes_taken"] == details["nodes"] > 500  # measured 809


def test_no_file_has_a_loop(small_bundle: Callable[..., Path]) -> None:
    (path,) = small_bundle("onnxruntime", "fp32", variant="tiny-vim2", image_size=64).glob("*.onnx")
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert not kinds & {"Loop", "Scan", "If"}
    assert not takes_any_size(make_config("tiny-vim2"))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_int8_leaves_the_scan_in_float(small_bundle: Callable[..., Path], target: str) -> None:
    """Projections are quantized; no product, sum or exponential of a scan is."""
    options = Int8Options("photographs", 64, metric="sqnr", max_drop=10.0, race=False)
    path = small_bundle(target, "int8", variant="tiny-vim2", image_size=64, int8=options)
    manifest = Bundle.open(path).manifest
    assert manifest.measured.int8_mac_share > 0.85  # measured 0.908: the others are the scan's last products
    assert manifest.measured.photographs is not None
    assert manifest.measured.photographs.sqnr_db > 30  # measured 43.9 in ONNX Runtime, 41.8 in OpenVINO
    if target == "onnxruntime":
        graph = onnx.load(path / "model.onnx").graph
        maker = {name: node for node in graph.node for name in node.output}
        weights = {tensor.name for tensor in graph.initializer}
        products = [n for n in graph.node if n.op_type == "MatMul" and "s6/selective_scan" in n.name]
        assert products
        scans = [n for n in graph.node if "selective_scan" in n.name and n.op_type in ("MatMul", "Exp", "Mul", "Add")]
        read = [maker[name].op_type for node in scans for name in node.input if name in maker and name not in weights]
        assert "DequantizeLinear" not in read


def test_every_layer_between_scans_has_its_sensitivity() -> None:
    """They predict the noise of all in INT8 that ONNX Runtime has; a graph that ended at its first scan knew five."""
    source = variant_source("tiny-vim2", image_size=64, num_classes=10)
    contract = source.contract("image", 1, False)
    request = Request("fp32", contract, source.outputs(contract.size, 1), None, {}, task=source.task)
    model = float_graph(source.make(), request, DEFAULT_RULES, lambda _: None).model
    pictures = open_pictures("photographs")
    inputs = np.stack([preprocess(pictures[i].image, contract) for i in range(16)])
    quantizer = QdqQuantizer(model, CalibrationSet.of_arrays("photographs", inputs[:10], contract), NEUTRAL)
    known = quantizer.sensitivity()
    assert len(known.units) == 22 + 4  # the depth-wise convolutions too
    assert min(known.alone().values()) > 0
    exact, found = (Prober(m, ["logits"]).run_each(inputs[10:])["logits"] for m in (model, quantizer.quantize()))
    measured = 10 * np.log10(np.square(exact).sum() / np.square(found - exact).sum())
    assert -10 * np.log10(known.noise()) == pytest.approx(measured, abs=4)
