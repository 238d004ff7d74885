"""The torch program behind LiteRT, ExecuTorch and ncnn: preprocessing, the deploy form, and the model's own names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.deploy.traced import Program, rewrite_program
from dualtoken_deploy.errors import ConversionError, UsageError, first_line
from dualtoken_deploy.targets.apple.names import name_after_modules
from dualtoken_deploy.targets.request import Request, Tell, quiet
from dualtoken_deploy.targets.tracing import Around, own_path

ProgramRules = Mapping[str, Callable[[Program], int]]
NO_RULES: ProgramRules = MappingProxyType({})
_PRODUCTS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)


class PixelModel(Around):
    """uint8 NHWC RGB -> whatever the model gives."""

    def __init__(self, model: nn.Module, request: Request) -> None:
        super().__init__()
        self.pixels = ImageInput(request.contract.mean, request.contract.std, torch.float32)
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model(self.pixels(image))


@dataclass(frozen=True)
class Source:
    """`program` takes one input of the contract's shape and dtype. `rules`: those that applied, modules' and traced.
    `names`: {node of the program: the model's name of its value}, in the order that they are made; `biased`: of those
    names the products with a bias."""

    program: Program
    rules: tuple[str, ...]
    names: dict[str, str]
    biased: frozenset[str]


def make_source(
    model: nn.Module, request: Request, traced: Iterable[str], tell: Tell, more: ProgramRules = NO_RULES
) -> Source:
    """The deploy form behind the input contract, traced at a fixed size and rewritten by rules of deploy/traced.py,
    then by `more`.

    Raises ConversionError where torch cannot trace the model.
    """
    tell("rewriting to the deploy form")
    form = deploy_form(model, DEFAULT_RULES, request.contract.size)
    image = request.contract.kind == "image"
    module = PixelModel(form.module, request) if image else form.module
    tell("tracing with torch.export")
    spec = request.contract.tensor
    example = torch.zeros(spec.concrete(), dtype=getattr(torch, spec.dtype))
    try:
        with quiet(), torch.no_grad():
            program, counts = rewrite_program(torch.export.export(module.eval(), (example,)), traced, more)
    except Exception as error:  # torch.export has no common base for what it raises
        raise ConversionError(f"torch.export cannot trace the model: {first_line(error)}") from error
    names = name_after_modules(program, own_path(module), [output.name for output in request.outputs])
    applied = [name for name, count in {**form.rules, **counts}.items() if count]
    products = [node for node in program.graph.nodes if node.target in _PRODUCTS and len(node.args) > 2]
    biased = frozenset(names[node.name] for node in products if node.args[2] is not None and node.name in names)
    return Source(program, tuple(applied), names, biased)


def check_fixed(request: Request, title: str) -> None:
    """Raises UsageError on what a format of fixed shapes without an opset does not have."""
    if request.opset is not None:
        raise UsageError(f"opset is a matter of ONNX, and {title} takes none; leave --opset out")
    if request.contract.batch is None:
        raise UsageError(f"a {title} model here has fixed shapes; give --batch a number")
