"""What exporters write: the graph's shape, its numbers against eager, and every target by the same tests."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.errors import ConversionError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.eager import load as load_eager
from dualtoken_deploy.targets.load import AsyncRunner, Runner, RunnerOptions
from dualtoken_deploy.targets.openvino.runner import has_bfloat16
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.classify import level_top1
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle, product_precision
from dualtoken_deploy.use.validate import gate, validate
from tests.conftest import PORTABLE, ROWS
from tests.numerics import assert_close, shown
from tests.small import SMALL, TINY

MakeBundle = Callable[..., Path]

# Tighter than the shipped gates where the measurement allows: fp32 reached 118 dB and more, fp16 52 dB and more.
SQNR_DB = {"fp32": 110.0, "fp16": 48.0}


@pytest.mark.parametrize(("target", "precision"), ROWS)
def test_saved_files_compute_what_eager_computes(small_bundle: MakeBundle, target: str, precision: str) -> None:
    bundle = Bundle.open(small_bundle(target, precision))
    rng = np.random.default_rng(7)
    for image in (
        *(preprocess(load_image(p), bundle.manifest.input) for p in open_dataset("photographs").images[:4]),
        rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        np.zeros((64, 64, 3), np.uint8),
        np.full((64, 64, 3), 255, np.uint8),
    ):
        feed = {"image": image[None]}
        with load_runner(bundle, threads=1) as runner, load_eager(bundle, RunnerOptions()) as eager:
            assert_close(runner.run(feed)["logits"], eager.run(feed)["logits"], sqnr_db=SQNR_DB[precision])


@pytest.mark.parametrize("target", PORTABLE)
def test_the_real_s_at_224(s_bundle: Callable[[str], Path], target: str) -> None:
    """S itself: tolerance, golden, and the matrix products in the precision that was asked for."""
    bundle = Bundle.open(s_bundle(target))
    assert shown(bundle).sqnr_db >= SQNR_DB["fp32"]
    assert (shown(bundle).images or 0) >= 16
    with load_runner(bundle) as runner:
        assert_close(runner.run({"image": bundle.golden["input"]})["logits"], bundle.golden["logits"], sqnr_db=110)
    check_promise(inspect_bundle(bundle))
    assert 44 <= bundle.size_bytes / 2**20 <= 50  # 11.85 M float32 weights are 45.2 MiB


@pytest.mark.parametrize("target", PORTABLE)
def test_fp16_halves_the_file_and_says_what_executes(small_bundle: MakeBundle, target: str) -> None:
    full, half = (Bundle.open(small_bundle(target, p)) for p in ("fp32", "fp16"))
    assert 0.4 < half.size_bytes / full.size_bytes < 0.6
    inspection = inspect_bundle(half)
    # neither CPU runtime computes in float16; the reference execution of a Core ML program rounds to it
    assert product_precision(inspection.executed_precision) == {"coreml": "float16 (reference)"}.get(target, "float32")
    check_promise(inspection)


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
def test_bf16_computes_in_bfloat16(small_bundle: MakeBundle) -> None:
    """Its error is that of rounding to 8 bits: as large as in PyTorch, far from that of float16."""
    full, narrow = (Bundle.open(small_bundle("openvino", p)) for p in ("fp32", "bf16"))
    assert 0.4 < narrow.size_bytes / full.size_bytes < 0.6
    inspection = inspect_bundle(narrow)
    assert product_precision(inspection.executed_precision) == "bfloat16"
    check_promise(inspection)
    with load_runner(narrow) as runner:
        found = runner.run({"image": narrow.golden["input"]})["logits"]
    image = load_eager(narrow, RunnerOptions()).normalised(narrow.golden["input"])
    with torch.inference_mode():
        same = rebuild(narrow.manifest).eval().bfloat16()(torch.from_numpy(image).bfloat16()).float().numpy()
    ours, theirs = (compare(narrow.golden["logits"], logits).sqnr_db for logits in (found, same))
    assert 30 <= ours <= 60
    assert abs(ours - theirs) < 10, (ours, theirs)
    assert narrow.manifest.tolerance.top1_agreement == 1.0


@pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
def test_only_answers_that_bfloat16_cannot_tell_apart_may_turn(small_bundle: MakeBundle) -> None:
    """Counted here on the photographs by the neighbours of each logit in torch's bfloat16."""
    full, narrow = (Bundle.open(small_bundle("openvino", p)) for p in ("fp32", "bf16"))
    pictures = [preprocess(load_image(path), full.manifest.input) for path in open_dataset("photographs").images]
    with load_runner(full) as wide, load_runner(narrow) as runner:
        logits, found = (
            np.concatenate([one.run({"image": p[None]})["logits"] for p in pictures]) for one in (wide, runner)
        )
    best, second = np.sort(logits, -1)[:, ::-1][:, :2].T
    step = neighbour(best, 1) - neighbour(best, 0)
    level = best - second < 2 * np.abs(step)
    assert (logits.argmax(-1) == found.argmax(-1))[~level].all()
    said = narrow.manifest.measured.level
    assert level.sum() == (0 if said is None else said.images)


