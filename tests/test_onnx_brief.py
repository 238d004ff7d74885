"""Tracing once gives the graph that tracing twice gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from dualtoken_deploy.targets.onnx import brief


class Known(nn.Module):
    """All operators that are exchanged; two outputs that are casts to what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 10, generator=torch.Generator().manual_seed(0)))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.to(torch.float32)
        first, second, third = (1 - x).chunk(3, 1)  # 10 channels: 4, 4 and 2
        rows = x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 10).contiguous()
        unused = x * 3
        assert unused is not x
        return (rows @ self.weight.T).flatten(1), (first - second).to(torch.float32), third, self.pool(x).double()


class Casts(nn.Module):
    """What torch casts by itself: numbers and kinds of tensors to one another, and results that others read."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        many = (x > 0.5).to(torch.int64)
        mixed = (x + 1) * many + x.to(torch.float32)
        return mixed * mixed, many / 2 - x, torch.where(many > 0, 1.5, x.to(torch.float32)), torch.cat([x, mixed])


class InPlace(nn.Module):
    """What is written into is seen in what shares its memory."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        doubled = x * 2
        view = doubled.reshape(-1)
        doubled.add_(1)
        return view, doubled


class Batched(nn.Module):
    """Two dynamic sides in one flattened shape."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


class Unknown(nn.Module):
    """torch.onnx has no translation of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.batch_norm(x, torch.zeros(10), torch.ones(10))


X = torch.rand(2, 10, 4, 6, generator=torch.Generator().manual_seed(1)).half()
DYNAMIC = {0: torch.export.Dim("batch", min=1, max=8)}
SIDES = {**DYNAMIC, 2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}


@pytest.mark.parametrize(
    ("module", "shapes", "once"),
    [
        (Known(), None, True),
        (Known(), DYNAMIC, True),
        (Casts(), DYNAMIC, True),
        (InPlace(), DYNAMIC, False),
        (Batched(), SIDES, False),
        (Batched(), None, True),
        (Unknown(), DYNAMIC, False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value)[:12],
)
def test_the_graph_is_the_same(
    module: nn.Module, shapes: dict[int, Any] | None, once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = []
    own = brief.exchange

    def watch(program: ExportedProgram, known: set[Any]) -> bool:
        exchanged.append(own(program, known))
        return exchanged[-1]

    monkeypatch.setattr(brief, "exchange", watch)
    found, whole = (traced(module, shapes, context) for context in (brief.brief, contextlib.nullcontext))
    assert exchanged == [once]
    assert rows(found) == rows(whole)
    with torch.no_grad():
        wanted = module.eval()(X)
    for answer, want in zip(answers(found), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
        np.testing.assert_allclose(answer, want.numpy(), rtol=1e-3, atol=1e-3)


def test_torch_is_left_as_it_was() -> None:
    from torch.onnx._internal.exporter import _fx_passes

    own = _fx_passes.decompose_with_registry
    with pytest.raises(ZeroDivisionError), brief.brief():
        _ = 1 / int(_fx_passes.decompose_with_registry is own)
    assert _fx_passes.decompose_with_registry is own


def traced(module: nn.Module, shapes: dict[int, Any] | None, context: Callable[[], Any]) -> onnx.ModelProto:
    with context():
        program = torch.onnx.export(
            module.eval(), (X,), dynamo=True, dynamic_shapes=(shapes,) if shapes else None, verbose=False
        )
    assert program is not None
    return program.model_proto


def rows(model: onnx.ModelProto) -> list[tuple[Any, ...]]:
    """Each node as its operator, attributes and inputs: a value by who made it, a constant by its numbers. Whether a
    0 in the shape of a Reshape is a 0 is left out: there is none."""
    held = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    made: dict[str, Any] = {value.name: ("input", value.name) for value in model.graph.input}
    found = []
    for place, node in enumerate(model.graph.node):
        attributes = sorted(str(a) for a in node.attribute if a.name != "allowzero")
        inputs = [(v.dtype.str, v.tolist()) if (v := held.get(name)) is not None else made[name] for name in node.input]
        found.append((node.op_type, attributes, inputs))
        made |= {name: (place, output) for output, name in enumerate(node.output)}
    shapes = [(o.type, made.get(o.name)) for o in model.graph.output]
    return [*found, ("outputs", str([made_by for _, made_by in shapes]), [str(kind) for kind, _ in shapes])]


def answers(model: onnx.ModelProto) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    return list(session.run(None, {model.graph.input[0].name: X.numpy()}))
