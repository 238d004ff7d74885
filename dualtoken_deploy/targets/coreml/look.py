"""The float32 torch program that a Core ML package was converted from, and the values inside the package."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.apple.names import operation
from dualtoken_deploy.targets.coreml.export import make_form, trace_named
from dualtoken_deploy.targets.coreml.mil import load_program
from dualtoken_deploy.targets.coreml.runner import ENGINE, PACKAGE, MilReferenceRunner
from dualtoken_deploy.targets.inner import Insides, Last, Look, Tell
from dualtoken_deploy.targets.recorder import Recorder
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.targets.runner import planar

# What rearranges data alone; a converter may merge, reorder or drop it.
MOVES = frozenset(
    {"view", "_unsafe_view", "transpose", "permute", "clone", "split", "getitem", "slice", "cat", "pad", "expand"}
)
_HALF = "_cast_fp16"  # coremltools adds it to what it turns to float16


def coreml_insides(bundle: Bundle, inputs: Array, tell: Tell) -> Insides:
    """Every value of the torch program but moved data, computed by PyTorch: no converter had a part in them."""
    manifest = bundle.manifest
    deployment, layout = _settings(bundle)
    program, names = float_program(manifest, deployment, layout, tell)
    outputs = {spec.arg.name for spec in program.graph_signature.output_specs}
    tell("running the float program")
    nodes = [node for node in program.graph.nodes if node.name in names]
    held = {spec.arg.name for spec in program.graph_signature.input_specs if spec.target is not None}
    kept = [n for n in nodes if n.name in outputs or (operation(n) not in MOVES and not _joins(n, held))]
    kinds = {names[n.name]: operation(n) for n in kept}
    recorder = Recorder(program.module(), {graph: name for graph, name in names.items() if name in kinds})
    with torch.no_grad():
        batches = [torch.from_numpy(planar(_batch(bundle, image), manifest.input.tensor)) for image in inputs]
        runs = [recorder.record(batch) for batch in batches]
    values = {name: np.concatenate([_first(bundle, run[name]) for run in runs]) for name in kinds}
    edges = [([names[i.name] for i in node.all_input_nodes if i.name in names], [names[node.name]]) for node in nodes]
    return Insides(kinds, values, edges, _to_tokens if layout == "ane" else lambda value: value)


def _joins(node: torch.fx.Node, held: set[str]) -> bool:
    """Whether coremltools makes one batch_norm of a product with a constant and the sum with one that alone reads it:
    the package then has the sum's value and not the product's. `held`: names of constants."""
    if operation(node) != "mul" or len(node.users) != 1:
        return False
    (reader,) = node.users
    return operation(reader) == "add" and all(any(i.name in held for i in n.all_input_nodes) for n in (node, reader))


def float_program(
    manifest: Manifest, deployment: str, layout: str, tell: Tell
) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The float32 program of a bundle's model, traced anew from its weights, and the names of its values."""

    def trace() -> tuple[torch.export.ExportedProgram, dict[str, str]]:
        tell("tracing the float program")
        said = {"variant": manifest.variant}
        request = Request("fp32", manifest.input, manifest.outputs, None, said, task=manifest.task)
        module, _ = make_form(rebuild(manifest), request, deployment, layout)
        return trace_named(module, request)

    return _PROGRAMS.get(manifest, [deployment, layout], trace)


_PROGRAMS: Last[tuple[torch.export.ExportedProgram, dict[str, str]]] = Last()


def probe_coreml(bundle: Bundle, names: Sequence[str], inputs: Array) -> dict[str, Array]:
    """Those of the named values that the package has, by reference execution of the saved program."""
    manifest = bundle.manifest
    runner = MilReferenceRunner(bundle.path / PACKAGE, (manifest.input.tensor,), manifest.outputs)
    wanted = {re.sub(r"\W", "_", name): name for name in names}
    found: dict[str, list[Array]] = {}

    def observe(value_name: str, value: Array) -> None:
        name = wanted.get(value_name.removesuffix(_HALF))
        if name is not None:
            found.setdefault(name, []).append(_first(bundle, value))

    for image in inputs:
        runner.run_all({manifest.input.tensor.name: _batch(bundle, image)}, observe)
    return {name: np.concatenate(values) for name, values in found.items() if len(values) == len(inputs)}


def _batch(bundle: Bundle, image: Array) -> Array:
    """One image as often as the fixed batch has it."""
    return np.repeat(image[None], bundle.manifest.input.batch or 1, axis=0)


def _first(bundle: Bundle, value: Array) -> Array:
    """The part of a value that belongs to the first image of the batch, which is always its outermost axis."""
    return value[: max(len(value) // (bundle.manifest.input.batch or 1), 1)]


def _settings(bundle: Bundle) -> tuple[str, str]:
    """Deployment target and layout that the package says it was made for. Raises BundleError where it does not."""
    said = load_program(bundle.path / PACKAGE).description.metadata.userDefined
    deployment, layout = (said.get(f"dualtoken.{name}") for name in ("deployment_target", "layout"))
    if not (deployment and layout):
        raise BundleError(f"{bundle.path / PACKAGE} does not say its layout; export the bundle again")
    return deployment, layout


def _to_tokens(value: Array) -> Array:
    """(B, C, 1, S) -> (B, S, C)."""
    return value[:, :, 0].transpose(0, 2, 1) if value.ndim == 4 and value.shape[2] == 1 else value


LOOK = Look(coreml_insides, probe_coreml, ENGINE)
