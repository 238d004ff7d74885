"""The Android example is not built here: what it reads of a bundle and how it cuts pictures is held by parsing it."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dualtoken_deploy.data.images import resize_and_crop

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "android"
SOURCES = FOLDER / "app" / "src"
COMMON = SOURCES / "main" / "kotlin" / "org" / "dualtoken" / "demo"


def kotlin(name: str) -> str:
    return (COMMON / name).read_text(encoding="utf-8")


def test_it_reads_what_a_manifest_has(small_bundle: Callable[..., Path]) -> None:
    manifest = json.loads((small_bundle() / "manifest.json").read_text(encoding="utf-8"))
    text = kotlin("Contract.kt")
    assert re.findall(r'JSONObject\(json\)\.getJSONObject\("(\w+)"\)', text) == ["input"]
    read = re.findall(r'input\.get(\w+)\("(\w+)"\)', text)
    kinds = {"JSONArray": list, "Double": float, "String": str}
    assert {name for _, name in read} == {"size", "crop_ratio", "kind", "resize", "color"}
    for kind, name in read:
        assert isinstance(manifest["input"][name], kinds[kind]), name
    wanted = dict(re.findall(r'getString\("(\w+)"\) == "(\w+)"', text))
    assert {name: manifest["input"][name] for name in wanted} == wanted
    assert "getInt(0)" in text.split("val height")[1].split("\n")[0]  # size is height, width


def cropped(width: int, height: int, size: tuple[int, int], ratio: float) -> tuple[int, int, int, int]:
    """What Preprocessing.kt's `crop` gives, by its own expressions."""
    body = kotlin("Preprocessing.kt").split("fun crop(")[1].split("\n}")[0]
    names = {
        "pictureWidth": width,
        "pictureHeight": height,
        "max": max,
        "clip": np.clip,
        "rounded": lambda v: int(v + 0.5),
    }
    names |= {"contract_width": size[1], "contract_height": size[0], "contract_cropRatio": ratio}
    for name, expression in re.findall(r"val (\w+) = (.+)", body):
        python = (
            re.sub(r"contract\.(\w+)", r"contract_\1", expression).replace(".toDouble()", "").replace("maxOf", "max")
        )
        python = re.sub(r"Math\.round\((.+)\)\.toInt\(\)\.coerceIn\((.+)\)", r"int(clip(rounded(\1), \2))", python)
        assert re.fullmatch(r"[\w\s.,()*/+-]+", python), python
        names[name] = eval(python, {"__builtins__": {}, "int": int}, names)
    returned = re.search(r"return Crop\((.+)\)", body)
    assert returned is not None
    parts = [part.replace("/ 2", "// 2") for part in returned[1].split(", ")]
    left, top, wide, high = (eval(part, {"__builtins__": {}}, names) for part in parts)
    return left, top, wide, high


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (224, 224), (3000, 1001)])
@pytest.mark.parametrize("size", [(224, 224), (192, 256)])
def test_it_cuts_what_the_bundle_was_validated_on(width: int, height: int, size: tuple[int, int]) -> None:
    """A picture whose pixels are their own coordinates: the corners of what the package cuts are those of the app."""
    ramp = np.zeros((height, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.linspace(0, 255, width)[None], np.linspace(0, 255, height)[:, None]
    ours = resize_and_crop(ramp, size, 0.875).astype(float)
    left, top, wide, high = cropped(width, height, size, 0.875)
    assert ours[:, 0, 0].mean() == pytest.approx(255 * left / width, abs=3)
    assert ours[:, -1, 0].mean() == pytest.approx(255 * (left + wide) / width, abs=3)
    assert ours[0, :, 1].mean() == pytest.approx(255 * top / height, abs=3)
    assert ours[-1, :, 1].mean() == pytest.approx(255 * (top + high) / height, abs=3)


def test_the_self_test_reads_golden_json() -> None:
    from examples.ios.golden_json import golden_json

    text = kotlin("SelfTest.kt")
    fields = set(re.findall(r'golden\.get\w+\("(\w+)"\)', text))
    assert fields <= set(re.findall(r'"(\w+)":', Path(golden_json.__code__.co_filename).read_text(encoding="utf-8")))
    assert fields == {"rgbaBase64", "logits", "minimumSqnrDb"}


def test_files_are_those_of_bundles_and_versions_those_of_the_extras() -> None:
    from dualtoken_deploy.targets.table import TARGETS

    gradle = (FOLDER / "app" / "build.gradle.kts").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for flavour, artifact, package in (("litert", "litert:litert", "ai-edge-litert"),
                                       ("executorch", "executorch-android", "executorch")):  # fmt: skip
        (file,) = TARGETS[flavour].files
        model = SOURCES / flavour / "kotlin" / "org" / "dualtoken" / "demo" / "Model.kt"
        assert f'"{file}"' in model.read_text(encoding="utf-8")
        assert 'noCompress += listOf("tflite", "pte")' in gradle
        version = re.search(rf"{artifact}:(\d+\.\d+)", gradle)
        low = next(re.search(r">=([\d.]+)", e) for e in extras[flavour] if e.startswith(f"{package}>"))
        assert version is not None
        assert low is not None
        assert version[1] == low[1]
