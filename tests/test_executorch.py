"""ExecuTorch: lowered to XNNPACK as one delegate, run by its own runtime; rules of this target in float64."""

from __future__ import annotations

import contextlib
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bench.run import bench
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.traced import TRACED_RULES, rewrite_program
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import BundleError, ConversionError, MissingError, ToleranceError, UsageError
from dualtoken_deploy.models.count import count_macs
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.models.registry import random_model
from dualtoken_deploy.targets.executorch import brief, look, partition, program
from dualtoken_deploy.targets.executorch import export as exporter
from dualtoken_deploy.targets.executorch.program import check_file, read
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle
from tests.numerics import assert_close
from tests.test_traced_rules import PARITY, Of, apply_more, highest_rank, operations, random, traced

MODEL = "model.pte"


@pytest.fixture(scope="session")
def made(small_bundle: Callable[..., Path]) -> Bundle:
    """The small model, lowered once."""
    return Bundle.open(small_bundle("executorch"))


@pytest.fixture
def own(made: Bundle, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made.path, tmp_path / "bundle"))


# The rules


Case = tuple[str, Callable[..., Tensor], tuple[tuple[int, ...], ...], int]
CASES: list[Case] = [
    ("mean_as_product", lambda x: x.mean(-1, keepdim=True), ((2, 5, 6),), 1),
    ("mean_as_product", lambda x: x.mean(1, keepdim=True), ((2, 5, 6),), 1),
    ("mean_as_product", lambda x: x.mean(1), ((2, 5, 6),), 1),
    ("mean_as_product", lambda x: x.mean(-1) + x.mean(1), ((6, 6),), 1),  # one buffer serves both
    ("mean_as_product", lambda x: x.mean((2, 3)), ((2, 5, 6, 7),), 0),
    ("mean_as_product", lambda x: x.mean(0), ((2, 5, 6),), 0),
    ("uneven_pool_as_product", lambda x: F.adaptive_avg_pool2d(x, (3, 6)), ((2, 5, 4, 8),), 1),
    (
        "uneven_pool_as_product",
        lambda x: F.adaptive_avg_pool2d(x, 3) + F.adaptive_avg_pool2d(x, (3, 1)),
        ((1, 5, 7, 6),),
        2,
    ),
    ("uneven_pool_as_product", lambda x: F.adaptive_avg_pool2d(x, 2), ((2, 5, 4, 8),), 0),
    ("matrix_as_layer", lambda a, x: a @ x, ((3, 5), (2, 5, 6)), 1),
    ("matrix_as_layer", lambda x, a: x @ a, ((2, 5, 6), (6, 3)), 0),
    ("three_axes", lambda a, b: a @ b, ((2, 3, 5, 4), (2, 3, 4, 6)), 1),
    ("three_axes", lambda a, b: a @ b, ((2, 5, 4), (2, 4, 6)), 1),
    ("three_axes", lambda a, b: a @ b, ((2, 5, 4), (1, 4, 6)), 0),
]


@pytest.mark.parametrize(("rule", "function", "shapes", "times"), CASES)
def test_each_rule_keeps_what_is_computed(
    rule: str, function: Callable[..., Tensor], shapes: tuple[tuple[int, ...], ...], times: int
) -> None:
    inputs = [random(*shape) for shape in shapes]
    module = Of(function).double()
    program, counts = rewrite_program(traced(module, *inputs), [], {rule: PRODUCT_RULES[rule]})
    with torch.no_grad():
        assert_close(program.module()(*inputs), module(*inputs), relative=PARITY)
    assert counts == {rule: times} or (times == 1 and counts[rule] == 2)


def test_a_whole_model_keeps_what_it_computes() -> None:
    model = random_model("tiny-mix", 0, image_size=(64, 64), num_classes=5).double()
    form = deploy_form(model, None, (64, 64)).module
    program = apply_more(form, list(TRACED_RULES), PRODUCT_RULES, random(2, 3, 64, 64))
    assert highest_rank(program) <= 4
    found = operations(program)
    assert "aten.matmul.default" not in found
    assert found["aten.linear.default"] > found["aten.mean.dim"]


