"""Clients that nobody here wrote: NVIDIA's tritonclient, schemathesis and curl, against a real server."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.clients import make_venv
from tests.serving import Server, serving

CLIENTS = Path(make_venv.__file__).parent


@pytest.fixture(scope="module")
def server(small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundles = f"m={small_bundle()}", f"floats:2={small_bundle(input_kind='tensor')}"
    with serving(tmp_path_factory.mktemp("serve") / "log", *bundles, "--queue", "64") as running:
        yield running


@pytest.fixture(scope="module")
def python() -> Path:
    """The python of the clients' environment."""
    try:
        return make_venv.make()
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the packages of {make_venv.REQUIREMENTS.name} cannot be had here: {error.stderr.strip()[-200:]}")


@pytest.mark.parametrize(("model", "options"), [("m", {}), ("floats", {"input_kind": "tensor"})])
def test_tritonclient_works_unchanged(
    server: Server, python: Path, small_bundle: Callable[..., Path], model: str, options: dict[str, str]
) -> None:
    golden = small_bundle(**options) / "golden.npz"
    addresses = f"{server.host}:{server.port}", server.grpc
    command = [python, CLIENTS / "triton_check.py", model, golden, *addresses]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)["passed"]) == 12


def test_the_kserve_sdk_works_unchanged(server: Server, python: Path, small_bundle: Callable[..., Path]) -> None:
    golden = small_bundle() / "golden.npz"
    command = [python, CLIENTS / "kserve_check.py", "m", golden, f"{server.host}:{server.port}", server.grpc]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout)["passed"]) == 5


def test_the_grpc_server_describes_itself(server: Server, python: Path, small_bundle: Callable[..., Path]) -> None:
    command = [python, CLIENTS / "reflection_check.py", "m", small_bundle() / "golden.npz", server.grpc]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["services"] == ["grpc.reflection.v1alpha.ServerReflection", "inference.GRPCInferenceService"]
    methods = ["ModelInfer", "ModelMetadata", "ModelReady", "ServerLive", "ServerMetadata", "ServerReady"]
    assert found["methods"] == methods


def test_schemathesis_finds_no_server_error(server: Server, python: Path, tmp_path: Path) -> None:
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [python.parent / "schemathesis", "run", f"{server.addresses['http']}/openapi.json", "--checks", checks]
    limits = (
        "--max-examples",
        "12",
        "--phases",
        "examples,coverage,fuzzing",
        "--seed",
        "1",
        "--generation-database",
        "none",
    )
    done = subprocess.run([*map(str, command), *limits], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]
    assert server.metric("dualtoken_requests_total", code="500") == 0
    assert server.metric("dualtoken_requests_total", protocol="http") > 200
    assert not [row for row in server.logs if row["event"] == "unexpected error"]


def test_curl_sends_a_photo(server: Server, tmp_path: Path) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("curl is not here")
    photo = tmp_path / "photo.jpg"
    Image.linear_gradient("L").convert("RGB").save(photo)
    url = f"{server.addresses['http']}/v2/models/m/classify?top=3"
    answers = []
    for form in (("--data-binary", f"@{photo}"), ("-F", f"image=@{photo}"), ("-T", str(photo), "-X", "POST")):
        done = subprocess.run([curl, "-sS", "-f", *form, url], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["predictions"])
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) == 3
