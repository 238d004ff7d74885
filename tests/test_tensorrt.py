"""TensorRT: what any machine can prove (the typed ONNX), and all that surrounds an engine on a fake device."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from dualtoken_deploy import Bundle, load_runner, predict, validate
from dualtoken_deploy.bundle.store import CARD, DOCUMENTS, write_bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.pipeline.build import BuildOptions, build_bundle, why_no_build
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.eager import load as load_eager
from dualtoken_deploy.targets.load import Runner, RunnerOptions
from dualtoken_deploy.targets.nvidia.binding import RTX as RTX_LIBRARY
from dualtoken_deploy.targets.nvidia.binding import load_library, make_logger
from dualtoken_deploy.targets.nvidia.engine import EngineBuild, Host, doubts, obstacles
from dualtoken_deploy.targets.nvidia.inspector import read_layers
from dualtoken_deploy.targets.nvidia.network import parse_batches, read_network
from dualtoken_deploy.targets.onnx.export import export_onnx
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, QdqQuantizer
from dualtoken_deploy.targets.request import Artifact, Request
from dualtoken_deploy.targets.table import TARGETS, Target
from dualtoken_deploy.targets.tensorrt.export import OPSET, RULES, type_onnx
from dualtoken_deploy.targets.tensorrt_rtx.compile import _ORIGIN
from dualtoken_deploy.targets.tensorrt_rtx.validity import malformed
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.contracts import make_contract
from tests.fake_nvidia import STAND_INS, Device, plugged_in
from tests.numerics import assert_close
from tests.small import SMALL
from tests.tensorrt_api import RTX, VERSIONS, load_api

MakeBundle = Callable[..., Path]

no_device = why_no_build()
on_the_device = pytest.mark.skipif(no_device is not None, reason=f"no engine can be built here: {no_device}")
without_tensorrt = pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed here")
DATA = Path(__file__).parent / "data"

# Measured 126 dB (fp32) and 64 dB (fp16) on the small model; the gates of the target are 100 and 45.
SQNR_DB = {"fp32": 110.0, "fp16": 48.0}

INT8 = Int8Options("random", size=10, metric="sqnr", max_drop=15)
GRAPHS: list[dict[str, Any]] = [
    {},
    {"precision": "int8", "int8": INT8},
    {"precision": "fp16"},
    {"precision": "fp16", "batch": "dynamic"},
    {
        "precision": "fp16",
        "batch": 2,
        "image_size": "70x101",
        "input_kind": "tensor",
        "global_tokens": 0,
        "local_attention": "window",
        "downsampling": "onestep",
    },
    *({"variant": v, "precision": p} for v in ("tiny-lightvit", "tiny-dualformer") for p in ("fp32", "fp16", "int8")),
]
COMPARISONS = ("GreaterOrEqual", "Less")  # DualFormer's sides of hyperplanes and its empty groups


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def types_of(model: onnx.ModelProto) -> dict[str, str]:
    """numpy's names of the types of all tensors."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    found |= {t.name: t.data_type for t in graph.initializer}
    return {name: str(onnx.helper.tensor_dtype_to_np_dtype(kind)) for name, kind in found.items()}


@pytest.fixture(scope="module", autouse=True)
def prepared_only() -> Iterator[None]:
    """Exports stop at "prepared", on a machine with TensorRT and beside the fake device too; the tests build."""
    with pytest.MonkeyPatch.context() as patch:
        reason = no_device or "the tests build by themselves"
        patch.setattr("dualtoken_deploy.pipeline.make.why_no_build", lambda _: reason)
        yield


@pytest.fixture(scope="module")
def typed_graph(small_bundle: MakeBundle) -> Callable[[dict[str, Any]], onnx.ModelProto]:
    """The typed ONNX of a row of GRAPHS: of a bundle, or made as one is for the other families of models."""
    sources: dict[str, onnx.ModelProto] = {}
    contract = make_contract("image", (64, 64), 1)

    def make(options: dict[str, Any]) -> onnx.ModelProto:
        if "variant" not in options:
            return graph_of(small_bundle("tensorrt", **options))
        variant, precision = options["variant"], options["precision"]
        if variant not in sources:
            request = Request("fp32", contract, (TensorSpec("logits", "float32", "NC", (1, 10)),), None, {})
            model = random_model(variant, 0, image_size=(64, 64), num_classes=10)
            sources[variant] = export_onnx(model, request, RULES, OPSET, lambda _: None).model
        source = sources[variant]
        if precision == "int8":
            noise = np.random.default_rng(6).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
            source = QdqQuantizer(source, CalibrationSet.of_arrays("noise", noise, contract), NEUTRAL).quantize()
        return type_onnx(source, TARGETS["tensorrt"].precision(precision).beside)

    return make


