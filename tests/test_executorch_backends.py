"""Bundles of ExecuTorch for backends that do not run here: what is in the file, executed by reference, and said so."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dualtoken_deploy import export
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.targets.executorch import backends, program
from dualtoken_deploy.targets.executorch import export as exporter
from dualtoken_deploy.targets.executorch.backends import BACKENDS, Backend
from dualtoken_deploy.targets.executorch.package import unpack
from dualtoken_deploy.targets.executorch.reference import ReferenceProgram
from dualtoken_deploy.targets.executorch.vulkan import VulkanGraph
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.commands import fails
from tests.numerics import assert_close
from tests.test_executorch import MODEL, Everything
from tests.test_traced_rules import random

LOWERED = [name for name, row in BACKENDS.items() if row.stand_in]


@pytest.fixture(scope="session", params=LOWERED)
def made(request: pytest.FixtureRequest, small_bundle: Callable[..., Path]) -> Bundle:
    """The small model in float32, lowered to each of them once."""
    return Bundle.open(small_bundle("executorch", backend=request.param))


@pytest.fixture
def own(made: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made.path, tmp_path / "bundle"))


def row_of(bundle: Bundle) -> Backend:
    return backends.backend_of(bundle.manifest)


def logits_of(bundle: Bundle) -> Any:
    with load_runner(bundle) as runner:
        return runner.run({"image": bundle.golden["input"]})["logits"]


# What is in the file


def test_the_saved_file_computes_what_eager_computes_and_says_by_what(made: Bundle) -> None:
    row = row_of(made)
    assert_close(logits_of(made), made.golden["logits"], sqnr_db=100)
    inspection = inspect_bundle(made)
    check_promise(inspection)
    said = f"{row.stand_in}: lowered to {row.title}, not run by it"
    assert (inspection.engine, made.manifest.measured.engine) == (said, said)
    assert f"lowered to {row.title}, not run by it: that takes {row.where}" in inspection.notes
    products = {kind: dtype for kind, dtype in inspection.executed_precision.items() if "linear" in kind}
    assert set(products.values()) == {"float32 (reference)"}


def test_its_pieces_are_counted_from_the_file(made: Bundle) -> None:
    """Against ExecuTorch's own reader."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    (plan,) = deserialize_pte_binary((made.path / MODEL).read_bytes()).program.execution_plan
    structure = made.manifest.operators["structure"]
    assert {delegate.id for delegate in plan.delegates} == {row_of(made).delegate}
    assert structure["delegates"] == len(plan.delegates)
    calls = [type(step.instr_args).__name__ for chain in plan.chains for step in chain.instructions]
    assert structure["outside"] == calls.count("KernelCall")


@pytest.mark.parametrize("name", LOWERED)
def test_many_operators_are_executed_as_torch_does(name: str, tmp_path: Path) -> None:
    module, image = Everything().eval(), random(1, 3, 18, 18).float()
    with torch.no_grad():
        exporter.lower(torch.export.export(module, (image,)), tmp_path / MODEL, BACKENDS[name])
        (found,) = ReferenceProgram(tmp_path / MODEL).run([image])
        assert_close(found, module(image), sqnr_db=110)


