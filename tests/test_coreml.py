"""Core ML: the layout's algebra, what the package says and holds, every precision by reference execution, bad input."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualtoken_deploy import Bundle, load_runner
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet
from dualtoken_deploy.bundle.store import sha256
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.ane import channel_norm, to_ane_layout
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import BundleError, InputError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.quantize.calibration import FITTED
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.targets import eager
from dualtoken_deploy.targets.coreml.activation_pass import measure_ranges
from dualtoken_deploy.targets.coreml.compress import palette
from dualtoken_deploy.targets.coreml.mil import MilProgram, load_program
from dualtoken_deploy.targets.coreml.mil.program import find_specification
from dualtoken_deploy.targets.coreml.mil.vendor import model_proto
from dualtoken_deploy.targets.coreml.mil.weights import WeightFile
from dualtoken_deploy.targets.coreml.runner import ENGINE, MilReferenceRunner
from dualtoken_deploy.targets.coreml.validation import validated_once
from dualtoken_deploy.targets.load import RunnerOptions
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from dualtoken_deploy.use.predict import predict
from dualtoken_deploy.use.validate import validate
from tests.contracts import run_batches
from tests.numerics import assert_close, shown
from tests.small import SMALL

MakeBundle = Callable[..., Path]
PACKAGE = "model.mlpackage"
LABELS = [f"class {n}" for n in range(10)]

# Least SQNR in dB on the small model; measured 125, 58, 37, 34, 38, 61 and 56, the last two on
# pictures that they were fitted to.
SQNR_DB = {"fp32": 110.0, "fp16": 50.0, "int8": 30.0, "int8-w8a8": 20.0, "palettized8": 30.0, "palettized6": 50.0,
           "palettized4": 45.0}  # fmt: skip
# Size against float16's: n bits of 16, tables, scales, small tensors and the program itself.
SIZE_LIMITS = {"int8": 0.72, "palettized8": 0.75, "palettized6": 0.62, "palettized4": 0.52}


@pytest.fixture(scope="module")
def packages(small_bundle: MakeBundle) -> Callable[..., Bundle]:
    """packages(precision, ...) -> the opened Core ML bundle of the small model."""
    return lambda precision="fp16", **options: Bundle.open(small_bundle("coreml", precision, **options))


# --- the layout ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_attention", [True, False])
@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (64, 64)), ({}, (72, 100)),
        ({"local_attention": "window"}, (96, 64)), ({"local_attention": "window"}, (64, 64)),
        ({"downsampling": "onestep"}, (64, 64)), ({"global_tokens": 0}, (64, 64)), ({"global_tokens": 3}, (64, 96)),
        ({"token_mlp": "mlp"}, (64, 64)),
    ],
)  # fmt: skip
def test_the_layout_computes_what_eager_computes(
    options: dict[str, Any], size: tuple[int, int], whole_attention: bool
) -> None:
    """Relative error in float64 at most 1e-12: the rules move and reorder numbers, they change none."""
    model = random_model("tiny-mix", 3, image_size=size, num_classes=7, **options).double()
    rules = [r for r in DEFAULT_RULES if not (whole_attention and r == "fold_attention_scale")]
    form = deploy_form(model, rules).module
    assert to_ane_layout(form, whole_attention) > 50
    image = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(form(image).numpy(), model(image).numpy(), relative=1e-12)
    kinds = {type(m) for m in form.modules()}
    assert torch.nn.LayerNorm not in kinds and torch.nn.Linear not in kinds  # noqa: PT018


def test_channel_norm_is_layer_norm_of_the_turned_tensor() -> None:
    x = torch.randn(2, 5, 1, 7, dtype=torch.float64)
    gamma, beta = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    want = torch.nn.functional.layer_norm(x.movedim(1, -1), (5,), gamma, beta, 1e-3).movedim(-1, 1)
    assert_close(channel_norm(x, gamma, beta, 1e-3).numpy(), want.numpy(), relative=1e-14)


def test_the_layout_needs_the_default_rules() -> None:
    form = deploy_form(random_model("tiny-mix", 0, image_size=(64, 64)), ["fold_batch_norm"]).module
    with pytest.raises(UsageError, match=r"ane layout needs"):
        to_ane_layout(form, True)


def test_the_two_layouts_side_by_side(packages: Callable[..., Bundle]) -> None:
    """No transposes at all where attention is two products; the attention operation brings its four each."""
    structures = {
        (target, layout): packages(deployment_target=target, layout=layout).manifest.operators["structure"]
        for target, layout in (("iOS16", "ane"), ("iOS18", "ane"), ("iOS18", "plain"))
    }
    attentions = 2 * 2
    assert structures["iOS16", "ane"]["transposes"] == 0
    assert structures["iOS16", "ane"]["attention"] == 0
    assert structures["iOS18", "ane"]["transposes"] == 4 * attentions
    assert structures["iOS18", "ane"]["attention"] == structures["iOS18", "plain"]["attention"] == attentions
    for layout in structures.values():
        assert layout["max_rank"] <= 5
        assert layout["off_neural_engine"] == 1  # classify, behind the program
    # the head and the two token-axis products of a block stay where they are; all else becomes convolutions
    assert structures["iOS18", "ane"]["linear"] < 10 < structures["iOS18", "plain"]["linear"]


def test_a_program_that_a_pass_breaks_is_found_at_the_end() -> None:
    """coremltools' own check of a program whose value nothing makes any longer; not between passes."""
    from coremltools.converters.mil.mil import Builder, Program

    @Builder.program(input_specs=[Builder.TensorSpec(shape=(1,))])  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return Builder.relu(x=Builder.square(x=x))

    with validated_once():
        program.validate()
    main, own = program.functions["main"], Program.validate
    main.operations.remove(main.find_ops(op_type="square")[0])
    between = validated_once()
    between.__enter__()
    program.validate()
    with pytest.raises(ValueError, match=r"square_0.*not visible"):
        between.__exit__(None, None, None)
    assert Program.validate is own


