"""Where a bundle drifts: its values layer by layer against those of the eager model, in the model's own names.

What the bundle's values are held against is a float program of the same model, named alike, and that program is itself
held against the eager model at the end of every block and at the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dualtoken_deploy import numerics
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, ConversionError, UsageError
from dualtoken_deploy.models.own_sources import rebuild
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.inner import Insides, open_look
from dualtoken_deploy.targets.load import RunnerOptions
from dualtoken_deploy.targets.table import TARGETS, get_target
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.plots import COLOURS, GREY, LIMIT, label_points, save_figure

REFERENCE_DB = 90.0  # the float program against eager
LEAST_SEEN = 0.5  # of the values; the bundles of this version have 95 % and more
DEFAULT_IMAGES = 4


PHOTOGRAPHS = "photographs"
KINDS = ("digits", "shapes", "scenes")  # sets that need no download, and the words of weights that begin so


def own_data(manifest: Manifest) -> str:
    """Pictures of the bundle's own kind: those that its ranges were measured on, or that its weights were trained for,
    where they ship; else photographs. Integers saturate outside of their ranges, so other pictures say little."""
    word = _calibrated(manifest)
    if word in KINDS:
        return word
    return next((kind for kind in KINDS if manifest.weights.source.startswith(kind)), PHOTOGRAPHS)


def _calibrated(manifest: Manifest) -> str | None:
    said = manifest.calibration
    return None if said is None else said.name.partition(" (")[0]


def _note(manifest: Manifest, pictures: str) -> str | None:
    word = _calibrated(manifest)
    if word is None or pictures.partition(" (")[0] == word:
        return None
    return (
        f"ranges were measured on {word}, these are {pictures}: what lies outside of those ranges saturates, in layers "
        "without a fault too; give --data with pictures like those of the calibration"
    )


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
    data: str
    images: int
    threshold_db: float
    layers: tuple[Drift, ...]
    blocks: tuple[Drift, ...]
    first: str | None
    suspect: str | None
    unseen: int  # values of the float program that the bundle does not have under their names
    engine: str | None = None  # what stood in for the target's own runtime, if anything did
    note: str | None = None  # why a drift may be that of the pictures

    def to_json(self) -> dict[str, Any]:
        """Plain data; an infinite error, where a value overflowed, is null."""
        data = asdict(self)
        for drift in (*data["layers"], *data["blocks"]):
            if not math.isfinite(drift["max_abs_error"]):
                drift["max_abs_error"] = None
        return data


def diagnose(
    bundle: Bundle | str | Path,
    data: str | Path | None = None,
    limit: int = DEFAULT_IMAGES,
    threshold_db: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Compares every layer over `limit` pictures of `data` (unless given, own_data).

    Raises BundleError, WeightsError (the eager model cannot be rebuilt), UsageError (a target without names inside).
    """
    tell = progress or (lambda _: None)
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest, row = opened.manifest, get_target(opened.manifest.target)
    if not row.looks:
        offered = ", ".join(name for name, other in TARGETS.items() if other.looks)
        raise UsageError(f"diagnose cannot look into {row.name}; it can into {offered}")
    look = open_look(row)
    task, data = get_task(manifest.task), data or own_data(manifest)
    images = task.examples(manifest.input) if data == PHOTOGRAPHS else task.open(data, "val")
    images = images.limit(limit)
    inputs = np.stack([task.prepare(images[i], manifest.input) for i in range(len(images))])
    inside = look.expected(opened, inputs, tell)
    kinds, expected = inside.kinds, inside.values
    blocks = _check_reference(manifest, inside, inputs)
    tell("running the bundle")
    actual = look.actual(opened, list(kinds), inputs)
    seen = [name for name in kinds if name in actual and actual[name].size == expected[name].size]
    if len(seen) < LEAST_SEEN * len(kinds):
        raise BundleError(
            f"{opened.path} has {len(seen)} of {len(kinds)} values under the model's names; export it again with this "
            "version"
        )
    compared = {name: numerics.compare(expected[name].ravel(), actual[name].ravel()) for name in seen}
    sources = inside.sources(set(seen))
    layers = []
    for name in seen:
        best = min((compared[s].sqnr_db for s in sources[name]), default=numerics.SQNR_LIMIT_DB)
        found = compared[name]
        layers.append(Drift(name, kinds[name], found.sqnr_db, found.max_abs_error, best - found.sqnr_db))
    threshold = row.looks[manifest.precision] if threshold_db is None else threshold_db
    by_name = {layer.name: layer for layer in layers}
    past = [layer for layer in layers if layer.sqnr_db < threshold]
    suspect = max(past, key=_loss).name if past else None
    ends = tuple(replace(by_name[value], name=block) for block, value in blocks.items() if value in by_name)
    return Diagnosis(
        str(opened.path), images.name, len(images), threshold, tuple(layers), ends,
        past[0].name if past else None, suspect, len(kinds) - len(seen), look.engine,
        _note(manifest, images.name),
    )  # fmt: skip


