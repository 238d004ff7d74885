"""Core AI: converted and run by Apple's own tools, and as the witness of the MIL reference runner."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.errors import ConversionError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models import dualtoken_vit, registry
from dualtoken_deploy.models.registry import Variant, random_model
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.coreai import export as coreai
from dualtoken_deploy.targets.coreai.runner import ENGINE
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.numerics import assert_close, shown

# At 224, where G's grid is that of stage 3: its optimiser miscompiles the resizing of other sizes (see below).
SMALL_224: dict[str, Any] = {"variant": "tiny-mix", "image_size": 224, "num_classes": 10, "input_kind": "tensor"}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coreai")


@pytest.fixture(scope="module")
def bundle(store: Path, tiny_variant: None) -> Bundle:
    export(target="coreai", output=store / "fp32", **SMALL_224)
    return Bundle.open(store / "fp32")


def test_the_saved_asset_computes_what_eager_computes(bundle: Bundle) -> None:
    assert shown(bundle).sqnr_db >= 100
    assert bundle.manifest.measured.engine == ENGINE
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    assert inspection.executed_precision["conv2d"] == "float32 (interpreter)"
    assert inspection.operators["conv2d"] == 5 + 1 + 1  # stem, Conv Encoder, stage 1's downsampling


def test_float16_is_run_to_the_end(store: Path, tiny_variant: None) -> None:
    """At 96 with three global tokens a side, so that none are resized: the interpreter is slow in float16."""
    folder = store / "fp16"
    export(target="coreai", precision="fp16", output=folder, variant="tiny-mix", image_size=96, num_classes=10,
           global_tokens=3)  # fmt: skip
    half = Bundle.open(folder)
    assert shown(half).sqnr_db >= 40
    assert half.manifest.measured.engine == ENGINE
    assert half.manifest.executed_precision["conv2d"] == "float16 (interpreter)"
    with load_runner(half) as runner:
        logits = runner.run({"image": half.golden["input"]})["logits"]
    assert_close(logits, half.golden["logits"], sqnr_db=40)
    assert not np.array_equal(logits, half.golden["logits"])  # it is not float32 that ran


def test_an_independent_witness_of_the_reference_runner(bundle: Bundle, store: Path) -> None:
    """The same program through Apple's runtime and through ours, on noise and on the edges: at least 110 dB."""
    export(target="coreml", layout="plain", output=store / "mil", **SMALL_224)
    rng = np.random.default_rng(5)
    noise = rng.standard_normal((2, 1, 3, 224, 224)).astype(np.float32)
    with load_runner(bundle) as apples, load_runner(store / "mil") as ours:
        for image in (*noise, np.zeros_like(noise[0]), 3 * np.ones_like(noise[0])):
            feed = {"input": image}
            assert_close(ours.run(feed)["logits"], apples.run(feed)["logits"], sqnr_db=110)


def test_a_miscompiled_program_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 64 coreai-core 1.0.0b3 gets stage 2's global tokens wrong without a word: export's own check finds it."""
    staged = Variant("staged", "a block a stage", replace(dualtoken_vit.T, blocks=(1, 1, 1), token_mlp="mix"))
    monkeypatch.setattr(registry, "VARIANTS", MappingProxyType({**registry.VARIANTS, staged.name: staged}))
    with pytest.raises(ToleranceError, match="out of tolerance"):
        export(target="coreai", output=tmp_path / "b", **{**SMALL_224, "variant": staged.name, "image_size": 64})
    assert not (tmp_path / "b").exists()


def test_a_compiler_that_ends_its_process_is_an_error(tmp_path: Path) -> None:
    """A merge as other targets have it makes the optimiser abort; that is one line, and no end of this process."""
    model = random_model("tiny-mix", 0, image_size=(64, 64))
    merge = deploy_form(model).module.get_submodule("merge2")

    class Alone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.merge = merge

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.merge(x, (4, 4))
            return out

    alone = Alone()
    program = torch.export.export(alone, (torch.zeros(1, 16, 96),))
    contract = InputContract(TensorSpec("x", "float32", "NC", (1, 16, 96)), "tensor", (4, 4))
    request = Request(
        "fp32", contract, (TensorSpec("y", "float32", "NC", (1,)),), None, {"variant": "merge", "weights": "-"}
    )
    with pytest.raises(ConversionError, match="LLVM ERROR"):
        coreai._convert(program, alone, request, tmp_path / "m.aimodel", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"batch": "dynamic"}, "fixed shapes"), ({"opset": 20}, "opset"), ({"precision": "int8"}, "fp16")],
)
def test_what_core_ai_does_not_have(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export(target="coreai", output=tmp_path / "b", **{**SMALL_224, **options})


def test_its_time_is_no_devices(bundle: Bundle) -> None:
    with pytest.raises(MissingError, match="not timed"):
        bench([bundle])
    with pytest.raises(MissingError, match="CPU alone"):
        load_runner(bundle, device="gpu")