# --- precisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", SQNR_DB)
def test_every_precision_on_the_saved_package(packages: Callable[..., Bundle], precision: str) -> None:
    bundle = packages(precision)
    manifest = bundle.manifest
    assert shown(bundle).sqnr_db >= SQNR_DB[precision]
    assert manifest.measured.engine == ENGINE
    dtype = "float32" if precision == "fp32" else "float16"
    assert manifest.executed_precision["conv"] == f"{dtype} (reference)"
    with load_runner(bundle) as runner:
        logits = runner.run({"image": bundle.golden["input"]})["logits"]
    assert_close(logits, bundle.golden["logits"], sqnr_db=SQNR_DB[precision] - 3)
    if precision in SIZE_LIMITS:
        assert bundle.size_bytes <= SIZE_LIMITS[precision] * packages("fp16").size_bytes


@pytest.mark.parametrize(
    ("precision", "options"),
    [
        *((precision, {}) for precision in SQNR_DB),
        ("fp16", {"layout": "plain"}),
        ("fp16", {"deployment_target": "iOS16"}),
    ],
)
def test_diagnose_finds_no_suspect_in_a_sound_package(
    packages: Callable[..., Bundle], precision: str, options: dict[str, Any]
) -> None:
    """Faults are planted in test_diagnose_coreml.py."""
    found = diagnose(packages(precision, **options), limit=2)
    assert (found.first, found.suspect, found.engine) == (None, None, ENGINE)
    assert [b.name for b in found.blocks] == ["stem", "stage1.block1", "stage3.block1", "logits"]
    names = {d.name for d in found.layers}
    assert {"stem.conv1.conv", "stage1.block1.local.pw1", "stage1.block1.token.broadcast.q", "head.neck"} <= names
    assert found.unseen == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_compression_for_the_oldest_target(packages: Callable[..., Bundle]) -> None:
    kinds = packages("int8", deployment_target="iOS16").manifest.operators["mil"]
    assert kinds["constexpr_affine_dequantize"] > 20
    assert "constexpr_blockwise_shift_scale" not in kinds


def test_activations_are_quantized_before_products_but_the_stem(packages: Callable[..., Bundle]) -> None:
    bundle = packages("int8-w8a8")
    program = load_program(bundle.path / PACKAGE)
    makers = {name: op for op in program.operations for name, _ in op.outputs}
    products = [op for op in program.operations if op.kind in ("conv", "linear")]
    fed = [op.inputs["x"][0] in makers and makers[op.inputs["x"][0]].kind == "dequantize" for op in products]
    assert fed[:5] == [False] * 5
    assert all(fed[5:])
    assert bundle.manifest.operators["mil"]["quantize"] == bundle.manifest.operators["mil"]["dequantize"]