# The file


def test_the_saved_file_computes_what_eager_computes_in_one_piece(made: Bundle) -> None:
    with load_runner(made) as runner:
        logits = runner.run({"image": made.golden["input"]})["logits"]
    assert_close(logits, made.golden["logits"], sqnr_db=100)
    inspection = inspect_bundle(made)
    check_promise(inspection)
    assert made.manifest.operators["structure"]["delegates"] == 1
    assert made.manifest.operators["structure"]["outside"] == 1
    assert "outside it: 1 dim_order_ops::_to_dim_order_copy.out" in inspection.notes  # pixels to float32
    assert inspection.executed_precision["XNNFullyConnected"] == "float32"


def test_without_the_rules_it_falls_apart(made: Bundle, tmp_path: Path) -> None:
    """What the rules of this target are for, on one stage's worth of layers."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(self.norm(self.layer(self.norm(x)))).mean(1)
            return out

    x = random(1, 8, 16).float()
    with torch.no_grad():
        program = torch.export.export(Norm().float().eval(), (x,))
    pieces = []
    for name, rules in (("without", {}), ("with", PRODUCT_RULES)):
        changed, _ = rewrite_program(program, TRACED_RULES if rules else [], rules)
        exporter.lower(changed, tmp_path / name)
        found = read(tmp_path / name)
        pieces.append((len(found.delegates), len(found.outside)))
    assert pieces[0][0] > 1
    assert pieces[1] == (1, 0)


class Everything(nn.Module):
    """Work for many of the passes that are left out where they have none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.after = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.row, self.layer = nn.Conv1d(2, 4, 3), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.after(F.gelu(F.relu(self.norm(self.conv(x)))))
        x = F.interpolate(F.max_pool2d(x, 2, 2), scale_factor=2, mode="bilinear")
        x = torch.cat([x, x, x + 1, x + 2, x + 3, x + 4], 1).mean((2, 3))
        out: Tensor = self.layer(F.hardtanh(self.row(x.reshape(1, 2, 24)))[..., :2] * 0.5)
        return out


def parts(path: Path) -> tuple[Any, ...]:
    """All that a file is made of, but the numbers by which debuggers group operators."""
    pte = program.load(path)
    graphs = look.graphs_of(pte)
    for graph in graphs.values():
        for node in graph["xnodes"]:
            node.pop("debug_handle")
    (plan,) = pte.program.execution_plan
    buffers = [bytes(buffer) for buffer in pte.named_data.buffers]
    return graphs, plan, pte.named_data.pte_data, buffers, [c.storage for c in pte.program.constant_buffer]


