"""The tokenizer: residual quantization against its definition, figures against scikit-image's, bundles and training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dualtoken_deploy import Bundle, create_model, export
from dualtoken_deploy.data.folders import open_parts
from dualtoken_deploy.deploy import RULES, deploy_form
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.models import systems, tokenizer
from dualtoken_deploy.models.own_sources import other_source
from dualtoken_deploy.models.registry import randomise
from dualtoken_deploy.models.systems import create_system
from dualtoken_deploy.models.tokenizer import ResidualQuantizer
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS, describe_weights
from dualtoken_deploy.pipeline.plan import plan
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets.onnx.moves import without_idle_moves
from dualtoken_deploy.targets.onnx.quantize import float_graph
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.tasks.quality import psnr_db, ssim
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.tasks.tokenize import code_map
from dualtoken_deploy.use.evaluate import evaluate
from dualtoken_deploy.use.predict import draw, predict
from dualtoken_deploy.use.validate import gate, parse_minima, validate
from tests.commands import fails
from tests.numerics import assert_close
from tests.small import TINY

NAME = "tiny-tokenizer"


@pytest.fixture(scope="module", autouse=True)
def tiny_tokenizer(tiny_variant: None) -> Iterator[None]:
    """A small tokenizer known to this process."""
    config = replace(tokenizer.S, backbone=TINY.name, codes=32, code_dim=8, decoder=(16, 16, 8), num_classes=2)
    row = systems.System(NAME, "small", "tokenize", config, systems.TOKENIZER_OPTIONS)
    real = systems.SYSTEMS
    systems.SYSTEMS = MappingProxyType({**real, NAME: row})
    yield
    systems.SYSTEMS = real


@pytest.mark.parametrize(
    ("target", "precision", "int8", "wanted"),
    [("onnxruntime", "fp32", False, (100.0, 0.999)), ("litert", "fp16", False, (15.0, 0.9)),
     ("openvino", "bf16", False, (5.0, 0.5)), ("coreml", "palettized8", False, (15.0, 0.9)),
     ("coreml", "palettized4", False, (3.0, 0.0)), ("coreml", "palettized4", True, (-300.0, 0.0)),
     *((target, precision, True, (-300.0, 0.0)) for target, precision in
       (("onnxruntime", "int8"), ("tensorrt-rtx", "fp8"), ("tensorrt-rtx", "int4"), ("litert", "int8-weights")))],
)  # fmt: skip
def test_what_is_judged_by_its_loss_has_no_other_limit(
    target: str, precision: str, int8: bool, wanted: tuple[float, float]
) -> None:
    """Held to float32's equal codes as well, FP8 and weights in few bits were refused after their search."""
    planned = plan(other_source(NAME), target, precision, int8=Int8Options("shapes") if int8 else None)
    found = planned.tolerance(("reconstruction", "pixel_codes", "semantic_codes", "logits"))
    assert (found.sqnr_db, found.top1_agreement) == wanted


def quantizer(codes: int = 20, width: int = 6, depth: int = 4) -> ResidualQuantizer:
    torch.manual_seed(0)
    return ResidualQuantizer(codes, width, depth).double().eval()


def test_the_nearest_code_then_the_nearest_to_the_rest() -> None:
    made, x = quantizer(), torch.randn(2, 7, 6, dtype=torch.float64)
    found = made(x)
    for image, place in np.ndindex(2, 7):
        rest = x[image, place].clone()
        for depth in range(4):
            distances = [float((rest - code).norm()) for code in made.codebook]
            assert int(found.codes[image, place, depth]) == int(np.argmin(distances))
            rest = rest - made.codebook[int(np.argmin(distances))]
        torch.testing.assert_close(found.sum[image, place], x[image, place] - rest)


@pytest.mark.parametrize("rules", [None, list(RULES)], ids=["default", "all"])
def test_the_deploy_form_keeps_what_the_model_computes(rules: list[str] | None) -> None:
    """Backbone rewritten, codes the same: in float64 no vector of these is near a border."""
    model = create_system(NAME).double()
    randomise(model, 0)
    form = deploy_form(model, rules, (64, 64))
    assert form.rules["fold_norm_affine"] > 0
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for found, wanted in zip(form.module(image), model(image), strict=True):
            assert_close(found.double(), wanted.double(), relative=1e-10)


def test_the_margin_is_the_way_to_the_next_code() -> None:
    """A step of the margin along the line between the two nearest codes lies on their border."""
    made = quantizer(depth=1)
    x = torch.randn(1, 1, 6, dtype=torch.float64)
    margin = float(made.margin(x)) * float(x.norm())
    first = int(made(x).codes)
    reached = []
    for code in range(len(made.codebook)):
        if code != first:
            way = made.codebook[code] - made.codebook[first]
            way = way / way.norm()
            reached.append(int(made(x + 1.001 * margin * way).codes) != first)
            assert int(made(x + 0.999 * margin * way).codes) == first
    assert any(reached)


