"""Models of the user's: live modules, references and ONNX files become one shape, or one line says what is wrong."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dualtoken_deploy.errors import DualTokenError, InputError, UsageError, WeightsError
from dualtoken_deploy.models.source import MODULE, PREPROCESSINGS, REFERENCE, Preprocessing, Source, prepared
from dualtoken_deploy.spec import STRETCH, TensorSpec

SIZE = (8, 12)
Pair = namedtuple("Pair", ["scores", "boxes"])


@dataclass
class Given:
    logits: Tensor
    hidden: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class Net(nn.Module):
    """Gives whatever `answer` makes of the mean colours (B, 3) and the picture."""

    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 5)
        self.answer = answer

    def forward(self, image: Tensor) -> Any:
        return self.answer(self.fc(image.mean((2, 3))), image)


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


# what forward returns, and the (name, shape of one) that the bundle is to have
SHAPES: dict[str, tuple[Any, list[tuple[str, tuple[int, ...]]]]] = {
    "a tensor": (lambda v, x: v, [("output", (5,))]),
    "a tuple": (lambda v, x: (v, x), [("output_0", (5,)), ("output_1", (3, *SIZE))]),
    "a list with a gap": (lambda v, x: [v, None, x], [("output_0", (5,)), ("output_1", (3, *SIZE))]),
    "a dict": (lambda v, x: {"logits": v, "map": x}, [("logits", (5,)), ("map", (3, *SIZE))]),
    "a key that is no name": (lambda v, x: {"a.b": v, "2nd": v}, [("a_b", (5,)), ("output_2nd", (5,))]),
    "an ordered dict": (lambda v, x: OrderedDict(b=v, a=x), [("b", (5,)), ("a", (3, *SIZE))]),
    "a dataclass": (lambda v, x: Given(v, None, (x, v)), [("logits", (5,)), ("maps_0", (3, *SIZE)), ("maps_1", (5,))]),
    "a named tuple": (lambda v, x: Pair(v, x), [("scores", (5,)), ("boxes", (3, *SIZE))]),
}


@pytest.mark.parametrize("case", SHAPES)
def test_outputs_of_every_shape_have_names(case: str) -> None:
    answer, wanted = SHAPES[case]
    source = Source.module(Net(answer), task="tensors", image_size=SIZE)
    for batch in (1, 3, "batch"):
        specs = source.outputs(SIZE, batch)
        assert [(s.name, s.shape) for s in specs] == [(name, (batch, *shape)) for name, shape in wanted]
    values = source.make()(torch.ones(2, 3, *SIZE))
    assert [tuple(v.shape[1:]) for v in values] == [shape for _, shape in wanted]
    assert all(v.dtype == torch.float32 for v in values)


def test_values_are_the_models_own_in_the_order_of_the_names() -> None:
    net = Net(lambda v, x: {"a": v, "b": 2 * v}).eval()
    source = Source.module(net, task="tensors", image_size=SIZE, output_names=("b", "a"))
    image = torch.rand(2, 3, *SIZE)
    b, a = source.make()(image)
    expected = net.fc(image.mean((2, 3)))
    assert torch.equal(a, expected)
    assert torch.equal(b, 2 * expected)


# task, what forward returns, --output-names, and the name, dtype and layout in the bundle
TASKS: dict[str, tuple[str, Any, tuple[str, ...], list[tuple[str, str, str]]]] = {
    "classify": ("classify", lambda v, x: v, (), [("logits", "float32", "NC")]),
    "the logits among others": ("classify", lambda v, x: {"aux": v, "logits": v}, (), [("logits", "float32", "NC")]),
    "the only one that fits": ("embed", lambda v, x: (x, v), (), [("embedding", "float32", "NC")]),
    "one by name": ("embed", lambda v, x: {"a": v, "b": 2 * v}, ("b",), [("embedding", "float32", "NC")]),
    "maps of classes": ("segment", lambda v, x: x, (), [("logits", "float32", "NCHW")]),
    "a label map": ("segment", lambda v, x: x.argmax(1), (), [("labels", "int32", "NHW")]),
    "boxes in another order": (
        "detect",
        lambda v, x: {
            "classes": v[:, :4].to(torch.int64),
            "scores": v[:, :4],
            "boxes": x.flatten(1)[:, :16].unflatten(1, (4, 4)),
        },
        (),
        [("boxes", "float32", "ND4"), ("scores", "float32", "ND"), ("classes", "int32", "ND")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TASKS)
def test_a_task_takes_its_outputs(case: str) -> None:
    task, answer, names, wanted = TASKS[case]
    source = Source.module(Net(answer), task=task, image_size=SIZE, output_names=names)
    assert [(s.name, s.dtype, s.layout) for s in source.outputs(SIZE, 1)] == wanted
    resize = STRETCH if task in ("segment", "detect") else "bicubic"
    assert source.preprocessing.resize == resize


def test_a_named_output_that_is_chosen_is_the_one_that_is_taken() -> None:
    net = Net(lambda v, x: {"a": v, "b": 2 * v})
    source = Source.module(net, task="embed", image_size=SIZE, output_names=("b",))
    image = torch.rand(1, 3, *SIZE)
    assert torch.equal(source.make()(image)[0], 2 * net.fc(image.mean((2, 3))))


class Keyword(nn.Module):
    def forward(self, input_ids: Tensor | None = None, pixel_values: Tensor | None = None) -> Tensor:
        assert input_ids is None
        assert pixel_values is not None
        return pixel_values.mean((2, 3))


def test_pixel_values_take_the_picture_wherever_they_stand() -> None:
    assert Source.module(Keyword(), image_size=SIZE).outputs(SIZE, 1)[0].shape == (1, 3)


class Two(nn.Module):
    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return image * mask


class Count(nn.Module):
    calls = 0

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image.mean((2, 3)) + self.calls


def _fails(v: Tensor, x: Tensor) -> Tensor:
    raise RuntimeError("the stem takes 1 channel\nand a trace")


# what is wrong, the module, its task and output names, and the words that the error has
FAULTS: dict[str, tuple[nn.Module, str, tuple[str, ...], type[DualTokenError], str]] = {
    "forward raises": (Net(_fails), "classify", (), InputError,
                       r"Net on a picture of 8x12 raised RuntimeError at .*source.py:\d+ in _fails: the stem .*nel$"),
    "no tensors": (Net(lambda v, x: {}), "tensors", (), InputError, "Net gives no tensors"),
    "none": (Net(lambda v, x: None), "tensors", (), InputError, "Net gives no tensors"),
    "a text": (Net(lambda v, x: {"logits": v, "name": "cat"}), "tensors", (), InputError, "output 'name' is a str"),
    "a number": (Net(lambda v, x: 3.0), "tensors", (), InputError, "the output is a float"),
    "sizes that change": (Net(lambda v, x: x.flatten()[x.flatten() > 0]), "tensors", (), InputError, "on the picture"),
    "how many change": (Net(lambda v, x: [v] * (1 + int(x.sum() > 0))), "tensors", (), InputError, "on the picture"),
    "state": (Count(), "classify", (), InputError, "another .* for the same picture"),
    "noise": (Net(lambda v, x: torch.rand_like(v)), "classify", (), InputError, "another .* for the same picture"),
    "a sum over the batch": (Net(lambda v, x: v.mean(0)), "tensors", (), InputError,
                             r"output output of 1 pictures has shape \(5,\)"),
    "a number over the batch": (Net(lambda v, x: v.mean()), "tensors", (), InputError,
                                r"shape \(\): its first axis is not the batch"),
    "maps for classify": (Net(lambda v, x: x), "classify", (), UsageError,
                          r"task classify needs logits \(2 axes\), and the model gives a tensor \(1, 3, 8, 12\)"),
    "two that fit": (Net(lambda v, x: {"a": v, "b": v}), "embed", (), UsageError, "choose with --output-names"),
    "boxes without scores": (Net(lambda v, x: {"boxes": x[:, 0]}), "detect", (), UsageError,
                             "boxes .* and scores .* and classes"),
    "an unknown name": (Net(lambda v, x: {"a": v, "b": v}), "tensors", ("c",), UsageError, "gives 2: a, b"),
    "a name twice": (Net(lambda v, x: (v, v)), "tensors", ("c", "c"), UsageError, "'c' is given twice"),
    "another argument": (Two(), "tensors", (), UsageError, "needs mask beside the picture"),
    "lazy": (nn.Sequential(nn.LazyLinear(3)), "tensors", (), InputError, "lazy layers"),
    "no weights": (nn.Conv2d(3, 3, 1, device="meta"), "tensors", (), InputError, "meta device"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_wrong_is_one_line(case: str) -> None:
    model, task, names, kind, words = FAULTS[case]
    with pytest.raises(kind) as caught:
        Source.module(model, task=task, image_size=SIZE, output_names=names).outputs(SIZE, 1)
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


USAGE: dict[str, tuple[Any, str]] = {
    "task": (lambda: Source.module(Keyword(), task="pose"), "valid tasks: classify, detect, segment, embed, tensors"),
    "size": (lambda: Source.module(Keyword(), image_size=0), "image size 0"),
    "size as text": (lambda: Source.module(Keyword(), image_size="big"), "image size 'big'"),
    "module": (lambda: Source.module(3), "a int is no torch.nn.Module"),  # type: ignore[arg-type]
    "preprocess": (lambda: Source.module(Keyword(), preprocess="vgg"), "valid: imagenet, clip, unit"),
    "std": (lambda: Preprocessing(std=(1.0, 0.0, 1.0)), "must be above 0"),
    "mean": (lambda: Preprocessing(mean=(1.0, 2.0)), "three numbers"),  # type: ignore[arg-type]
    "crop": (lambda: Preprocessing(crop_ratio=1.5), "crop ratio 1.5"),
    "resize": (lambda: Preprocessing(resize="lanczos"), "valid: bicubic, stretch"),
}


@pytest.mark.parametrize("case", USAGE)
def test_names_and_values_are_checked_before_the_model(case: str) -> None:
    call, words = USAGE[case]
    with pytest.raises(UsageError, match=words):
        call()


def test_a_live_module_is_left_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(2))
    net(torch.rand(2, 3, *SIZE))
    net.double().train()
    made = Source.module(net, image_size=SIZE).make()
    assert net.training
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert not made.training
    assert {p.dtype for p in made.parameters()} == {torch.float32}


def test_a_module_that_is_ready_is_not_copied_and_wrappers_are_looked_into() -> None:
    net = Keyword().eval()
    assert prepared(net) is net
    compiled = nn.Module()
    compiled.add_module("_orig_mod", net)  # as torch.compile keeps it
    assert prepared(compiled) is net
    assert prepared(nn.DataParallel(net).eval()) is net


def test_class_names_come_from_labels_or_are_numbers() -> None:
    source = Source.module(Keyword(), image_size=SIZE)
    specs = source.outputs(SIZE, 1)
    assert source.class_names(specs) == ("class 0", "class 1", "class 2")
    assert replace(source, labels=("r", "g", "b")).class_names(specs) == ("r", "g", "b")
    with pytest.raises(InputError, match="2 labels for the 3 classes"):
        replace(source, labels=("r", "g")).class_names(specs)
    assert Source.module(Keyword(), task="tensors").class_names((TensorSpec("a", "float32", "NC", (1, 3)),)) == ()


def test_clip_is_that_of_its_code() -> None:
    assert PREPROCESSINGS["clip"].mean[0] == pytest.approx(0.4815, abs=1e-4)
    assert PREPROCESSINGS["unit"].std == (1.0, 1.0, 1.0)


USER_CODE = """
import torch
from torch import nn
from beside import WIDTH

