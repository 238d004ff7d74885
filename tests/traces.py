"""One trace for all tests that export the same module, one simplified form, one count: most of a small export's time.

Everything behind them (quantizing, checks of the files, the runtime) is each test's own.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import onnx
import onnxsim
import torch
import torch._export.utils as torch_utils
from torch import nn
from torch.export import ExportedProgram
from torch.onnx._internal.exporter._registration import ONNXRegistry

from dualtoken_deploy.data import images, pictures
from dualtoken_deploy.data.images import Pixels, load_image
from dualtoken_deploy.models import count as counting
from dualtoken_deploy.models import registry
from dualtoken_deploy.models.base import ImageModel, ModelConfig
from dualtoken_deploy.models.count import Product
from dualtoken_deploy.models.onnx_reference import reference_inside
from dualtoken_deploy.targets.coreml import export as coreml_export
from dualtoken_deploy.targets.coreml.mil.vendor import coremltools
from dualtoken_deploy.targets.litert import export as litert_export
from dualtoken_deploy.targets.mobile.torch_program import Source
from dualtoken_deploy.targets.onnx import export as onnx_export
from dualtoken_deploy.targets.request import Request

PROGRAMS, PICTURES, MODELS = 4, 256, 12  # that a process keeps
Trace = Callable[[nn.Module, Request, int], onnx.ModelProto]


def written_once(kept: Path, write: Callable[[Path], object]) -> Path:
    """A file that the first of all processes that asks for it writes; nobody sees a part of it."""
    if not kept.exists():
        part = kept.with_suffix(f".{os.getpid()}")
        write(part)
        part.rename(kept)
    return kept


Key = TypeVar("Key")
Value = TypeVar("Value")


def among_last(kept: dict[Key, Value], key: Key, make: Callable[[], Value], most: int) -> Value:
    """What is kept under a key, made where it is not there, in the place of what came first where that are too many."""
    if key not in kept:
        while len(kept) >= most:
            del kept[next(iter(kept))]
        kept[key] = make()
    return kept[key]


def shared(trace: Trace, folder: Path) -> Trace:
    """`trace` with its results kept in a folder that all test processes have."""
    folder.mkdir(exist_ok=True)

    def once(module: nn.Module, request: Request, opset: int) -> onnx.ModelProto:
        kept = folder / f"{key(module, request, opset)}.onnx"
        return onnx.load(written_once(kept, lambda part: onnx.save(trace(module, request, opset), part)))

    return once


Simplify = Callable[[onnx.ModelProto, Request], onnx.ModelProto]


def simplified_once(simplify: Simplify, folder: Path) -> Simplify:
    """`simplify`, which checks what it made, with its results kept by the graph that it is given; a test that puts
    something in onnxsim's place gets what that makes."""
    folder.mkdir(exist_ok=True)
    real = onnxsim.simplify

    def once(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
        if onnxsim.simplify is not real:
            return simplify(model, request)
        digest = hashlib.sha256(repr((request.task, request.contract.tensor, request.outputs)).encode())
        digest.update(model.SerializeToString(deterministic=True))
        kept = folder / f"{digest.hexdigest()}-simplified.onnx"
        return onnx.load(written_once(kept, lambda part: onnx.save(simplify(model, request), part)))

    return once


def key(module: nn.Module, request: Request, opset: int) -> str:
    """Of all that a trace depends on: the module, and the contract."""
    return key_of(module, opset, request.task, request.contract.tensor, request.outputs)


def key_of(module: nn.Module, *besides: object) -> str:
    """Of kinds of modules and their plain attributes, every tensor, and what is named besides."""
    digest = hashlib.sha256(repr(besides).encode())
    for name, part in module.named_modules():
        plain = {k: v for k, v in vars(part).items() if not k.startswith("_") and not isinstance(v, nn.Module)}
        digest.update(f"{name} {type(part).__qualname__} {part!r} {sorted(plain.items(), key=str)}".encode())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


Build = Callable[[ModelConfig], ImageModel]


def built_once(build: Build) -> Build:
    """`build`, of which a process keeps the last few models, by config and random numbers; each test gets a copy."""
    kept: dict[tuple[str, bytes], tuple[ImageModel, torch.Tensor]] = {}

    def once(config: ModelConfig) -> ImageModel:
        if torch.get_default_device().type != "cpu" or torch.get_default_dtype() != torch.float32:
            return build(config)
        known = (repr(config), torch.get_rng_state().numpy().tobytes())
        model, after = among_last(kept, known, lambda: (build(config), torch.get_rng_state()), MODELS)
        torch.set_rng_state(after)
        return copy.deepcopy(model)

    return once


Counts = tuple[int, tuple[Product, ...]]
Count = Callable[[nn.Module, tuple[int, int]], Counts]


def counted_once(count: Count, folder: Path) -> Count:
    """`count`, which runs a model, with its results kept in a folder that all test processes have."""

    def once(model: nn.Module, size: tuple[int, int]) -> Counts:
        if reference_inside(model) is not None:
            return count(model, size)
        kept = folder / f"{key_of(model, size)}-counts.json"
        written_once(kept, lambda part: part.write_text(json.dumps(count(model, size))))
        macs, products = json.loads(kept.read_text())
        return macs, tuple(tuple(product) for product in products)

    return once


Named = tuple[ExportedProgram, dict[str, str]]


def shared_program(trace: Callable[[nn.Module, Request], Named]) -> Callable[[nn.Module, Request], Named]:
    """Core ML's trace, of which a process keeps the last few; each conversion gets a copy of its own."""
    kept: dict[str, Named] = {}

    @functools.wraps(trace)
    def once(module: nn.Module, request: Request) -> Named:
        digest = f"{key(module, request, 0)} {request.contract}"
        program, names = among_last(kept, digest, lambda: trace(module, request), PROGRAMS)
        return copy.deepcopy(program), dict(names)

    return once


def found_once(find: Callable[[], None]) -> Callable[[], None]:
    """torch's way to make a thousand composite operators known to Python, which each decomposition goes some twenty
    times: again only where there are others than before."""
    known: set[str] = set()

    def again() -> None:
        there = set(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
        if not there <= known:
            find()
            known.update(there)

    return again


def without_looks(load: Callable[[str], Any]) -> Callable[[str], Any]:
    """coremltools without its look for garbage behind each conversion: at all that other tests left, half a second."""

    def loaded(what: str) -> Any:
        ct = load(what)
        sys.modules["coremltools.converters._converters_entry"].gc = SimpleNamespace(  # type: ignore[attr-defined]
            collect=lambda: 0
        )
        return ct

    return loaded


def one_registry() -> Callable[[int], ONNXRegistry]:
    """ONNXRegistry.from_torchlib that looks its 1,000 operators up once; each trace has a table of its own."""
    made = functools.cache(ONNXRegistry.from_torchlib)

    def copied(opset_version: int) -> ONNXRegistry:
        registry = copy.copy(made(opset_version))
        registry.functions = {name: list(metas) for name, metas in registry.functions.items()}
        return registry

    return copied


def decoded_once(load: Callable[[Path], Pixels]) -> Callable[[Path], Pixels]:
    """`load` that decodes a file once, and again where it has changed: each export looks at the same 16 photographs."""

    @functools.lru_cache(64)
    def kept(path: Path, _size: int, _changed: int) -> Pixels:
        pixels = load(path)
        pixels.flags.writeable = False
        return pixels

    def decode(path: Path) -> Pixels:
        found = path.stat()
        return kept(path, found.st_size, found.st_mtime_ns)

    return decode


Resize = Callable[[Pixels, tuple[int, int], float], Pixels]


def resized_once(resize: Resize) -> Resize:
    """`resize` that keeps what it made of the pictures of `decoded_once`, which nobody writes into."""
    kept: dict[tuple[int, tuple[int, int], float], tuple[Pixels, Pixels]] = {}

    def once(image: Pixels, size: tuple[int, int], crop_ratio: float) -> Pixels:
        if image.flags.writeable:
            return resize(image, size, crop_ratio)
        known = (id(image), size, crop_ratio)  # of a picture that is kept beside it, and so of no other
        return among_last(kept, known, lambda: (image, resize(image, size, crop_ratio)), PICTURES)[1].copy()

    return once


Convert = Callable[[Source, Path], None]


def shared_conversion(convert: Convert, folder: Path) -> Convert:
    """`convert` of a target for phones with its files kept in a folder that all test processes have."""
    folder.mkdir(exist_ok=True)

    @functools.wraps(convert)
    def once(source: Source, output: Path) -> None:
        digest = hashlib.sha256(source.program.graph_module.code.encode())
        for name, tensor in source.program.state_dict.items():
            digest.update(name.encode())
            digest.update(tensor.detach().contiguous().numpy().tobytes())
        kept = folder / f"{digest.hexdigest()}{output.suffix}"
        shutil.copy2(written_once(kept, lambda part: convert(source, part)), output)

    return once


def replacements(folder: Path) -> tuple[tuple[Any, str, Any], ...]:
    """(owner, attribute, what takes its place) of all of this; `folder` is for what other processes have as well."""
    return (
        (pictures, "load_image", decoded_once(load_image)),
        (images, "resize_and_crop", resized_once(images.resize_and_crop)),
        (torch_utils, "_materialize_cpp_cia_ops", found_once(torch_utils._materialize_cpp_cia_ops)),
        (ONNXRegistry, "from_torchlib", staticmethod(one_registry())),
        (registry, "build", built_once(registry.build)),
        (counting, "count_products", counted_once(counting.count_products, folder)),
        (onnx_export, "trace", shared(onnx_export.trace, folder)),
        (onnx_export, "simplify", simplified_once(onnx_export.simplify, folder)),
        (coreml_export, "coremltools", without_looks(coremltools)),
        (coreml_export, "trace_named", shared_program(coreml_export.trace_named)),
        (litert_export, "convert", shared_conversion(litert_export.convert, folder)),
    )