def test_codebooks_follow_what_chooses_them_and_rare_codes_restart() -> None:
    made = quantizer(codes=8, depth=1).train()
    centres = 3 * torch.randn(4, 6, dtype=torch.float64)
    for _ in range(200):
        noise = 0.05 * torch.randn(8, 16, 6, dtype=torch.float64)
        x = centres[torch.randint(4, (8, 16))] + noise
        x.requires_grad_(True)
        found = made(x)
    (found.sum.sum() + found.commitment).backward()
    assert x.grad is not None
    assert float((x.grad - 1).abs().max()) < 0.1  # straight through, and a little commitment
    near = torch.cdist(centres, made.codebook).amin(1)
    assert float(near.max()) < 0.5
    assert float(made.counts.min()) > 0.01  # none is dead


def test_figures_are_scikit_images() -> None:
    random = np.random.default_rng(0)
    a = random.random((3, 24, 40))
    b = (a + 0.1 * random.normal(size=a.shape)).clip(0, 1)
    assert psnr_db(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1))
    wanted = structural_similarity(
        a, b, channel_axis=0, data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(a, b) == pytest.approx(wanted, abs=1e-3)  # its window has the same radius, and its borders are cut
    assert psnr_db(a, a) == 100.0
    assert ssim(a, a) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def tokens(bundle_store: Path, tiny_tokenizer: None) -> Callable[..., Path]:
    def make(target: str = "onnxruntime", precision: str = "fp32") -> Path:
        folder = bundle_store / f"tokens-{target}-{precision}"
        if not folder.exists():
            export(NAME, target, precision, output=folder)
        return folder

    return make


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "coreml"])
def test_codes_survive_export(tokens: Callable[..., Path], target: str) -> None:
    bundle = Bundle.open(tokens(target))
    measured = bundle.manifest.measured
    assert measured.near_ties is not None
    assert measured.near_ties.images <= 2
    (result,) = validate([bundle], "photographs", limit=6)
    assert result.agreement is not None
    assert result.agreement >= 0.999
    assert {f"equal_pixel_codes_{d}" for d in (1, 2, 3, 4)} < set(result.likeness.more)
    names = [(o.name, o.dtype, o.shape) for o in bundle.manifest.outputs]
    assert names[1:3] == [("pixel_codes", "int32", (1, 64, 4)), ("semantic_codes", "int32", (1, 4, 4))]


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of two classes."""
    from dualtoken_deploy.data.built_in import built_in_folder

    folder = tmp_path_factory.mktemp("two")
    for name in ("circle", "texture-checks"):
        (folder / name).mkdir()
        picture = min((built_in_folder("shapes") / "val" / name).iterdir())
        (folder / name / picture.name).write_bytes(picture.read_bytes())
    return folder


def test_psnr_and_probe_are_gates(
    tokens: Callable[..., Path], two_shapes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The untrained one draws noise; half precision is held to each figure by the same words."""
    words = ("validate", tokens("onnxruntime", "fp16"), "--data", two_shapes)
    (found,) = validate([tokens("onnxruntime", "fp16")], two_shapes)
    assert found.scores is not None
    for name in ("psnr_db", "ssim", "probe_top1"):
        least = found.scores[name] + 0.01
        code, text = fails(capsys, *words, "--minimum", f"{name}={least}")
        assert (code, f"{name} {found.scores[name]:.4g} is below" in text) == (5, True), text
    gate([found], **parse_minima([f"psnr_db={found.scores['psnr_db']}", f"probe_top1={found.scores['probe_top1']}"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("psnr_db",), "METRIC=VALUE"),
        (("psnr_db=high",), "METRIC=VALUE"),
        (("psnr_db=nan",), "METRIC=VALUE"),
        (("mse=1",), "valid metrics are"),
        (("probe_top1=0.1", "top1=0.1"), "top1 was not measured"),
    ],
    ids=" ".join,
)
def test_minima_that_are_none(
    words: tuple[str, ...],
    message: str,
    tokens: Callable[..., Path],
    two_shapes: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [part for word in words for part in ("--minimum", word)]
    code, text = fails(capsys, "validate", tokens(), "--data", two_shapes, *given)
    assert (code, message in text) == (2, True), text


def test_no_file_scatters(tokens: Callable[..., Path]) -> None:
    import onnx

    kinds = {node.op_type for node in onnx.load(tokens() / "model.onnx").graph.node}
    assert "ArgMin" in kinds
    assert not [kind for kind in kinds if kind.startswith("Scatter") or kind in ("Loop", "Scan", "If")]


COMPILE = """import sys, openvino as ov
core = ov.Core()
core.compile_model(core.read_model(sys.argv[1]), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})"""


def test_openvino_takes_a_product_behind_a_map_that_was_turned_back(tmp_path: Path) -> None:
    """One product in integers, at the tokens of the pixel codes, is enough for OpenVINO 2026.4 to refuse the file (in a
    process, since it may crash as well). Where it does no longer, the rewrite may go."""
    import onnx

    source = other_source(NAME)
    contract = source.contract("image", 1, False)
    request = Request("fp32", contract, source.outputs(contract.size, 1), None, {}, task=source.task)
    model = float_graph(source.make(), request, DEFAULT_RULES, lambda _: None).model
    place = next(i for i, node in enumerate(model.graph.node) if node.output[0].startswith("to_pixel"))
    product = model.graph.node[place]
    assert product.op_type == "MatMul"
    weight = next(onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == product.input[1])
    whole = np.rint(weight / np.abs(weight).max() * 127).astype(np.int8)
    for name, value in {"step": np.float32(0.03), "zero": np.uint8(120), "whole": whole}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    pairs = [
        onnx.helper.make_node("QuantizeLinear", [product.input[0], "step", "zero"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["dq"]),
        onnx.helper.make_node("DequantizeLinear", ["whole", "step"], ["weight"]),
    ]
    for node in reversed(pairs):
        model.graph.node.insert(place, node)
    product.input[:] = ["dq", "weight"]
    done = {}
    for name, made in (("turned", model), ("mended", without_idle_moves(model))):
        onnx.save(made, tmp_path / f"{name}.onnx")
        command = [sys.executable, "-c", COMPILE, str(tmp_path / f"{name}.onnx")]
        done[name] = subprocess.run(command, capture_output=True, check=False).returncode
    assert done["mended"] == 0
    assert done["turned"] != 0


def test_a_picture_is_drawn_beside_its_codes(tokens: Callable[..., Path], photograph: Path, tmp_path: Path) -> None:
    (answer,) = predict(tokens(), [photograph])
    draw(answer, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.size == (4 * 64 + 12, 64)
    (row,) = answer.to_json()["tokens"]
    assert (row["pixel_codes"], row["semantic_codes"]) == (256, 16)


def test_a_code_map_has_a_colour_a_code() -> None:
    found = code_map(np.array([0, 1, 1, 0]), (8, 8))
    assert np.array_equal(found[0, 0], found[7, 7])
    assert np.array_equal(found[0, 7], found[7, 0])
    assert not np.array_equal(found[0, 0], found[0, 7])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("--variant", "dualtoken-tokenizer-s", "--image-size", "72"), "32 divides"),
        (("--variant", "dualtoken-tokenizer-s", "--option", "wheels=1"), "valid options"),
        (("--variant", "dualtoken-tokenizer-s", "--option", "depth=0"), "at least 1"),
    ],
    ids=["size", "option", "number"],
)
def test_bad_input(command: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capsys, "export", "--target", "onnx", *command, "--output", str(tmp_path / "bundle"))
    assert (code, message in line) == (2, True), line