def test_lowering_in_brief_gives_the_same_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves out no pass that has work."""
    with torch.no_grad():
        program = torch.export.export(Everything().eval(), (random(1, 3, 18, 18).float(),))
    ran: list[str] = []
    has_work = brief._has_work

    def watch(name: str, graph: Any) -> bool:
        ran.extend([name] if has_work(name, graph) else [])
        return has_work(name, graph)

    monkeypatch.setattr(brief, "_has_work", watch)
    exporter.lower(program, tmp_path / "brief")
    monkeypatch.setattr(partition, "brief", contextlib.nullcontext)
    exporter.lower(program, tmp_path / "whole")
    assert parts(tmp_path / "brief") == parts(tmp_path / "whole")
    assert set(ran) & set(brief.WORK) >= {
        *("ConvertToUpsampleBilinear2d", "FuseBatchNormPass", "FuseActivationPass", "DecomposeConcatenate"),
        *("Conv1dUnsqueezePass", "ConstPropPass", "RemoveMixedTypeOperators", "LegalizePortableDimOrderPass"),
    }


def test_a_graph_with_a_relu_is_read(tmp_path: Path) -> None:
    """Its upper end is infinite, which flatc writes as no JSON reader has it."""
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
        exporter.lower(torch.export.export(model, (torch.ones(1, 4),)), tmp_path / MODEL)
    (graph,) = read(tmp_path / MODEL).delegates
    assert "XNNFullyConnected" in {node.kind for node in graph}


def test_a_product_outside_the_delegate_is_a_promise_not_kept(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(made.path / MODEL)
    monkeypatch.setattr(program, "read", lambda _: replace(found, outside=("aten::bmm.out", *found.outside)))
    with pytest.raises(ToleranceError, match=r"float32\+outside XNNPACK here, the manifest promises float32"):
        check_promise(inspect_bundle(made))


def change_weights(path: Path, layer: str, products: list[str], change: Callable[[Any], Any]) -> None:
    """Changes the weights of a product in a file, which lie in its named data."""
    pte = program.load(path)
    (graph,) = look.graphs_of(pte).values()
    (node,) = [n for n, name in zip(
        [n["xnode_union"] for n in graph["xnodes"] if n["xnode_union_type"] in program.PRODUCTS], products, strict=True
    ) if name == layer]  # fmt: skip
    (value,) = [v for v in map(program.tensor_of, look._values(graph)) if v["id_out"] == node["filter_id"]]
    key = graph["constant_data"][value["constant_buffer_idx"]]["named_key"]
    place = pte.named_data.pte_data[key].buffer_index
    old = np.frombuffer(pte.named_data.buffers[place], {"fp32": np.float32}.get(value["datatype"][13:], np.int8))
    new = np.ascontiguousarray(change(old.reshape(value["dims"])))
    pte.named_data.buffers[place] = new.astype(old.dtype).tobytes()
    look.write(pte, path)


@pytest.mark.parametrize(
    ("layer", "change"),
    [("stage1.block1.token.broadcast.proj", lambda w: w.T), ("stage3.block1.ffn.fc1", lambda w: 4 * w),
     ("stem.conv1.conv", lambda w: 4 * w)],
)  # fmt: skip
def test_diagnose_points_at_a_planted_fault(own: Path, layer: str, change: Callable[[Any], Any]) -> None:
    bundle = Bundle.open(own)
    change_weights(own / MODEL, layer, list(bundle.manifest.operators["products"]), change)
    assert diagnose(Bundle.open(own, verify=False), limit=2).suspect == layer


def test_diagnose_finds_nothing_in_a_whole_bundle(made: Bundle) -> None:
    found = diagnose(made, limit=2)
    assert found.suspect is None
    assert found.unseen <= 0.05 * (len(found.layers) + found.unseen)
    assert min(layer.sqnr_db for layer in found.layers) >= 100
    assert {"stem", "stage1.block1", "stage3.block1", "logits"} <= {block.name for block in found.blocks}


def test_products_are_named_and_counted_as_torch_counts(made: Bundle) -> None:
    """Against FlopCounterMode over eager; means are products here and the constant G's MLP is folded away."""
    products = made.manifest.operators["products"]
    means = {name: macs for name, macs in products.items() if "norm" in name or "mean" in name}
    real = sum(products.values()) - sum(means.values())
    assert real == pytest.approx(count_macs(rebuild(made.manifest), (64, 64)), rel=0.04)
    assert {"stem.conv1.conv", "stage1.block1.local.pw1", "logits"} <= set(products)
    with load_runner(made) as runner:
        assert set(runner.execution().nodes) == set(products)


def test_it_is_timed_as_any_other(made: Bundle) -> None:
    row, *_ = bench([made], rounds=1, seconds=0.05).contestants
    assert row.p50_ms > 0


def test_threads_are_set(made: Bundle) -> None:
    from executorch.extension.pybindings import portable_lib

    load_runner(made, threads=1)
    assert portable_lib._threadpool_get_thread_count() == 1


