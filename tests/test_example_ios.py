"""The Swift example cannot be built here; what it reads can: its JSON, and the names of inputs and outputs."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualtoken_deploy import Bundle, load_runner
from dualtoken_deploy.targets.coreml.classifier import LABEL_PROBABILITIES
from tests.contracts import make_contract

FOLDER = Path(__file__).parent.parent / "examples" / "ios"
SWIFT_TYPES = {"Int": int, "Double": float, "String": str, "[Float]": list}


def golden_json(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, FOLDER / "golden_json.py", *arguments]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


def test_the_json_is_what_swift_decodes_and_the_self_test_passes_on_it(small_bundle: Callable[..., Path]) -> None:
    folder = small_bundle()
    done = golden_json(folder)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    struct = re.search(
        r"struct Golden: Decodable \{(.*?)\}", (FOLDER / "Sources/selftest/main.swift").read_text(), re.S
    )
    assert struct is not None
    fields = dict(re.findall(r"let (\w+): (\S+)", struct[1]))
    assert {name: type(value) for name, value in data.items()} == {n: SWIFT_TYPES[t] for n, t in fields.items()}
    assert all(type(value) is float for value in data["logits"])

    # as main.swift does it: 4 bytes a pixel, the last one skipped; SQNR of what the model gives for that picture
    pixels = np.frombuffer(base64.b64decode(data["rgbaBase64"], validate=True), np.uint8)
    picture = pixels.reshape(data["height"], data["width"], 4)
    bundle = Bundle.open(folder)
    np.testing.assert_array_equal(picture[..., :3], bundle.golden["input"][0])
    assert (picture[..., 3] == 255).all()
    with load_runner(bundle) as runner:
        (logits,) = runner.run({"image": np.ascontiguousarray(picture[None, ..., :3])}).values()
    signal = sum(v**2 for v in data["logits"])
    noise = sum((v - float(w)) ** 2 for v, w in zip(data["logits"], logits[0], strict=True))
    assert 10 * math.log10(signal / noise) >= data["minimumSqnrDb"] == bundle.manifest.tolerance.sqnr_db


def test_swift_asks_for_names_that_the_package_has() -> None:
    """tests/test_coreml.py holds a package to the same names."""
    text = (FOLDER / "Sources/DualTokenClassifier/Classifier.swift").read_text()
    assert set(re.findall(r'featureValue\(for: "(\w+)"\)', text)) == {LABEL_PROBABILITIES, "logits"}
    inputs = re.findall(r'inputDescriptionsByName\["(\w+)"\]', text) + re.findall(r'dictionary: \["(\w+)"', text)
    assert set(inputs) == {make_contract("image", (64, 64), 1).tensor.name}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "usage: golden_json.py BUNDLE"),
        (("a", "b"), 2, "usage:"),
        (("no-such-bundle",), 4, "error: no bundle at"),
    ],
)
def test_bad_arguments(arguments: tuple[str, ...], code: int, words: str) -> None:
    done = golden_json(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(words)


def test_a_bundle_of_tensors(own_bundle: Path) -> None:
    manifest = own_bundle / "manifest.json"
    data = json.loads(manifest.read_text())
    data["input"]["kind"] = "tensor"
    manifest.write_text(json.dumps(data))
    done = golden_json(own_bundle)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--input image" in done.stderr
