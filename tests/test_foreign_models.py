"""Models that nobody here wrote, from transformers, by their reference through the one pipeline; and what cannot be."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.models.source import Source
from dualtoken_deploy.pipeline.export import export
from dualtoken_deploy.targets.load import load_runner
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.targets.tracing import own_path, path_below
from tests.foreign import check_two_outputs

ZOO = Path(__file__).parents[1] / "benchmarks/foreign_zoo.py"
# name, task, and outputs asked for
MODELS = {
    "vit": ("classify", ()),
    "segformer": ("segment", ()),
    "clip_vision": ("embed", ("image_embeds",)),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_peoples_models_run_as_eager_does(name: str, tmp_path: Path) -> None:
    task, names = MODELS[name]
    result = export(f"{ZOO}:{name}", task=task, image_size=64, output_names=names, output=tmp_path / name)
    assert result.sqnr_db > 100
    bundle = Bundle.open(tmp_path / name)
    assert bundle.manifest.origin is not None
    assert bundle.manifest.origin.reference == f"{ZOO}:{name}"
    picture = np.random.default_rng(3).integers(0, 256, (1, 64, 64, 3), dtype=np.uint8)
    source = Source.reference(f"{ZOO}:{name}", task=task, image_size=64, output_names=names)
    mean, std = (np.array(v, np.float32) for v in (source.preprocessing.mean, source.preprocessing.std))
    with torch.no_grad():
        wanted = source.make()(torch.from_numpy(((picture / np.float32(255) - mean) / std).transpose(0, 3, 1, 2)))
    with load_runner(bundle) as runner:
        found = runner.run({bundle.manifest.input.tensor.name: picture})
    for value, expected in zip(found.values(), wanted, strict=True):
        np.testing.assert_allclose(value, expected.numpy(), rtol=1e-3, atol=1e-4)
    graph = onnx.load(tmp_path / name / "model.onnx").graph
    made = {value.split("/")[0] for node in graph.node for value in node.output}
    layers = [path for path, part in source.make().named_modules() if type(part) is nn.Linear]
    named = [path for path in layers if path.removeprefix("model.") in made]
    assert len(named) > len(layers) / 2  # the rest were joined, or give an output, and have its name


@pytest.mark.parametrize("name", ["levit", "vit"])
def test_what_stands_in_the_table_tells_pictures_apart(name: str) -> None:
    """Or an agreement would say nothing: answers differ, and no photograph is near a tie."""
    spec = importlib.util.spec_from_file_location("foreign_zoo", ZOO)
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    sys.modules["foreign_zoo"] = zoo
    spec.loader.exec_module(zoo)
    model = getattr(zoo, name)()
    with torch.no_grad():
        logits = model(pixel_values=zoo.photographs()).logits
    first, second = logits.sort(-1, descending=True).values[:, :2].T
    assert len(set(logits.argmax(-1).tolist())) >= 4
    assert (first - second).min() > zoo.CLEAR * logits.square().mean().sqrt()


class Inner(nn.Module):
    """A convolution, then what `act` makes of its map."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 4, 3, padding=1), act

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.conv(x))
        return out


def _branch(y: Tensor) -> Tensor:
    if y.sum() > 0:
        return y * 2
    return y * 3


def _zeroed(y: Tensor) -> Tensor:
    y[:, 0] = 0.0
    return y.relu_().add_(1)


def _masked(y: Tensor) -> Tensor:
    y[y > 0] = 0.5
    return y


# what the module does, target, and the words of the error
HERE = r"test_foreign_models\.py:\d+"
REFUSED = {
    "control flow, onnxruntime": (_branch, "onnxruntime", rf"stem\.0 \(.*{HERE} in _branch\): .*torch\.where"),
    "control flow, coreml": (_branch, "coreml", rf"stem\.0 \(.*{HERE} in _branch\): .*torch\.where"),
    "no ONNX operator": (torch.linalg.svdvals, "onnxruntime", r"aten\._linalg_svd in stem\.0 \(.*in forward\): ONNX"),
    "no Core ML operator": (torch.lgamma, "coreml", rf"lgamma in stem\.0 \(.*{HERE} in forward\): "),
    "control flow, coreai": (_branch, "coreai", rf"stem\.0 \(.*{HERE} in _branch\): .*torch\.where"),
    "no Core AI operator": (torch.lgamma, "coreai", rf"aten\.lgamma in stem\.0 \(.*{HERE} in forward\): "),
    "control flow, aotinductor": (_branch, "aotinductor", rf"stem\.0 \(.*{HERE} in _branch\): .*torch\.where"),
    "not in the reference": (_masked, "coreml", r"has .*non_zero.* \(in .*\), which the reference"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_says_operator_module_and_line(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    act, target, words = REFUSED[case]
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(Inner(act)))
    with pytest.raises(ConversionError) as caught:
        export(model.eval(), target, task="tensors", image_size=16, output=tmp_path / "bundle")
    assert re.search(words, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("target", ["coreai"])  # aotinductor's is in its own file, where its compiler is looked at once
def test_targets_that_take_torch_programs_take_foreign_ones(target: str, tmp_path: Path) -> None:
    row = TARGETS[target]
    if row.missing(row.export_modules):
        pytest.skip(f"{row.title} is not installed")
    check_two_outputs(target, tmp_path / "bundle")


def test_a_pool_larger_than_its_map_is_the_mean_of_the_map(tmp_path: Path) -> None:
    """As EfficientNet ends in transformers: a kernel of hundreds, cut at the map's edge."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.AvgPool2d(64, ceil_mode=True), nn.Flatten()).eval()
    result = export(model, "openvino", task="tensors", image_size=16, output=tmp_path / "bundle")
    assert result.sqnr_db > 100


def test_changes_in_place_are_exported_as_they_are(tmp_path: Path) -> None:
    result = export(Inner(_zeroed).eval(), task="tensors", image_size=16, output=tmp_path / "bundle")
    assert result.sqnr_db > 100


PATHS = {
    ("1.model.stem.0", "1.model"): "stem.0", ("1.model", "1.model"): "model", ("1", "1.model"): "model",
    ("", "1.model"): "model", ("0", "1.model"): "input", ("stem", ""): "stem", ("", ""): "model",
    ("pixels", "model"): "input", ("model.a", "model"): "a", ("modela", "model"): "input",
}  # fmt: skip


@pytest.mark.parametrize("given", PATHS)
def test_paths_are_those_of_the_users_modules(given: tuple[str, str]) -> None:
    assert path_below(*given) == PATHS[given]


def test_the_model_lies_behind_what_names_its_outputs() -> None:
    source = Source.module(Inner(torch.relu).eval(), task="tensors", image_size=16)
    assert own_path(source.make()) == "model"
