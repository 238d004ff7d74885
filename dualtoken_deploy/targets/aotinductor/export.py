"""AOTInductor: the deploy form compiled by torch to a .pt2 package of native code, for CPU or CUDA."""

from __future__ import annotations

import contextlib
import io
import os
import platform
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dualtoken_deploy.bundle.blocks import Build
from dualtoken_deploy.bundle.decode import plain
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, MissingError
from dualtoken_deploy.targets.aotinductor.runner import NativeCode
from dualtoken_deploy.targets.request import Artifact, Request, Tell, quiet
from dualtoken_deploy.targets.tracing import Around, why

RULES = DEFAULT_RULES
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Typed(Around):
    """The network in one dtype behind its input contract; what it gives is float32."""

    inside = "network"

    def __init__(self, network: nn.Module, image: nn.Module | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.image, self.dtype = network.to(dtype), image, dtype

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        # mean and std are applied in float32: 255 levels times a gain do not survive bfloat16's 8 bits
        x = x if self.image is None else self.image(x)
        found = self.network(x.to(self.dtype))
        if isinstance(found, tuple):
            return tuple(value.float() if value.is_floating_point() else value for value in found)
        logits: Tensor = found.float()
        return logits


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.pt2. Raises MissingError without a C++ compiler or the device, ConversionError where torch fails."""
    device = check_device(request.device)
    compiler = find_compiler()
    tell("rewriting to the deploy form")
    form = deploy_form(model, RULES, request.contract.size)
    contract = request.contract
    image = ImageInput(contract.mean, contract.std, torch.float32) if contract.kind == "image" else None
    module = Typed(form.module, image, DTYPES[request.precision]).eval().to(device)
    tell("tracing with torch.export")
    program = trace(module, request, device)
    counts = Counter(str(n.target) for n in program.graph.nodes if n.op == "call_function")
    tell(f"compiling for {device}, which takes minutes")
    compile_package(program, folder / "model.pt2")
    rules = tuple(name for name, count in form.rules.items() if count)
    return Artifact(rules, {"exported": dict(counts.most_common())}, describe(device, compiler))


def check_device(device: str | None) -> str:
    """ "cpu" (None) or "cuda". Raises MissingError where it is neither, or not here."""
    wanted = (device or "cpu").lower()
    if wanted not in ("cpu", "cuda"):
        raise MissingError(f"AOTInductor packages are made for cpu or cuda, not for {device!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MissingError(
            f"PyTorch {torch.__version__} finds no CUDA device here; export on the GPU machine, or for cpu"
        )
    return wanted


def find_compiler() -> str:
    """The C++ compiler that torch will call. Raises MissingError."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        raise MissingError(f"AOTInductor needs a C++ compiler and {name!r} is not here; install g++ or set CXX")
    return path


def trace(module: nn.Module, request: Request, device: str) -> torch.export.ExportedProgram:
    """The exported program, with a dynamic batch where the contract leaves it open."""
    spec, fixed = request.contract.tensor, request.contract.batch
    # two, because torch.export takes a batch of one for a constant
    shape = [2 if fixed is None and axis == 0 else int(size) for axis, size in enumerate(spec.shape)]
    example = torch.zeros(shape, dtype=getattr(torch, spec.dtype), device=device)
    dynamic = ({0: torch.export.Dim("batch", min=1, max=1024)},) if fixed is None else None
    try:
        with torch.no_grad(), quiet(), contextlib.redirect_stderr(io.StringIO()):
            return torch.export.export(module, (example,), dynamic_shapes=dynamic)
    except Exception as error:  # torch.export has no common base for what it raises, nor has the user's code
        raise ConversionError(f"torch.export cannot export {why(error, module)}") from error


def compile_package(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compiles in a cache folder of its own, which goes again: nothing is left outside of the bundle.

    Headers are not compiled before: torch would do that anew for every package, in a folder that stays, for two files.
    """
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    once = config.patch({"aot_inductor.precompile_headers": False})
    try:
        with torch.no_grad(), quiet(), once, fresh_cache():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    except Exception as error:  # the compiler's exceptions share no base but this
        raise ConversionError(f"AOTInductor cannot compile {why(error)}") from error


def describe(device: str, compiler: str) -> Build:
    """What the native code depends on."""
    system = f"{platform.system().lower()}-{platform.machine().lower()}"
    said = NativeCode(device, system, str(torch.__version__), Path(compiler).name)
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        said = replace(said, gpu=torch.cuda.get_device_name(), compute_capability=f"{major}.{minor}")
    return Build(details=plain(said))
