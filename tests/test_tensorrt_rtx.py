"""TensorRT for RTX: engines that the real builder compiles here, and what is said of them. Nothing is executed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dualtoken_deploy import Bundle, load_runner, predict, validate
from dualtoken_deploy.bundle.store import DOCUMENTS, write_bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.pipeline.build import build_bundle, why_no_build
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.nvidia.binding import RTX, load_library
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.targets.tensorrt_rtx.compile import (
    CompileOptions,
    check_options,
    compile_engine,
    compute_capabilities,
)
from dualtoken_deploy.targets.tensorrt_rtx.validity import diagnose
from dualtoken_deploy.use.inspect import inspect_bundle
from tests.fake_nvidia import Device, plugged_in
from tests.numerics import assert_close
from tests.small import SMALL
from tests.tensorrt_api import RTX as API
from tests.tensorrt_api import load_api

pytest.importorskip(RTX.module, reason="the extra [tensorrt-rtx] has wheels for x86-64 alone")
MakeBundle = Callable[..., Path]

no_gpu = why_no_build("tensorrt-rtx")
without_gpu = pytest.mark.skipif(no_gpu is None, reason="a GPU is here, and runs the engine")
INT8 = Int8Options("random", size=10, metric="sqnr", max_drop=15)
SEARCHED = {"int8": INT8}
OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("fp32", "fp16", "bf16")},
    **dict.fromkeys(("int8", "fp8", "int4"), SEARCHED),
}
# Measured 128, 64.8, 45.7, 29.5, 28.6 and 19.4 dB on the small model.
SQNR_DB = {"fp32": 110.0, "fp16": 48.0, "bf16": 35.0, "int8": 15.0, "fp8": 15.0, "int4": 10.0}
INPUT = TensorSpec("x", "float32", "NC", (4, 64))


def details(folder: Path) -> Any:
    build = Bundle.open(folder).manifest.build
    assert build is not None
    return build.details


def quiet(_: str) -> None:
    return None


# --- what export leaves ---


@without_gpu
@pytest.mark.parametrize("precision", OPTIONS)
def test_an_engine_is_compiled_and_not_called_complete(small_bundle: MakeBundle, precision: str) -> None:
    bundle = Bundle.open(small_bundle("tensorrt-rtx", precision, **OPTIONS[precision]))
    manifest, build = bundle.manifest, details(bundle.path)
    assert (manifest.state, manifest.executed_precision) == ("compiled", {})
    assert manifest.measured.checked_by == "onnxruntime"
    assert manifest.measured.photographs is not None
    assert manifest.measured.photographs.sqnr_db >= SQNR_DB[precision]
    assert manifest.files.keys() == {"model.engine", "model.onnx", "golden.npz", "labels.txt", *DOCUMENTS}
    assert bundle.size_bytes == (bundle.path / "model.engine").stat().st_size  # what an app ships
    nodes = onnx.load(bundle.path / "model.onnx").graph.node
    assert build["nodes"] == build["nodes_taken"] == len(nodes)
    assert build["layers"] > len(nodes)
    assert build["compute_capabilities"] == []
    assert build["versions"]["tensorrt-rtx-cu13-libs"] == load_library(RTX).__version__
    # the vendor's own look at the file: all that keeps it from loading is that there is no driver
    names, verdict = diagnose(load_library(RTX), (bundle.path / "model.engine").read_bytes())
    assert verdict == "invalid"
    assert "CUDA driver" in " ".join(names)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_the_onnx_carries_the_types(small_bundle: MakeBundle, precision: str) -> None:
    model = onnx.load(small_bundle("tensorrt-rtx", precision) / "model.onnx")
    word = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    weights = [t for t in model.graph.initializer if len(t.dims) >= 2 and np.prod(t.dims) > 1000]
    assert {t.data_type for t in weights} == {word}
    assert [o.type.tensor_type.elem_type for o in model.graph.output] == [TensorProto.FLOAT]


@pytest.mark.parametrize("precision", ["fp8", "int4"])
def test_narrow_weights_are_near_their_floats_and_convolutions_are_left(
    small_bundle: MakeBundle, precision: str
) -> None:
    """Every narrow weight of the saved file, dequantized in numpy, against the float16 of the fp16 bundle."""
    model = onnx.load(small_bundle("tensorrt-rtx", precision, **OPTIONS[precision]) / "model.onnx")
    plain = onnx.load(small_bundle("tensorrt-rtx", "fp16") / "model.onnx")
    floats = {t.name: numpy_helper.to_array(t).astype(np.float32) for t in plain.graph.initializer}
    tensors = {t.name: t for t in model.graph.initializer}
    kind = {"fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}[precision]
    seen = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            assert tensors[node.input[1]].data_type == TensorProto.FLOAT16
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        narrow, scale = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input[:2])
        assert tensors[node.input[0]].data_type == kind
        axis = next(a.i for a in node.attribute if a.name == "axis")
        wide = np.expand_dims(scale, 1 - axis) if precision == "fp8" else np.repeat(scale, 32, axis)
        # three bits behind the point of E4M3: 2**-4 of a value at most; INT4 has steps of a seventh of its block
        expected = floats[node.input[0].rpartition("/")[0]]
        assert_close(narrow * wide, expected, sqnr_db=25 if precision == "fp8" else 15)
        seen += 1
    assert seen >= {"fp8": 20, "int4": 12}[precision]  # of int4 those whose rows are whole blocks of 32


def test_bfloat16_is_rounded_behind_every_operator() -> None:
    """What stands in for kernels that ONNX Runtime lacks, against numpy's own bfloat16, product by product."""
    import onnxruntime

    from dualtoken_deploy.targets.onnx.bfloat16 import rounded_to_bfloat16, to_bfloat16

    random = np.random.default_rng(0)
    first, second = (random.standard_normal((64, 64)).astype(np.float32) for _ in range(2))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "a"], ["m"]), helper.make_node("MatMul", ["m", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 64])],
        [numpy_helper.from_array(first, "a"), numpy_helper.from_array(second, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    x = random.standard_normal((4, 64)).astype(np.float32)
    rounded = rounded_to_bfloat16(to_bfloat16(model))
    found = onnxruntime.InferenceSession(rounded.SerializeToString()).run(None, {"x": x})[0]

    def narrow(value: Any) -> Any:
        return value.astype(ml_dtypes.bfloat16).astype(np.float32)

    expected = narrow(narrow(narrow(x) @ narrow(first)) @ narrow(second))
    assert_close(found, expected, sqnr_db=60)
    assert (found != (x @ first) @ second).mean() > 0.9  # it is not float32 that ran


def test_a_dynamic_batch_is_compiled_for_its_profile(small_bundle: MakeBundle) -> None:
    folder = small_bundle("tensorrt-rtx", "fp16", batch="dynamic", batches="1,2,4")
    assert details(folder)["batches"] == [1, 2, 4]
    assert diagnose(load_library(RTX), (folder / "model.engine").read_bytes())[1] == "invalid"


@without_gpu
def test_the_command_line_says_compiled_and_exits_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "export",
        "--variant",
        SMALL["variant"],
        "--target",
        "rtx",
        "--precision",
        "fp16",
        "--image-size",
        "64",
    ]
    more = ["--classes", "10", "--compute-capability", "8.9", "--compute-capability", "12.0"]
    main([*map(str, arguments), *more, "--output", str(tmp_path / "b"), "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["state"], result["executed_precision"]) == ("compiled", "compiled, not executed")
    assert f"note: {tmp_path / 'b'} is compiled, not executed" in printed.err
    assert "TensorRT for RTX: " in printed.err  # the builder's own progress
    assert details(tmp_path / "b")["compute_capabilities"] == ["8.9", "12.0"]


@without_gpu
@pytest.mark.parametrize("command", ["inspect", "predict", "validate", "build"])
def test_without_a_driver_the_reason_is_said_in_one_line(
    command: str, small_bundle: MakeBundle, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(photograph)] if command == "predict" else []
    with pytest.raises(SystemExit) as caught:
        main([command, str(small_bundle("tensorrt-rtx", "fp16")), *arguments])
    assert caught.value.code == 3
    (line,) = [part for part in capsys.readouterr().err.splitlines() if part.startswith("error: ")]
    assert "no NVIDIA GPU can be used here" in line if command == "build" else "will not load here" in line


@without_gpu
def test_without_names_compiled_bundles_are_left_out_and_named(
    small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "later").symlink_to(small_bundle("tensorrt-rtx", "fp16"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["validate"])
    assert "note: bundles/later is compiled, not executed, and left out" in capsys.readouterr().err


# --- bad input ---


def one_product(precision: str) -> bytes:
    """The smallest network that is of a precision: x @ W, typed as our exports are."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    narrow = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}.get(precision, TensorProto.FLOAT16)
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=narrow)]
    if precision == "fp32":
        nodes = [helper.make_node("Identity", ["x"], ["a"])]
        tensors = [numpy_helper.from_array(weight, "w")]
    elif precision in ("fp16", "bf16"):
        kind = np.float16 if precision == "fp16" else ml_dtypes.bfloat16
        tensors = [numpy_helper.from_array(weight.astype(kind), "w")]
    elif precision == "int4":
        rows = helper.make_tensor("q", TensorProto.INT4, [64, 64], np.clip(2 * weight, -7, 7).astype(int).ravel())
        tensors = [rows, numpy_helper.from_array(np.full((2, 64), 0.5, np.float16), "s")]
        nodes += [helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=0, block_size=32)]
    else:
        kind = np.int8 if precision == "int8" else ml_dtypes.float8_e4m3fn
        tensors = [
            numpy_helper.from_array((20 * weight).astype(kind), "q"),
            numpy_helper.from_array(np.full(64, 0.05, np.float16), "s"),
            numpy_helper.from_array(np.zeros(64, kind), "z"),
            numpy_helper.from_array(np.array(0.05, np.float16), "as"),
            numpy_helper.from_array(np.array(0, kind), "az"),
        ]
        nodes += [
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
            helper.make_node("QuantizeLinear", ["a", "as", "az"], ["aq"]),
            helper.make_node("DequantizeLinear", ["aq", "as", "az"], ["ad"]),
        ]
    last = "ad" if precision in ("int8", "fp8") else "a"
    nodes += [helper.make_node("MatMul", [last, "w"], ["m"]), helper.make_node("Cast", ["m"], ["y"], to=1)]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 64]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    opset = helper.make_opsetid("", 21 if precision == "int4" else 20)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()


@pytest.mark.parametrize("precision", TARGETS["tensorrt-rtx"].precisions)
def test_the_builder_takes_a_precision_from_the_capability_on_that_we_say(precision: str) -> None:
    """Our table against the library: every precision for every capability that it has."""
    taken = dict.fromkeys(compute_capabilities(load_library(RTX)), True)
    for capability in taken:
        options = CompileOptions((capability,))
        try:
            compile_engine(one_product(precision), (INPUT,), options, quiet)
        except ConversionError:
            taken[capability] = False
            with pytest.raises(MissingError, match=f"compute capability {capability} have no {precision}"):
                check_options(options, precision)
    needed = TARGETS["tensorrt-rtx"].precision(precision).oldest
    assert needed is not None
    oldest = ".".join(map(str, needed))
    capabilities = list(taken)
    assert len(capabilities) >= 6
    assert taken == {c: capabilities.index(c) >= capabilities.index(oldest) for c in capabilities}


def refused(case: str) -> bytes:
    """Small networks that the library takes no part of."""
    half = numpy_helper.from_array(np.array(0.03, np.float16), "s")
    weight = numpy_helper.from_array(np.ones((64, 64), np.float16), "w")
    nodes = [helper.make_node("Cast", ["x"], ["a"], to=TensorProto.FLOAT16)]
    pair = [
        helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    tensors = [half, weight]
    if case == "convolution in int4":
        shape = (64, 64, 3, 3)
        tensors = [
            helper.make_tensor("q", TensorProto.INT4, shape, np.ones(shape, int).ravel()),
            numpy_helper.from_array(np.ones((64, 2, 3, 3), np.float16), "s"),
        ]
        nodes += [
            helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1, block_size=32),
            helper.make_node("Conv", ["a", "w"], ["y"]),
        ]
    else:
        kind, zero = {"zero point": (np.int8, 3), "uint8": (np.uint8, 128), "int16": (np.int16, 0)}[case]
        tensors.append(numpy_helper.from_array(np.array(zero, kind), "z"))
        nodes += pair
    rank = [1, 64, 16, 16] if case.startswith("conv") else [4, 64]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, rank)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)
    graph = helper.make_graph(nodes, "g", [value], [out], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("convolution in int4", "blocking dimension must be the last or second to last"),
        ("zero point", "Non-zero zero point is not supported"),
        ("uint8", "Non-zero zero point is not supported"),
        ("int16", "Failed to import initializer"),
    ],
)
def test_what_the_docs_say_that_the_library_refuses(case: str, words: str) -> None:
    with pytest.raises(ConversionError, match=words) as caught:
        compile_engine(refused(case), (INPUT,), CompileOptions(), quiet)
    assert "\n" not in str(caught.value)
    assert words in (Path(__file__).parent.parent / "docs" / "tensorrt.md").read_text()


BAD = [
    (["--compute-capability", "9.9"], 3, "compiles for no compute capability 9.9; it has 7.5, 8.0, 8.6"),
    (["--compute-capability", "9.0"], 3, "data-centre GPUs: --target tensorrt"),
    (["--compute-capability", "ampere"], 2, "'ampere' is not MAJOR.MINOR"),
    (["--precision", "int4", "--compute-capability", "8.6"], 2, "needs a calibration set"),
    (
        ["--precision", "fp8", "--compute-capability", "8.6", "--calibration", "photographs"],
        3,
        "have no fp8 in TensorRT for RTX; it needs 8.9",
    ),
    (["--precision", "bf16", "--compute-capability", "7.5"], 3, "have no bf16 in TensorRT for RTX; it needs 8.0"),
    (["--batch", "dynamic", "--batches", "4,2,8"], 2, "MIN <= BEST <= MAX"),
    (["--weightless", "--compute-capability", "8.6,8.9"], 2, "one compute capability at most"),
    (["--opset", "23"], 2, "opset 23 is not offered for tensorrt-rtx"),
    pytest.param(["--weightless"], 3, "beside a GPU alone", marks=without_gpu),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_what_cannot_be_compiled_is_said_before_anything_is_made(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "--variant", "t-mix", "--target", "tensorrt-rtx", "--output", str(tmp_path / "b"), *arguments])
    assert caught.value.code == code
    (line,) = [part for part in capsys.readouterr().err.splitlines() if part.startswith("error: ")]
    assert words in line
    assert list(tmp_path.iterdir()) == []


def test_settings_of_this_target_are_no_other_targets() -> None:
    from dualtoken_deploy import export

    with pytest.raises(UsageError, match="--compute-capability is for target tensorrt-rtx, not for onnxruntime"):
        export(target="onnxruntime", output="unused", compute_capability="8.9", **SMALL)  # type: ignore[arg-type]


def test_an_operator_that_the_parser_lacks_is_named(
    small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an export: exit 6, the operator by name, and nothing is left."""
    from dualtoken_deploy import export
    from dualtoken_deploy.targets.request import Artifact

    model = onnx.load(small_bundle("tensorrt-rtx", "fp16") / "model.onnx")
    next(n for n in model.graph.node if n.op_type == "Softmax").op_type = "Mystery"

    def write(row: Any, module: Any, request: Any, folder: Path, tell: Any) -> Artifact:
        onnx.save(model, folder / "model.onnx")
        return Artifact((), {})

    monkeypatch.setattr("dualtoken_deploy.pipeline.make.run_exporter", write)
    with pytest.raises(ConversionError, match=r"does not take the ONNX: .*Mystery") as caught:
        export(target="tensorrt-rtx", precision="fp16", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda plan: plan[:40], lambda plan: b"nothing of the kind" * 9, lambda plan: b""])
def test_a_file_that_is_no_engine(damage: Callable[[bytes], bytes], small_bundle: MakeBundle, tmp_path: Path) -> None:
    """With a manifest that says that the damaged file is right, so that it is the library that sees it."""
    from dualtoken_deploy.bundle.store import write_bundle

    shutil.copytree(small_bundle("tensorrt-rtx", "fp16"), tmp_path / "b")
    bundle = Bundle.open(tmp_path / "b")
    (tmp_path / "b" / "model.engine").write_bytes(damage((tmp_path / "b" / "model.engine").read_bytes()))
    with pytest.raises(BundleError, match="sha256 differs"):
        load_runner(tmp_path / "b")
    write_bundle(tmp_path / "b", bundle.manifest, bundle.golden, bundle.labels)
    with pytest.raises(BundleError, match="is no engine: its header is not that of an engine"):
        load_runner(tmp_path / "b")


def test_interrupting_the_builder_stops_it() -> None:
    """Ctrl-C in the progress display ends a real build, and not through the builder's frames."""

    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_engine(one_product("fp16"), (INPUT,), CompileOptions(), interrupt)


def test_only_what_is_compiled_or_prepared_is_built(small_bundle: MakeBundle) -> None:
    with pytest.raises(UsageError, match="only tensorrt and tensorrt-rtx bundles are built"):
        build_bundle(small_bundle("onnxruntime"))


# --- on a GPU that stands in: the engine is the real builder's, its execution is not ---


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Device]:
    load_api(API)  # read before anything stands in for the library
    monkeypatch.delenv("DUALTOKEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with plugged_in(API, monkeypatch) as plugged:
        yield plugged


@pytest.fixture
def engine(small_bundle: MakeBundle, tmp_path: Path) -> Path:
    """A copy of the compiled fp16 bundle that a test may build and damage."""
    shutil.copytree(small_bundle("tensorrt-rtx", "fp16"), tmp_path / "bundle")
    return tmp_path / "bundle"


def test_the_compiled_engine_is_run_and_its_bundle_complete(engine: Path, device: Device, photograph: Path) -> None:
    device.know(engine)
    before = (engine / "model.engine").read_bytes()
    result = build_bundle(engine)
    assert (result.gpu, result.tensorrt) == ("Fake GPU", load_library(RTX).__version__)
    assert result.sqnr_db >= SQNR_DB["fp16"]
    assert Bundle.open(engine).manifest.state == "complete"
    assert (engine / "model.engine").read_bytes() == before  # what was compiled is what runs
    (checked,) = validate([engine], data="photographs", limit=3)
    assert checked.sqnr_db >= SQNR_DB["fp16"]
    assert len(predict(engine, [photograph], top=3)[0].answers) == 3
    with load_runner(engine) as runner:
        launches = device.cuda.launches
        runner.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})
        assert device.cuda.launches == launches + 1  # one captured graph
    assert (device.cuda.memory, device.cuda.graphs, device.cuda.streams) == ({}, {}, set())


def test_what_may_not_be_captured_runs_without_a_graph(engine: Path, device: Device) -> None:
    device.know(engine)
    device.capturable = False
    build_bundle(engine)
    assert device.cuda.launches == 0


def test_compiled_kernels_are_kept_in_the_users_cache_and_given_back(
    engine: Path, device: Device, tmp_path: Path
) -> None:
    device.know(engine)
    build_bundle(engine)
    (kept,) = (tmp_path / "cache").rglob("*.kernels")
    assert kept.parent.name == "tensorrt-rtx"
    assert kept.read_bytes() == b"kernels"
    assert device.given == []
    first = kept.stat().st_ino
    with load_runner(engine):
        assert device.given == [b"kernels"]
    assert kept.stat().st_ino == first  # nothing new was compiled, nothing is written
    (tmp_path / "own").mkdir()
    with load_runner(engine, cache_dir=tmp_path / "own"):
        pass
    assert [p.read_bytes() for p in (tmp_path / "own").iterdir()] == [b"kernels"]
    assert not [p for p in engine.iterdir() if "kernels" in p.name]


@pytest.mark.parametrize("command", ["inspect", "predict"])
@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("OLD_CUDA_DRIVER", "the NVIDIA driver is too old"),
        ("UNSUPPORTED_CC", "it has no code for this GPU's compute capability"),
        ("VERSION_MISMATCH", "it was compiled by another version of TensorRT for RTX than the 1."),
        ("INSUFFICIENT_GPU_MEMORY", "the GPU has too little memory"),
        ("CUDA_ERROR", "CUDA does not work here"),
    ],
)
def test_why_an_engine_will_not_load_is_said_and_it_is_not_loaded(
    command: str, reason: str, words: str, engine: Path, device: Device, photograph: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    device.know(engine)
    device.validity = "INVALID", reason
    with pytest.raises(SystemExit) as caught:
        main([command, str(engine), *([str(photograph)] if command == "predict" else [])])
    assert caught.value.code == 3
    (line,) = [part for part in capsys.readouterr().err.splitlines() if part.startswith("error: ")]
    assert f"{engine / 'model.engine'} is compiled, and will not load here: {words}" in line
    assert device.loads == 0


def test_a_suboptimal_engine_loads_with_a_note(engine: Path, device: Device) -> None:
    device.know(engine)
    device.validity = "SUBOPTIMAL", None
    build_bundle(engine)
    assert "TensorRT for RTX calls the engine suboptimal here" in inspect_bundle(engine).notes


@without_gpu
def test_an_engine_of_another_version_is_named_without_a_driver(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Bundle.open(engine)
    assert bundle.manifest.build is not None
    build = replace(bundle.manifest.build, details={**bundle.manifest.build.details, "version": "1.2.3.4"})
    write_bundle(engine, replace(bundle.manifest, build=build), bundle.golden, bundle.labels)
    with pytest.raises(SystemExit) as caught:
        main(["inspect", str(engine)])
    assert caught.value.code == 3
    here = load_library(RTX).__version__
    assert f"TensorRT for RTX 1.2.3.4 compiled it, here is {here}: export it anew" in capsys.readouterr().err


def test_an_engine_that_is_cut_behind_its_header_is_refused(engine: Path, device: Device) -> None:
    """The hash of the file says so first; where a manifest was made to fit, the library does when it loads it."""
    device.know(engine)
    bundle = Bundle.open(engine)
    plan = (engine / "model.engine").read_bytes()
    (engine / "model.engine").write_bytes(plan[: len(plan) // 2])
    with pytest.raises(BundleError, match="sha256 differs"):
        load_runner(engine)
    write_bundle(engine, bundle.manifest, bundle.golden, bundle.labels)
    with pytest.raises(BundleError, match=r"TensorRT for RTX 1\..* refuses .*model\.engine: .*; rebuild it"):
        load_runner(engine)
    assert (device.cuda.memory, device.cuda.streams) == ({}, set())


def test_a_weightless_engine_takes_its_weights_from_the_onnx(engine: Path, device: Device) -> None:
    """Its builder needs a GPU, so the manifest says weightless of an engine that stands in for one."""
    bundle = Bundle.open(engine)
    assert bundle.manifest.build is not None
    build = replace(bundle.manifest.build, details={**bundle.manifest.build.details, "weightless": True})
    write_bundle(engine, replace(bundle.manifest, build=build), bundle.golden, bundle.labels)
    device.know(engine, weights=False)
    build_bundle(engine)
    (checked,) = validate([engine], reference="golden")
    assert checked.sqnr_db >= SQNR_DB["fp16"]


def test_an_engine_that_is_wrong_is_not_made_complete(engine: Path, device: Device) -> None:
    device.know(engine)
    model = onnx.load(engine / "model.onnx")
    weights = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    weights.raw_data = (1.3 * np.frombuffer(weights.raw_data, np.float16)).astype(np.float16).tobytes()
    device.computes = model.SerializeToString()
    with pytest.raises(ToleranceError, match="the fp16 engine is out of tolerance on golden"):
        build_bundle(engine)
    assert Bundle.open(engine).manifest.state == "compiled"
    assert [p.name for p in engine.parent.iterdir() if p.name.startswith(".")] == []
