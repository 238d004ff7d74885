"""Core AI: an .aimodel from torch.export by Apple's coreai-torch, for iOS and macOS 27 and later."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn

from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, UsageError
from dualtoken_deploy.processes import how_it_ended, own_command, own_environment
from dualtoken_deploy.targets.apple.torch_program import PixelInput, trace
from dualtoken_deploy.targets.coreai.form import HalfPrecision, to_coreai_form
from dualtoken_deploy.targets.coreml.package import AUTHOR, LICENSE, input_text
from dualtoken_deploy.targets.request import Artifact, Request, Tell
from dualtoken_deploy.targets.tracing import find_operator

CONVERSION_SECONDS = 1200  # S took 16 s on a quiet machine; a conversion that hangs is to end


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.aimodel. The program takes float32 NCHW: pixels 0..255 for an image contract, else normalised ones.

    Raises UsageError on an opset or a dynamic batch, ConversionError where coreai-torch fails or ends its process.
    """
    if request.opset is not None:
        raise UsageError("opset is a matter of ONNX, and Core AI takes none; leave --opset out")
    if request.contract.batch is None:
        raise UsageError("a Core AI program here has fixed shapes; give --batch a number")
    tell("rewriting to the deploy form")
    form = deploy_form(model, DEFAULT_RULES, request.contract.size)
    to_coreai_form(form.module)
    tell("tracing with torch.export")
    module = _with_input(form.module, request)
    program = trace(module, request.contract)
    tell("converting to Core AI")
    with tempfile.TemporaryDirectory() as scratch:
        _convert(program, module, request, folder / "model.aimodel", Path(scratch))
    applied = tuple(name for name, count in form.rules.items() if count)
    return Artifact(applied, {})


def _with_input(module: nn.Module, request: Request) -> nn.Module:
    half = HalfPrecision(module) if request.precision == "fp16" else module
    if request.contract.kind != "image":
        return half
    return nn.Sequential(PixelInput(request.contract.mean, request.contract.std), half)


def _convert(
    program: torch.export.ExportedProgram, module: nn.Module, request: Request, output: Path, scratch: Path
) -> None:
    saved, wanted = scratch / "program.pt2", scratch / "request.json"
    torch.export.save(program, saved)
    texts = {
        "input": request.contract.tensor.name,
        "outputs": [spec.name for spec in request.outputs],
        "author": AUTHOR,
        "license": LICENSE,
        "description": f"{request.metadata['variant']}, {request.precision}; weights: "
        f"{request.metadata['weights']}; input: {input_text(request.contract)}",
    }
    wanted.write_text(json.dumps(texts), encoding="utf-8")
    worker = [*own_command("dualtoken_deploy.targets.coreai.worker"), *map(str, (saved, output, wanted))]
    try:
        done = subprocess.run(
            worker, capture_output=True, text=True, timeout=CONVERSION_SECONDS, check=False, env=own_environment()
        )
    except subprocess.TimeoutExpired as error:
        raise ConversionError(f"coreai-torch did not end within {CONVERSION_SECONDS} s") from error
    if done.returncode != 0 or not output.is_dir():
        what = find_operator(done.stderr, program, module) or "the model"
        raise ConversionError(f"coreai-torch cannot convert {what}: {_reason(done.stderr, done.returncode)}")


def _reason(text: str, code: int) -> str:
    """The line that says why: its compiler's own error, or the last line of a traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    fatal = [n for n, line in enumerate(lines) if "ERROR" in line]
    if fatal:
        return " ".join(lines[fatal[0] : fatal[0] + 2])[:300]
    return lines[-1][:300] if lines and code > 0 else f"its process {how_it_ended(code)}"
