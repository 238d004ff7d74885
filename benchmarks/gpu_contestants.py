"""The contestants of benchmarks/gpu.py: each makes a `Call` from a setting, or raises an error that becomes its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.bench.worker import product_shapes
from dualtoken_deploy.errors import DualTokenError, MissingError
from dualtoken_deploy.quantize.gate import Int8Options

Array = np.ndarray[Any, Any]
# Every product that may be is in INT8: what speed there is to gain. The accuracy gates are those of `dualtoken export`.
ALL_INT8 = Int8Options("photographs", size=10, metric="sqnr", max_drop=100)


@dataclass(frozen=True)
class Setting:
    """What one contestant is run with. `folder`: where bundles are kept, and found again."""

    name: str
    batch: int
    variant: str
    size: int
    classes: int
    device: str
    folder: str

    @property
    def on_cuda(self) -> bool:
        return self.device == "cuda"


@dataclass(frozen=True)
class Call:
    """`run`: uint8 pictures on the host to float32 logits on the host; None: a limit, which has no answer. `resident`:
    one pass whose input and output stay on the device, finished when it returns; None where a runtime has no such
    call here."""

    run: Callable[[Array], Array] | None
    resident: Callable[[], object] | None = None


def model_of(setting: Setting) -> Any:
    """The reference model, random weights from seed 0."""
    from dualtoken_deploy.models.registry import random_model

    size = (setting.size, setting.size)
    return random_model(setting.variant, 0, image_size=size, num_classes=setting.classes).eval()


def pictures_of(setting: Setting) -> Array:
    shape = (setting.batch, setting.size, setting.size, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


# --- PyTorch ---


def reference_of(setting: Setting) -> Callable[[Array], Array]:
    """Eager float32 on the CPU, what all are held against."""
    call = eager(replace(setting, device="cpu"), "float32")
    if call.run is None:
        raise TypeError("eager answers pictures")
    return call.run


def eager(setting: Setting, dtype: str, compiled: bool = False, graph: bool = False) -> Call:
    """The reference model, normalisation included, as a user would run it."""
    import torch

    from dualtoken_deploy.deploy.forms import ImageInput
    from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD

    kind = getattr(torch, dtype)
    image = ImageInput(IMAGENET_MEAN, IMAGENET_STD, torch.float32).to(setting.device)
    model: Any = model_of(setting).to(device=setting.device, dtype=kind)
    if compiled:
        model = torch.compile(model, mode="max-autotune")

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(image(pictures).to(kind)).float()
        return logits

    return of_torch(setting, forward, graph)


def aotinductor(setting: Setting, precision: str, graph: bool = False) -> Call:
    """The package of a bundle. A CUDA graph cannot hold the events with which torch shares one among threads."""
    import torch

    if graph:
        need_cuda(setting)
    folder = made(setting, "aotinductor", precision, device=setting.device)
    if not graph:
        with load_runner(folder, setting.device):
            pass  # it says why a package will not run here
    model = torch._inductor.aoti_load_package(str(folder / "model.pt2"), run_single_threaded=graph)

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(pictures)
        return logits

    return of_torch(setting, forward, graph)


def of_torch(setting: Setting, forward: Callable[[Any], Any], graph: bool) -> Call:
    """A call from the host, and one whose pictures are on the device already."""
    import torch

    if graph:
        forward = capture(forward, setting)
    held = torch.from_numpy(pictures_of(setting)).to(setting.device)

    def resident() -> None:
        forward(held)
        if setting.on_cuda:
            torch.cuda.synchronize()

    def run(pictures: Array) -> Array:
        logits: Array = forward(torch.from_numpy(pictures).to(setting.device)).cpu().numpy()
        return logits

    return Call(run, resident)


def need_cuda(setting: Setting) -> None:
    if not setting.on_cuda:
        raise MissingError("a CUDA graph needs a CUDA device")


def capture(forward: Callable[[Any], Any], setting: Setting) -> Callable[[Any], Any]:
    """`forward` as one CUDA graph over static tensors."""
    import torch

    need_cuda(setting)
    held = torch.zeros((setting.batch, setting.size, setting.size, 3), dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen and loaded outside of the capture
        for _ in range(3):
            forward(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(held)

    def replay(pictures: Any) -> Any:
        held.copy_(pictures)
        graph.replay()
        return out

    return replay


# --- bundles ---


def made(setting: Setting, target: str, precision: str, **options: Any) -> Path:
    """The folder of a bundle for this batch, which is exported where it is not there yet."""
    said = "-".join(f"{value}" for value in options.values())
    name = "-".join(filter(None, (setting.variant, target, precision, f"b{setting.batch}", said)))
    folder = Path(setting.folder) / name
    if not folder.is_dir():
        export(
            setting.variant, target, precision, image_size=setting.size, batch=setting.batch, output=folder,
            classes=setting.classes, int8=ALL_INT8 if precision == "int8" else None, **options,
        )  # fmt: skip
    return folder


def bundle(setting: Setting, target: str, precision: str, runs_as: str | None = None, **options: Any) -> Call:
    """A bundle through its own runner; `runs_as` runs its ONNX with another target's."""
    if runs_as == "onnxruntime":
        need_provider(setting)
    opened = Bundle.open(made(setting, target, precision, **options))
    if runs_as:
        opened = Bundle(opened.path, replace(opened.manifest, target=runs_as))
    elif opened.manifest.state != "complete":
        opened = finished(opened)
    runner = load_runner(opened, "cuda" if setting.on_cuda else None)
    return Call(lambda pictures: runner.run({"image": pictures})["logits"])