def test_core_ml_takes_every_cast_but_that_of_pixels(tmp_path: Path) -> None:
    """Whose arrays have no uint8: DualFormer-T's comparisons, each with a cast, are one piece."""

    class Positive(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.float() - 100
            return x * (x > 3).float()

    pixels = torch.arange(0, 240, 20, dtype=torch.uint8).reshape(1, 3, 4)
    with torch.no_grad():
        exporter.lower(torch.export.export(Positive(), (pixels,)), tmp_path / MODEL, BACKENDS["coreml"])
        program = ReferenceProgram(tmp_path / MODEL)
        assert torch.equal(program.run([pixels])[0], Positive()(pixels))
    assert len(program.contents.delegates) == 1
    assert program.contents.outside == ("dim_order_ops::_to_dim_order_copy.out",)


@pytest.mark.parametrize("name", LOWERED)
def test_float16_is_rounded_to_and_computed_no_worse(name: str, tmp_path: Path) -> None:
    """Every value that the file declares is one of float16: the result differs from float32, and by no more."""
    module, tokens = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8), nn.GELU()).eval(), random(1, 9, 16).float()
    with torch.no_grad():
        traced = torch.export.export(module, (tokens,))
        exporter.lower(traced, tmp_path / MODEL, BACKENDS[name], "fp16")
        program = ReferenceProgram(tmp_path / MODEL)
        (found,) = program.run([tokens])
        likeness = compare(module(tokens).numpy(), found.numpy())
    assert 50 < likeness.sqnr_db < 90
    assert torch.equal(found, found.half().float())
    assert {node.dtype for node in program.contents.nodes if node.kind != "cast"} == {"float16"}


def test_a_changed_weight_changes_the_answer(own: Path) -> None:
    """What is executed are the weights of the file, not those of a model that is built anew."""
    bundle = Bundle.open(own)
    before, data = logits_of(bundle), (own / MODEL).read_bytes()
    weights = [value.numpy() for value in rebuild(bundle.manifest).state_dict().values() if value.numel() > 1000]
    found = [weight for weight in weights if data.count(weight.tobytes()) == 1]
    (own / MODEL).write_bytes(data.replace(found[-1].tobytes(), (3 * found[-1]).tobytes()))
    assert compare(before, logits_of(Bundle.open(own, verify=False))).sqnr_db < 40


# What is promised, and what is not had here


def test_a_file_for_another_backend_is_a_promise_not_kept(made: Bundle) -> None:
    asked = made.manifest.asked
    assert asked is not None
    other = next(name for name in LOWERED if name != row_of(made).name)
    manifest = replace(made.manifest, asked=replace(asked, settings={**asked.settings, "backend": other}))
    with pytest.raises(ToleranceError, match=rf"its pieces are \d+ of {row_of(made).delegate}; export it again"):
        inspect_bundle(Bundle(made.path, manifest))


def test_a_manifest_with_a_backend_of_a_later_version_is_one_line(made: Bundle) -> None:
    asked = made.manifest.asked
    assert asked is not None
    manifest = replace(made.manifest, asked=replace(asked, settings={"backend": "metal"}))
    with pytest.raises(BundleError, match="names the backend 'metal', which this version does not know"):
        load_runner(Bundle(made.path, manifest))


