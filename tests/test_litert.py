"""LiteRT: converted by its own tool, run by its own interpreter; metadata are read by a reader of the test's own."""

from __future__ import annotations

import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, UsageError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.targets.litert import environment, flat
from dualtoken_deploy.targets.litert import export as litert
from dualtoken_deploy.targets.litert.runner import delegated
from dualtoken_deploy.targets.litert.structure import gpu_refusals
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.commands import fails
from tests.numerics import assert_close

MODEL = "model.tflite"

# the converter's environment, 2 GB, may have to be made by the first of them
pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="session")
def made(small_bundle: Callable[..., Path], litert_converter: Path) -> Callable[..., Bundle]:
    """made(precision, **options): a bundle of the small model, converted once."""
    return lambda precision="fp32", **options: Bundle.open(small_bundle("litert", precision, **options))


@pytest.fixture
def own(made: Callable[..., Bundle], tmp_path: Path) -> Path:
    """A copy of the float32 bundle that a test may damage."""
    return Path(shutil.copytree(made().path, tmp_path / "bundle"))


@pytest.mark.parametrize(("precision", "least_db"), [("fp32", 100), ("fp16", 45)])
def test_the_saved_file_computes_what_eager_computes(
    made: Callable[..., Bundle], precision: str, least_db: float
) -> None:
    bundle = made(precision)
    with load_runner(bundle) as runner:
        logits = runner.run({"image": bundle.golden["input"]})["logits"]
    assert_close(logits, bundle.golden["logits"], sqnr_db=least_db)
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    assert inspection.executed_precision["FULLY_CONNECTED"] == "float32"
    assert inspection.executed_precision["CAST"] == "uint8 outside XNNPACK"  # the one operator that is left outside
    assert any("outside it: 1 CAST" in note for note in inspection.notes)


def test_float16_stores_weights_in_half_the_bytes(made: Callable[..., Bundle]) -> None:
    whole, half = (made(precision) for precision in ("fp32", "fp16"))
    assert half.size_bytes < 0.56 * whole.size_bytes
    with load_runner(half) as runner:
        logits = runner.run({"image": half.golden["input"]})["logits"]
    assert not np.array_equal(logits, half.golden["logits"])  # it is not the float32 weights that ran


def test_operators_are_few_plain_and_of_four_axes(made: Callable[..., Bundle]) -> None:
    """One block a stage: what the traced rules left of the 559 operators that the converter made without them."""
    found = made().manifest.operators["structure"]
    assert found["max_rank"] <= 4
    assert found["off_gpu"] == 1  # the cast of pixels
    assert found["operators"] <= 345
    model = flat.read(made().path / MODEL)
    kinds = [op.kind for op in flat.operators(model)]
    assert len(kinds) == found["operators"]
    assert not [kind for kind in kinds if kind.startswith(("CUSTOM", "FLEX", "STABLEHLO"))]
    eager = rebuild(made().manifest)
    convolutions = sum(type(m).__name__ == "Conv2d" for m in eager.modules())
    assert sum(kind in ("CONV_2D", "DEPTHWISE_CONV_2D") for kind in kinds) == convolutions


def test_values_have_the_models_own_names(made: Callable[..., Bundle]) -> None:
    model = flat.read(made().path / MODEL)
    names = {flat.tensor_name(model, i): op.kind for op in flat.operators(model) for i in op.outputs}
    assert names["stage1.block1.local.pw1"] == "FULLY_CONNECTED"
    assert names["stem.conv1.conv"] == "CONV_2D"
    assert names["stage3.block1.token.broadcast/softmax"] == "SOFTMAX"
    assert names["logits"] == "FULLY_CONNECTED"
    weights = {flat.tensor_name(model, i) for op in flat.operators(model) for i in op.inputs if i >= 0}
    assert {"stage1.block1.local.pw1.weight", "logits.bias"} <= weights


