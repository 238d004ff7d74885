"""The manifest and the Containerfile, held against the server that they start: paths, ports, options."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from dualtoken_deploy.cli import app
from dualtoken_deploy.serve.openapi import document
from dualtoken_deploy.serve.settings import Settings, parse_sources

FOLDER = Path(__file__).parent.parent / "deploy" / "kserve"


@pytest.fixture(scope="module")
def container() -> dict[str, Any]:
    documents = {d["kind"]: d for d in yaml.safe_load_all((FOLDER / "inferenceservice.yaml").read_text())}
    assert documents["InferenceService"]["spec"]["predictor"]["model"]["runtime"] == "dualtoken-serve"
    (found,) = documents["ServingRuntime"]["spec"]["containers"]
    grace = documents["InferenceService"]["spec"]["predictor"]["terminationGracePeriodSeconds"]
    return dict(found, grace=grace)


def entrypoint() -> list[str]:
    text = (FOLDER / "Containerfile").read_text()
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    parts: list[str] = json.loads(line)
    return parts


def test_probes_ask_routes_that_exist_on_the_port_that_is_opened(container: dict[str, Any]) -> None:
    paths = document(Settings())["paths"]
    (port,) = (p["containerPort"] for p in container["ports"])
    assert shlex.join(entrypoint()).count(f"--port {port}") == 1
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port
        assert container[probe]["httpGet"]["path"] in paths
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"


def test_every_option_is_one_of_the_server(container: dict[str, Any]) -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    given = [a.partition("=")[0] for a in (*entrypoint(), *container["args"]) if a.startswith("--")]
    assert given
    assert set(given) <= known
    parse_sources([container["args"][0].replace("{{.Name}}", "dualtoken")])


def test_the_pod_lives_longer_than_its_drain(container: dict[str, Any]) -> None:
    (drain,) = (float(a.partition("=")[2]) for a in container["args"] if a.startswith("--drain-seconds"))
    pause = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert container["grace"] > drain + pause