# --- prepare ---


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_prepared_file_computes_what_eager_computes(small_bundle: MakeBundle, precision: str) -> None:
    """On the saved file, in ONNX Runtime, over pictures that the export did not see."""
    folder = small_bundle("tensorrt", precision)
    bundle = Bundle.open(folder)
    assert (bundle.manifest.state, bundle.manifest.build) == ("prepared", None)
    assert bundle.manifest.measured.checked_by == "onnxruntime"
    images = np.random.default_rng(5).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    with load_eager(bundle, RunnerOptions()) as eager:
        for image in images:
            logits = session.run(None, {"image": image[None]})[0]
            assert_close(logits, eager.run({"image": image[None]})["logits"], sqnr_db=SQNR_DB[precision])


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_the_parser_takes_every_operator_type_and_attribute(
    typed_graph: Callable[[dict[str, Any]], onnx.ModelProto], options: dict[str, Any]
) -> None:
    """Each node against its row of onnx-tensorrt's list: the operator, the type it computes in, the restriction."""
    listed = json.loads((DATA / "onnx_tensorrt_operators.json").read_text())
    model = typed_graph(options)
    dtypes, constants = types_of(model), {t.name for t in model.graph.initializer}
    zeros = {t.name for t in model.graph.initializer if not onnx.numpy_helper.to_array(t).any()}
    assert [(o.domain, o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")] == [("", 20)]
    for node in model.graph.node:
        assert node.domain == "", node.name
        assert node.op_type in listed["operators"], f"{node.op_type} is not in the list of {listed['source']}"
        allowed = {listed["types"].get(t) for t in listed["operators"][node.op_type].split()}
        assert dtypes[node.input[0]] in allowed, node.name
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert set(attributes.get("dilations", [1])) == {1} or node.op_type == "Conv"
        assert len(node.output) == 1 or node.op_type == "Split", node.name
        if node.op_type in ("ReduceMean", "ReduceSum"):
            assert node.input[1] in constants
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert {node.input[1]} <= constants
            assert set(node.input[2:]) <= zeros, node.name
        if node.op_type == "Gelu":
            assert attributes.get("approximate", b"none") == b"none"


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_the_real_parser_makes_layers_of_every_node(
    options: dict[str, Any], typed_graph: Callable[[dict[str, Any]], onnx.ModelProto]
) -> None:
    """That of TensorRT for RTX, whose code is TensorRT's: nothing is built."""
    trt = load_library(RTX_LIBRARY)
    logger, model = make_logger(trt), typed_graph(options)
    network = read_network(trt, RTX_LIBRARY, trt.Builder(logger), model.SerializeToString(), logger)
    made = {name for i in range(network.num_layers) for name in _ORIGIN.findall(network.get_layer(i).metadata or "")}
    assert [node.name for node in model.graph.node if node.name not in made] == []
    assert network.num_layers >= len(model.graph.node)


def test_the_documented_table_has_every_operator(typed_graph: Callable[[dict[str, Any]], onnx.ModelProto]) -> None:
    text = (DATA.parent.parent / "docs" / "tensorrt.md").read_text()
    table = text[text.index("| operator | types in our graphs") :].split("\n\n")[0]
    documented = {name.strip() for row in table.splitlines()[2:] for name in row.split("|")[1].split(",")}
    listed = json.loads((DATA / "onnx_tensorrt_operators.json").read_text())["operators"]
    used = {n.op_type for options in GRAPHS for n in typed_graph(options).graph.node}
    assert used <= documented <= set(listed)


@pytest.mark.parametrize("options", GRAPHS, ids=str)
def test_no_integer_is_computed(
    typed_graph: Callable[[dict[str, Any]], onnx.ModelProto], options: dict[str, Any]
) -> None:
    """int64 is left in the constants that say shapes and axes; uint8 in the picture and its cast; int8 in pairs."""
    model = typed_graph(options)
    dtypes, constants = types_of(model), {t.name for t in model.graph.initializer}
    for node in model.graph.node:
        for name in filter(None, node.input):
            if dtypes[name] == "int64":
                assert name in constants, f"{node.name} reads a computed int64"
            elif dtypes[name] == "uint8":
                assert (node.op_type, name) == ("Cast", "image")
            elif dtypes[name] == "int8":
                assert node.op_type in ("QuantizeLinear", "DequantizeLinear"), node.name
            elif dtypes[name] == "bool":
                assert node.op_type == "Cast", node.name
        made = {"QuantizeLinear": "int8", **dict.fromkeys(COMPARISONS, "bool")}.get(node.op_type, "float")
        assert all(dtypes[o].startswith(made) for o in node.output), node.name


def test_float16_but_for_softmax_normalisation_and_the_border(small_bundle: MakeBundle) -> None:
    model = graph_of(small_bundle("tensorrt", "fp16"))
    dtypes = types_of(model)
    assert [dtypes[t.name] for t in (*model.graph.input, *model.graph.output)] == ["uint8", "float32"]
    counts = Counter(n.op_type for n in model.graph.node)
    blocks = 2
    # Attention's two products and softmax, twice a block; stem, Conv Encoder, three a block, merges, head.
    assert counts["Softmax"] == 2 * blocks
    assert counts["LayerNormalization"] == 1 + 1 + 3 * blocks + 2 + 2 + 2
    assert counts["Attention"] == 0
    for node in model.graph.node:
        if node.op_type in ("Softmax", "LayerNormalization"):
            assert {dtypes[n] for n in (*node.input, *node.output)} == {"float32"}, node.name
        elif node.op_type in ("MatMul", "Gemm", "Conv", "Gelu"):
            assert {dtypes[n] for n in (*node.input, *node.output)} == {"float16"}, node.name


def test_products_are_named_for_the_inspector(small_bundle: MakeBundle) -> None:
    names = [n.name for n in graph_of(small_bundle("tensorrt", "fp16")).graph.node]
    assert len(set(names)) == len(names)
    for node in graph_of(small_bundle("tensorrt", "fp16")).graph.node:
        if node.op_type in ("MatMul", "Conv", "Gemm"):
            assert node.name in (node.output[0], f"{node.output[0]}@{node.op_type}")
            assert node.name.endswith((f"/{node.op_type}", f"@{node.op_type}"))
    assert {"stem.proj@Conv", "stage1.block1.ffn.fc1/MatMul", "stage1.block1.token.aggregate/attention/MatMul"} <= {
        *names
    }


def test_an_opset_that_10_3_does_not_parse_is_refused() -> None:
    from dualtoken_deploy import export

    with pytest.raises(UsageError, match="opset 23 is not offered for tensorrt"):
        export(target="tensorrt", opset=23, output="unused", **SMALL)  # type: ignore[arg-type]


def test_a_quantized_source_keeps_its_pairs(small_bundle: MakeBundle, tmp_path: Path) -> None:
    """The way in for INT8: a Q/DQ ONNX (S8/S8 symmetric, made here by ONNX Runtime) becomes int8 around float16."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.left = iter(np.random.default_rng(1).integers(0, 256, (4, 1, 64, 64, 3), dtype=np.uint8))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.left, None)
            return None if image is None else {"image": image}

    quantize_static(
        str(small_bundle("tensorrt") / "model.onnx"), str(tmp_path / "q.onnx"), Reader(), QuantFormat.QDQ,
        op_types_to_quantize=["MatMul"], per_channel=True, activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8, extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
    )  # fmt: skip
    source = onnx.load(tmp_path / "q.onnx")
    typed = type_onnx(source, "float16")
    before, after = (Counter(n.op_type for n in m.graph.node) for m in (source, typed))
    assert after["QuantizeLinear"] == before["QuantizeLinear"] > 30
    assert after["DequantizeLinear"] == before["DequantizeLinear"] > 60
    dtypes = types_of(typed)
    for node in typed.graph.node:
        if node.op_type == "DequantizeLinear":
            assert (dtypes[node.input[0]], dtypes[node.output[0]]) in (("int8", "float16"), ("int8", "float32"))
        elif node.op_type == "MatMul":
            assert {dtypes[n] for n in (*node.input, *node.output)} == {"float16"}, node.name
    feed = {"image": np.random.default_rng(2).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)}
    run = [onnxruntime.InferenceSession(m.SerializeToString()).run(None, feed)[0] for m in (source, typed)]
    # float16 rounds what the quantizer sees, and a value on the edge of a step falls to the other side: 20 dB and more
    assert_close(run[1], run[0], sqnr_db=20)


@without_tensorrt
def test_export_without_a_device_says_what_is_left_to_do(
    small_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = small_bundle("tensorrt", "fp16")

    def copy(row: Target, model: Any, request: Request, folder: Path, tell: Any) -> Artifact:
        shutil.copy(made / "model.onnx", folder)  # spares the tracing; checking it and what follows are the real ones
        return Artifact((), {})

    monkeypatch.setattr("dualtoken_deploy.pipeline.make.run_exporter", copy)
    folder = tmp_path / "b"
    arguments = ["export", "--variant", SMALL["variant"], "--target", "tensorrt", "--precision", "fp16"]
    more = ["--image-size", "64", "--classes", "10", "--output", str(folder), "--json"]
    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), *more])
    printed = capsys.readouterr()
    assert caught.value.code == 3
    (line,) = [part for part in printed.err.splitlines() if part.startswith("error: ")]
    assert "prepared and checked, not built: tensorrt is not installed" in line
    assert f"on the device run: dualtoken build {folder}" in line
    result = json.loads(printed.out)
    assert (result["state"], result["executed_precision"]) == ("prepared", "not run")
    assert Bundle.open(folder).manifest.state == "prepared"


@without_tensorrt
@pytest.mark.parametrize("command", [["build"], ["inspect"], ["validate"]])
def test_a_prepared_bundle_does_not_run(
    command: list[str], small_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, str(small_bundle("tensorrt"))])
    assert caught.value.code == 3
    assert ("tensorrt is not installed" if command == ["build"] else "prepared, not built") in capsys.readouterr().err


def test_without_names_prepared_bundles_are_left_out_and_named(
    small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "later").symlink_to(small_bundle("tensorrt", "fp16"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["validate"])
    assert caught.value.code == 2
    assert "note: bundles/later is prepared, not built, and left out" in capsys.readouterr().err


def test_int8_is_prepared_within_its_budget_and_built(
    small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantized, searched and measured on the CPU on the file that is built; the fake engine runs all of it in INT8."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(small_bundle("tensorrt", "int8", int8=INT8), tmp_path / "bundle")
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert manifest.calibration is not None
    planned = manifest.calibration.planned_int8_mac_share
    assert (manifest.calibration.drop or 0.0) <= 15
    assert planned is not None
    assert planned > 0.3
    model = graph_of(tmp_path / "bundle")
    dtypes = types_of(model)
    pairs = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    assert len(pairs) > 20
    assert {dtypes[n.input[0]] for n in pairs} == {"int8"}
    zeros = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8 and "zero_point" in t.name]
    assert not any(onnx.numpy_helper.to_array(t).any() for t in zeros)
    with plugged_in("11.4.0", monkeypatch) as device:
        layers = [
            {"LayerType": "gemm", "Name": "x", "Metadata": f"[ONNX Layer: {n.name}]",
             "Inputs": [{"Format/Datatype": "Int8" if "DequantizeLinear" in n.input[0] else "Half"}]}
            for n in model.graph.node if n.op_type in ("MatMul", "Conv", "Gemm")
        ]  # fmt: skip
        device.layers = json.dumps({"Layers": layers})
        build_bundle(tmp_path / "bundle")
        built = inspect_bundle(tmp_path / "bundle")
        # the fake takes a product with a quantized input for INT8, whatever its weight is
        assert built.int8_mac_share == pytest.approx(planned, abs=1e-3)
        check_promise(built)
        for layer in layers:
            layer["Inputs"] = [{"Format/Datatype": "Half"}]
        device.layers = json.dumps({"Layers": layers})
        with pytest.raises(ToleranceError, match=r"0\.0 % of the MACs run in INT8"):
            check_promise(inspect_bundle(tmp_path / "bundle"))
        with pytest.raises(ToleranceError, match=r"were quantized, the engine runs 0\.0 % in INT8"):
            build_bundle(tmp_path / "bundle", rebuild=True)


# --- build and run, on the device itself ---


@on_the_device
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_real_engine(small_bundle: MakeBundle, precision: str, tmp_path: Path) -> None:
    """Where TensorRT and a GPU are: an engine reaches golden and runs in what it promises."""
    shutil.copytree(small_bundle("tensorrt", precision), tmp_path / "bundle")
    build_bundle(tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.state == "complete"
    with load_runner(bundle) as runner:
        logits = runner.run({"image": bundle.golden["input"]})["logits"]
    assert_close(logits, bundle.golden["logits"], sqnr_db=bundle.manifest.tolerance.sqnr_db)
    check_promise(inspect_bundle(bundle))


# --- build and run, on the fake device ---


@pytest.fixture
def prepared(small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """prepared(precision, **options) -> a copy of a prepared bundle that a test may build."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(precision: str = "fp16", **options: object) -> Path:
        shutil.copytree(small_bundle("tensorrt", precision, **options), tmp_path / "bundle")
        return tmp_path / "bundle"

    return make


@pytest.fixture(params=VERSIONS)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with plugged_in(request.param, monkeypatch) as plugged:
        yield plugged


@pytest.fixture
def device_11(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with plugged_in("11.4.0", monkeypatch) as plugged:
        yield plugged


@pytest.mark.parametrize("version", [*VERSIONS, RTX])
def test_what_stands_in_for_a_gpu_has_the_vendors_calls(version: str) -> None:
    """Each method of a stand-in takes what the library's own takes; what is RTX's alone is in RTX alone."""
    api, seen = load_api(version), 0
    for owner, kind in STAND_INS.items():
        for name, method in vars(kind).items():
            if name.startswith("_") or not callable(method) or name in ("fill", "compute"):
                continue
            if name not in api.members(owner):
                assert version != RTX, f"{owner}.{name}"
                continue
            given = [p.name for p in inspect.signature(method).parameters.values() if p.default is p.empty][1:]
            assert any(list(s.parameters[: len(given)]) == given for s in api.signatures(owner, name)), name
            seen += 1
    assert seen >= (19 if version == RTX else 13)


def test_built_checked_run_and_asked(device: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    result = build_bundle(folder)
    assert (result.executed_precision, result.gpu, result.tensorrt) == ("float16", "Fake GPU", device.trt.__version__)
    assert result.sqnr_db >= SQNR_DB["fp16"]
    bundle = Bundle.open(folder)
    assert bundle.manifest.state == "complete"
    assert bundle.size_bytes == (folder / "model.engine").stat().st_size  # what an app ships
    made = {"model.onnx", "model.engine", "engine.json", "golden.npz", "labels.txt"}
    assert bundle.manifest.files.keys() == {*made, *DOCUMENTS}
    assert "Prepared, not built" in before[CARD].decode()
    assert "Prepared, not built" not in (folder / CARD).read_text(encoding="utf-8")
    assert not malformed(device.trt, (folder / "model.engine").read_bytes())  # raw: what the vendor's builder wrote
    assert (folder / "model.onnx").read_bytes() == before["model.onnx"]
    assert bundle.manifest.build is not None
    assert bundle.manifest.build.typed(EngineBuild).host.compute_capability == "8.7"
    (checked,) = validate([bundle])
    assert checked.sqnr_db >= SQNR_DB["fp16"]
    check_promise(inspect_bundle(bundle))
    assert len(predict(bundle, [open_dataset("photographs").images[0]], top=3)[0].answers) == 3
    assert device.cuda.memory == {}
    assert device.cuda.graphs == {}
    assert device.cuda.streams == set()


def test_fixed_shapes_run_as_one_graph(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared("fp32")
    build_bundle(folder)
    bundle = Bundle.open(folder)
    images = load_batch(open_dataset("photographs").images[:3], bundle.manifest.input)
    with load_runner(bundle) as runner, load_eager(bundle, RunnerOptions()) as eager:
        assert isinstance(runner, Runner)
        before = device_11.cuda.launches
        first = runner.run({"image": images[:1]})["logits"]
        kept = first.copy()
        for image in images:
            assert_close(
                runner.run({"image": image[None]})["logits"], eager.run({"image": image[None]})["logits"], sqnr_db=110
            )
        assert device_11.cuda.launches == before + 4
        assert (first == kept).all()  # the caller's own, no view of pinned memory
        with pytest.raises(UsageError, match="does not fit"):
            runner.run({"image": images})


def test_a_dynamic_batch_takes_its_profile(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared("fp16", batch="dynamic")
    build_bundle(folder, BuildOptions(batches=(1, 2, 4)))
    assert device_11.profiles == [("image", (1, 64, 64, 3), (2, 64, 64, 3), (4, 64, 64, 3))]
    images = np.random.default_rng(3).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    with load_runner(folder) as runner:
        alone = np.concatenate([runner.run({"image": images[i : i + 1]})["logits"] for i in range(4)])
        assert_close(runner.run({"image": images})["logits"], alone, sqnr_db=100)
        assert device_11.cuda.launches == 0  # shapes change: no graph
        with pytest.raises(UsageError, match="does not fit"):
            runner.run({"image": np.zeros((5, 64, 64, 3), np.uint8)})


def test_options_reach_the_builder(device_11: Device, prepared: Callable[..., Path]) -> None:
    options = BuildOptions(512, 5, True, "same-compute-capability")
    build_bundle(prepared(), options)
    asked = device_11.asked
    assert asked["builder_optimization_level"] == 5
    assert asked["flags"] == ["VERSION_COMPATIBLE"]
    assert asked["hardware"].name == "SAME_COMPUTE_CAPABILITY"
    assert asked["profiling_verbosity"].name == "DETAILED"


def test_the_builder_tells_its_steps_and_stops_when_interrupted(
    device_11: Device, prepared: Callable[..., Path]
) -> None:
    """The real builder, and not through its frames: Ctrl-C is seen at the next step."""
    folder, told = prepared(), list[str]()
    device_11.fresh = True

    def interrupt(text: str) -> None:
        told.append(text)
        if text.startswith("TensorRT: "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_bundle(folder, progress=interrupt)
    assert Bundle.open(folder).manifest.state == "prepared"
    assert len([text for text in told if text.startswith("TensorRT: ")]) >= 1
    assert device_11.cuda.memory == {}


def test_10_3_has_no_same_compute_capability(prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared()
    with plugged_in("10.3.0", monkeypatch):
        build_bundle(folder, BuildOptions(hardware_compatibility="ampere-plus"))
        with pytest.raises(MissingError, match=r"TensorRT 10\.3\.0 has no hardware compatibility"):
            build_bundle(folder, BuildOptions(hardware_compatibility="same-compute-capability"), rebuild=True)


def test_timings_are_kept_and_read_again(device_11: Device, prepared: Callable[..., Path], tmp_path: Path) -> None:
    folder = prepared()
    build_bundle(folder)
    (kept,) = (tmp_path / "cache").rglob("*.timing")
    assert kept.read_bytes() == b"timings"
    assert "11.4.0" in kept.name
    assert "Fake_GPU" in kept.name
    build_bundle(folder, rebuild=True)
    assert device_11.timings == [b"", b"timings"]


def unchanged(folder: Path, attempt: Callable[[], object], error: type[Exception], match: str) -> None:
    """`attempt` fails and leaves the bundle, and nothing beside it."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(error, match=match):
        attempt()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(".")]


def test_what_fails_leaves_the_bundle(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    device_11.plan = b"something else"
    unchanged(folder, lambda: build_bundle(folder), ConversionError, "cannot load the engine .* another version")
    device_11.plan = None
    layer = {"LayerType": "gemm", "Name": "x", "Metadata": "[ONNX Layer: a.fc1/MatMul]"}
    device_11.layers = json.dumps({"Layers": [{**layer, "Inputs": [{"Format/Datatype": "Row major linear FP32"}]}]})
    unchanged(folder, lambda: build_bundle(folder), ToleranceError, "100% of .* run in float32, fp16 allows 5%")
    device_11.layers = json.dumps({"Layers": [{"LayerType": "Reformat", "Name": "r"}]})
    unchanged(folder, lambda: build_bundle(folder), ToleranceError, "fp16 cannot be confirmed")
    device_11.layers = json.dumps({"Layers": ["a name alone"]})
    unchanged(folder, lambda: build_bundle(folder), BundleError, "without detailed profiling verbosity")

    model = graph_of(folder)
    next(n for n in model.graph.node if n.op_type == "Softmax").op_type = "Mystery"
    onnx.save(model, folder / "model.onnx")
    bundle = Bundle.open(folder, verify=False)
    write_bundle(folder, bundle.manifest, bundle.golden, bundle.labels)
    unchanged(folder, lambda: build_bundle(folder), ConversionError, "does not take the ONNX: .*Mystery")
    assert device_11.cuda.memory == {}


def test_a_wrong_engine_is_out_of_tolerance(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    model = graph_of(folder)
    weights = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    weights.raw_data = (1.3 * np.frombuffer(weights.raw_data, np.float16)).astype(np.float16).tobytes()
    device_11.computes = model.SerializeToString()
    unchanged(folder, lambda: build_bundle(folder), ToleranceError, "the fp16 engine is out of tolerance on golden")


def test_built_already_and_other_targets(
    device_11: Device, prepared: Callable[..., Path], small_bundle: MakeBundle
) -> None:
    folder = prepared()
    build_bundle(folder)
    unchanged(folder, lambda: build_bundle(folder), UsageError, "--rebuild")
    with pytest.raises(UsageError, match="only tensorrt and tensorrt-rtx bundles are built"):
        build_bundle(small_bundle("onnxruntime"))


def test_export_builds_where_the_device_is_here(
    device_11: Device, prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dualtoken_deploy.pipeline.check import ExportResult
    from dualtoken_deploy.pipeline.make import build_here

    monkeypatch.setattr("dualtoken_deploy.pipeline.make.why_no_build", why_no_build)
    folder = prepared()
    exported = ExportResult(str(folder), "classify", "tensorrt", "fp16", "not run", 60.0, 1.0, 1.0, 1.0, (), "prepared")
    result = build_here(exported, folder, lambda _: None)
    assert (result.state, result.next_step, result.executed_precision) == ("complete", None, "float16")
    assert (folder / "model.engine").exists()


def test_load_says_before_loading_why_not(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    build_bundle(folder)
    device_11.cuda.device.major, device_11.cuda.device.minor = 9, 0
    with pytest.raises(MissingError, match=r"compute capability 8\.7, Fake GPU has 9\.0.*--rebuild"):
        load_runner(folder)
    device_11.cuda.status = 35
    with pytest.raises(MissingError, match="no NVIDIA GPU can be used here"):
        load_runner(folder)


@pytest.mark.parametrize("name", ["cpu", "cuda:1", "tpu"])
def test_a_device_that_is_not_here(name: str, device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    build_bundle(folder)
    with pytest.raises(MissingError, match=name):
        load_runner(folder, device=name)


def test_inspect_fails_where_float32_layers_are_beyond_the_share(
    device_11: Device, prepared: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepared()
    build_bundle(folder)
    products = [
        {
            "LayerType": "gemm",
            "Name": "x",
            "Metadata": f"[ONNX Layer: l{i}/{kind}]",
            "Inputs": [{"Format/Datatype": word}],
        }
        for kind in ("MatMul", "Conv", "Gemm")
        for i, word in enumerate(["Half"] * 17 + ["Float"])
    ]
    device_11.layers = json.dumps({"Layers": products})  # 1 of 18 is 5.6 %, and each kind runs in float16 for the most
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(folder)])
    assert caught.value.code == 5
    assert "6% of the layers with matrix products run in float32, fp16 allows 5%" in capsys.readouterr().err


def test_another_gpu_of_the_same_kind_loads_with_a_note(device_11: Device, prepared: Callable[..., Path]) -> None:
    folder = prepared()
    build_bundle(folder)
    assert inspect_bundle(folder).notes == ()
    device_11.cuda.device.name = b"Other GPU"
    (note,) = inspect_bundle(folder).notes
    assert "tuned for Fake GPU, this is Other GPU" in note


@without_tensorrt
def test_the_lean_runtime_takes_version_compatible_engines_alone(
    device_11: Device, prepared: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = prepared()
    build_bundle(folder, BuildOptions(version_compatible=True))
    trt = device_11.trt
    with monkeypatch.context() as patch:  # a device that has tensorrt_lean and no tensorrt
        patch.delitem(sys.modules, "tensorrt")
        patch.setitem(sys.modules, "tensorrt_lean", trt)
        with load_runner(folder) as runner:
            golden = Bundle.open(folder).golden
            assert_close(runner.run({"image": golden["input"]})["logits"], golden["logits"], sqnr_db=SQNR_DB["fp16"])
    build_bundle(folder, BuildOptions(), rebuild=True)
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "tensorrt")
        patch.setitem(sys.modules, "tensorrt_lean", trt)
        with pytest.raises(MissingError, match="tensorrt is not installed"):
            load_runner(folder)


HERE = Host("11.4.0.106", "linux-x86_64", "H200", "9.0", 132, "13.0")


@pytest.mark.parametrize(
    ("changed", "version_compatible", "level", "reason"),
    [
        ({}, False, "none", None),
        ({"tensorrt": "11.3.0.99"}, False, "none", "for that one alone"),
        ({"tensorrt": "11.3.0.99"}, True, "none", None),
        ({"tensorrt": "11.5.0.1"}, True, "none", "so needs a later one"),
        ({"tensorrt": "10.3.0"}, True, "none", None),
        ({"tensorrt": "8.6.1"}, True, "none", "so needs a later one"),
        ({"tensorrt": "12.0.0"}, True, "none", "so needs a later one"),
        ({"system": "linux-aarch64"}, True, "ampere-plus", "built on linux-aarch64"),
        ({"compute_capability": "8.7"}, False, "none", "compute capability 8.7"),
        ({"compute_capability": "8.7"}, False, "ampere-plus", None),
        ({"compute_capability": "8.7"}, False, "same-compute-capability", "compute capability 8.7"),
        ({"gpu": "H100", "multiprocessors": 114}, False, "same-compute-capability", None),
    ],
)
def test_preflight(changed: dict[str, Any], version_compatible: bool, level: str, reason: str | None) -> None:
    """Rules of NVIDIA's support matrix: 11.4's, engine portability."""
    build = EngineBuild(replace(HERE, **changed), version_compatible, level)
    found = obstacles(build, HERE)
    assert (reason is None) == (found == [])
    assert reason is None or reason in found[0]


def test_preflight_on_an_old_gpu_and_its_doubts() -> None:
    old = replace(HERE, compute_capability="7.5", gpu="T4")
    build = EngineBuild(HERE, False, "ampere-plus")
    assert "8.0 or later" in obstacles(build, old)[0]
    assert doubts(build, replace(HERE, gpu="H100")) == []
    assert "tuned for H200" in doubts(replace(build, hardware_compatibility="none"), replace(HERE, gpu="H100"))[0]


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("Half", "float16"),
        ("Row major linear FP16 format", "float16"),
        ("Channel major FP16 format where channel % 8 == 0", "float16"),
        ("Row major linear FP32", "float32"),
        ("Float", "float32"),
        ("Thirty-two wide channel vectorized row major Int8 format", "int8"),
        ("BFloat16", "bfloat16"),
        ("Row major linear BF16", "bfloat16"),
        ("Int32", "none"),
    ],
)
def test_the_inspectors_words_for_types(word: str, dtype: str) -> None:
    layer = {"LayerType": "gemm", "Name": "x", "Inputs": [{"Format/Datatype": word}], "Outputs": []}
    assert read_layers(json.dumps({"Layers": [layer]})).precision == {"MatMul": (dtype,)}


def test_layers_with_products_are_told_by_origin_and_kind() -> None:
    def layer(kind: str, metadata: str, word: str, name: str = "l") -> dict[str, Any]:
        return {"LayerType": kind, "Name": name, "Metadata": metadata, "Inputs": [{"Format/Datatype": word}]}

    found = read_layers(json.dumps({"Layers": [
        layer("kgen", "[ONNX Layer: a.norm]\x1e[ONNX Layer: a.fc1/MatMul]", "Float"),
        layer("CaskConvolution", "", "Half"),
        layer("kgen", "[ONNX Layer: a/attention/Softmax]", "Float"),
        layer("Reformat", "", "Float", "Reformatting for stem/Conv"),
        layer("gemm", "[ONNX Layer: head.fc@Gemm]", "Half"),
    ]}))  # fmt: skip
    assert found.operators == {"MatMul": 1, "Conv": 1, "kgen": 1, "Reformat": 1, "Gemm": 1}
    assert found.float32_share == pytest.approx(1 / 3)
    assert found.nodes == {"a.fc1/MatMul": "float32", "head.fc": "float16"}


@pytest.mark.parametrize("text", ["1,2", "a,b,c", "", "1,2,3,4"])
def test_batches_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="MIN,BEST,MAX"):
        parse_batches(text)


def test_bad_build_options() -> None:
    with pytest.raises(UsageError, match="none, ampere-plus, same-compute-capability"):
        BuildOptions(hardware_compatibility="any")
    with pytest.raises(UsageError, match="MIN <= BEST"):
        BuildOptions(batches=(4, 2, 8))
