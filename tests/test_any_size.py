"""One bundle for every image size, and weights of 224 at larger sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dualtoken_deploy import Bundle, create_model, export, load_runner
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.targets.eager import load as load_eager
from dualtoken_deploy.targets.load import RunnerOptions
from dualtoken_deploy.targets.table import TARGETS
from tests.numerics import assert_close

SIZES = [(64, 64), (224, 224), (97, 65), (223, 301), (288, 384)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("variant", "options"),
    [("tiny-mix", {}), ("tiny-mix", {"local_attention": "window"}), ("tiny-mix", {"global_tokens": 0}),
     ("tiny-lightvit", {}), ("tiny-dualformer", {})],
)  # fmt: skip
def test_the_form_for_any_size_is_eager_at_every_size(
    variant: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    model = random_model(variant, num_classes=5, **options).double()
    image = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(deploy_form(model, any_size=True).module(image), model(image), relative=1e-10)


@pytest.mark.parametrize(("variant", "target"), [("tiny-mix", "openvino"), ("tiny-dualformer", "onnxruntime")])
def test_one_bundle_takes_five_sizes(small_bundle: Callable[..., Path], variant: str, target: str) -> None:
    bundle = Bundle.open(small_bundle(target, variant=variant, image_size="dynamic"))
    assert bundle.manifest.input.tensor.shape == (1, "height", "width", 3)
    rng = np.random.default_rng(0)
    with load_runner(bundle, threads=1) as runner, load_eager(bundle, RunnerOptions()) as eager:
        for size in SIZES:
            feed = {"image": rng.integers(0, 256, (1, *size, 3), dtype=np.uint8)}
            assert_close(runner.run(feed)["logits"], eager.run(feed)["logits"], sqnr_db=105)


def test_a_target_without_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fixed = replace(TARGETS["openvino"], any_size=False)
    monkeypatch.setattr("dualtoken_deploy.pipeline.plan.get_target", lambda _: fixed)
    with pytest.raises(UsageError, match="targets that do: onnxruntime"):
        export("t-mix", "openvino", image_size="dynamic", output=tmp_path / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("variant", "options"), [("lightvit-t", {}), ("t", {"local_attention": "window"})])
def test_windows_need_a_size(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="window attention takes no dynamic image size"):
        export(variant, "onnxruntime", image_size="dynamic", output=tmp_path / "b", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["tiny-mix", "tiny-lightvit", "tiny-dualformer"])
@pytest.mark.parametrize("side", [288, 384])
def test_weights_of_224_serve_larger_images(variant: str, side: int, tmp_path: Path) -> None:
    """No parameter depends on the image size; DualToken-ViT brings X_ga to the tokens' grid by interpolation."""
    model = random_model(variant, num_classes=5, image_size=224)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    larger = create_model(variant, num_classes=5, image_size=side, weights=tmp_path / "w.safetensors")
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        assert torch.equal(larger(image), model(image))
        assert_close(deploy_form(larger).module(image), model(image), sqnr_db=110)
