"""The float32 program that a bundle for a phone was converted from, and every value in it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.apple.names import operation
from dualtoken_deploy.targets.inner import Insides, Last, Tell
from dualtoken_deploy.targets.mobile.torch_program import NO_RULES, ProgramRules, Source, make_source
from dualtoken_deploy.targets.recorder import Recorder
from dualtoken_deploy.targets.request import Request

# What rearranges data alone, or turns pixels to numbers; a converter may merge, reorder or drop it.
MOVES = frozenset(
    {"view", "_unsafe_view", "reshape", "transpose", "permute", "clone", "split", "getitem", "slice", "cat", "pad",
     "expand", "_to_copy", "_assert_tensor_metadata"}
)  # fmt: skip
MAPS = ("conv2d", "avg_pool2d", "max_pool2d", "gelu")  # operations whose four axes are a map


def mobile_insides(
    bundle: Bundle, traced: Iterable[str], inputs: Array, tell: Tell, more: ProgramRules = NO_RULES
) -> Insides:
    """Every value of the torch program but moved data, computed by PyTorch: no converter had a part in them."""
    source = float_source(bundle.manifest, tuple(traced), tell, more)
    tell("running the float program")
    module = source.program.module()
    assert isinstance(module, torch.fx.GraphModule)  # noqa: S101 (for the type checker)
    nodes = [node for node in source.program.graph.nodes if node.name in source.names]
    kinds = kinds_of(source)
    recorder = Recorder(module, {graph: name for graph, name in source.names.items() if name in kinds})
    with torch.no_grad():
        runs = [recorder.record(torch.from_numpy(batch_of(bundle, image))) for image in inputs]
    values = {name: np.concatenate([first_of(bundle, run[name]) for run in runs]) for name in kinds}
    names = source.names
    edges = [([names[i.name] for i in node.all_input_nodes if i.name in names], [names[node.name]]) for node in nodes]
    return Insides(kinds, values, edges, lambda value: value)


def kinds_of(source: Source) -> dict[str, str]:
    """The named values of a program but moved data, in the order that they are made, and the operations behind them."""
    nodes = [node for node in source.program.graph.nodes if node.name in source.names]
    return {source.names[node.name]: operation(node) for node in nodes if operation(node) not in MOVES}


def as_saved(value: Array, shape: tuple[int, ...] | None, kind: str) -> Array:
    """A map (N, C, H, W) as (N, H, W, C) where the file has it so; where both would fit, by the operation. Tokens of a
    map as that map, and matrices in a stack with the axis of the batch."""
    if shape is None or len(shape) != 4:
        return value
    if value.ndim < 4:
        return value if value.size % math.prod(shape[1:]) else value.reshape(-1, *shape[1:])
    last = value.transpose(0, 2, 3, 1)
    fits = last.shape[1:] == shape[1:]
    return last if fits and (value.shape[1:] != shape[1:] or kind in MAPS) else value


def float_source(manifest: Manifest, traced: tuple[str, ...], tell: Tell, more: ProgramRules = NO_RULES) -> Source:
    """The program of a bundle's model, traced anew from its weights; the last one is remembered."""

    def trace() -> Source:
        request = Request("fp32", manifest.input, manifest.outputs, None, {"variant": manifest.variant})
        return make_source(rebuild(manifest), request, traced, tell, more)

    return _SOURCES.get(manifest, [*traced, *more], trace)


_SOURCES: Last[Source] = Last()


def batch_of(bundle: Bundle, image: Array) -> Array:
    """One input as often as the fixed batch has it."""
    return np.repeat(image[None], bundle.manifest.input.batch or 1, axis=0)


def first_of(bundle: Bundle, value: Array) -> Array:
    """The part of a value that belongs to the first input of the batch, which is always its outermost axis."""
    batch = bundle.manifest.input.batch or 1
    return value if batch == 1 else value[: max(len(value) // batch, 1)]