# What goes wrong


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "not a program":
        data[4:8] = b"TFL3"
    elif how == "newer":
        data[4:8] = b"ET13"
    else:
        at = data.index(b"dim_order_ops::_to_dim_order_copy")
        data[at : at + 9] = b"my_custom"
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("how", "words"),
    [("cut", "cut short"), ("empty", "no .pte"), ("not a program", "no .pte"), ("newer", "version ET13"),
     ("custom", "cannot load")],
)  # fmt: skip
def test_a_file_that_cannot_run_is_one_line(own: Path, how: str, words: str) -> None:
    damage(own / MODEL, how)
    with pytest.raises(BundleError, match=words) as caught:
        load_runner(Bundle.open(own, verify=False))
    assert "\n" not in str(caught.value)


def test_a_header_that_lies_is_not_followed(tmp_path: Path, made: Bundle) -> None:
    data = bytearray((made.path / MODEL).read_bytes())
    struct.pack_into("<Q", data, 32, 1 << 62)
    (tmp_path / MODEL).write_bytes(bytes(data))
    with pytest.raises(BundleError, match="cut short"):
        check_file(tmp_path / MODEL)


def test_another_shape_than_the_manifests_is_one_line(made: Bundle) -> None:
    (logits,) = made.manifest.outputs
    manifest = replace(made.manifest, outputs=(replace(logits, shape=(1, 11)),))
    with pytest.raises(BundleError, match=r"not the manifest's \[\(1, 11\)\]"):
        load_runner(Bundle(made.path, manifest))


def test_what_cannot_be_lowered_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        program = torch.export.export(Of(torch.exp), (random(2),))
    monkeypatch.setattr(program, "run_decompositions", lambda *_: 1 / 0)
    with pytest.raises(ConversionError, match="ExecuTorch cannot lower the model"):
        exporter.lower(program, tmp_path / MODEL)


@pytest.mark.parametrize(
    ("options", "words"), [({"batch": "dynamic"}, "fixed shapes"), ({"opset": 20}, "opset"), ({"image_size": "dynamic"},
     "dynamic image size"), ({"precision": "bf16"}, "fp32")],
)  # fmt: skip
def test_what_executorch_does_not_have(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    given: dict[str, Any] = {"variant": "tiny-mix", "target": "executorch", "output": tmp_path / "b"} | options
    with pytest.raises(UsageError, match=words):
        export(**given)


def test_other_devices_are_named_as_missing(made: Bundle) -> None:
    with pytest.raises(MissingError, match="CPU alone"):
        load_runner(made, device="vulkan")


def test_outputs_do_not_change_with_the_next_run(made: Bundle) -> None:
    with load_runner(made) as runner:
        first = runner.run({"image": made.golden["input"]})["logits"]
        kept = first.copy()
        runner.run({"image": 255 - made.golden["input"]})
    np.testing.assert_array_equal(first, kept)


def test_it_runs_from_cpp_without_torch(made: Bundle, tmp_path: Path) -> None:
    """examples/cpp, against the libraries of the installed wheel."""
    import executorch

    if missing := [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]:
        pytest.skip(f"the C++ example needs {' and '.join(missing)}")
    source = Path(__file__).parent.parent / "examples" / "cpp"
    prefix = Path(next(iter(executorch.__path__))) / "share" / "cmake"

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)

    built = tmp_path / "build"
    configured = run("cmake", "-S", source, "-B", built, "-DWITH_EXECUTORCH=ON", f"-Dexecutorch_DIR={prefix}")
    assert configured.returncode == 0, configured.stderr
    compiled = run("cmake", "--build", built)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    assert "libtorch" not in run("ldd", built / "run_executorch").stdout
    assert run(sys.executable, source / "raw.py", made.path, tmp_path).returncode == 0
    done = run(built / "run_executorch", made.path, tmp_path / "image.rgb", tmp_path / "golden.f32", "100")
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = run(built / "run_executorch", tmp_path, tmp_path / "image.rgb")
    assert wrong.returncode == 4
    assert "error: ExecuTorch cannot load" in wrong.stderr