def _loss(layer: Drift) -> float:
    """Loss that counts: noise below 60 dB is no fault, wherever it came from."""
    return min(layer.sqnr_db + layer.lost_db, 60.0) - layer.sqnr_db


def _check_reference(manifest: Manifest, inside: Insides, inputs: Array) -> dict[str, str]:
    """Holds the float program against eager; gives the value that is the end of each block."""
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
        given = eager.run({manifest.input.tensor.name: inputs})
    for handle in handles:
        handle.remove()
    ends |= {name: value for name, value in given.items() if value.dtype.kind == "f"}
    made = inside.sources(set(inside.values))
    out: dict[str, str] = {}
    for block, end in ends.items():
        near = {n: value for n, value in inside.values.items() if n.startswith(block) and value.size == end.size}
        moved = not near and block in given  # an output that only moves another value has that one's numbers
        if moved:
            near = {n: inside.values[n] for n in made.get(block, ()) if inside.values[n].size == end.size}
        scored = {n: _likeness(end, v if moved else inside.tokens(v), moved) for n, v in near.items()}
        best = max(scored, key=lambda n: scored[n], default=None)
        if best is None or scored[best] < REFERENCE_DB:
            raise ConversionError(
                f"the float program differs from eager at {block} ({scored.get(best or '', -300):.0f} dB): nothing can "
                "be said of the bundle; report this with the bundle's manifest"
            )
        out[block] = best
    return out


def _likeness(end: Array, value: Array, moved: bool) -> float:
    """SQNR of a value against eager's; of one that is laid out otherwise by its sorted numbers."""
    want, got = end.ravel(), value.ravel()
    return numerics.compare(np.sort(want), np.sort(got)).sqnr_db if moved else numerics.compare(want, got).sqnr_db


CLIP_DB = 60.0  # noise below is no fault, and would flatten what matters


def draw(diagnosis: Diagnosis, path: Path, caption: str = "") -> None:
    """SQNR over the layers in the order that they run, clipped at CLIP_DB, coloured by stage, the suspect named."""
    what = f"{diagnosis.images} pictures of {diagnosis.data}"
    title = f"{Path(diagnosis.bundle).name}: SQNR of each layer against float, {what}"
    save_figure(path, (11, 4.2), lambda figure: fill(figure, diagnosis), title, caption)


def stage_of(layer: str) -> str:
    """stem, stage1, ... or head, by a layer's name."""
    first = layer.split("/")[0].split(".")[0]
    return first if first.startswith(("stage", "stem")) else "head and others"


def fill(figure: Any, diagnosis: Diagnosis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis = figure.subplots()
    names = [layer.name for layer in diagnosis.layers]
    values = [min(layer.sqnr_db, CLIP_DB) for layer in diagnosis.layers]
    stages = [stage_of(name) for name in names]
    for number, stage in enumerate(dict.fromkeys(stages)):
        at = [i for i, own in enumerate(stages) if own == stage]
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(at, [values[i] for i in at], linestyle="none", marker="o", markersize=4, color=colour, label=stage)
    axis.plot(values, linewidth=0.5, color=GREY, zorder=1)
    threshold = diagnosis.threshold_db
    if threshold <= CLIP_DB:
        axis.axhline(threshold, color=LIMIT, linewidth=1, linestyle="--", label=f"threshold {threshold:g} dB")
    axis.set_ylim(min(0.0, min(values, default=0.0)), CLIP_DB + 8)
    axis.set_yticks(range(0, int(CLIP_DB) + 1, 10), [*map(str, range(0, int(CLIP_DB), 10)), f"{CLIP_DB:g} and more"])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("layer, in the order that they run")
    axis.set_ylabel("SQNR (dB)")
    axis.legend(frameon=False, ncols=6, loc="lower left", bbox_to_anchor=(0, 1), handletextpad=0.2, columnspacing=1.4)
    if diagnosis.suspect is not None:
        worst = names.index(diagnosis.suspect)
        axis.scatter([worst], [values[worst]], s=110, facecolors="none", edgecolors=LIMIT, linewidths=1.8, zorder=3)
        label_points(axis, [(worst, values[worst])], [f"loses most by itself: {diagnosis.suspect}"])
