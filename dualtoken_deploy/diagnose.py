"""Where a bundle drifts: its values layer by layer against those of the eager model, in the model's own names.

The bundle's values are read by extra outputs. What they are held against is the float graph of the same model, named
alike, and that graph is itself held against the eager model at the end of every block and at the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import torch

from dualtoken_deploy import numerics
from dualtoken_deploy.bundle import Bundle, Manifest
from dualtoken_deploy.datasets import open_dataset
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, UsageError
from dualtoken_deploy.export.base import Request
from dualtoken_deploy.export.onnx import ATTENTION_OPSET, DECOMPOSED_OPSET, export_onnx
from dualtoken_deploy.images import load_batch
from dualtoken_deploy.models.registry import rebuild
from dualtoken_deploy.plots import save_figure
from dualtoken_deploy.probes import Array, Prober, probe_onnx, probe_openvino
from dualtoken_deploy.runtimes import RunnerOptions
from dualtoken_deploy.runtimes.eager import EagerRunner

PROBES: Mapping[str, Callable[[Path, Sequence[str], Array], dict[str, Array]]] = MappingProxyType(
    {"onnxruntime": probe_onnx, "openvino": probe_openvino}
)
# Below it a layer counts as drifted, in dB: the bundles of this project keep 110, 45 and 12 at their worst layer.
THRESHOLDS = MappingProxyType({"fp32": 80.0, "fp16": 35.0, "int8": 8.0})
MOVES = frozenset({"Reshape", "Transpose", "Split", "Cast", "Squeeze", "Unsqueeze", "Concat", "Slice", "Expand"})
REFERENCE_DB = 90.0  # the float graph against eager
DEFAULT_IMAGES = 4


@dataclass(frozen=True)
class Drift:
    """One layer: its SQNR and largest error against float, and `lost_db`, how much worse it is than what it reads."""

    name: str
    kind: str
    sqnr_db: float
    max_abs_error: float
    lost_db: float


@dataclass(frozen=True)
class Diagnosis:
    """`first` is the first layer past the threshold, `suspect` the one that loses most by itself; None: none does."""

    bundle: str
    images: int
    threshold_db: float
    layers: tuple[Drift, ...]
    blocks: tuple[Drift, ...]
    first: str | None
    suspect: str | None
    unseen: int  # values of the float graph that the bundle does not have under their names

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(
    bundle: Bundle | str | Path,
    data: str | Path | None = None,
    limit: int = DEFAULT_IMAGES,
    threshold_db: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Compares every layer over `limit` pictures of `data` (the photographs unless given).

    Raises BundleError, WeightsError (the eager model cannot be rebuilt), UsageError (a target without names inside).
    """
    tell = progress or (lambda _: None)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.need_classifier("diagnose")
    manifest = opened.manifest
    if manifest.target not in PROBES:
        raise UsageError(f"diagnose cannot look into {manifest.target}; it can into {', '.join(PROBES)}")
    images = open_dataset("photographs" if data is None else data).limit(limit)
    inputs = load_batch(images.images, manifest.input)
    graph = float_graph(manifest, tell)
    kinds = {n.output[0]: n.op_type for n in graph.graph.node if n.op_type not in MOVES}
    tell("running the float graph")
    expected = Prober(graph, list(kinds)).run_each(inputs)
    blocks = _check_reference(manifest, expected, inputs)
    tell("running the bundle")
    actual = PROBES[manifest.target](opened.path, list(kinds), inputs)
    seen = [name for name in kinds if name in actual and actual[name].size == expected[name].size]
    compared = {name: numerics.compare(expected[name].ravel(), actual[name].ravel()) for name in seen}
    sources = _sources(graph, set(seen))
    layers = []
    for name in seen:
        best = min((compared[s].sqnr_db for s in sources[name]), default=numerics.SQNR_LIMIT_DB)
        found = compared[name]
        layers.append(Drift(name, kinds[name], found.sqnr_db, found.max_abs_error, best - found.sqnr_db))
    threshold = THRESHOLDS.get(manifest.precision, 80.0) if threshold_db is None else threshold_db
    by_name = {layer.name: layer for layer in layers}
    past = [layer for layer in layers if layer.sqnr_db < threshold]
    suspect = max(past, key=_loss).name if past else None
    ends = tuple(replace(by_name[value], name=block) for block, value in blocks.items() if value in by_name)
    return Diagnosis(
        str(opened.path), len(images), threshold, tuple(layers), ends, past[0].name if past else None, suspect,
        len(kinds) - len(seen),
    )  # fmt: skip