def test_the_manifest_says_what_activations_were_calibrated_on(packages: Callable[..., Bundle]) -> None:
    photographs = open_dataset("photographs")
    bundle = packages("int8-w8a8")
    stem = ["stem_conv1_conv", "stem_conv2_conv", "stem_conv3_conv", "stem_conv4_conv", "stem_proj"]
    assert bundle.manifest.calibration == Calibration(
        name="photographs",
        images=len(photographs),
        sha256=hashlib.sha256(load_batch(photographs.images, bundle.manifest.input).tobytes()).hexdigest(),
        method="minmax",
        quantizer="coremltools linear_symmetric, int8",
        in_float=tuple(stem),
    )
    check_promise(inspect_bundle(bundle))
    assert packages("int8").manifest.calibration is None


def test_palettes_say_by_which_pictures_they_were_fitted(packages: Callable[..., Bundle]) -> None:
    said = packages("palettized4").manifest.calibration
    assert said is not None
    assert (said.name, said.images, said.held_out) == ("photographs", len(open_dataset("photographs")), None)
    assert said.method == FITTED
    assert packages("palettized8").manifest.calibration is None


def test_own_calibration_pictures_and_the_loss_on_others(packages: Callable[..., Bundle]) -> None:
    """127 times a scale is the largest value of the tensor over the calibration pictures, in the fp16 package."""
    options = Int8Options("photographs", size=10, metric="agreement", max_drop=100.0)
    bundle = packages("int8-w8a8", int8=options)
    said = bundle.manifest.calibration
    assert said is not None
    photographs = open_dataset("photographs")
    chosen = photographs.limit(10)
    assert (said.name, said.images) == ("photographs", 10)
    assert said.sha256 == hashlib.sha256(load_batch(chosen.images, bundle.manifest.input).tobytes()).hexdigest()
    assert said.held_out == HeldOutSet("photographs", len(photographs) - 10)

    others = load_batch([path for path in photographs.images if path not in chosen.images], bundle.manifest.input)
    with load_runner(bundle) as own, eager.load(bundle, RunnerOptions()) as reference:
        best = [run_batches(runner, bundle.manifest.input, others).argmax(1) for runner in (own, reference)]
    assert said.drop == pytest.approx(100 * float((best[0] != best[1]).mean()))

    largest: dict[str, float] = {}

    def observe(name: str, value: Any) -> None:
        if value.dtype.kind == "f":
            largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max()))

    plain = MilProgram(load_program(packages("fp16").path / PACKAGE))
    for image in load_batch(chosen.images, bundle.manifest.input).transpose(0, 3, 1, 2):
        plain.run({"image": image[None]}, observe)
    operations = load_program(bundle.path / PACKAGE).operations
    constants = {op.outputs[0][0]: op.constants["val"] for op in operations if op.kind == "const"}
    quantizers = [op for op in operations if op.kind == "quantize"]
    assert len(quantizers) > 20
    for op in quantizers:
        scale = float(constants[op.inputs["scale"][0]])
        assert 127 * scale == pytest.approx(largest[op.inputs["input"][0]], rel=0.01), op.name