print("loading")
CALLS = []

class Net(nn.Module):
    def __init__(self, classes=4, width=WIDTH):
        super().__init__()
        CALLS.append(classes)
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        self.same = self.fc

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean((2, 3)))

ready = Net()
number = 3

class Nets:
    small = Net

def wrong(): return 3
def broken(): raise KeyError("where")
def leave(): raise SystemExit(7)
def needs(size): return Net(size)
"""


@pytest.fixture
def user_file(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 6\n")
    path = tmp_path / "net.py"
    path.write_text(USER_CODE)
    sys.modules.pop("beside", None)
    return path


def test_a_file_is_imported_when_the_model_is_made_and_once(
    user_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(sys.modules)
    source = Source.reference(f"{user_file}:Net", {"classes": 5}, image_size=SIZE)
    assert not [name for name in set(sys.modules) - before if name.startswith("dualtoken_user")]
    assert source.outputs(SIZE, "batch") == (TensorSpec("logits", "float32", "NC", ("batch", 5)),)
    model = source.make()
    assert model is source.make()
    (user,) = [sys.modules[n] for n in set(sys.modules) - before if n.startswith("dualtoken_user")]
    assert user.CALLS == [4, 5]  # `ready`, and this one
    assert (source.name, source.origin.kind, source.origin.reference) == ("net", REFERENCE, f"{user_file}:Net")
    assert source.origin.arguments == {"classes": 5}
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "loading\n")  # stdout is the document of --json


def test_random_weights_are_the_same_every_time_and_leave_the_callers_alone(user_file: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one = Source.reference(f"{user_file}:Net", image_size=SIZE).make()
    assert torch.equal(torch.rand(1), expected)
    two = Source.reference(f"{user_file}:Net", image_size=SIZE).make()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    other = Source.reference(f"{user_file}:Net", image_size=SIZE, seed=1).make()
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


def test_a_module_beside_the_working_folder(user_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (user_file.parent / "my_models").mkdir()
    (user_file.parent / "my_models/small.py").write_text(USER_CODE)
    monkeypatch.chdir(user_file.parent)
    for name in ("my_models.small:Nets.small", "my_models.small:ready"):
        assert Source.reference(name, image_size=SIZE).outputs(SIZE, 1)[0].shape == (1, 4)


# reference (FILE: the user's), arguments, what is raised and said
REFERENCES: dict[str, tuple[str, dict[str, Any], type[DualTokenError], str]] = {
    "no colon": ("net.py", {}, UsageError, "is no reference; give package.module:callable"),
    "no callable": ("net.py:", {}, UsageError, "is no reference"),
    "no identifier": ("my-net:make", {}, UsageError, "neither a Python file nor a module"),
    "no file": ("nowhere/net.py:make", {}, UsageError, "no file nowhere/net.py"),
    "no module": ("no_such_module_here:make", {}, UsageError, "no module named 'no_such_module_here'"),
    "no submodule": ("torch.no_such:make", {}, UsageError, "no module named 'torch.no_such'"),
    "no attribute": ("FILE:Nett", {}, UsageError, "has no 'Nett'; it has .*Net, "),
    "not callable": ("FILE:number", {}, UsageError, "is a int and cannot be called"),
    "unknown argument": ("FILE:Net", {"depth": 3}, UsageError, "argument 'depth'; its arguments: classes, width"),
    "missing argument": ("FILE:needs", {}, UsageError, "missing a required argument: 'size'; its arguments: size"),
    "no module returned": ("FILE:wrong", {}, InputError, "returned a int"),
    "raises": ("FILE:broken", {}, InputError, r"calling .*:broken raised KeyError at .*net.py:\d+ in broken: 'where'"),
    "exits": ("FILE:leave", {}, InputError, r"raised SystemExit at .*net.py:\d+ in leave: exit 7"),
    "wrong value": ("FILE:Net", {"classes": "four"}, InputError, r"raised TypeError at .*net.py:\d+ in __init__"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFERENCES)
def test_a_reference_that_leads_nowhere_is_one_line(case: str, user_file: Path) -> None:
    reference, arguments, kind, words = REFERENCES[case]
    with pytest.raises(kind) as caught:
        Source.reference(reference.replace("FILE", str(user_file)), arguments, image_size=SIZE).make()
    assert re.search(words, str(caught.value))
    assert "\n" not in str(caught.value)


BROKEN_FILES: dict[str, tuple[str, str]] = {
    "a syntax error": ("def make(:\n", r"raised SyntaxError at .*broken.py:1"),
    "a missing package": ("import no_such_package\n", r"ModuleNotFoundError at .*broken.py:1 .*'no_such_package'"),
    "an error": ("x = 1\n1 / 0\n", r"raised ZeroDivisionError at .*broken.py:2 in <module>: division by zero"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_file_that_does_not_import_says_where(case: str, tmp_path: Path) -> None:
    text, words = BROKEN_FILES[case]
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(InputError) as caught:
        Source.reference(f"{tmp_path}/broken.py:make").make()
    assert re.search(words, str(caught.value))
    assert not [name for name in sys.modules if name.startswith("dualtoken_user_broken")]


def _state(user_file: Path) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = Source.reference(f"{user_file}:Net", image_size=SIZE, seed=9).make()
    return {k.removeprefix("model."): v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", " under model.pt"])
def test_weights_are_loaded(suffix: str, user_file: Path, tmp_path: Path) -> None:
    state, path = _state(user_file), tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":  # one tensor under two names is saved under one of them
        save_file({k: v for k, v in state.items() if not k.startswith("same.")}, path)
    else:
        torch.save({"model": state} if "under" in suffix else state, path)
    made = Source.reference(f"{user_file}:Net", weights=path, image_size=SIZE).make().state_dict()
    assert all(torch.equal(made[f"model.{k}"], v) for k, v in state.items())


def _without(*names: str) -> Any:
    return lambda state: {k: v for k, v in state.items() if k not in names}


# what was done to the state dict, and the words of the error
WEIGHTS: dict[str, tuple[Any, str]] = {
    "missing": (_without("conv.bias", "norm.weight"), "2 missing: conv.bias, norm.weight"),
    "unexpected": (lambda s: {**s, "head.weight": torch.zeros(1)}, "1 unexpected: head.weight"),
    "mis-shaped": (lambda s: {**s, "conv.bias": torch.zeros(9)}, r"1 mis-shaped: conv.bias \(9,\) instead of \(6,\)"),
    "many": (lambda s: {**s, **{f"x{i}": torch.zeros(1) for i in range(90)}}, "90 unexpected: x0, .* and 84 more$"),
    "wrapped": (lambda s: {f"model.{k}": v for k, v in s.items()}, "begin with 'model.', which is a wrapper's"),
    "not finite": (lambda s: {**s, "conv.bias": torch.full((6,), torch.nan)}, "NaN or infinity in conv.bias"),
    "code": (lambda s: {**s, "run": print}, "could run code"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_do_not_fit_are_named(case: str, user_file: Path, tmp_path: Path) -> None:
    change, words = WEIGHTS[case]
    path = tmp_path / "weights.pt"
    torch.save(change(_state(user_file)), path)
    with pytest.raises(WeightsError) as caught:
        Source.reference(f"{user_file}:Net", weights=path, image_size=SIZE).make()
    assert re.search(words, str(caught.value))
    assert len(str(caught.value)) < 600


def test_an_old_checkpoint_without_the_counters_of_training_fits(user_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(_without("norm.num_batches_tracked")(_state(user_file)), path)
    Source.reference(f"{user_file}:Net", weights=path, image_size=SIZE).make()


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    path = tmp_path_factory.mktemp("onnx") / "Some Net.onnx"
    torch.onnx.export(net, (torch.zeros(1, 3, *SIZE),), path, dynamo=True, verbose=False)
    return path, net


def test_an_onnx_file_is_its_own_reference(onnx_file: tuple[Path, nn.Module]) -> None:
    path, net = onnx_file
    source = Source.onnx(path)
    assert (source.name, source.size, source.origin.kind) == ("some-net", SIZE, "onnx")
    assert source.outputs(SIZE, 1) == (TensorSpec("logits", "float32", "NC", (1, 4)),)
    image = torch.rand(1, 3, *SIZE)
    np.testing.assert_allclose(source.make()(image)[0].numpy(), net(image).detach().numpy(), atol=1e-6)


def test_what_is_no_picture_model_is_refused(onnx_file: tuple[Path, nn.Module], tmp_path: Path) -> None:
    import onnx

    path, _ = onnx_file
    with pytest.raises(UsageError, match="takes pictures of 8x12, not 16x16"):
        Source.onnx(path, image_size=16)
    with pytest.raises(UsageError, match="no file"):
        Source.onnx(tmp_path / "none.onnx")
    (tmp_path / "cut.onnx").write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="no whole ONNX model"):
        Source.onnx(tmp_path / "cut.onnx")
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.INT64, [1, 7]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", value[:1], value[1:])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "text.onnx")
    with pytest.raises(InputError, match="is int64 1x7, and a picture is float32"):
        Source.onnx(tmp_path / "text.onnx")


def test_the_origin_of_a_live_module_cannot_be_made_again() -> None:
    origin = Source.module(Keyword(), image_size=SIZE, name="My Net").origin
    assert (origin.kind, origin.name, origin.reference) == (MODULE, "my-net", None)