@pytest.mark.parametrize(
    ("target", "precision", "step"),
    [("openvino", "fp16", 2**-10), ("openvino", "fp32", 2**-23), ("openvino", "bf16", 2**-7),
     ("openvino", "int8", None), ("coreml", "fp16", 2**-10), ("coreml", "int8", 2**-10)],
)  # fmt: skip
def test_a_precision_has_the_steps_of_its_coarser_numbers(target: str, precision: str, step: float | None) -> None:
    """Also where float16 is stored and float32 computed: S has a photograph whose two best logits are 0.0002 apart."""
    assert TARGETS[target].precision(precision).step == step


def neighbour(values: np.ndarray, above: int) -> np.ndarray:
    """The bfloat16 number that values are cut to, or the one with the next larger magnitude."""
    bits = torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(torch.int32) >> 16
    return ((bits + above) << 16).view(torch.float32).numpy().astype(np.float64)


@pytest.mark.parametrize(("steps", "level"), [(0, True), (1, True), (2, False), (5, False)])
@pytest.mark.parametrize("top", [0.73, -3.0, 1100.0, 1e-4])
def test_level_answers_are_those_nearer_than_two_steps(steps: int, level: bool, top: float) -> None:
    first = neighbour(np.array([top]), 0)
    second = neighbour(np.array([top]), -steps if top > 0 else steps)
    logits = np.stack([first, second, second - 1], -1)
    assert second <= first
    assert level_top1({"logits": logits}, 2.0**-7).tolist() == [level]


