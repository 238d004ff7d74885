"""An ONNX file of anyone's as the model: every bundle of it against the file itself, run here by ONNX Runtime alone."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from dualtoken_deploy import export, numerics, predict
from dualtoken_deploy.bench.process import Series
from dualtoken_deploy.bench.run import Setting, contestant, enter
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import DualTokenError, InputError, UsageError
from dualtoken_deploy.models.onnx_count import count_graph
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import inspect_bundle
from dualtoken_deploy.use.validate import validate
from tests.commands import fails, prints
from tests.serving import serving

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
CLASSES = 20
ATTEMPTS = Int8Options("photographs", 100, metric="sqnr", max_drop=10.0, race=False)


def value(name: str, shape: Sequence[int | str] | None, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    shape: Sequence[int | str],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, Array],
    opset: int = 13,
    domains: Sequence[str] = (),
    **how: Any,
) -> Path:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "graph", [value("pixels", shape)], list(outputs), tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path, **how)
    return path


def net(path: Path, opset: int = 13, shape: Sequence[int | str] = ("n", 3, "h", "w"), **how: Any) -> Path:
    """A small classifier as TorchScript's exporter writes one: the bias in front of what it is added to, outputs
    called after nothing; one value has the name that a bundle's input has."""
    rng = np.random.default_rng(5)

    def random(*sides: int) -> Array:
        return np.asarray(rng.standard_normal(sides) / np.sqrt(np.prod(sides[1:])), np.float32)

    weights = {
        "stem.weight": random(16, 3, 3, 3), "stem.bias": random(16, 1)[:, 0], "depth.weight": random(16, 1, 3, 3),
        "wide.weight": random(32, 16, 3, 3), "head.weight": random(CLASSES, 32).T.copy(),
        "head.bias": random(CLASSES, 1)[:, 0],
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["pixels", "stem.weight", "stem.bias"], ["1"], "stem", strides=[2, 2], pads=[1] * 4),
        helper.make_node("Relu", ["1"], ["image"]),
        helper.make_node("Conv", ["image", "depth.weight"], ["2"], "depth", group=16, pads=[1] * 4),
        helper.make_node("Conv", ["2", "wide.weight"], ["3"], "wide", pads=[1] * 4),
        helper.make_node("Relu", ["3"], ["4"]),
        helper.make_node("GlobalAveragePool", ["4"], ["5"]),
        helper.make_node("Flatten", ["5"], ["6"]),
        helper.make_node("MatMul", ["6", "head.weight"], ["7"], "head"),
        helper.make_node("Add", ["head.bias", "7"], ["8"]),
    ]
    return save(path, nodes, shape, [value("8", [shape[0], CLASSES])], weights, opset, **how)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return net(tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.fixture(scope="module")
def made(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    folder, known = tmp_path_factory.mktemp("bundles"), {}

    def make(target: str, precision: str) -> Path:
        name = f"{target}-{precision}"
        if name not in known:
            int8 = ATTEMPTS if precision == "int8" else None
            known[name] = export(str(file), target, precision, image_size=48, output=folder / name, int8=int8)
        return folder / name

    return make


def by_itself(path: Path, pictures: Array) -> Array:
    """The file's output for uint8 pictures (N, H, W, 3), normalised here."""
    inputs = ((pictures / 255.0 - MEAN) / STD).astype(np.float32).transpose(0, 3, 1, 2)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rows = [session.run(None, {"pixels": np.ascontiguousarray(one[None])})[0] for one in inputs]
    return np.concatenate(rows)


CELLS = {
    ("onnxruntime", "fp32"): 110.0, ("onnxruntime", "fp16"): 45.0, ("onnxruntime", "int8"): 20.0,
    ("openvino", "fp32"): 100.0, ("openvino", "int8"): 20.0, ("tensorrt", "fp32"): 110.0, ("tensorrt", "fp16"): 45.0,
    ("tensorrt", "int8"): 20.0,
}  # fmt: skip


@pytest.mark.parametrize(("target", "precision"), CELLS)
def test_a_bundle_gives_what_the_file_gives(
    target: str, precision: str, made: Callable[[str, str], Path], file: Path
) -> None:
    path = made(target, precision)
    pictures = np.random.default_rng(9).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
    wanted = by_itself(file, pictures)
    if target == "tensorrt":  # prepared: its ONNX runs anywhere
        session = ort.InferenceSession(str(path / "model.onnx"), providers=["CPUExecutionProvider"])
        found = np.concatenate([session.run(None, {"image": one[None]})[0] for one in pictures])
    else:
        with load_runner(path) as runner:
            found = np.concatenate([runner.run({"image": one[None]})["logits"] for one in pictures])
    assert numerics.compare(wanted, found).sqnr_db > CELLS[target, precision]
    manifest = Bundle.open(path).manifest
    assert manifest.origin is not None
    assert (manifest.origin.kind, manifest.origin.reference, manifest.reference) == ("onnx", str(file), "onnx-file")
    assert manifest.measured.params == sum(t.size for t in _weights(file))
    share = manifest.measured.int8_mac_share
    assert share > 0.95 if precision == "int8" else share == 0


def _weights(path: Path) -> list[Array]:
    return [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]


def test_tensorrt_for_rtx_compiles_the_file(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed")
    result = export(str(file), "tensorrt-rtx", "fp16", image_size=48, output=tmp_path / "rtx")
    assert (result.state, result.reference) == ("compiled", "onnx-file")
    assert result.sqnr_db > 45


def test_macs_and_products_are_those_of_the_layers(file: Path) -> None:
    macs, products = count_graph(onnx.load(file), "pixels", (48, 48))
    pixels = 24 * 24
    assert macs == pixels * (16 * 27 + 16 * 9 + 32 * 144) + 32 * CLASSES
    assert products == {(1, pixels, 27, 16): 1, (1, pixels, 144, 32): 1, (1, 1, 32, CLASSES): 1}


def test_every_result_says_what_it_is_against(
    made: Callable[[str, str], Path], photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = made("onnxruntime", "fp32")
    (result,) = validate([bundle], data="photographs", limit=3)
    assert (result.reference, result.images) == ("onnx-file", 3)
    assert result.sqnr_db > 110
    assert validate([bundle], reference="golden")[0].reference == "golden"
    raced, _ = enter([Bundle.open(bundle)], "eager")
    setting, laps = Setting(1, 1, None, 1, 1.0), Series(1.0, 1.0, [[1000]], [], 1.0)
    rows = [contestant(one, setting, dict.fromkeys((e.name for e in raced), laps), "eager") for one in raced]
    assert [(c.name, c.target) for c in rows[:2]] == [("eager", "onnxruntime, the file"), (bundle.name, "onnxruntime")]
    assert inspect_bundle(bundle).executed_precision
    shown = prints(capsys, "predict", bundle, photograph, "--json")
    assert len(shown) == 1


def test_served_it_answers_with_what_the_file_gives(
    made: Callable[[str, str], Path], file: Path, photograph: Path, tmp_path: Path
) -> None:
    pictures = np.random.default_rng(4).integers(0, 256, (2, 48, 48, 3), dtype=np.uint8)
    bundle = made("openvino", "fp32")
    (told,) = predict(bundle, [photograph], top=5, threads=1)
    with serving(tmp_path / "log", f"net={bundle}", "--threads", "1") as server:
        for picture, row in zip(pictures, by_itself(file, pictures), strict=True):
            tensor = {"name": "image", "shape": [1, 48, 48, 3], "datatype": "UINT8", "data": picture.ravel().tolist()}
            (found,) = server.post("/v2/models/net/infer", {"inputs": [tensor]}).json["outputs"]
            np.testing.assert_allclose(found["data"], row, rtol=1e-3, atol=1e-4)
        answer = server.ask("POST", "/v2/models/net/classify?top=5", photograph.read_bytes()).json
        assert [p["label"] for p in answer["predictions"]] == [a.label for a in told.answers]
        assert "weights" not in answer  # those are the file's own


def test_layers_are_named_as_the_file_names_its_values(made: Callable[[str, str], Path]) -> None:
    found = diagnose(made("onnxruntime", "int8"), limit=1)
    assert {"1", "2", "3"} <= {layer.name for layer in found.layers}


def test_a_file_that_changed_is_no_reference_any_more(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx")
    export(str(path), image_size=32, output=tmp_path / "bundle")
    net(path, shape=("n", 3, 32, 32))
    validate([tmp_path / "bundle"], data="photographs", limit=1)  # the same weights
    model = onnx.load(path)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(2 * _weights(path)[0], "stem.weight"))
    onnx.save(model, path)
    with pytest.raises(DualTokenError, match="sha256 differs"):
        validate([tmp_path / "bundle"], data="photographs", limit=1)
    path.unlink()
    with pytest.raises(DualTokenError, match="no file"):
        validate([tmp_path / "bundle"], data="photographs", limit=1)
    assert validate([tmp_path / "bundle"], reference="golden")[0].sqnr_db > 110


@pytest.mark.parametrize("opset", [9, 11, 17, 21])
def test_files_of_other_opsets_are_taken_to_the_targets(opset: int, tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx", opset)
    export(str(path), "tensorrt", image_size=32, output=tmp_path / "bundle")
    model = onnx.load(tmp_path / "bundle/model.onnx")
    assert [o.version for o in model.opset_import] == [20]


def test_weights_in_a_file_beside_it_come_along(tmp_path: Path) -> None:
    path = net(tmp_path / "net.onnx", save_as_external_data=True, location="net.bin", size_threshold=0)
    result = export(str(path), image_size=32, output=tmp_path / "bundle")
    assert result.sqnr_db > 110
    (tmp_path / "net.bin").write_bytes(b"1234")
    with pytest.raises(InputError, match="External data"):
        export(str(path), image_size=32, output=tmp_path / "other")
    (tmp_path / "net.bin").unlink()
    with pytest.raises(InputError, match=r"net\.bin"):
        export(str(path), image_size=32, output=tmp_path / "other")


def test_a_dynamic_batch_goes_through(tmp_path: Path, file: Path) -> None:
    export(str(file), image_size=48, batch="dynamic", output=tmp_path / "bundle")
    pictures = np.random.default_rng(2).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    with load_runner(tmp_path / "bundle") as runner:
        found = runner.run({"image": pictures})["logits"]
    np.testing.assert_allclose(found, by_itself(file, pictures), atol=1e-5)


def test_several_outputs_are_chosen_and_named(tmp_path: Path) -> None:
    """Of other types than a bundle's, one of them inside a branch, where names of the outside are read."""

    def branch(name: str, operation: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(operation, ["flat"], [name])], name, [], [value(name, None)])

    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("ReduceSum", ["flat"], ["sum"], keepdims=0),
        helper.make_node("Greater", ["sum", "zero"], ["positive"]),
        helper.make_node("If", ["positive"], ["way"], then_branch=branch("a", "Relu"), else_branch=branch("b", "Neg")),
        helper.make_node("ArgMax", ["flat"], ["best"], axis=1),
    ]
    outputs = [value("flat", [1, 3]), value("way", [1, 3]), value("best", [1, 1], TensorProto.INT64)]
    path = save(tmp_path / "net.onnx", nodes, (1, 3, 8, 8), outputs, {"zero": np.array(0, np.float32)})
    export(str(path), task="tensors", output=tmp_path / "bundle", output_names=("best", "way"))
    export(str(path), task="tensors", output=tmp_path / "renamed", output_names=("x", "flat", "best"))
    picture = np.random.default_rng(1).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    pooled = ((picture / 255.0 - MEAN) / STD).mean((1, 2))
    way = np.maximum(pooled, 0) if pooled.sum() > 0 else -pooled
    with load_runner(tmp_path / "bundle") as runner:
        found = runner.run({"image": picture})
    assert list(found) == ["best", "way"]
    assert found["best"].dtype == np.int32
    assert found["best"].item() == pooled.argmax()
    np.testing.assert_allclose(found["way"], way, atol=1e-5)
    with load_runner(tmp_path / "renamed") as runner:
        found = runner.run({"image": picture})
    np.testing.assert_allclose(found["x"], pooled, atol=1e-5)
    np.testing.assert_allclose(found["flat"], way, atol=1e-5)


def _after(operation: str, *more: onnx.NodeProto, domain: str = "") -> list[onnx.NodeProto]:
    return [helper.make_node(operation, ["pixels"], ["y"], "last", domain=domain), *more]


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lambda path: path.write_text("no protobuf"), "is no whole ONNX model"),
    "nothing": (lambda path: path.write_bytes(b""), "is no whole ONNX model"),
    "eight pictures": (lambda path: net(path, shape=(8, 3, 32, 32)), "takes 8 pictures at once"),
    "one channel": (lambda path: net(path, shape=("n", 1, 32, 32)), "is float .x1x32x32, and a picture is float32"),
    "unknown operator": (
        lambda path: save(path, _after("Frobnicate"), ("n", 3, "h", "w"), [value("y", ["n", 3])], {}),
        "no whole ONNX model .*Frobnicate",
    ),
    "unknown domain": (
        lambda path: save(
            path, _after("Frobnicate", domain="acme"), ("n", 3, "h", "w"), [value("y", ["n", 3])], {}, domains=["acme"]
        ),
        "ONNX Runtime .* takes no .*acme:Frobnicate",
    ),
    "a fixed size inside": (
        lambda path: save(
            path, [helper.make_node("Reshape", ["pixels", "shape"], ["y"], "flat")], ("n", 3, "h", "w"),
            [value("y", ["n", 300])], {"shape": np.array([-1, 300])},
        ),
        "does not run on a picture of 1x3x32x32: Reshape flat: ",
    ),
    "sizes of the picture": (
        lambda path: save(
            path, [helper.make_node("Relu", ["pixels"], ["p"]), helper.make_node("NonZero", ["p"], ["y"])],
            ("n", 3, "h", "w"), [value("y", [4, "found"], TensorProto.INT64)], {},
        ),
        r"the sizes of .*model\.onnx's outputs depend on the picture",
    ),
    "chance": (
        lambda path: save(path, _after("RandomNormalLike"), ("n", 3, "h", "w"), [value("y", ["n", 3, "h", "w"])], {}),
        r"model\.onnx gives another y for the same picture",
    ),
    "a sequence": (
        lambda path: save(
            path, [helper.make_node("SequenceConstruct", ["pixels"], ["y"])], ("n", 3, "h", "w"),
            [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)], {},
        ),
        "no tensor of numbers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_model_of_a_picture_is_one_line(case: str, tmp_path: Path) -> None:
    write, words = BAD[case]
    write(tmp_path / "model.onnx")
    with pytest.raises(InputError, match=words) as caught:
        export(str(tmp_path / "model.onnx"), task="tensors", image_size=32, output=tmp_path / "bundle")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    inputs = [value(name, [1, 3, 8, 8]) for name in ("left", "right")]
    graph = helper.make_graph(
        [helper.make_node("Add", ["left", "right"], ["y"])], "g", inputs, [value("y", [1, 3, 8, 8])]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"has 2 inputs \(left, right\), and a bundle takes one picture"):
        export(str(tmp_path / "m.onnx"), task="tensors", output=tmp_path / "bundle")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"target": "coreml"}, r"coreml converts PyTorch modules, .* targets that take one: onnxruntime, openvino"),
        ({"target": "litert"}, r"litert converts PyTorch modules"),
        ({"weights": "w.pt"}, r"--weights is for a model that is code"),
        ({"arguments": {"a": 1}}, r"--model-arg is for a model that is code"),
        ({"image_size": "dynamic"}, r"takes no dynamic image size"),
    ],
)
def test_what_a_file_cannot_be_asked_for(given: dict[str, Any], words: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        export(str(file), output=tmp_path / "bundle", **given)


def test_a_file_for_one_picture_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = net(tmp_path / "one.onnx", shape=(1, 3, 32, 32))
    code, line = fails(capsys, "export", "--model", path, "--target", "onnxruntime", "--batch", "4")
    assert code == 2
    assert "takes one image at a time" in line
    code, line = fails(capsys, "export", "--model", path, "--target", "onnxruntime", "--image-size", "64")
    assert code == 2
    assert "takes pictures of 32x32, not 64x64" in line


def test_all_targets_are_those_that_take_onnx(tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = prints(
        capsys, "export", "--model", file, "--target", "all", "--image-size", "32", "--output", tmp_path, "--json"
    )
    assert [(row["target"], row["reference"]) for row in out] == [
        ("onnxruntime", "onnx-file"), ("openvino", "onnx-file"),
    ]  # fmt: skip


def test_the_command_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "your-model.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith("dualtoken") and "net.onnx" in line)
    monkeypatch.chdir(tmp_path)
    net(tmp_path / "net.onnx")
    (tmp_path / "names.txt").write_text("\n".join(f"name {i}" for i in range(CLASSES)))
    made = prints(capsys, *shlex.split(line)[1:], "--no-race", "--json")  # how fast it is has a test of its own
    assert (made["precision"], made["reference"]) == ("int8", "onnx-file")
