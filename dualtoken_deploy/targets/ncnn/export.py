"""ncnn: model.ncnn.param and model.ncnn.bin, converted by pnnx from the deploy form traced by torch."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.deploy.traced import rewrite_program
from dualtoken_deploy.errors import BundleError, ConversionError, UsageError, first_line, missing_extra
from dualtoken_deploy.targets.mobile.torch_program import check_fixed
from dualtoken_deploy.targets.ncnn.runner import BINARY, PARAM, layers, open_net
from dualtoken_deploy.targets.request import Artifact, Request, Tell, quiet
from dualtoken_deploy.targets.tracing import Around

RULES = ("merge_axes", "join_views")  # ncnn has no more than four axes, the batch's not among them
CONVERSION_SECONDS = 900


class PlanarPixels(Around):
    """float32 NCHW RGB of 0..255, as ncnn makes it of a picture's bytes, -> whatever the model gives."""

    shift: Tensor
    gain: Tensor

    def __init__(self, model: nn.Module, request: Request) -> None:
        super().__init__()
        pixels = ImageInput(request.contract.mean, request.contract.std, torch.float32)
        self.register_buffer("shift", pixels.shift.reshape(1, 3, 1, 1))
        self.register_buffer("gain", pixels.gain.reshape(1, 3, 1, 1))
        self.model = model

    def forward(self, image: Tensor) -> Any:
        return self.model((image - self.shift) * self.gain)


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes the two files. Raises UsageError on an opset or a batch, MissingError without pnnx, ConversionError where
    pnnx fails or, without failing, drops an operator."""
    check_fixed(request, "ncnn")
    if request.contract.batch != 1:
        raise UsageError(f"an ncnn model takes one picture at a time, not {request.contract.batch}; leave --batch out")
    converter = pnnx()
    traced, rules = trace(model, request, tell)
    tell("converting by pnnx")
    convert(converter, traced, request, folder)
    kinds = Counter(layer.kind for layer in layers(folder / PARAM))
    return Artifact(rules, {"ncnn": dict(kinds.most_common())})


def pnnx() -> Path:
    """The converter's program, which its wheel brings. Raises MissingError without it."""
    try:
        import pnnx as wheel
    except ImportError as error:
        raise missing_extra("ncnn-export", "exporting to ncnn") from error
    return Path(next(iter(wheel.__path__))) / "pnnx"


def trace(model: nn.Module, request: Request, tell: Tell) -> tuple[torch.jit.ScriptModule, tuple[str, ...]]:
    """The deploy form as TorchScript, and the rules that applied. Raises ConversionError."""
    tell("rewriting to the deploy form")
    form = deploy_form(model, DEFAULT_RULES, request.contract.size)
    module = PlanarPixels(form.module, request) if request.contract.kind == "image" else form.module
    example = torch.zeros(1, 3, *request.contract.size)
    tell("tracing with torch")
    try:
        with quiet(), torch.no_grad():
            program, counts = rewrite_program(torch.export.export(module.eval(), (example,)), RULES)
            traced: Any = torch.jit.trace(program.module(), example, check_trace=False)  # type: ignore[no-untyped-call]
    except Exception as error:  # torch has no common base for what it raises
        raise ConversionError(f"torch cannot trace the model: {first_line(error)}") from error
    assert isinstance(traced, torch.jit.ScriptModule)  # noqa: S101 (for the type checker)
    return traced, tuple(name for name, count in {**form.rules, **counts}.items() if count)


def convert(converter: Path, traced: torch.jit.ScriptModule, request: Request, folder: Path) -> None:
    """Runs pnnx, which ends with 0 on what it cannot convert: its "ignore" lines say so, and ncnn's reader.

    Raises ConversionError.
    """
    height, width = request.contract.size
    with tempfile.TemporaryDirectory(prefix="dualtoken-ncnn.") as scratch:
        source = Path(scratch) / "model.pt"
        traced.save(str(source))
        half = int(request.precision == "fp16")
        command = [str(converter), str(source), f"inputshape=[1,3,{height},{width}]", f"fp16={half}"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=CONVERSION_SECONDS, check=False,
                cwd=scratch,
            )  # fmt: skip
        except (subprocess.TimeoutExpired, OSError) as error:
            raise ConversionError(f"pnnx cannot convert the model: {first_line(error)}") from error
        check_converted(done.stdout + done.stderr, done.returncode)
        for name in (PARAM, BINARY):
            made = Path(scratch) / name
            if not made.is_file():
                raise ConversionError(f"pnnx ended with 0 and wrote no {name}; no bundle was written")
            (folder / name).write_bytes(made.read_bytes())
    try:
        open_net(folder / PARAM, folder / BINARY, 1)
    except BundleError as error:
        raise ConversionError(f"ncnn does not read what pnnx wrote: {error}") from error


def check_converted(said: str, code: int) -> None:
    """Raises ConversionError where pnnx failed, or says that it left operators out of the graph."""
    dropped = list(dict.fromkeys(re.findall(r"^ignore (\S+) ", said, re.MULTILINE)))
    if code != 0:
        last = [line for line in said.splitlines() if line.strip()][-1:] or ["it said nothing"]
        raise ConversionError(f"pnnx ended with {code}: {last[0][:200]}")
    if dropped:
        more = f" and {len(dropped) - 3} more" if len(dropped) > 3 else ""
        raise ConversionError(
            f"ncnn has no {', '.join(dropped[:3])}{more}, which pnnx leaves out of the graph without failing; no "
            "bundle was written"
        )