def test_a_device_without_bfloat16_runs_nothing_else_instead(
    small_bundle: MakeBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualtoken_deploy.targets.openvino.runner.has_bfloat16", lambda device="CPU": False)
    with pytest.raises(MissingError, match="CPU has no bfloat16"):
        export(TINY.name, "openvino", "bf16", image_size=64, output=tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_promise_is_out_of_tolerance(own_bundle: Path) -> None:
    bundle = Bundle.open(own_bundle)
    inspection = inspect_bundle(bundle)
    promised = dict.fromkeys(bundle.manifest.executed_precision, "int8")
    broken = type(inspection)(
        manifest=type(bundle.manifest).from_json(bundle.manifest.to_json() | {"executed_precision": promised}),
        verified=True,
        operators=inspection.operators,
        executed_precision=inspection.executed_precision,
    )
    with pytest.raises(ToleranceError, match="float32 here, the manifest promises int8"):
        check_promise(broken)


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def test_operators_of_a_fixed_size(small_bundle: MakeBundle) -> None:
    """Nothing that a fixed size makes needless is left, and what has a node of its own keeps it."""
    model = graph_of(small_bundle())
    counts = Counter(node.op_type for node in model.graph.node)
    banned = {"Resize", "Shape", "If", "Loop", "Expand", "BatchNormalization", "Erf", "Tile", "Gather"}
    assert not banned & set(counts)
    blocks = 2
    # A block has an aggregation and a broadcast.
    assert counts["Attention"] == 2 * blocks
    # Stem 4, Conv Encoder 1, FFN, BiDim 2 a block, head 1; MixMLP has no GELU.
    assert counts["Gelu"] == 4 + 1 + 3 * blocks + 1
    # Stem, Conv Encoder, token module, FFN and BiDim a block, merges 2, token merges 2, head 2.
    assert counts["LayerNormalization"] == 1 + 1 + 3 * blocks + 2 + 2 + 2
    assert counts["Conv"] == 5 + 1 + 1  # stem, Conv Encoder, stage 1's downsampling
    assert counts["Sigmoid"] == 2 * blocks


def test_the_manifest_counts_operators_before_and_after(small_bundle: MakeBundle) -> None:
    bundle = Bundle.open(small_bundle())
    after = bundle.manifest.operators["laid out"]
    assert after == Counter(n.op_type for n in graph_of(bundle.path).graph.node)
    assert sum(bundle.manifest.operators["exported"].values()) >= sum(after.values())


def test_metadata_is_in_the_file_and_no_path_of_this_machine(small_bundle: MakeBundle) -> None:
    folder = small_bundle()
    model = graph_of(folder)
    assert {p.key: p.value for p in model.metadata_props}["variant"] == SMALL["variant"]
    assert b"/site-packages/" not in (folder / "model.onnx").read_bytes()
    assert b"dualtoken_deploy/models" not in (folder / "model.onnx").read_bytes()


def test_below_opset_23_attention_is_matmul_softmax_matmul(small_bundle: MakeBundle) -> None:
    model = graph_of(small_bundle(opset=20))
    counts = Counter(node.op_type for node in model.graph.node)
    assert {o.version for o in model.opset_import if o.domain == ""} == {20}
    assert counts["Softmax"] == 4
    assert counts["Attention"] == 0


def test_fp16_stores_weights_alone_and_casts_them_once(small_bundle: MakeBundle) -> None:
    """Every product reads a float32 value that is cast from half; loaded, not one cast is left, and what runs is what
    runs in fp32."""
    full, half = small_bundle("onnxruntime", "fp32"), small_bundle("onnxruntime", "fp16")
    model = graph_of(half)
    constants = {t.name: t for t in model.graph.initializer}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast" and n.input[0] in constants}
    assert len(casts) > 40
    assert {constants[name].data_type for name in casts.values()} == {onnx.TensorProto.FLOAT16}
    float32 = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Conv", "Gemm"):
            assert not float32 & set(node.input[:2]), node.name
    executed = []
    for folder in (full, half):
        with load_runner(folder, threads=1) as runner:
            executed.append(runner.execution())
    assert executed[0].operators == executed[1].operators
    assert executed[0].precision == executed[1].precision


@pytest.mark.parametrize("target", PORTABLE)
def test_tensor_input_takes_the_normalised_image(small_bundle: MakeBundle, target: str, photograph: Path) -> None:
    image, tensor = (Bundle.open(small_bundle(target, input_kind=kind)) for kind in ("image", "tensor"))
    assert tensor.manifest.input.baked == ()
    assert image.manifest.input.baked != ()
    pixels = load_image(photograph)
    with load_runner(image) as a, load_runner(tensor) as b:
        from_image = a.run({"image": preprocess(pixels, image.manifest.input)[None]})["logits"]
        from_tensor = b.run({"input": preprocess(pixels, tensor.manifest.input)[None]})["logits"]
    assert_close(from_tensor, from_image, sqnr_db=105)


@pytest.mark.parametrize("target", [t for t in PORTABLE if t != "coreml"])  # its programs have fixed shapes
def test_a_dynamic_batch_gives_each_image_its_own_logits(small_bundle: MakeBundle, target: str) -> None:
    bundle = Bundle.open(small_bundle(target, batch="dynamic"))
    images = np.random.default_rng(3).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    with load_runner(bundle) as runner:
        alone = np.concatenate([runner.run({"image": images[i : i + 1]})["logits"] for i in range(5)])
        assert_close(runner.run({"image": images})["logits"], alone, sqnr_db=105)


@pytest.mark.parametrize("target", PORTABLE)
def test_a_fixed_batch_and_a_size_that_32_does_not_divide(small_bundle: MakeBundle, target: str) -> None:
    kind = "tensor" if target == "coreml" else "image"  # Core ML's image input is one picture
    bundle = Bundle.open(small_bundle(target, batch=2, image_size="70x101", input_kind=kind))
    assert bundle.manifest.input.tensor.shape == ((2, 3, 70, 101) if kind == "tensor" else (2, 70, 101, 3))
    (result,) = validate([bundle], "photographs", limit=3)
    assert result.images == 3
    assert result.sqnr_db >= SQNR_DB["fp32"]


OPTIONS: list[dict[str, Any]] = [
    {"global_tokens": 3},
    {"global_tokens": 0, "local_attention": "window", "downsampling": "onestep"},
    {"global_tokens": 8, "token_method": "normal"},
    {"global_tokens": 8, "token_method": "normal-star", "batch": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_exports(small_bundle: MakeBundle, options: dict[str, Any]) -> None:
    bundle = Bundle.open(small_bundle("onnxruntime", image_size=96, **options))
    assert shown(bundle).sqnr_db >= SQNR_DB["fp32"]


def test_same_inputs_give_the_same_bytes(small_bundle: MakeBundle, tmp_path: Path) -> None:
    """Of ONNX; OpenVINO numbers the layers it makes from a counter of the process, so its model.xml differs."""
    from dualtoken_deploy import export

    first = Bundle.open(small_bundle())
    export(target="onnxruntime", output=tmp_path / "again", **SMALL)  # type: ignore[arg-type]
    assert Bundle.open(tmp_path / "again").manifest.files == first.manifest.files


def test_out_of_tolerance_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dualtoken_deploy import export

    row = TARGETS["onnxruntime"]
    fp32 = replace(row.precisions["fp32"], tolerance=Tolerance(sqnr_db=299.0))
    monkeypatch.setattr("dualtoken_deploy.pipeline.plan.get_target", lambda _: replace(row, precisions={"fp32": fp32}))
    with pytest.raises(ToleranceError, match=r"out of tolerance on golden: SQNR 1\d\d\.\d dB \(needs 299\)"):
        export(target="onnxruntime", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_simplifier_that_changes_the_result_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnxsim

    from dualtoken_deploy import export

    def spoil(model: onnx.ModelProto, **_: object) -> tuple[onnx.ModelProto, bool]:
        tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        tensor.raw_data = (1.01 * np.frombuffer(tensor.raw_data, np.float32)).astype(np.float32).tobytes()
        return model, True

    # The original is run first, so that spoiling it in place afterwards is seen.
    real = onnxsim.simplify
    monkeypatch.setattr(onnxsim, "simplify", lambda model, **k: spoil(real(model, **k)[0]))
    with pytest.raises(ConversionError, match="onnxsim changed the result"):
        export(target="onnxruntime", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    monkeypatch.setattr(onnxsim, "simplify", lambda model, **k: (real(model, **k)[0], False))
    with pytest.raises(ConversionError, match="does not check"):
        export(target="onnxruntime", output=tmp_path / "b", **SMALL)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# --- runners and validate ---


@pytest.mark.parametrize("target", PORTABLE)
def test_a_device_that_is_not_here_is_missing_and_no_fallback(small_bundle: MakeBundle, target: str) -> None:
    device = {"onnxruntime": "cuda", "openvino": "GPU", "coreml": "cpu+gpu"}[target]
    with pytest.raises(MissingError, match=r"cuda|GPU|gpu"):
        load_runner(small_bundle(target), device=device)


@pytest.mark.parametrize("target", PORTABLE)
def test_runners_keep_the_protocol(small_bundle: MakeBundle, target: str) -> None:
    with load_runner(small_bundle(target), threads=1) as runner:
        assert isinstance(runner, Runner)
        assert isinstance(runner, AsyncRunner) == (target == "openvino")  # one thread has no pool
        assert [s.name for s in runner.inputs] == ["image"]
        feed = {"image": np.zeros((1, 64, 64, 3), np.uint8)}
        first = runner.run(feed)["logits"]
        kept = first.copy()
        runner.run({"image": np.full((1, 64, 64, 3), 200, np.uint8)})
        assert (first == kept).all()  # a result is the caller's own and no view of the runtime's memory


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_overlapped_runs_all_run_and_their_errors_arrive(small_bundle: MakeBundle, target: str) -> None:
    with load_runner(small_bundle(target), threads=2) as runner:
        assert isinstance(runner, AsyncRunner)
        runner.run_async({"image": np.zeros((1, 64, 64, 3), np.uint8)}, 5)
        with pytest.raises(Exception, match=r"(?i)shape|dimension"):
            runner.run_async({"image": np.zeros((1, 32, 64, 3), np.uint8)}, 3)
        assert np.isfinite(runner.run({"image": np.zeros((1, 64, 64, 3), np.uint8)})["logits"]).all()


def test_openvinos_cache_goes_where_it_was_told(small_bundle: MakeBundle, tmp_path: Path) -> None:
    with load_runner(small_bundle("openvino"), cache_dir=tmp_path):
        assert list(tmp_path.rglob("*.blob"))


def test_validate_against_golden_needs_no_eager(small_bundle: MakeBundle) -> None:
    (result,) = validate([small_bundle()], reference="golden")
    assert (result.reference, result.images) == ("golden", 1)
    assert result.sqnr_db >= SQNR_DB["fp32"]


def test_labelled_folders_give_top1_and_top5(small_bundle: MakeBundle, tmp_path: Path) -> None:
    """Pictures filed under the class that eager names first are all right, under its sixth neither top-1 nor top-5."""
    bundle = Bundle.open(small_bundle())
    sources = open_dataset("photographs").images[:6]
    batch = np.stack([preprocess(load_image(p), bundle.manifest.input) for p in sources])
    with load_eager(bundle, RunnerOptions()) as eager:
        ranked = (-eager.run({"image": batch})["logits"]).argsort(axis=1)
    for rank, (top1, top5) in {0: (1.0, 1.0), 3: (0.0, 1.0), 5: (0.0, 0.0)}.items():
        folder = tmp_path / str(rank)
        for c in range(10):
            (folder / f"{c}").mkdir(parents=True)
        for i, source in enumerate(sources):
            shutil.copy(source, folder / str(ranked[i, rank]) / f"{i}{source.suffix}")
        for c in range(10):
            if not list((folder / str(c)).iterdir()):
                shutil.copy(sources[0], folder / str(c) / "filler.png")
        (result,) = validate([bundle], folder)
        fillers = len(list(folder.rglob("filler.png")))
        # a filler shows picture 0 under every class without a picture: right once at most, and known from its ranks
        empty = [c for c in range(10) if (folder / str(c) / "filler.png").exists()]
        right1 = top1 * 6 + sum(c == ranked[0, 0] for c in empty)
        right5 = top5 * 6 + sum(c in ranked[0, :5] for c in empty)
        assert result.images == 6 + fillers
        assert result.scores is not None
        assert result.scores["top1"] == pytest.approx(right1 / result.images)
        assert result.scores["top5"] == pytest.approx(right5 / result.images)


def test_gates(small_bundle: MakeBundle) -> None:
    results = validate([small_bundle()])
    gate(results, agreement=1.0, sqnr_db=100)
    with pytest.raises(ToleranceError, match="sqnr_db"):
        gate(results, sqnr_db=500)
    with pytest.raises(UsageError, match="labelled"):
        gate(results, top1=0.5)


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    code = (
        "import dualtoken_deploy.use.validate, dualtoken_deploy.bench.run, dualtoken_deploy as d;"
        "from dualtoken_deploy import create_model, export, Bundle, load_runner, validate, predict;"
        "from dualtoken_deploy.bench import bench;"
        "print(all(map(callable, (create_model, export, Bundle, load_runner, validate, bench, predict, d.export))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_the_manifest_is_complete(small_bundle: MakeBundle) -> None:
    data = json.loads((small_bundle() / "manifest.json").read_text())
    assert data["schema_version"] == 1
    assert data["weights"]["source"] == "random"
    assert data["files"].keys() == {"model.onnx", "golden.npz", "labels.txt", "README.md", "bom.cdx.json"}
    assert data["input"]["baked"] == ["cast", "scale", "mean", "std", "transpose"]
    assert {"torch", "onnx", "onnxsim", "onnxruntime", "numpy"} <= data["versions"].keys()
    assert data["rules"]
    assert data["products"]
    assert data["machine"]
