"""Bad input over every family: each ends in one line, its exit code, and nothing written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dualtoken_deploy import create_model
from dualtoken_deploy.models.registry import FAMILIES, family_of, get_variant
from dualtoken_deploy.models.systems import SYSTEMS, create_system
from tests.commands import fails
from tests.small import TINY_VIM

SMALLEST = ("t-mix", "lightvit-t", "dualformer-t", TINY_VIM.name)  # one of each family
OTHERS = ("tsm2", "dualtoken-tokenizer-s")  # that are no classifiers
DENSE = ("retinanet", "mask-rcnn", "deeplabv3", "pspnet")


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def state_of(variant: str) -> dict[str, torch.Tensor]:
    model = create_system(variant) if variant in OTHERS else create_model(variant, image_size=64)
    return model.state_dict()


def of_another_variant(path: Path, variant: str) -> None:
    save_file(state_of(SMALLEST[SMALLEST.index(variant) - 1]), path)


def of_a_system(path: Path, variant: str) -> None:
    save_file(state_of(next(name for name in OTHERS if name != variant)), path)


def of_other_shapes(path: Path, variant: str) -> None:
    state = state_of(variant)
    name = next(name for name, value in state.items() if value.ndim == 2)
    save_file({**state, name: state[name][:-1].contiguous()}, path)


def truncated(path: Path, variant: str) -> None:
    save_file(state_of(variant), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_code(path: Path, variant: str) -> None:
    path.write_bytes(pickle.dumps({"model": Code(path.parent / "made")}))


def checkpoint_with_code(path: Path, variant: str) -> None:
    torch.save({"model": Code(path.parent / "made")}, path)


def empty(path: Path, variant: str) -> None:
    path.touch()


def not_finite(path: Path, variant: str) -> None:
    state = state_of(variant)
    name = next(name for name, value in state.items() if value.ndim == 2)
    save_file({**state, name: torch.full_like(state[name], float("nan"))}, path)


Harm = tuple[Callable[[Path, str], None], str, str]
SYSTEM: Harm = (of_a_system, ".safetensors", "does not fit variant")
HARMS: tuple[Harm, ...] = (
    (of_another_variant, ".safetensors", "holds weights of variant"),
    (of_other_shapes, ".safetensors", "1 mis-shaped: "),
    (truncated, ".safetensors", "not a whole safetensors file"),
    (with_code, ".pth", "could run code"),
    (checkpoint_with_code, ".pth", "could run code"),
    (empty, ".safetensors", "not a whole safetensors file"),
    (not_finite, ".safetensors", "holds NaN or infinity in "),
)


def test_every_family_is_here() -> None:
    """Of ViM2 a small one, since its smallest variant has 22 M parameters."""
    assert [family_of(get_variant(name).config) for name in SMALLEST] == list(FAMILIES)
    assert set(OTHERS) == set(SYSTEMS)


MODELS = (
    *(((variant,), HARMS) for variant in SMALLEST),
    *(((variant,), (SYSTEM, *HARMS[1:])) for variant in OTHERS),
    (("t-mix",), (SYSTEM,)),
    *((("t-mix", "--head", head), (HARMS[2], HARMS[5])) for head in DENSE),
)


@pytest.mark.parametrize(
    ("model", "harm", "suffix", "message"),
    [(model, *harm) for model, harms in MODELS for harm in harms],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else getattr(value, "__name__", ""),
)
def test_bad_weights(
    model: tuple[str, ...],
    harm: Callable[[Path, str], None],
    suffix: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = tmp_path / f"weights{suffix}"
    harm(weights, model[0])
    size = () if model[0] == "tsm2" else ("--image-size", "64")  # it takes a series
    code, line = fails(
        capsys, "export", "--variant", *model, "--target", "onnx", *size,
        "--weights", weights, "--output", tmp_path / "bundle",
    )  # fmt: skip
    assert (code, message in line, weights.name in line) == (4, True, True), line
    assert len(line) < 2000
    assert [p.name for p in tmp_path.iterdir()] == [weights.name]


@pytest.mark.parametrize("variant", SMALLEST)
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--option", "wheels=4"), 2, "valid options"),
        (("--option", "classes"), 2, "NAME=VALUE"),
        (("--option", "drop_path=2"), 2, "drop_path"),
        (("--option", "drop_path=much"), 2, "drop_path"),
        (("--image-size", "63"), 2, "at least 64"),
        (("--image-size", "224x"), 2, "image size"),
        (("--image-size", "4097"), 2, "at most 4096"),
        (("--image-size", "99999999x64"), 2, "at most 4096"),
        (("--precision", "int3"), 2, "valid precisions"),
        (("--precision", "int8"), 2, "--calibration"),
        (("--target", "coreml", "--deployment-target", "iOS3"), 2, "iOS16"),
        (("--target", "coreml", "--layout", "sideways"), 2, "layout"),
        (("--seed", "-1"), 2, "seed"),
        (("--labels", "absent.txt"), 4, "absent.txt"),
        (("--calibration", "absent", "--precision", "int8"), 4, "absent"),
        (("--device", "cuda:7", "--target", "aotinductor"), 3, "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options(
    variant: str,
    arguments: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = () if "--target" in arguments else ("--target", "onnx")
    base = ("export", "--variant", variant, "--output", tmp_path / "bundle", *target)
    found, line = fails(capsys, *base, *arguments)
    assert (found, message in line) == (code, True), line
    assert list(tmp_path.iterdir()) == []