class Table:
    """A table of a FlatBuffer, read with struct alone: what the metadata is held against."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at
        self.fields = at - struct.unpack_from("<i", data, at)[0]

    def place(self, field: int) -> int:
        size = struct.unpack_from("<H", self.data, self.fields)[0]
        slot = 4 + 2 * field
        offset = struct.unpack_from("<H", self.data, self.fields + slot)[0] if slot < size else 0
        return self.at + offset if offset else 0

    def follow(self, field: int) -> int:
        place = self.place(field)
        return place + int(struct.unpack_from("<I", self.data, place)[0])

    def text(self, field: int) -> str:
        at = self.follow(field)
        return self.data[at + 4 : at + 4 + struct.unpack_from("<I", self.data, at)[0]].decode()

    def table(self, field: int) -> Table:
        return Table(self.data, self.follow(field))

    def tables(self, field: int) -> list[Table]:
        at = self.follow(field)
        places = [at + 4 + 4 * i for i in range(struct.unpack_from("<I", self.data, at)[0])]
        return [Table(self.data, p + struct.unpack_from("<I", self.data, p)[0]) for p in places]

    def floats(self, field: int) -> list[float]:
        at = self.follow(field)
        return list(struct.unpack_from(f"<{struct.unpack_from('<I', self.data, at)[0]}f", self.data, at + 4))

    def byte(self, field: int) -> int:
        return self.data[self.place(field)]


class Filled(nn.Module):
    """Adds what is filled with whole numbers to ten values."""

    def forward(self, x: Tensor) -> Tensor:
        zeros, ones = torch.zeros_like(x[:, :3]), torch.ones_like(x[:, :3])
        twos = torch.full((1, 1), 2, dtype=x.dtype)
        return x + torch.cat([zeros, ones, x.new_zeros(1, 1), torch.zeros(1, 1), twos, torch.full_like(twos, 3)], 1)


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory, litert_converter: Path) -> Bundle:
    """A convolution, its mean and what is filled, whose input is the normalised picture: little to convert."""
    model = nn.Sequential(nn.Conv2d(3, 10, 4, stride=4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Filled())
    folder = tmp_path_factory.mktemp("net") / "bundle"
    export(model, "litert", task="classify", image_size=64, input_kind="tensor", output=folder)
    return Bundle.open(folder)


@pytest.mark.parametrize("kind", ["image", "tensor"])
def test_metadata_says_what_android_studio_shows(made: Callable[..., Bundle], net: Bundle, kind: str) -> None:
    bundle = made() if kind == "image" else net
    model = flat.read(bundle.path / MODEL)
    (entry,) = [m for m in model.metadata if m.name == b"TFLITE_METADATA"]
    data = bytes(model.buffers[entry.buffer].data)
    assert data[4:8] == b"M001"
    root = Table(data, struct.unpack_from("<I", data)[0])
    if kind == "image":
        assert "tiny-mix" in root.text(1)
        assert "Apache-2.0" in root.text(5)
    (graph,) = root.tables(3)
    (given,), (found,) = graph.tables(2), graph.tables(3)
    assert given.text(0) == bundle.manifest.input.tensor.name
    (unit,) = given.tables(4)
    assert unit.byte(0) == 1  # NormalizationOptions
    mean, std = unit.table(1).floats(0), unit.table(1).floats(1)
    if kind == "image":
        assert (mean, std) == ([0.0], [1.0])  # the graph normalises
        assert given.table(3).byte(0) == 2  # ImageProperties
        assert given.table(3).table(1).byte(0) == 1  # RGB
    else:
        assert mean == pytest.approx([123.675, 116.28, 103.53])  # of pixels in 0..255, as torchvision's are of 0..1
        assert std == pytest.approx([58.395, 57.12, 57.375])
    assert found.text(0) == "logits"
    (labels,) = found.tables(6)
    assert labels.byte(2) == 2  # TENSOR_AXIS_LABELS
    with zipfile.ZipFile(bundle.path / MODEL) as packed:
        assert tuple(packed.read(labels.text(0)).decode().split("\n")[:-1]) == bundle.labels


def test_buffers_lie_where_the_schema_wants_them(made: Callable[..., Bundle]) -> None:
    """At multiples of 16 bytes, from which devices read them as they lie in the file."""
    data = (made().path / MODEL).read_bytes()
    model = flat.read(made().path / MODEL)
    weights = [bytes(b.data) for b in model.buffers if b.data is not None and len(b.data) >= 4096]
    assert len(weights) > 20
    assert {data.index(weight) % 16 for weight in weights} == {0}


def test_a_gpu_would_take_all_but_the_cast_of_pixels(made: Callable[..., Bundle], net: Bundle) -> None:
    assert [said.split(": ")[1] for said in gpu_refusals(flat.read(made().path / MODEL))] == [
        "CAST from UINT8 to FLOAT32"
    ]
    assert {said.split(": ")[1] for said in gpu_refusals(flat.read(net.path / MODEL))} == {
        "FILL is not among its operators"  # and nothing else: its input is normalised
    }


def test_what_a_gpu_refuses_is_named(made: Callable[..., Bundle]) -> None:
    model = flat.read(made().path / MODEL)
    graph, kinds = model.subgraphs[0], flat.kinds_of(model)
    model.operatorCodes[kinds.index("RSQRT")].builtinCode = flat.schema().BuiltinOperator.CEIL
    ops = list(flat.operators(model))
    first = next(op for op in ops if op.kind == "SOFTMAX")
    graph.tensors[first.outputs[0]].shape = np.array([1, 1, *flat.shape(model, first.outputs[0])], np.int32)
    add = next(op for op in ops if op.kind == "ADD" and len(flat.shape(model, op.inputs[1])) == 3)
    graph.tensors[add.inputs[1]].shape = np.array(flat.shape(model, add.inputs[1])[1:], np.int32)
    said = " ".join(gpu_refusals(model))
    assert "CEIL is not among its operators" in said
    assert "SOFTMAX has more than 4 axes" in said
    assert "ADD of shapes" in said


def transposed(weights: Any) -> Any:
    return weights.T


def fourfold(weights: Any) -> Any:
    return weights * 4


@pytest.mark.parametrize(
    ("layer", "change"), [("stage1.block1.token.broadcast.proj", transposed), ("stage3.block1.ffn.fc1", fourfold)]
)
def test_diagnose_points_at_a_planted_fault(own: Path, layer: str, change: Callable[[Any], Any]) -> None:
    model = flat.read(own / MODEL)
    (op,) = [op for op in flat.operators(model) if flat.tensor_name(model, op.outputs[0]) == layer]
    tensor = model.subgraphs[0].tensors[op.inputs[1]]
    old = np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.float32).reshape(tensor.shape)
    new = np.ascontiguousarray(change(old), np.float32)
    assert new.shape == old.shape
    model.buffers[tensor.buffer].data = np.frombuffer(new.tobytes(), np.uint8)
    flat.write(model, own / MODEL)
    assert diagnose(Bundle.open(own, verify=False), limit=2).suspect == layer


def test_diagnose_finds_nothing_in_a_whole_bundle(made: Callable[..., Bundle]) -> None:
    found = diagnose(made(), limit=2)
    assert found.suspect is None
    assert found.unseen <= 0.05 * (len(found.layers) + found.unseen)
    assert min(layer.sqnr_db for layer in found.layers) >= 100


def test_what_no_delegate_took_is_found() -> None:
    """Two of five operators between the delegate's border: the first stays outside, the last is another delegate's."""
    own = [{"op_name": "A", "inputs": [i], "outputs": [i + 1]} for i in range(5)]
    pieces = [{"op_name": "DELEGATE", "inputs": [1, 9], "outputs": [3]},
              {"op_name": "DELEGATE", "inputs": [4], "outputs": [5]}]  # fmt: skip
    assert delegated(own + pieces) == ({1, 2, 4}, 2)
    assert delegated(own) == (set(), 0)


def test_it_is_timed_and_served_as_any_other(made: Callable[..., Bundle]) -> None:
    row, *_ = bench([made()], rounds=1, seconds=0.05).contestants
    assert row.p50_ms > 0


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 3]
    elif how == "empty":
        data = bytearray()
    elif how == "not a model":
        data[4:8] = b"GGUF"
    else:
        model = flat.read(path)
        if how == "newer":
            model.version = 4
        elif how == "custom":
            model.operatorCodes[0].customCode = b"FlexErf"
            model.operatorCodes[0].builtinCode = model.operatorCodes[0].deprecatedBuiltinCode = 32
        else:
            tensor = model.subgraphs[0].tensors[model.subgraphs[0].outputs[0]]
            tensor.name = b"scores"
        flat.write(model, path)
        return
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "cut short or damaged|cannot load"), ("empty", "no .tflite"), ("not a model", "no .tflite"),
     ("newer", "version 4"), ("custom", "CUSTOM FlexErf"), ("other names", "the manifest says logits")],
)  # fmt: skip
def test_a_file_that_cannot_run_is_one_line(own: Path, how: str, words: str) -> None:
    damage(own / MODEL, how)
    with pytest.raises(BundleError, match=words):
        load_runner(Bundle.open(own, verify=False))


@pytest.mark.parametrize(
    ("options", "words"), [({"batch": "dynamic"}, "fixed shapes"), ({"opset": 20}, "opset"), ({"image_size": "dynamic"},
     "dynamic image size"), ({"precision": "bf16"}, "fp32, fp16, int8, int8-weights, int4-weights")],
)  # fmt: skip
def test_what_litert_does_not_have(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"variant": "tiny-mix", "target": "litert", "output": tmp_path / "b"} | options
    with pytest.raises(UsageError, match=words):
        export(**given)


def test_a_converter_that_is_not_there_is_said_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DUALTOKEN_CACHE", str(tmp_path))
    arguments = ["export", "--variant", "t-mix", "--target", "litert", "--image-size", "64", "--output"]
    code, said = fails(capsys, *arguments, tmp_path / "b")
    assert code == 3
    assert "run: python -m dualtoken_deploy.targets.litert.environment" in said
    monkeypatch.setenv(environment.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(MissingError, match="which is no file"):
        environment.converter_python()


@pytest.mark.parametrize(
    ("ends", "words"),
    [("raise SystemExit('LLVM ERROR: no such thing')", "LLVM ERROR: no such thing"),
     ("print('done')", "ended with code 0"),
     ("import os, sys; print('I0000 ops', file=sys.stderr, flush=True); os.abort()", "was killed by SIGABRT")],
)  # fmt: skip
def test_a_converter_that_fails_is_one_line(
    made: Callable[..., Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str, words: str
) -> None:
    made()
    worker = tmp_path / "worker.py"
    worker.write_text(ends)
    monkeypatch.setattr(litert, "WORKER", worker)
    monkeypatch.setattr(litert, "convert", litert.convert.__wrapped__)  # type: ignore[attr-defined] # not the kept one
    with pytest.raises(ConversionError, match=f"litert-torch cannot convert the model: .*{words}$"):
        export("tiny-mix", "litert", output=tmp_path / "b", image_size=64, num_classes=10)
    assert not (tmp_path / "b").exists()


def test_other_devices_are_named_as_missing(made: Callable[..., Bundle]) -> None:
    with pytest.raises(MissingError, match="CPU alone"):
        load_runner(made(), device="gpu")
