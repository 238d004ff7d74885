"""A bundle as a model of a Triton repository, its configuration read by NVIDIA's own protobuf."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.errors import OutputError, UsageError
from dualtoken_deploy.serve.triton import TYPES, config, lay_out
from dualtoken_deploy.targets.table import TARGETS
from tests.clients import make_venv

FILES = {"onnxruntime": ["model.onnx"], "openvino": ["model.bin", "model.xml"]}
READ = (
    "import json, sys; from google.protobuf import json_format, text_format\n"
    "from tritonclient.grpc.model_config_pb2 import ModelConfig\n"
    "print(json_format.MessageToJson(text_format.Parse(sys.stdin.read(), ModelConfig())))"
)


@pytest.mark.parametrize("target", sorted(FILES))
def test_a_bundle_is_laid_out(target: str, small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = Bundle.open(small_bundle(target))
    folder = lay_out(bundle, tmp_path / "repository")
    assert folder == tmp_path / "repository" / bundle.name
    assert sorted(p.name for p in folder.iterdir()) == ["1", "config.pbtxt", "labels.txt"]
    assert sorted(p.name for p in (folder / "1").iterdir()) == FILES[target]
    for name in FILES[target]:
        assert (folder / "1" / name).read_bytes() == (bundle.path / name).read_bytes()
    assert [p.name for p in (tmp_path / "repository").iterdir()] == [bundle.name], "nothing temporary is left"


@pytest.mark.parametrize(("options", "rows", "dims"), [({}, 0, [1, 64, 64, 3]), ({"batch": "dynamic"}, 8, [64, 64, 3])])
def test_nvidias_protobuf_reads_the_configuration(
    options: dict[str, Any], rows: int, dims: list[int], small_bundle: Callable[..., Path]
) -> None:
    bundle = Bundle.open(small_bundle(**options))
    try:
        python = make_venv.make()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages of {make_venv.REQUIREMENTS.name} cannot be had here: {error.stderr.strip()[-200:]}")
    done = subprocess.run([python, "-c", READ], input=config(bundle), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["name"], data["backend"], data.get("maxBatchSize", 0)) == (bundle.name, "onnxruntime", rows)
    (given,), (found,) = data["input"], data["output"]
    assert (given["name"], given["dataType"], [int(d) for d in given["dims"]]) == ("image", "TYPE_UINT8", dims)
    assert (found["name"], found["dataType"], found["labelFilename"]) == ("logits", "TYPE_FP32", "labels.txt")
    assert [int(d) for d in found["dims"]] == ([10] if rows else [1, 10])
    assert ("dynamicBatching" in data) is bool(rows)


def test_bfloat16_is_asked_for(small_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(small_bundle("openvino"))
    assert "parameters" not in config(bundle)
    text = config(replace(bundle, manifest=replace(bundle.manifest, precision="bf16")))
    assert re.search(r'parameters \{\n  key: "HINT_BF16"\n  value \{ string_value: "YES" \}\n\}', text)


def test_a_plan_is_tensorrts_name_of_an_engine(own_bundle: Path, tmp_path: Path) -> None:
    """No TensorRT is needed to lay its engine out."""
    bundle = Bundle.open(own_bundle)
    (own_bundle / "model.engine").write_bytes(b"engine")
    plan = replace(bundle, manifest=replace(bundle.manifest, target="tensorrt"))
    folder = lay_out(plan, tmp_path / "repository", version=3)
    assert (folder / "3" / "model.plan").read_bytes() == b"engine"
    assert 'backend: "tensorrt"' in (folder / "config.pbtxt").read_text()


def test_what_cannot_be_laid_out(own_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(own_bundle)
    with pytest.raises(UsageError, match=re.escape("valid targets: onnxruntime, openvino, tensorrt")):
        lay_out(replace(bundle, manifest=replace(bundle.manifest, target="coreml")), tmp_path / "r")
    lay_out(bundle, tmp_path / "r")
    before = (tmp_path / "r" / "bundle" / "config.pbtxt").stat().st_ino
    with pytest.raises(UsageError, match="--force"):
        lay_out(bundle, tmp_path / "r")
    lay_out(bundle, tmp_path / "r", force=True)
    assert (tmp_path / "r" / "bundle" / "config.pbtxt").stat().st_ino != before
    with pytest.raises(OutputError, match="cannot write"):
        lay_out(bundle, Path("/proc/none"))
    strange = own_bundle.rename(tmp_path / "a bundle")
    with pytest.raises(UsageError, match="no name for a Triton model"):
        lay_out(Bundle.open(strange), tmp_path / "r")


def test_every_dtype_of_a_bundle_has_a_type() -> None:
    assert {"uint8", "float32", "float16"} <= TYPES.keys()
    assert {name for name, row in TARGETS.items() if row.triton} == {"onnxruntime", "openvino", "tensorrt"}