def test_training_learns_to_draw(tmp_path: Path) -> None:
    from dualtoken_deploy.data.built_in import built_in_folder
    from dualtoken_deploy.train import checkpoint, make_config, train

    for part, count in (("train", 8), ("val", 3)):
        for name in ("circle", "texture-checks"):
            pictures = sorted((built_in_folder("shapes") / part / name).iterdir())[:count]
            (tmp_path / "data" / part / name).mkdir(parents=True)
            for picture in pictures:
                (tmp_path / "data" / part / name / picture.name).write_bytes(picture.read_bytes())
    teacher = create_model(TINY.name, num_classes=2, image_size=64)
    header = {"variant": TINY.name, "options": {}, "image_size": [64, 64], "labels": ["a", "b"], "data": "none"}
    checkpoint.save_weights(tmp_path / "teacher.safetensors", teacher.state_dict(), header)
    config = make_config(
        variant=NAME, data=str(tmp_path / "data"), task="tokenize", image_size=(64, 64), epochs=5, batch_size=8,
        lr=0.4, warmup_epochs=0.5, init=str(tmp_path / "teacher.safetensors"),
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    rows: list[Any] = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert result.metric == "psnr_db"
    assert float(rows[-1].split(",")[2]) < 0.9 * float(rows[0].split(",")[2])  # the loss
    found = evaluate(tmp_path / "run", tmp_path / "data")
    assert found.scores["psnr_db"] == pytest.approx(result.best, abs=0.05)
    assert get_task("tokenize").metrics == ("probe_top1", "psnr_db", "ssim")


def test_the_weights_that_ship_draw_what_they_see() -> None:
    """On 40 pictures of the held-out part; the whole part's figures are in the JSON beside the weights."""
    said = describe_weights("shapes-tokens")
    assert said is not None
    assert (said.task, said.variant, said.image_size) == ("tokenize", "dualtoken-tokenizer-s", (64, 64))
    beside = json.loads(BUILT_IN_WEIGHTS["shapes-tokens"].with_suffix(".json").read_text())
    train, val = open_parts("shapes")
    assert beside["data_sha256"] == train.digest() + val.digest()
    scores = evaluate("shapes-tokens", "shapes", limit=40).scores
    assert scores["psnr_db"] >= 21
    assert scores["probe_top1"] >= 0.65
