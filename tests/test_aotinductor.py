"""AOTInductor: one package of the small model, compiled here, and the checks around it. Compiling takes most of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError, MissingError
from dualtoken_deploy.targets.aotinductor.runner import NativeCode, isa_of, obstacles, read_calls
from dualtoken_deploy.targets.eager import load as load_eager
from dualtoken_deploy.targets.load import Runner, RunnerOptions
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle, product_precision
from tests.foreign import check_two_outputs
from tests.numerics import assert_close
from tests.small import SMALL

MakeBundle = Callable[..., Path]

BF16_SQNR_DB = 36.0  # measured 46 dB on this model; the target's gate is 30


@pytest.fixture(scope="session", autouse=True)
def compiled_in_less_time() -> Iterator[None]:
    """Without trying every instruction set that this CPU says it has, and without optimizing what calls the kernels: a
    third of the compiler's time."""
    from torch._inductor import config

    with config.patch({"cpp.vec_isa_ok": True, "aot_inductor.compile_wrapper_opt_level": "O0"}):
        yield


@pytest.fixture(scope="session")
def package(small_bundle: MakeBundle) -> Bundle:
    """bfloat16, the type that no other target has, for any batch."""
    return Bundle.open(small_bundle("aotinductor", "bf16", batch="dynamic"))


def test_the_package_computes_what_eager_computes(package: Bundle) -> None:
    images = np.random.default_rng(7).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    with load_runner(package, threads=1) as runner, load_eager(package, RunnerOptions()) as eager:
        assert isinstance(runner, Runner)
        expected = eager.run({"image": images})["logits"]
        together = runner.run({"image": images})["logits"]
        assert together.dtype == np.float32
        assert_close(together, expected, sqnr_db=BF16_SQNR_DB)
        kept = together.copy()
        alone = np.concatenate([runner.run({"image": images[i : i + 1]})["logits"] for i in range(5)])
        # other sizes take other kernels, whose bfloat16 sums round elsewhere
        assert_close(alone, together, sqnr_db=BF16_SQNR_DB)
        assert (together == kept).all()


def test_every_product_runs_in_bfloat16(package: Bundle) -> None:
    inspection = inspect_bundle(package)
    check_promise(inspection)
    assert product_precision(inspection.executed_precision) == "bfloat16"
    assert set(inspection.executed_precision.values()) == {"bfloat16"}
    assert inspection.operators["Conv2d"] == 5 + 1 + 1  # stem, Conv Encoder, stage 1's downsampling
    # attention is a call of its own where torch fuses it, and two batched products where it does not: twice a block
    fused, products = (inspection.operators.get(k, 0) for k in ("ScaledDotProductAttention", "MatMul"))
    assert 2 * fused + products >= 2 * 2 * 2


def test_a_foreign_module_is_compiled(package: Bundle, tmp_path: Path) -> None:
    """`package`: behind it, since torch tries the compiler's vector instructions once a process."""
    check_two_outputs("aotinductor", tmp_path / "bundle")


def test_the_manifest_says_what_the_code_depends_on(package: Bundle) -> None:
    manifest = package.manifest
    assert manifest.build is not None
    built = manifest.build.typed(NativeCode)
    assert (manifest.state, built.device, built.torch) == ("complete", "cpu", torch.__version__)
    assert manifest.files.keys() == {"model.pt2", "golden.npz", "labels.txt", "README.md", "bom.cdx.json"}
    assert obstacles(built, isa_of(manifest), None) == []


def changed(manifest: Manifest, build: dict[str, Any], **fields: Any) -> Manifest:
    assert manifest.build is not None
    return replace(manifest, build=Build(details={**manifest.build.details, **build}), **fields)


@pytest.mark.parametrize(
    ("build", "device", "reason"),
    [
        ({"system": "linux-aarch64"}, None, "compiled on linux-aarch64"),
        ({"torch": "2.12.0"}, None, r"compiled by torch 2\.12\.0"),
        ({}, "cuda", "compiled for cpu, not for device 'cuda'"),
        ({"device": "cuda", "compute_capability": "9.0"}, "cuda", "no CUDA device|compute capability 9.0"),
    ],
)
def test_another_machine_is_told_before_loading(
    build: dict[str, Any], device: str | None, reason: str, package: Bundle
) -> None:
    bundle = Bundle(package.path, changed(package.manifest, build))
    with pytest.raises(MissingError, match=reason):
        load_runner(bundle, device=device)


def test_a_cpu_without_its_instructions_is_told(package: Bundle) -> None:
    assert package.manifest.build is not None
    isa = isa_of(package.manifest) | {"amx_fp16_of_tomorrow"}
    found = obstacles(package.manifest.build.typed(NativeCode), isa, None)
    assert found == ["this CPU lacks amx_fp16_of_tomorrow"]


def test_a_package_that_is_none(package: Bundle, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").write_bytes(b"no archive")
    with pytest.raises(BundleError, match="cannot load"):
        load_runner(Bundle(tmp_path, package.manifest))
    with pytest.raises(BundleError, match="does not say what it was compiled for"):
        load_runner(Bundle(tmp_path, replace(package.manifest, build=None)))


def test_without_a_compiler_or_the_device_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingError, match="needs a C\\+\\+ compiler and 'no-such-compiler'"):
        export(target="aotinductor", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    for device, reason in (("tpu", "for cpu or cuda"), ("cuda", "no CUDA device")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(MissingError, match=reason):
            export(target="aotinductor", device=device, output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_device_is_for_what_compiles(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", "--variant", "t-mix", "--target", target, "--device", "cpu", "--output", str(tmp_path / "b")]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "does not compile for a device" in capsys.readouterr().err


def test_calls_are_read_from_the_source() -> None:
    """Lines as AOTInductor of torch 2.13 writes them: the dtype is that of the first tensor that is known."""
    source = """
    constants_info_[0].name = "stem_weight";
    constants_info_[0].dtype = cached_torch_dtype_float16;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_convolution(buf0, stem_weight, &x, &buf2_handle));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, a, b, cached_torch_dtype_bfloat16, c, d, &buf21_handle));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(buf21, bias, wrap(reinterpret_tensor_wrapper(buf20, 2))));
    auto buf22 = std::move(buf21);  // reuse
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_bmm_out(buf99, buf22, buf97));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(buf2, buf98, buf97));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu__scaled_dot_product_flash_attention(buf98, &buf3_handle));
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_sort(buf21));
    """
    found = read_calls(source)
    assert found.operators == {"Conv2d": 1, "Linear": 2, "MatMul": 1, "ScaledDotProductAttention": 1}
    assert found.precision == {"Conv2d": ("float16",), "Linear": ("bfloat16", "float16"), "MatMul": ("bfloat16",),
                               "ScaledDotProductAttention": ("none",)}  # fmt: skip
