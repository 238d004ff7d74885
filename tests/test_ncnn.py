"""ncnn: converted by pnnx, which drops what it cannot convert and ends with 0; run by ncnn's own library."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, UsageError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.targets.ncnn.export import check_converted
from dualtoken_deploy.targets.ncnn.runner import BINARY, PARAM, layers
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.numerics import assert_close


@pytest.fixture(scope="session")
def made(small_bundle: Callable[..., Path]) -> Callable[..., Bundle]:
    def make(precision: str = "fp32", variant: str = "tiny-mix") -> Bundle:
        return Bundle.open(small_bundle("ncnn", precision, **({} if variant == "tiny-mix" else {"variant": variant})))

    return make


@pytest.fixture
def own(made: Callable[..., Bundle], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made().path, tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("variant", "precision", "least_db"),
    [("tiny-mix", "fp32", 100), ("tiny-mix", "fp16", 45), ("tiny-lightvit", "fp32", 100)],
)
def test_the_saved_files_compute_what_eager_computes(
    made: Callable[..., Bundle], variant: str, precision: str, least_db: float
) -> None:
    bundle = made(precision, variant=variant)
    with load_runner(bundle, threads=1) as runner:
        logits = runner.run({"image": bundle.golden["input"]})["logits"]
    assert_close(logits, bundle.golden["logits"], sqnr_db=least_db)
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    wanted = "float32 (float16 weights)" if precision == "fp16" else "float32"
    assert inspection.executed_precision["Convolution"] == wanted


def test_float16_stores_weights_in_half_the_bytes(made: Callable[..., Bundle]) -> None:
    whole, half = ((made(p).path / BINARY).stat().st_size for p in ("fp32", "fp16"))
    assert half < 0.52 * whole


def test_convolutions_are_all_there(made: Callable[..., Bundle]) -> None:
    """Of eager, which pnnx does not know."""
    kinds = [layer.kind for layer in layers(made().path / PARAM)]
    eager = rebuild(made().manifest)
    convolutions = sum(type(m).__name__ == "Conv2d" for m in eager.modules())
    assert sum(kind in ("Convolution", "ConvolutionDepthWise") for kind in kinds) == convolutions


def test_what_pnnx_says_is_read() -> None:
    """DualFormer's comparisons, of which ncnn has none; pnnx ends with 0 all the same."""
    check_converted("ignored lines do not begin so\nFLOPS = 1\n", 0)
    with pytest.raises(ConversionError, match=r"no torch\.ge, which"):
        check_converted("x\nignore torch.ge torch.ge_0 param other=0\n", 0)
    with pytest.raises(ConversionError, match="ended with 255: segfault"):
        check_converted("segfault\n", 255)


def test_it_is_timed_as_any_other(made: Callable[..., Bundle]) -> None:
    row, *_ = bench([made()], rounds=1, seconds=0.05).contestants
    assert row.p50_ms > 0


def damage(folder: Path, how: str) -> None:
    param = folder / PARAM
    lines = param.read_text().splitlines()
    if how == "cut":
        lines = lines[: len(lines) // 2]
    elif how == "another format":
        lines[0] = "7767518"
    elif how == "unknown layer":
        lines[5] = lines[5].replace(lines[5].split()[0], "MyLayer", 1)
    elif how == "garbled":
        lines[7] = "Convolution"
    elif how == "no output":
        lines = [line.replace(" out0", " out9") for line in lines]
    else:
        binary = folder / BINARY
        binary.write_bytes(binary.read_bytes()[:1000])
    param.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "cut short"), ("another format", "no ncnn .param"), ("unknown layer", "does not have"),
     ("garbled", "damaged at its line 8"), ("no output", "no output out0"), ("weights", "cannot load")],
)  # fmt: skip
def test_files_that_cannot_run_are_one_line(own: Path, how: str, words: str) -> None:
    damage(own, how)
    with pytest.raises(BundleError, match=words) as caught:
        load_runner(Bundle.open(own, verify=False))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"), [({"batch": "dynamic"}, "fixed shapes"), ({"batch": 2}, "one picture at a time"),
                           ({"opset": 20}, "opset"), ({"precision": "int8"}, "fp32, fp16")],
)  # fmt: skip
def test_what_ncnn_does_not_have(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"variant": "tiny-mix", "target": "ncnn", "output": tmp_path / "b"} | options
    with pytest.raises(UsageError, match=words):
        export(**given)


def test_other_devices_are_named_as_missing(made: Callable[..., Bundle]) -> None:
    with pytest.raises(MissingError, match="CPU alone"):
        load_runner(made(), device="vulkan")


def test_outputs_do_not_change_with_the_next_run(made: Callable[..., Bundle]) -> None:
    with load_runner(made()) as runner:
        first = runner.run({"image": made().golden["input"]})["logits"]
        kept = first.copy()
        runner.run({"image": 255 - made().golden["input"]})
    np.testing.assert_array_equal(first, kept)
