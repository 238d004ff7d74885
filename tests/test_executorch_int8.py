"""ExecuTorch in integers by PT2E: our ranges in its observers, and what XNNPACK's graph in the file computes in."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.count import count_macs
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.executorch.contents import by_name
from dualtoken_deploy.targets.executorch.program import Node
from dualtoken_deploy.targets.executorch.quantize import PteBackend, prepare, quantize
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.tasks.table import TASKS
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.contracts import make_contract
from tests.test_executorch import MODEL, change_weights

CONTRACT = make_contract("image", (64, 64), 1)
INT8 = Int8Options(
    "digits", size=16, metric="agreement", max_drop=60.0, race=False
)  # random weights: any agreement will do


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("executorch") / "bundle"
    few = {**TASKS, "classify": replace(TASKS["classify"], held_out=24)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dualtoken_deploy.tasks.table.TASKS", few)
        export("tiny-mix", "executorch", "int8", output=folder, image_size=64, num_classes=10, int8=INT8)
    return Bundle.open(folder)


@pytest.fixture(scope="module")
def backend(made: Bundle) -> PteBackend:
    """Over the program that the export traced, which is still remembered."""
    inputs = np.repeat(made.golden["input"], 10, 0)
    pictures = CalibrationSet.of_arrays("golden", inputs, made.manifest.input)
    request = Request("int8", made.manifest.input, made.manifest.outputs, None, {"variant": "t"})
    found = prepare(rebuild(made.manifest), request, pictures, "static", "minmax", lambda _: None).backend
    assert isinstance(found, PteBackend)
    return found


def test_integers_execute_in_one_piece(made: Bundle) -> None:
    with load_runner(made) as runner:
        logits = runner.run({"image": made.golden["input"]})["logits"]
    assert compare(made.golden["logits"], logits).sqnr_db >= 15
    inspection = inspect_bundle(made)
    check_promise(inspection)
    assert inspection.int8_mac_share >= 0.94
    assert inspection.executed_precision["XNNConv2d"] == "int8"
    assert any("in 1 pieces" in note for note in inspection.notes)
    assert made.size_bytes < 0.36 * 4 * sum(p.numel() for p in rebuild(made.manifest).parameters())


def test_diagnose_points_at_a_fault_among_integers(made: Bundle, tmp_path: Path) -> None:
    layer, own = "stage3.block1.ffn.fc1", Path(shutil.copytree(made.path, tmp_path / "bundle"))
    change_weights(own / MODEL, layer, list(made.manifest.operators["products"]), lambda w: -w)
    assert diagnose(Bundle.open(own, verify=False), limit=2).suspect == layer


def test_multiplications_are_torchs(made: Bundle) -> None:
    """Without those of means; the constant G's MLP is folded away."""
    calibration = made.manifest.calibration
    assert calibration is not None
    macs = calibration.macs or {}
    assert sum(macs.values()) == pytest.approx(count_macs(rebuild(made.manifest), (64, 64)), rel=0.04)


def test_noise_is_predicted(backend: PteBackend, made: Bundle) -> None:
    """By one pass over the torch program, within 4 dB of what PT2E's own arithmetic loses."""
    predicted = -10 * np.log10(backend.sensitivity().noise())
    products = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    chosen = {name for name, node in backend._nodes.items() if node.target in products}
    image, source = torch.from_numpy(made.golden["input"]), backend._source
    with torch.no_grad():
        want, got = (p.module()(image) for p in (source.program, quantize(source.program, chosen, backend._ranges)))
    assert predicted == pytest.approx(compare(want.numpy(), got.numpy()).sqnr_db, abs=4)


def test_rows_are_rounded_as_they_come(backend: PteBackend, made: Bundle) -> None:
    """The dynamic quantizer: a range for each linear layer's input while it runs, none for convolutions, and the noise
    that was predicted within 4 dB."""
    request = Request("int8", made.manifest.input, made.manifest.outputs, None, {"variant": "t"})
    pictures = CalibrationSet.of_arrays("golden", np.repeat(made.golden["input"], 10, 0), made.manifest.input)
    found = prepare(rebuild(made.manifest), request, pictures, "dynamic", "minmax", lambda _: None).backend
    assert isinstance(found, PteBackend)
    chosen = {name for name, node in found._nodes.items() if node.target is torch.ops.aten.linear.default}
    assert {found._source.names[name] for name in chosen} == set(found.products.eligible)
    program = quantize(found._source.program, chosen, None)
    ranges = [n for n in program.graph.nodes if n.op == "call_function" and "choose_qparams" in str(n.target)]
    assert 0 < len(ranges) <= len(chosen)  # layers that read one value share its range
    image = torch.from_numpy(made.golden["input"])
    with torch.no_grad():
        want, got = (p.module()(image) for p in (found._source.program, program))
    measured = compare(want.numpy(), got.numpy()).sqnr_db
    assert -10 * np.log10(found.sensitivity().noise()) == pytest.approx(measured, abs=4)
    with pytest.raises(UsageError, match="measures no ranges; leave --calibrator entropy out"):
        prepare(rebuild(made.manifest), request, pictures, "dynamic", "entropy", lambda _: None)


def test_layers_in_float_have_no_pairs(backend: PteBackend) -> None:
    """And the ranges in the pairs of the others are ours."""
    one = next(name for name, node in backend._nodes.items() if node.target is torch.ops.aten.conv2d.default)
    program = quantize(backend._source.program, {one}, backend._ranges)
    pairs = [
        n for n in program.graph.nodes if "quantize_per_tensor" in str(n.target) and "dequantize" not in str(n.target)
    ]
    node = backend._nodes[one]
    wanted = {n.name: backend._ranges[n.name] for n in (node.all_input_nodes[0], node)}
    scales = sorted((max(high, 0.0) - min(low, 0.0)) / 255 for low, high in wanted.values())
    assert sorted({float(n.args[1]) for n in pairs}) == pytest.approx(scales, rel=1e-4)


def test_products_are_told_apart_where_branches_changed_places() -> None:
    """DualFormer's: in the program one half of the channels is first, in XNNPACK's file the other."""
    names = {"stem": 40, "attention": 8, "conv.expand": 20, "conv.project": 20, "head": 3}
    stem, attention, expand, project, head = (
        Node("XNNConv2d", dtype, macs)
        for dtype, macs in (("int8", 40), ("float32", 8), ("int8", 20), ("float32", 20), ("int8", 3))
    )
    found = by_name(names, [stem, expand, project, attention, head])
    assert found == dict(zip(names, (stem, attention, expand, project, head), strict=True))
    without = {name: node for name, node in found.items() if name != "attention"}
    assert by_name(names, [stem, expand, project, head]) == without  # left to a plain kernel
    assert by_name(names, [stem, expand, project, head, attention, attention]) == without
