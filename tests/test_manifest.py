"""manifest.json: what older programs wrote still opens, and whatever else lies there is one of our errors."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy import Bundle, validate
from dualtoken_deploy.bundle.blocks import Build, Figures, Origin
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.errors import BundleError, DualTokenError, WeightsError
from dualtoken_deploy.targets.nvidia.engine import EngineBuild

# Written by the program of 24 November 2026 before manifests had typed blocks: `tiny` is conftest's SMALL, the others
# T (mix) at 64; `int8` of the trained digits.
SCHEMA1 = sorted((Path(__file__).parent / "data" / "schema1").glob("*.json"))
TINY = next(path for path in SCHEMA1 if path.name == "tiny.json")


@pytest.mark.parametrize("path", SCHEMA1, ids=lambda path: path.stem)
def test_schema_1_reads_and_is_written_as_it_was(path: Path) -> None:
    before = json.loads(path.read_text(encoding="utf-8"))
    manifest = Manifest.parse(path.read_bytes())
    after = json.loads(json.dumps(manifest.to_json(), allow_nan=False))
    if before["calibration"] is not None:
        before["calibration"]["in_float_for_speed"] = []
    assert after == before | {"origin": None, "licenses": None, "evaluated": [], "asked": None}
    assert next(iter(after)) == "schema_version"


def test_a_bundle_of_schema_1_opens_and_validates(own_bundle: Path) -> None:
    """The old manifest over files of today's. The old seed made a model with one LayerNorm in the token module: eager
    cannot be made again from it, which is said, and golden holds; with today's hash both do."""
    data = json.loads(TINY.read_text(encoding="utf-8"))
    today = json.loads((own_bundle / "manifest.json").read_text(encoding="utf-8"))
    old = data | {"files": today["files"]}
    (own_bundle / "manifest.json").write_text(json.dumps(old), encoding="utf-8")
    assert Bundle.open(own_bundle).manifest.origin is None
    validate([own_bundle], reference="golden")
    with pytest.raises(WeightsError, match="validate with --reference golden"):
        validate([own_bundle], data="photographs", limit=2, reference="eager")
    (own_bundle / "manifest.json").write_text(json.dumps(old | {"weights": today["weights"]}), encoding="utf-8")
    bundle = Bundle.open(own_bundle)
    (on_golden,) = validate([bundle], reference="golden")
    (on_pictures,) = validate([bundle], data="photographs", limit=2, reference="eager")
    assert min(on_golden.sqnr_db, on_pictures.sqnr_db) >= bundle.manifest.tolerance.sqnr_db


def test_the_blocks_say_what_the_file_says() -> None:
    data = json.loads(next(p for p in SCHEMA1 if p.stem == "int8").read_text(encoding="utf-8"))
    manifest = Manifest.from_json(data)
    said, measured = manifest.calibration, manifest.measured
    assert said is not None
    assert said.search is not None
    assert said.held_out is not None
    assert (said.name, said.drop, said.held_out.images) == (
        data["calibration"]["name"], data["calibration"]["drop"], data["calibration"]["held_out"]["images"],
    )  # fmt: skip
    assert said.search.trace[0].action == data["calibration"]["search"]["trace"][0]["action"]
    assert manifest.weights.source == "digits"
    assert measured.photographs is not None
    assert measured.photographs.sqnr_db == data["measured"]["photographs"]["sqnr_db"]
    assert measured.int8_mac_share == data["measured"]["int8_mac_share"]


