"""LiteRT: a .tflite of builtin operators, NHWC, converted by litert-torch in an environment of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from dualtoken_deploy.deploy.traced import TRACED_RULES
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.processes import how_it_ended
from dualtoken_deploy.targets.litert import changes, flat
from dualtoken_deploy.targets.litert.environment import converter_python
from dualtoken_deploy.targets.litert.fewer import take_away
from dualtoken_deploy.targets.litert.metadata import add_metadata
from dualtoken_deploy.targets.litert.structure import structure
from dualtoken_deploy.targets.mobile.torch_program import Source, check_fixed, make_source
from dualtoken_deploy.targets.request import Artifact, Request, Tell, quiet

aten = torch.ops.aten
WORKER = Path(__file__).with_name("worker.py")
CONVERSION_SECONDS = 1800  # S took 62 s on two busy cores; a conversion that hangs is to end
MODEL = "model.tflite"
# what fills a tensor, and with what; None: with its second argument
FILLED: Mapping[Any, int | None] = MappingProxyType(
    {
        aten.zeros.default: 0,
        aten.zeros_like.default: 0,
        aten.new_zeros.default: 0,
        aten.ones.default: 1,
        aten.ones_like.default: 1,
        aten.new_ones.default: 1,
        aten.full.default: None,
        aten.full_like.default: None,
    }
)
POOLS = {name: PRODUCT_RULES[name] for name in ("uneven_pool_as_product",)}  # the converter refuses uneven bins


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.tflite. Raises UsageError on an opset or a dynamic batch, MissingError without the converter's
    environment, ConversionError where litert-torch fails or leaves an operator that no plain runtime has."""
    check_fixed(request, "LiteRT")
    converter_python()  # said before minutes of work
    source = make_source(model, request, TRACED_RULES, tell, POOLS)
    tell("converting to LiteRT")
    path = folder / MODEL
    convert(source, path)
    return describe(path, finish(path, request, source))


def finish(path: Path, request: Request, source: Source) -> Source:
    """Gives the converter's file fewer operators, the model's names, the request's precision, metadata.

    Returns the source with what was done to the file among its rules. Raises ConversionError.
    """
    converted = flat.read(path)
    check_operators(converted)
    changes.equal_ranks(converted)
    fewer = take_away(converted)
    names = list(source.names.values())
    changes.name_values(converted, names, source.biased, (request.contract.tensor,), request.outputs)
    changes.part_weights(converted)
    if request.precision == "fp16":
        flat.write(converted, path)
        from dualtoken_deploy.targets.litert.compress import to_half

        converted = to_half(path)
    flat.write(converted, path, add_metadata(converted, request))
    return replace(source, rules=(*source.rules, *(name for name, count in fewer.items() if count)))


def describe(path: Path, source: Source) -> Artifact:
    """What was made, read from the file."""
    saved = flat.read(path)
    kinds = Counter(op.kind for op in flat.operators(saved))
    return Artifact(source.rules, {"tflite": dict(kinds.most_common()), "structure": structure(saved)})


def convert(source: Source, output: Path) -> None:
    """Runs the worker on a saved program whose nodes carry their names. Raises ConversionError."""
    fill_in_kind(source.program.graph_module)
    named = {node.name: node for node in source.program.graph.nodes}
    for node, name in source.names.items():
        named[node].meta["nn_module_stack"] = {"d": (name.replace(".", ":"), "d")}
    with tempfile.TemporaryDirectory(prefix="dualtoken-litert.") as scratch:
        program = Path(scratch) / "program.pt2"
        with quiet():
            torch.export.save(source.program, program)
        own = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [str(converter_python()), str(WORKER), str(program), str(output.absolute())]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=CONVERSION_SECONDS, check=False, env=own, cwd=scratch
            )
        except subprocess.TimeoutExpired as error:
            raise ConversionError(f"litert-torch did not end within {CONVERSION_SECONDS} s") from error
    if done.returncode != 0 or not output.is_file():
        raise ConversionError(f"litert-torch cannot convert the model: {_reason(done.stderr, done.returncode)}")


def fill_in_kind(module: fx.GraphModule) -> None:
    """Writes floats that are filled with a whole number as filled with a float, in place: litert-torch gives zeros_like
    of floats the kind of its 0, and then refuses to put it beside floats."""
    for node in module.graph.nodes:
        made = node.meta.get("val")
        if node.target in FILLED and made.dtype.is_floating_point:
            value = next((x for x in (FILLED[node.target], *node.args[1:]) if isinstance(x, (int, float))), None)
            if value is not None:
                node.target, node.args = aten.full.default, (list(made.shape), float(value))
                node.kwargs = {"dtype": made.dtype, "device": made.device, "pin_memory": False}
    module.recompile()


def check_operators(model: object) -> None:
    """Raises ConversionError where the converter left what only an interpreter with additions would run."""
    foreign = sorted({op.kind for op in flat.operators(model) if op.kind.startswith(("CUSTOM", "operator"))})
    if foreign:
        raise ConversionError(
            f"litert-torch left {', '.join(foreign)}, which no plain LiteRT runtime has; no file was written"
        )


def _reason(text: str, code: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if "Error" in line or "error:" in line]
    if code < 0 and not said:  # what it printed last is no reason
        return f"its process {how_it_ended(code)}"
    return (said or lines or [f"it {how_it_ended(code)}"])[-1][:300]