def test_a_product_outside_its_pieces_is_a_promise_not_kept(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = ReferenceProgram.__init__

    def outside(self: ReferenceProgram, path: Path) -> None:
        inside(self, path)
        self.contents = replace(self.contents, outside=("aten::bmm.out", *self.contents.outside))

    monkeypatch.setattr(ReferenceProgram, "__init__", outside)
    with pytest.raises(ToleranceError, match=f"outside {row_of(made).title} here, the manifest promises float32"):
        check_promise(inspect_bundle(made))


def test_no_time_is_measured_here(made: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capsys, "bench", made.path)
    assert (code, f"lowered to {row_of(made).title}" in line, row_of(made).where in line) == (3, True, True), line


def test_other_devices_are_named_as_missing(made: Bundle) -> None:
    load_runner(made, device="reference")
    with pytest.raises(MissingError, match="CPU alone"):
        load_runner(made, device="gpu")


def test_diagnose_looks_into_xnnpack_alone(made: Bundle) -> None:
    with pytest.raises(
        UsageError, match=f"is lowered to {row_of(made).title}; export the model with --backend xnnpack"
    ):
        diagnose(made, limit=1)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--backend", "metal"), 2, "valid backends: xnnpack, coreml, vulkan"),
        (("--backend", "qnn"), 3, "Qualcomm's AI Engine Direct SDK"),
        (("--backend", "vgf"), 3, "tosa_serializer"),
        (("--backend", "openvino"), 2, "bfloat16 on AMX"),
        (("--precision", "fp16"), 2, "xnnpack is offered in fp32 and int8, not in fp16; backends that have it: coreml"),
        (("--backend", "vulkan", "--precision", "int8", "--calibration", "digits"), 2, "not in int8; backends"),
        (("--backend", "vulkan", "--batch", "dynamic"), 2, "fixed shapes"),
        (("--backend", "vulkan", "--target", "litert"), 2, "--backend is for target executorch"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_had_is_one_line(
    options: tuple[str, ...], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = () if "--target" in options else ("--target", "executorch")
    found, line = fails(capsys, "export", "--variant", "tiny-mix", *target, "--output", tmp_path / "b", *options)
    assert (found, words in line) == (code, True), line
    assert list(tmp_path.iterdir()) == []


def test_without_coremltools_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "coremltools" else find(name))
    with pytest.raises(MissingError, match=r"lowering to Core ML needs the extra \[coreml\]"):
        export("tiny-mix", "executorch", output=tmp_path / "b", backend="coreml")


@pytest.mark.parametrize(("how", "words"), [("cut", "cut short"), ("piece", "is damaged")])
def test_a_damaged_file_is_one_line(own: Path, how: str, words: str) -> None:
    from executorch.exir._serialize._program import serialize_pte_binary

    if how == "cut":
        (own / MODEL).write_bytes((own / MODEL).read_bytes()[:-5000])
    else:
        pte = program.load(own / MODEL)
        for piece in pte.program.backend_delegate_data:
            piece.data = b"\0" * len(piece.data)
        (own / MODEL).write_bytes(bytes(serialize_pte_binary(pte, extract_delegate_segments=True)))
    with pytest.raises(BundleError, match=words) as caught:
        load_runner(Bundle.open(own, verify=False))
    assert "\n" not in str(caught.value)


REGION, NONE = {"offset": 0, "size": 4}, {"offset": 0, "size": 0}


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([{"name": "a", "kind": 0, "children": {}, "dataRegion": {"offset": 0, "size": 9999}}], "larger"),
        ([{"name": "a", "kind": 0, "children": {}, "dataRegion": {"offset": 9999, "size": 4}}], "outside"),
        (
            [
                {"name": "a", "kind": 0, "children": {}, "dataRegion": REGION},
                {"name": "b", "kind": 1, "children": {"../a": 0}, "dataRegion": NONE},
            ],
            "no file '../a'",
        ),
        ([{"name": "b", "kind": 1, "children": {"b": 0}, "dataRegion": NONE}], "no file 'b'"),
        (
            [
                {"name": "a", "kind": 0, "children": {}, "dataRegion": REGION},
                {"name": "b", "kind": 1, "children": {"a": 0, "c": 0}, "dataRegion": NONE},
            ],
            "0",
        ),
    ],
)  # fmt: skip
def test_a_list_of_files_that_lies_is_not_followed(nodes: list[Any], words: str, tmp_path: Path) -> None:
    blob = b"data" + json.dumps({"nodes": nodes})[::-1].encode()
    with pytest.raises((ValueError, KeyError), match=words):
        unpack(blob, tmp_path)
    assert not (tmp_path.parent / "a").exists()


def test_what_vulkans_graph_has_and_pytorch_has_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualtoken_deploy.targets.executorch import vulkan

    for name in ("et_vk.dance.default", "aten.from_file.default", "aten.from_file.out", "prims.add.default", "add"):
        with pytest.raises(BundleError, match=f"the operator {re.escape(name)}, which is not executed here"):
            vulkan.operator(name)
    assert vulkan.operator("aten.gelu.out") is torch.ops.aten.gelu.out
    graph = VulkanGraph.__new__(VulkanGraph)
    graph._values = [("SymInt", {"value": 0})]
    with pytest.raises(BundleError, match="a SymInt, a size that is known only when it runs"):
        graph._argument(0, {})
