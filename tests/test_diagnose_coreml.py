"""diagnose on Core ML packages: faults planted in the weight file that ships are pointed at by the layer's own name."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.targets.coreml.mil.program import find_specification
from dualtoken_deploy.targets.coreml.mil.vendor import model_proto
from dualtoken_deploy.targets.coreml.runner import ENGINE
from dualtoken_deploy.use.compare import compare
from dualtoken_deploy.use.diagnose import Diagnosis, diagnose
from dualtoken_deploy.use.evaluate import evaluate

MakeBundle = Callable[..., Path]
PACKAGE = "model.mlpackage"
TYPES = {10: np.float16, 11: np.float32, 21: np.int8}  # MIL's numbers of dtypes


def operations(folder: Path) -> dict[str, Any]:
    """The operations of the package by the name of their first result, read with the schema alone."""
    model = model_proto("the test").Model()
    model.ParseFromString(find_specification(folder / PACKAGE).read_bytes())
    function = model.mlProgram.functions["main"]
    return {op.outputs[0].name: op for op in function.block_specializations[function.opset].operations}


def weight_of(layer: str, made: dict[str, Any]) -> Any:
    """The constant that holds a layer's weights; of compressed weights their scales."""
    name = layer.replace(".", "_")
    op = next(op for value, op in made.items() if value in (name, f"{name}_cast_fp16"))
    source = made[op.inputs["weight"].arguments[0].name]
    if source.type == "const":
        return source.attributes["val"]
    return source.inputs["scale"].arguments[0].value


def damaged(source: Path, folder: Path, layer: str, change: Callable[[Any], Any]) -> Bundle:
    """A copy of a bundle with one layer's weights changed in its weight file; nothing else knows of it."""
    shutil.copytree(source, folder)
    value = weight_of(layer, operations(folder))
    tensor = value.type.tensorType
    path = find_specification(folder / PACKAGE).parent / "weights" / "weight.bin"
    data = bytearray(path.read_bytes())
    _, _, size, start = struct.unpack_from("<IIQQ", data, value.blobFileValue.offset)
    shape = [d.constant.size for d in tensor.dimensions]
    old = np.frombuffer(data[start : start + size], TYPES[tensor.dataType]).reshape(shape)
    new = np.ascontiguousarray(change(old)).astype(old.dtype)
    assert new.shape == old.shape
    assert not np.array_equal(new, old)
    data[start : start + size] = new.tobytes()
    path.write_bytes(data)
    return Bundle.open(folder, verify=False)


def transposed(weights: Any) -> Any:
    return weights.swapaxes(0, 1)


def fourfold(weights: Any) -> Any:
    return weights * 4


@pytest.mark.parametrize(
    ("layer", "change", "options"),
    [
        ("stage1.block1.token.broadcast.q", transposed, {}),
        ("stage3.block1.token.broadcast.proj", transposed, {}),
        ("stage3.block1.ffn.fc1", fourfold, {}),
        ("stem.conv1.conv", fourfold, {}),
        ("stage1.block1.token.broadcast.q", transposed, {"layout": "plain"}),
        ("stage1.block1.local.pw2", fourfold, {"layout": "plain"}),
        ("stage1.block1.local.pw2", fourfold, {"precision": "int8"}),
        ("stage3.block1.ffn.fc2", fourfold, {"precision": "int8"}),
    ],
)
def test_a_planted_fault_is_pointed_at(
    layer: str, change: Callable[[Any], Any], options: dict[str, Any], small_bundle: MakeBundle, tmp_path: Path
) -> None:
    source = small_bundle("coreml", **{"precision": "fp16", **options})
    found = diagnose(damaged(source, tmp_path / "b", layer, change), limit=2)
    assert (found.first, found.suspect) == (layer, layer)
    assert next(d for d in found.layers if d.name == layer).lost_db > 20


def test_a_package_without_the_models_names(small_bundle: MakeBundle, tmp_path: Path) -> None:
    """As one that another version of this tool has made."""
    folder = tmp_path / "b"
    shutil.copytree(small_bundle("coreml", "fp16"), folder)
    path = find_specification(folder / PACKAGE)
    model = model_proto("the test").Model()
    model.ParseFromString(path.read_bytes())
    function = model.mlProgram.functions["main"]
    block = function.block_specializations[function.opset]
    new = {v.name: f"var_{n}_{i}" for n, op in enumerate(block.operations) for i, v in enumerate(op.outputs)}
    new = {old: name for old, name in new.items() if old not in block.outputs}
    for op in block.operations:
        for value in op.outputs:
            value.name = new.get(value.name, value.name)
        for argument in op.inputs.values():
            for binding in argument.arguments:
                if binding.WhichOneof("binding") == "name":
                    binding.name = new.get(binding.name, binding.name)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match=r"1 of [0-9]+ values under the model's names"):
        diagnose(Bundle.open(folder, verify=False), limit=1)


def test_every_command_says_that_it_is_no_core_ml_and_times_nothing(
    small_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_bundle("coreml", "fp16")
    digits = ["--data", "digits", "--limit", "20"]
    for command in (["diagnose", "--limit", "1"], ["evaluate", *digits], ["compare", *digits], ["inspect"]):
        main([command[0], str(folder), *command[1:]])
        assert ENGINE in " ".join(capsys.readouterr().out.replace("│", " ").split()), command
    evaluation = evaluate(folder, "digits", limit=20)
    assert evaluation.images_per_s is None
    assert evaluation.to_json()["engine"] == ENGINE
    (row,) = compare([folder], "digits", limit=20).rows
    assert row.score == evaluation.scores["top1"]
    assert (row.p50_ms, row.against_eager, row.against_fp32, row.engine) == (None, None, None, ENGINE)


def test_an_overflow_is_no_number_in_json(small_bundle: MakeBundle, tmp_path: Path) -> None:
    found: Diagnosis = diagnose(
        damaged(small_bundle("coreml", "fp16"), tmp_path / "b", "stem.conv1.conv", lambda w: w * 0 + 60000), limit=1
    )
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert next(d for d in said["layers"] if d["name"] == found.suspect)["max_abs_error"] is None