def test_calibration_that_loses_too_much_leaves_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 200 dB as what is enough, every 8-bit bundle loses points."""
    from dualtoken_deploy import export

    arguments: dict[str, Any] = {**SMALL, "target": "coreml", "precision": "int8-w8a8", "output": tmp_path / "b"}
    with pytest.raises(UsageError, match="leave --calibrator out"):
        export(int8=Int8Options("digits", method="entropy"), **arguments)
    monkeypatch.setattr("dualtoken_deploy.quantize.judge.ENOUGH_DB", 200.0)
    with pytest.raises(ToleranceError, match=r"points of sqnr on photographs, the budget is 1: .*--precision int8"):
        export(int8=Int8Options("photographs", size=10, metric="sqnr", max_drop=1.0), **arguments)
    assert not (tmp_path / "b").exists()


def test_ranges_are_those_of_all_samples(packages: Callable[..., Bundle]) -> None:
    """A later, smaller sample does not narrow what an earlier one has widened."""
    program = MilProgram(load_program(packages("fp16").path / PACKAGE))
    small, large = (np.full((1, 3, 64, 64), v, np.float32) for v in (100.0, 200.0))
    both, alone = measure_ranges(program, [large, small]), measure_ranges(program, [large])
    assert both["image"] == {"rmin": 100.0, "rmax": 200.0}
    for name, known in alone.items():
        assert both[name]["rmin"] <= known["rmin"] and both[name]["rmax"] >= known["rmax"]  # noqa: PT018


@pytest.mark.parametrize(("bits", "times"), [(4, 1.1), (6, 1.2), (8, 1.7)])
@pytest.mark.parametrize("count", [2048, 5000, 40000])
def test_palette_is_near_the_optimum(bits: int, times: float, count: int) -> None:
    """Squared error against coremltools' exact one-dimensional k-means; the optimum of 8 bits is beyond 40 dB."""
    from coremltools._deps import _kmeans1d

    weights = (np.random.default_rng(count).standard_t(5, count) * 0.02).astype(np.float16)
    table, indices = palette(weights, bits)
    assert table.shape == (1 << bits,) and indices.dtype == np.uint8  # noqa: PT018
    error = ((table.astype(np.float64)[indices] - weights) ** 2).sum()
    values, counts = np.unique(weights, return_counts=True)
    best = _kmeans1d.cluster(values, min(len(values), 1 << bits), weights=counts)
    centres = np.array(best.centroids).astype(np.float16).astype(np.float64)[np.array(best.clusters)]
    optimum = (counts * (centres - values) ** 2).sum()
    assert optimum <= error * (1 + 1e-6)
    assert error <= times * optimum


# --- the package -----------------------------------------------------------------------------------------------------


def test_outputs_of_an_image_classifier(packages: Callable[..., Bundle]) -> None:
    bundle = packages("fp16")
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    runner = MilReferenceRunner(bundle.path / PACKAGE, *specs)
    results = runner.run_all({"image": bundle.golden["input"]})
    assert set(results) == {"classLabel", "classLabel_probs", "logits"}
    logits = results["logits"][0].astype(np.float64)
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert results["classLabel"] == LABELS[int(logits.argmax())]
    assert list(results["classLabel_probs"]) == LABELS
    np.testing.assert_allclose(list(results["classLabel_probs"].values()), probabilities, atol=2e-3)  # float16 softmax


def read_model(package: Path) -> Any:
    model = model_proto("the test").Model()
    model.ParseFromString(find_specification(package).read_bytes())
    return model


def test_what_xcode_shows(packages: Callable[..., Bundle]) -> None:
    description = read_model(packages("fp16").path / PACKAGE).description
    metadata = description.metadata
    assert metadata.author and metadata.versionString and "Apache-2.0" in metadata.license  # noqa: PT018
    assert "random, seed 0" in metadata.shortDescription
    assert [i.type.WhichOneof("Type") for i in description.input] == ["imageType"]
    assert "bicubic" in description.input[0].shortDescription
    assert all(o.shortDescription for o in description.output)
    assert description.predictedFeatureName == "classLabel"
    assert not any("date" in key for key in metadata.userDefined)