def _loss(layer: Drift) -> float:
    """Loss that counts: noise below 60 dB is no fault, wherever it came from."""
    return min(layer.sqnr_db + layer.lost_db, 60.0) - layer.sqnr_db


def float_graph(manifest: Manifest, tell: Callable[[str], None]) -> onnx.ModelProto:
    """The float32 ONNX graph of a bundle's model, traced anew from its weights, with the names that the bundle has."""
    opset = ATTENTION_OPSET if manifest.precision == "fp32" else DECOMPOSED_OPSET
    key = json.dumps(
        [manifest.variant, dict(manifest.options), dict(manifest.weights), manifest.input.to_json(), opset]
    )
    if key not in _GRAPHS:
        _GRAPHS.clear()  # one at a time: it holds the weights
        _GRAPHS[key] = _trace(manifest, opset, tell)
    return _GRAPHS[key]


_GRAPHS: dict[str, onnx.ModelProto] = {}  # the last one: several bundles of one model are often diagnosed in a row


def _trace(manifest: Manifest, opset: int, tell: Callable[[str], None]) -> onnx.ModelProto:
    request = Request("fp32", manifest.input, manifest.outputs, None, {"variant": manifest.variant})
    return export_onnx(rebuild(manifest), request, DEFAULT_RULES, opset, tell).model


def _sources(graph: onnx.ModelProto, seen: set[str]) -> dict[str, set[str]]:
    """For each value the compared values that it is computed from, through those that are not compared."""
    found: dict[str, set[str]] = {}
    for node in graph.graph.node:
        near: set[str] = set()
        for name in node.input:
            near |= {name} if name in seen else found.get(name, set())
        for name in node.output:
            found[name] = near
    return found


def _check_reference(manifest: Manifest, values: Mapping[str, Array], inputs: Array) -> dict[str, str]:
    """Holds the float graph against eager; gives the value that is the end of each block."""
    model = rebuild(manifest)
    ends: dict[str, Array] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            ends[name] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if name == "stem" or (name.startswith("stage") and name.count(".") == 1)
    ]
    with EagerRunner(model, manifest.input, manifest.outputs, RunnerOptions()) as eager:
        (logits,) = eager.run({manifest.input.tensor.name: inputs}).values()
    for handle in handles:
        handle.remove()
    ends["logits"] = logits
    out: dict[str, str] = {}
    for block, end in ends.items():
        near = [n for n in values if n.startswith(block) and values[n].size == end.size]
        scored = {n: numerics.compare(end.ravel(), values[n].ravel()).sqnr_db for n in near}
        best = max(scored, key=lambda n: scored[n], default=None)
        if best is None or scored[best] < REFERENCE_DB:
            raise ConversionError(
                f"the float graph differs from eager at {block} ({scored.get(best or '', -300):.0f} dB): nothing can "
                "be said of the bundle; report this with the bundle's manifest"
            )
        out[block] = best
    return out


def draw(diagnosis: Diagnosis, path: Path) -> None:
    """SQNR over the layers in the order that they run, with the ends of the blocks and the threshold."""

    def fill(figure: Any) -> None:
        axis = figure.subplots()
        names = [layer.name for layer in diagnosis.layers]
        values = [min(layer.sqnr_db, 160.0) for layer in diagnosis.layers]
        axis.plot(values, marker=".", linewidth=0.8)
        axis.axhline(
            diagnosis.threshold_db, color="red", linewidth=0.8, label=f"threshold {diagnosis.threshold_db:g} dB"
        )
        starts: dict[str, int] = {}
        for i, name in enumerate(names):
            starts.setdefault(".".join(name.split("/")[0].split(".")[:2]) if name.startswith("stage") else "", i)
        ticks = [(i, name) for name, i in starts.items() if name]
        axis.set_xticks([i for i, _ in ticks], [name for _, name in ticks], rotation=60, ha="right", fontsize=7)
        if diagnosis.suspect is not None:
            at = names.index(diagnosis.suspect)
            axis.annotate(diagnosis.suspect, (at, values[at]), xytext=(8, 12), textcoords="offset points", fontsize=8)
            axis.plot([at], [values[at]], "ro")
        axis.set_ylabel("SQNR against float (dB)")
        axis.grid(alpha=0.3)
        axis.legend()

    save_figure(path, (11, 4), fill)
