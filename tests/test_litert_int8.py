"""LiteRT in integers: what is stored and what executes, read from the files; ranges and noise against torch."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.data.images import preprocess
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.models.count import count_macs
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.litert.quantize import FloatFile, LiteRtBackend, collect_ranges
from dualtoken_deploy.targets.recorder import Recorder
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.tasks.table import TASKS
from dualtoken_deploy.use.inspect import Inspection, check_promise, inspect_bundle, int8_share
from tests.contracts import make_contract

MODEL = "model.tflite"
KINDS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")
INT8 = Int8Options(
    "digits", size=16, metric="agreement", max_drop=60.0, race=False
)  # random weights: any agreement will do
CONTRACT = make_contract("image", (64, 64), 1)

pytestmark = pytest.mark.timeout(1500)  # the converter's environment may have to be made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, litert_converter: Path) -> Callable[..., Bundle]:
    """made(precision, quantizer): a bundle of the small model; one conversion and one run of eager serve all."""
    known: dict[tuple[str, str | None], Bundle] = {}

    def make(precision: str = "int8", quantizer: str | None = None) -> Bundle:
        key = precision, quantizer
        if key not in known:
            folder = tmp_path_factory.mktemp("litert") / "bundle"
            int8 = None if precision == "fp32" else dataclasses.replace(INT8, quantizer=quantizer)
            few = {**TASKS, "classify": dataclasses.replace(TASKS["classify"], held_out=24)}
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("dualtoken_deploy.tasks.table.TASKS", few)
                export("tiny-mix", "litert", precision, output=folder, image_size=64, num_classes=10, int8=int8)
            known[key] = Bundle.open(folder)
        return known[key]

    return make


@pytest.fixture(scope="module")
def float_file(made: Callable[..., Bundle]) -> FloatFile:
    manifest = made("fp32").manifest
    request = Request("fp32", manifest.input, manifest.outputs, None, {"variant": "t", "precision": "", "weights": ""})
    return FloatFile(rebuild(manifest), request, lambda _: None)


@pytest.fixture(scope="module")
def pictures() -> CalibrationSet:
    images = open_pictures("photographs")
    return CalibrationSet.of_arrays("p", np.stack([preprocess(images[i].image, CONTRACT) for i in range(10)]), CONTRACT)


def stored(bundle: Bundle) -> dict[str, tuple[str, Any, Any]]:
    """{weight of a product: its dtype, its integers or floats, its quantization}, by the value that it makes."""
    model = flat.read(bundle.path / MODEL)
    graph, types = model.subgraphs[0], flat.type_names()
    behind = {i: op.inputs[0] for op in flat.operators(model) if op.kind == "DEQUANTIZE" for i in op.outputs}
    found = {}
    for op in flat.operators(model):
        if op.kind not in KINDS:
            continue
        index = behind.get(op.inputs[1], op.inputs[1])
        tensor = graph.tensors[index]
        data = bytes(model.buffers[tensor.buffer].data)
        dtype = types[tensor.type]
        values: Any = np.frombuffer(data, {"INT8": np.int8, "INT4": np.uint8}.get(dtype, np.float32))
        if dtype == "INT4":  # two to a byte, the low half first
            low, high = (values << 4).view(np.int8) >> 4, values.view(np.int8) >> 4
            values = np.stack([low, high], 1).ravel()[: int(np.prod(tensor.shape))]
        name = flat.tensor_name(model, op.outputs[0]).removesuffix("/int8")
        found[name] = dtype, values.reshape(tensor.shape), tensor.quantization
    return found


@pytest.mark.parametrize(
    ("precision", "quantizer", "least_db", "share"),
    [("int8", None, 30, 0.93), ("int8", "static", 20, 0.96), ("int8-weights", None, 32, 0),
     ("int4-weights", None, 9, 0)],
)  # fmt: skip
def test_what_executes_is_what_was_promised(
    made: Callable[..., Bundle], precision: str, quantizer: str | None, least_db: float, share: float
) -> None:
    bundle = made(precision, quantizer)
    with load_runner(bundle) as runner:
        logits = runner.run({"image": bundle.golden["input"]})["logits"]
    assert compare(bundle.golden["logits"], logits).sqnr_db >= least_db
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    assert inspection.int8_mac_share >= share
    found = inspection.executed_precision["FULLY_CONNECTED"]
    assert found.removesuffix(" outside XNNPACK") == {
        "int8": "int8", "int8-weights": "float32 (int8 weights)", "int4-weights": "float32 (int4 weights)"
    }[precision]  # fmt: skip
    if precision != "int4-weights":  # whose weights XNNPACK does not widen
        assert any("in 1 pieces" in note for note in inspection.notes)
    assert inspection.executed_precision["BATCH_MATMUL"] == "float32"


@pytest.mark.parametrize(
    ("precision", "quantizer", "dtypes"),
    [("int8", None, {"INT8", "FLOAT32"}), ("int8", "static", {"INT8"}), ("int8-weights", None, {"INT8"}),
     ("int4-weights", None, {"INT4", "INT8"})],
)  # fmt: skip
def test_weights_are_the_models_own_within_half_a_step(
    made: Callable[..., Bundle], precision: str, quantizer: str | None, dtypes: set[str]
) -> None:
    """Channel by channel, against the float32 file's."""
    whole, narrow = stored(made("fp32")), stored(made(precision, quantizer))
    assert set(narrow) == set(whole)
    assert {dtype for dtype, _, _ in narrow.values()} == dtypes
    for name, (dtype, integers, said) in narrow.items():
        expected = whole[name][1]
        if dtype == "FLOAT32":
            np.testing.assert_array_equal(integers, expected)
            continue
        axis = int(said.quantizedDimension)
        assert len(said.scale) == expected.shape[axis]
        assert not np.any(said.zeroPoint)
        scale = np.asarray(said.scale).reshape([-1 if k == axis else 1 for k in range(expected.ndim)])
        assert (np.abs(integers * scale - expected) <= 0.5001 * scale).all(), name
        most = 7 if dtype == "INT4" else 127
        others = tuple(k for k in range(expected.ndim) if k != axis)
        assert (np.abs(integers.astype(int)).max(others) == most).mean() > 0.95