def test_the_classifier_is_as_coremltools_makes_it() -> None:
    """Against coremltools' own classifier of one output: the operation and the description, message by message."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    from dualtoken_deploy.targets.coreml.classifier import add_classifier

    def convert(**options: Any) -> Any:
        @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3))])  # type: ignore[untyped-decorator]
        def program(x: Any) -> Any:
            return mb.softmax(x=x, axis=-1, name="probabilities")

        return ct.convert(program, convert_to="mlprogram", skip_model_load=True, **options).get_spec()

    own = convert(compute_precision=ct.precision.FLOAT32)
    add_classifier(own, ["a", "b", "c"], "probabilities")
    theirs = convert(
        compute_precision=ct.precision.FLOAT32, classifier_config=ct.ClassifierConfig(["a", "b", "c"], "classLabel")
    )
    for spec in (own, theirs):
        spec.description.ClearField("metadata")
    assert own.description.SerializeToString(deterministic=True) == theirs.description.SerializeToString(
        deterministic=True
    )
    blocks = [
        next(iter(s.mlProgram.functions["main"].block_specializations.values())).operations[-1] for s in (own, theirs)
    ]
    assert blocks[0].SerializeToString(deterministic=True) == blocks[1].SerializeToString(deterministic=True)


def test_the_same_model_gives_the_same_bytes(packages: Callable[..., Bundle], tmp_path: Path) -> None:
    from dualtoken_deploy import export

    arguments: dict[str, Any] = {**SMALL}
    export(target="coreml", precision="fp16", output=tmp_path / "again", **arguments)
    assert sha256(tmp_path / "again" / PACKAGE) == sha256(packages("fp16").path / PACKAGE)
    assert sorted(p.name for p in (tmp_path / "again" / PACKAGE).iterdir()) == ["Data", "Manifest.json"]


def test_the_weight_file_is_read_as_coremltools_reads_it(packages: Callable[..., Bundle]) -> None:
    from coremltools.libmilstoragepython import _BlobStorageReader

    package = packages("int8").path / PACKAGE
    path = find_specification(package).parent / "weights" / "weight.bin"
    reader, mine = _BlobStorageReader(str(path)), WeightFile(path)
    compared = 0
    function = read_model(package).mlProgram.functions["main"]
    for op in function.block_specializations[function.opset].operations:
        values = [*op.attributes.values(), *(b.value for a in op.inputs.values() for b in a.arguments)]
        for value in values:
            if value.WhichOneof("value") != "blobFileValue":
                continue
            tensor, offset = value.type.tensorType, value.blobFileValue.offset
            shape = tuple(d.constant.size for d in tensor.dimensions)
            name, theirs = {10: ("FLOAT16", reader.read_fp16_data), 21: ("INT8", reader.read_int8_data)}[
                tensor.dataType
            ]
            got = mine.read(offset, name, shape).reshape(-1)
            np.testing.assert_array_equal(got.view(np.uint8), np.array(theirs(offset), copy=False).view(np.uint8))
            compared += 1
    assert compared > 50


# --- through the commands --------------------------------------------------------------------------------------------


def test_every_output_says_that_it_is_no_core_ml(packages: Callable[..., Bundle], photograph: Path) -> None:
    bundle = packages("fp16")
    assert validate([bundle], data="photographs", limit=2)[0].to_json()["engine"] == ENGINE
    assert predict(bundle, [photograph], top=2)[0].to_json()["engine"] == ENGINE
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    assert inspection.to_json()["engine"] == ENGINE
    assert set(inspection.executed_precision.values()) == {
        "float16 (reference)",
        "float32 (reference)",
        "none (reference)",
    }


def test_bench_refuses(packages: Callable[..., Bundle]) -> None:
    with pytest.raises(MissingError, match=r"not timed: .* no.* device|not timed: .*nothing about a device"):
        bench([packages("fp16")])


@pytest.mark.parametrize("device", ["cpu+ne", "all", "gpu9"])
def test_devices_that_are_not_here(packages: Callable[..., Bundle], device: str) -> None:
    with pytest.raises(MissingError, match=r"macOS|choose one of"):
        load_runner(packages("fp16"), device=device)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"precision": "int8-w8a8", "deployment_target": "iOS16"}, UsageError, "give --deployment-target iOS17"),
        ({"deployment_target": "iOS15"}, UsageError, "valid deployment targets: iOS16, iOS17, iOS18, iOS26"),
        ({"layout": "nhwc"}, UsageError, "valid layouts: ane, plain"),
        ({"batch": "dynamic"}, UsageError, "fixed shapes"),
        ({"batch": 2}, UsageError, "--input tensor"),
        ({"opset": 20}, UsageError, "leave --opset out"),
        ({"precision": "int3"}, UsageError, "palettized4"),
        ({"target": "onnxruntime", "layout": "ane"}, UsageError, "is for target coreml"),
        ({"variant": "tiny-lightvit", "layout": "ane"}, UsageError, "--layout plain"),
    ],
)
def test_combinations_that_core_ml_does_not_have(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    from dualtoken_deploy import export

    with pytest.raises(error) as caught:
        export(**{**SMALL, "target": "coreml", "output": tmp_path / "b", **options})
    assert words in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_labels_that_repeat(tmp_path: Path) -> None:
    from dualtoken_deploy import export

    labels = tmp_path / "labels.txt"
    labels.write_text("crane\n" * 2 + "".join(f"{n}\n" for n in range(8)))
    arguments: dict[str, Any] = {k: v for k, v in SMALL.items() if k != "num_classes"}
    with pytest.raises(InputError, match="crane"):
        export(target="coreml", labels=labels, output=tmp_path / "b", **arguments)


@pytest.fixture
def own_package(packages: Callable[..., Bundle], tmp_path: Path) -> Path:
    copy = tmp_path / "bundle"
    shutil.copytree(packages("int8").path, copy)
    return copy


def weight_file(folder: Path) -> Path:
    return find_specification(folder / PACKAGE).parent / "weights" / "weight.bin"


def test_a_bundle_without_its_weight_file(own_package: Path) -> None:
    weight_file(own_package).unlink()
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(own_package)
    with pytest.raises(BundleError, match=r"lacks its weight file"):
        load_runner(Bundle.open(own_package, verify=False))


def test_a_changed_byte(own_package: Path) -> None:
    path = weight_file(own_package)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(own_package)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: weight_file(p).write_bytes(weight_file(p).read_bytes()[:5000]), "ends before|cut off"),
        (lambda p: weight_file(p).write_bytes(b"\0" * weight_file(p).stat().st_size), "storage version"),
        (lambda p: find_specification(p / PACKAGE).write_bytes(b"\xff\xff"), "no Core ML specification"),
        (lambda p: (p / PACKAGE / "Manifest.json").unlink(), "no Manifest.json"),
        (lambda p: (p / PACKAGE / "Manifest.json").write_text("{}"), "cannot be read"),
        (lambda p: find_specification(p / PACKAGE).unlink(), "its model"),
    ],
)
def test_a_damaged_package(own_package: Path, damage: Callable[[Path], Any], words: str) -> None:
    damage(own_package)
    with pytest.raises(BundleError, match=words):
        load_runner(Bundle.open(own_package, verify=False))


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    """Changes the specification of a package, block by block."""
    model = read_model(folder / PACKAGE)
    function = model.mlProgram.functions["main"]
    change(function.block_specializations[function.opset])
    find_specification(folder / PACKAGE).write_bytes(model.SerializeToString())


def test_an_unknown_operation_is_named(own_package: Path) -> None:
    def change(block: Any) -> None:
        next(op for op in block.operations if op.type == "gelu").type = "warp_drive"

    rewrite(own_package, change)
    with pytest.raises(BundleError, match=r"warp_drive \(1\)"):
        load_runner(Bundle.open(own_package, verify=False))


def test_a_shape_that_is_not_the_declared_one(own_package: Path) -> None:
    def change(block: Any) -> None:
        op = next(op for op in block.operations if op.type == "gelu")
        op.outputs[0].type.tensorType.dimensions[1].constant.size += 1

    rewrite(own_package, change)
    bundle = Bundle.open(own_package, verify=False)
    with load_runner(bundle) as runner, pytest.raises(BundleError, match=r"the program declares"):
        runner.run({"image": bundle.golden["input"]})


def test_a_program_of_another_tool(tmp_path: Path) -> None:
    """Made with coremltools' builder and not by this project; float16 overflow shows as infinity."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 3))])  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return mb.add(x=mb.mul(x=x, y=60000.0), y=1.0, name="out")

    model = ct.convert(program, convert_to="mlprogram", skip_model_load=True, minimum_deployment_target=ct.target.iOS17)
    model.save(str(tmp_path / "other.mlpackage"))
    loaded = MilProgram(load_program(tmp_path / "other.mlpackage"))
    x = np.array([[1, 0.5, 0], [-1, 2, -2]], np.float32)
    out = loaded.run({"x": x})["out"]
    with np.errstate(over="ignore"):
        want = (x.astype(np.float16) * np.float32(60000)).astype(np.float16).astype(np.float32) + 1
    np.testing.assert_array_equal(out, want.astype(np.float16))
    assert np.isinf(out[1, 1])


def test_the_manifest_of_the_package_is_json_with_relative_paths(packages: Callable[..., Bundle]) -> None:
    data = json.loads((packages("fp16").path / PACKAGE / "Manifest.json").read_text())
    assert data["rootModelIdentifier"] in data["itemInfoEntries"]
    assert not any(item["path"].startswith("/") for item in data["itemInfoEntries"].values())