def test_the_build_of_an_engine() -> None:
    host = {
        "tensorrt": "10.13.3", "system": "linux-x86_64", "gpu": "H100", "compute_capability": "9.0",
        "multiprocessors": 132, "driver": "580.95",
    }  # fmt: skip
    build = {
        "host": host, "versions": {}, "workspace_mib": None, "optimization_level": 3, "version_compatible": False,
        "hardware_compatibility": "none", "batches": [1, 1, 8], "ships": ["model.engine"],
        "float32_share_allowed": 0.05,
    }  # fmt: skip
    data = json.loads(TINY.read_text(encoding="utf-8")) | {"build": build}
    data["measured"]["engine"] = {"sqnr_db": 51.0, "max_abs_error": 0.1, "top1_agreement": 1.0}
    manifest = Manifest.from_json(data)
    assert manifest.build is not None
    assert (manifest.build.ships, manifest.build.float32_share_allowed) == (("model.engine",), 0.05)
    assert manifest.build.typed(EngineBuild).host.to_json() == host
    assert manifest.measured.engine == Figures(sqnr_db=51.0, max_abs_error=0.1, top1_agreement=1.0)
    assert manifest.to_json()["build"] == build
    with pytest.raises(BundleError, match="missing required field `host`"):
        Build(details={"version_compatible": True}).typed(EngineBuild)


def test_an_origin_comes_back() -> None:
    origin = Origin(
        kind="reference", name="tiny net", reference="nets/tiny.py:make",
        arguments={"width": 8, "deep": [1, {"a": None}]},
        outputs=("logits",), sha256="0" * 64,
    )  # fmt: skip
    manifest = replace(Manifest.parse(TINY.read_bytes()), origin=origin)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_fields_of_a_newer_minor_are_left_out() -> None:
    data = json.loads(TINY.read_text(encoding="utf-8"))
    newer = data | {"signature": {"by": "someone"}, "weights": data["weights"] | {"licence": "Apache-2.0"}}
    assert Manifest.from_json(newer) == Manifest.from_json(data)
    built = Manifest.from_json(data | {"build": {"device": "cpu", "linker": "mold"}}).build
    assert built is not None
    assert built.to_json() == {"device": "cpu", "linker": "mold"}  # a target's own, whatever they are


@pytest.mark.parametrize("task", ["embed", "tensors", "a task of tomorrow"])
def test_any_task_is_read(task: str) -> None:
    assert Manifest.from_json(json.loads(TINY.read_text(encoding="utf-8")) | {"task": task}).task == task


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(TINY.read_text(encoding="utf-8")) | fields).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "Expected `object`"),
        (b"{}", "missing required field `schema_version`"),
        (b'{"schema_version": NaN}', "not JSON"),
        (b'{"schema_version": "1"}', "Expected `int`"),
        (b'{"schema_version": 1}', "missing required field"),
        (b'{"schema_version": 99}', "upgrade it"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "not JSON"),
        (changed(weights=None), r"\$\.weights"),
        (changed(weights={"source": 3, "sha256": ""}), r"\$\.weights\.source"),
        (changed(measured=[]), r"\$\.measured"),
        (changed(input={"tensor": {}}), r"\$\.input"),
        (changed(tolerance={"sqnr_db": "high"}), r"\$\.tolerance\.sqnr_db"),
        (changed(products=[[1, 2, 3]]), r"\$\.products\[0\]"),
        (changed(files=["model.onnx"]), r"\$\.files"),
        (changed(build=3), r"\$\.build"),
        (changed(build={"ships": "model.engine"}), r"\$\.build\.ships"),
        (changed(calibration={"name": "digits"}), r"\$\.calibration"),
        (changed(origin={"kind": "pickle", "name": "x"}), r"\$\.origin\.kind"),
    ],
)
def test_what_is_no_manifest_is_one_line(text: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=reason) as caught:
        Bundle.open(tmp_path)
    assert str(tmp_path / "manifest.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        Bundle.open(tmp_path)


def test_damaged_bytes_raise_only_our_errors() -> None:
    """Every byte range of a real manifest cut, doubled or turned at random places; seeded, so a failure comes again."""
    text, dice = TINY.read_bytes(), random.Random(0)
    for _ in range(3000):
        start = dice.randrange(len(text))
        stop = start + dice.randrange(1, 40)
        new = dice.choice([b"", text[start:stop] * 2, dice.randbytes(3), b"null", b"-1", b"1e999", b"{}", b'"\\ud800"'])
        try:
            Manifest.parse(text[:start] + new + text[stop:])
        except DualTokenError:
            continue