def test_files_are_small(made: Callable[..., Bundle]) -> None:
    whole = (made("fp32").path / MODEL).stat().st_size
    sizes = [(made(p).path / MODEL).stat().st_size / whole for p in ("int8", "int8-weights", "int4-weights")]
    assert sizes == pytest.approx([0.285, 0.285, 0.166], abs=0.03)  # the operators weigh something too


def test_depthwise_convolutions_are_not_what_splits_the_delegate(made: Callable[..., Bundle]) -> None:
    """Rounded as they come, XNNPACK does not take them: six pieces where there is one."""
    dtypes = {name: dtype for name, (dtype, _, _) in stored(made("int8")).items()}
    model = flat.read(made("int8").path / MODEL)
    for op in flat.operators(model):
        if op.kind in KINDS:
            wanted = "FLOAT32" if op.kind == "DEPTHWISE_CONV_2D" else "INT8"
            assert dtypes[flat.tensor_name(model, op.outputs[0])] == wanted


def test_multiplications_are_torchs(made: Callable[..., Bundle]) -> None:
    """Against FlopCounterMode over eager; the constant G's MLP is folded away."""
    calibration = made("int8").manifest.calibration
    assert calibration is not None
    macs = calibration.macs or {}
    counted = count_macs(rebuild(made("int8").manifest), (64, 64))
    assert sum(macs.values()) == pytest.approx(counted, rel=0.04)