def need_provider(setting: Setting) -> None:
    """ONNX Runtime must have CUDA before minutes go into an export."""
    import onnxruntime

    if setting.on_cuda and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise MissingError("this onnxruntime has no CUDAExecutionProvider; install onnxruntime-gpu instead")


def finished(opened: Bundle) -> Bundle:
    """A bundle that was left prepared or compiled, built on the GPU here. Raises MissingError where there is none."""
    from dualtoken_deploy.pipeline.build import build_bundle, why_no_build

    reason = why_no_build(opened.manifest.target)
    if reason:
        raise MissingError(f"{opened.manifest.state} alone: {reason}")
    build_bundle(opened)
    return Bundle.open(opened.path)


# --- limits ---


def products(setting: Setting, dtype: str) -> Call:
    """The model's matrix products alone, in their shapes, by the library that torch calls: cuBLAS, or the CPU's."""
    import torch

    from dualtoken_deploy.models.count import count_products

    kind = getattr(torch, dtype)
    shapes = product_shapes(count_products(model_of(setting), (setting.size, setting.size))[1], setting.batch)
    operands = [
        tuple(torch.randn(b, *pair, dtype=kind, device=setting.device) for pair in ((m, k), (k, n)))
        for b, m, k, n in shapes
    ]

    def multiply(_: Any = None) -> Any:
        with torch.inference_mode():
            return [torch.matmul(a, b) for a, b in operands]

    if not setting.on_cuda:
        return Call(None, multiply)
    replay = capture(multiply, setting)
    still = torch.zeros((setting.batch, setting.size, setting.size, 3), dtype=torch.uint8, device="cuda")

    def resident() -> None:
        replay(still)
        torch.cuda.synchronize()

    return Call(None, resident)


def copy(setting: Setting) -> Call:
    """One copy on the device of as many bytes as the model must move at least; see `least_bytes`."""
    import torch

    half = max(1, least_bytes(setting, 2)["once"] // 2)  # a copy reads and writes
    source = torch.zeros(half, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)

    def resident() -> None:
        target.copy_(source)
        if setting.on_cuda:
            torch.cuda.synchronize()

    return Call(None, resident)


def least_bytes(setting: Setting, item: int) -> Mapping[str, int]:
    """Bytes of one pass with numbers of `item` bytes. `once`: weights, pictures and logits, each moved once, which no
    implementation can save. `products`: what the products read and write where nothing is fused."""
    from dualtoken_deploy.models.count import count_params, count_products

    model = model_of(setting)
    shapes = product_shapes(count_products(model, (setting.size, setting.size))[1], setting.batch)
    ends = math.prod((setting.batch, setting.size, setting.size, 3)) + 4 * setting.batch * setting.classes
    moved = item * sum(b * (m * k + k * n + m * n) for b, m, k, n in shapes)
    return {"once": item * count_params(model) + ends, "products": moved}


def refusal(error: Exception) -> str:
    """Why a contestant has no figures, in one line."""
    text = str(error) if isinstance(error, DualTokenError) else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [""])[0]


BASE = "eager-fp32"
CONTESTANTS: dict[str, Callable[[Setting], Call]] = {
    BASE: lambda s: eager(s, "float32"),
    "eager-fp16": lambda s: eager(s, "float16"),
    "eager-bf16": lambda s: eager(s, "bfloat16"),
    "eager-fp16-graph": lambda s: eager(s, "float16", graph=True),
    "compile-fp16": lambda s: eager(s, "float16", compiled=True),
    **{f"aotinductor-{p}": lambda s, p=p: aotinductor(s, p) for p in ("fp32", "fp16", "bf16")},
    **{f"aotinductor-{p}-graph": lambda s, p=p: aotinductor(s, p, graph=True) for p in ("fp32", "fp16", "bf16")},
    **{f"onnxruntime-{p}": lambda s, p=p: bundle(s, "tensorrt", p, "onnxruntime") for p in ("fp32", "fp16", "int8")},
    **{f"tensorrt-{p}": lambda s, p=p: bundle(s, "tensorrt", p) for p in ("fp32", "fp16")},
    "tensorrt-rtx-fp16": lambda s: bundle(s, "tensorrt-rtx", "fp16"),
    # a data-centre GPU is not among the library's compute capabilities: this asks for Ampere's portable code by name
    "tensorrt-rtx-fp16-sm80": lambda s: bundle(s, "tensorrt-rtx", "fp16", compute_capability="8.0"),
    **{f"products-{p}": lambda s, d=d: products(s, d) for p, d in (("fp32", "float32"), ("fp16", "float16"))},
    "copy": copy,
}
LIMITS = ("products-fp32", "products-fp16", "copy")