def test_a_float_file_in_an_int8_bundle_is_a_promise_not_kept(made: Callable[..., Bundle], tmp_path: Path) -> None:
    own = Path(shutil.copytree(made("int8").path, tmp_path / "bundle"))
    model = flat.read(made("fp32").path / MODEL)
    flat.write(model, own / MODEL)
    bundle = Bundle.open(own, verify=False)
    with load_runner(bundle) as runner:
        share, floats = int8_share(bundle.manifest, runner.execution())
    assert share == 0
    with pytest.raises(ToleranceError, match=r"0\.0 % of the MACs run in INT8"):
        check_promise(Inspection(bundle.manifest, True, {}, {}, share, floats))


def backend(float_file: FloatFile, pictures: CalibrationSet, quantizer: str) -> LiteRtBackend:
    manifest = {"variant": "tiny-mix", "precision": "int8", "weights": "random"}
    request = Request("int8", CONTRACT, (), None, manifest)
    return LiteRtBackend(float_file, request, pictures, quantizer, "minmax", lambda _: None)


def test_layers_in_float_have_float_weights(
    made: Callable[..., Bundle], float_file: FloatFile, pictures: CalibrationSet, tmp_path: Path
) -> None:
    kept = "stage1.block1.local.pw1"
    backend(float_file, pictures, "dynamic").write([kept], tmp_path)
    found = stored(dataclasses.replace(made("int8"), path=tmp_path))
    assert {n for n, (d, _, _) in found.items() if d == "FLOAT32" and not re.search(r"dw$|resize|stem", n)} == {kept}


def test_ranges_are_those_of_the_torch_program(float_file: FloatFile, pictures: CalibrationSet) -> None:
    import torch

    found = collect_ranges(float_file.path, float_file.model, pictures.inputs, "minmax", lambda _: None)
    source = float_file.source
    names = {node: name for node, name in source.names.items() if name in found}
    recorder = Recorder(source.program.module(), names)
    with torch.no_grad():
        runs = [recorder.record(torch.from_numpy(image[None])) for image in pictures.inputs]
    compared = 0
    for name in names.values():
        low, high = min(float(run[name].min()) for run in runs), max(float(run[name].max()) for run in runs)
        assert found[name] == pytest.approx((low, high), rel=1e-3, abs=1e-4), name
        compared += 1
    assert compared > 30
    narrow = collect_ranges(float_file.path, float_file.model, pictures.inputs, "percentile", lambda _: None)
    assert all(narrow[n][0] >= found[n][0] and narrow[n][1] <= found[n][1] for n in found)
    assert narrow != found


@pytest.mark.parametrize("quantizer", ["dynamic", "static"])
def test_noise_is_predicted(
    made: Callable[..., Bundle], float_file: FloatFile, pictures: CalibrationSet, quantizer: str, tmp_path: Path
) -> None:
    """By one pass over the torch program, within 4 dB of what the written file loses."""
    quantized = backend(float_file, pictures, quantizer)
    predicted = -10 * np.log10(quantized.sensitivity().noise())
    quantized.write([], tmp_path)
    with load_runner(made("fp32")) as one, load_runner(dataclasses.replace(made("fp32"), path=tmp_path)) as other:
        runs = [[r.run({"image": image[None]})["logits"] for image in pictures.inputs] for r in (one, other)]
    want, got = (np.concatenate(run) for run in runs)
    assert predicted == pytest.approx(compare(want, got).sqnr_db, abs=4)


@pytest.mark.parametrize(
    ("precision", "options", "words"),
    [("int8-weights", {"quantizer": "static"}, "leave --quantizer static out"),
     ("int8", {"method": "entropy"}, "the quantizer dynamic measures no ranges"),
     ("int4-weights", {"method": "entropy"}, "int4-weights measures no ranges"),
     ("int8", {"quantizer": "qdq"}, "valid quantizers: dynamic, static")],
)  # fmt: skip
def test_what_no_quantizer_does(precision: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        export(
            "tiny-mix", "litert", precision, output=tmp_path / "b", image_size=64, num_classes=10,
            int8=dataclasses.replace(INT8, **options),
        )  # fmt: skip
    assert not (tmp_path / "b").exists()
