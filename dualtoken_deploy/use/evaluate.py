"""Accuracy on pictures whose truth is known, the same numbers whether the eager model or a bundle runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import MANIFEST, Bundle
from dualtoken_deploy.data.samples import SampleSet, left_out
from dualtoken_deploy.errors import DatasetError, UsageError, WeightsError, missing_extra
from dualtoken_deploy.spec import InputContract
from dualtoken_deploy.targets.load import Runner, RunnerOptions, engine_of, load_runner
from dualtoken_deploy.targets.runner import run_each
from dualtoken_deploy.tasks.base import Pair, Task
from dualtoken_deploy.tasks.classify import confusion
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.validate import chunks

BEST = "best.safetensors"  # of a run's folder


@dataclass(frozen=True)
class Evaluation:
    """`scores` and `per_class` (its first metric) are fractions of 1. `confusion[i][j]`, of a classifier: pictures of
    class i that were taken for class j.

    `images_per_s` is that of the model and of reading its outputs, on pictures that are loaded already; None where
    `engine` stood in for the target's own runtime, whose time says nothing of a device.
    """

    source: str
    data: str
    task: str
    images: int
    scores: dict[str, float]
    per_class: dict[str, float]
    images_per_s: float | None
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] | None = None
    engine: str | None = None
    unreadable: int = 0  # pictures of the data that were left out
    weights: str = ""  # what the model's weights are; "random" where its answers mean nothing

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "scores"} | self.scores


@dataclass(frozen=True)
class _Opened:
    """What is to be judged. `runner`: a context manager."""

    weights: str
    runner: AbstractContextManager[Runner]
    contract: InputContract
    labels: tuple[str, ...]
    task: Task


def evaluate(
    source: Bundle | str | Path,
    data: str | Path,
    limit: int | None = None,
    variant: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluates a bundle, or weights in eager PyTorch, on `data` with its truth (its val part where it has two).

    `source`: a bundle or its folder, a word of BUILT_IN_WEIGHTS, a weights file, or a run's folder. `variant` is needed
    for weights that do not say it themselves.
    Raises UsageError, DatasetError, BundleError, WeightsError, MissingError.
    """
    opened = _open(source, variant, RunnerOptions(device, threads))
    task = opened.task
    images = task.open(data, "val")
    if not task.known(images):
        raise DatasetError(f"{images.name} does not say what is true of its pictures; evaluation needs labelled images")
    images = task.match(images, opened.labels)
    if limit is not None:
        images = images.limit(limit)
    with opened.runner as runner:
        engine = engine_of(runner)
        pairs, seconds = _run(opened, images, runner, progress)
    labels = opened.labels or images.labels or ()
    table = confusion(pairs, len(labels)) if all(found.logits is not None for _, found in pairs) else None
    return Evaluation(
        source=str(source.path if isinstance(source, Bundle) else source),
        data=images.name,
        task=task.name,
        images=len(pairs),
        unreadable=len(images) - len(pairs),
        scores=task.score(pairs, len(labels)),
        per_class=task.score_classes(pairs, labels),
        images_per_s=None if engine else round(len(pairs) / seconds, 2),
        labels=tuple(labels),
        confusion=None if table is None else tuple(tuple(row) for row in table.tolist()),
        engine=engine,
        weights=opened.weights,
    )


def _run(
    opened: _Opened, images: SampleSet, runner: Runner, progress: Callable[[str], None] | None
) -> tuple[list[Pair], float]:
    """Truth and answers, and the seconds that the answers took."""
    pairs: list[Pair] = []
    skipped: list[str] = []
    seconds = 0.0
    for samples, inputs in chunks(images, opened.contract, opened.task, skipped):
        if progress:
            progress(f"evaluating {len(pairs)}/{len(images)}")
        began = time.perf_counter()
        found = [
            opened.task.interpret(outputs, opened.contract.size, sample.size)
            for sample, outputs in zip(samples, run_each(runner, opened.contract, inputs), strict=True)
        ]
        seconds += time.perf_counter() - began
        kept = (opened.task.keep(sample, opened.contract) for sample in samples)
        pairs += zip(kept, found, strict=True)
    left_out(images, skipped)
    return pairs, seconds


def _open(source: Bundle | str | Path, variant: str | None, options: RunnerOptions) -> _Opened:
    if isinstance(source, Bundle) or (Path(source) / MANIFEST).is_file():
        bundle = source if isinstance(source, Bundle) else Bundle.open(source)
        runner = load_runner(bundle, options.device, options.threads)
        return _Opened(
            bundle.manifest.weights.source, runner, bundle.manifest.input, bundle.labels, get_task(bundle.manifest.task)
        )
    if Path(source).is_dir() and not (Path(source) / BEST).is_file():
        raise UsageError(f"{source} is a folder without {MANIFEST} or {BEST}; give a bundle, a run or weights")
    try:
        from dualtoken_deploy.models.own_sources import trained_source
        from dualtoken_deploy.targets.eager import EagerRunner
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("export", "evaluating weights in PyTorch") from error
    found = trained_source(source)
    if variant not in (None, found.described["variant"]):
        raise WeightsError(f"{source} are weights of variant {found.described['variant']}, not of {variant}")
    batch = 1 if found.one_picture else "batch"
    contract = found.contract(None, batch)
    model = EagerRunner(found.make(), contract, found.outputs(found.size, batch), options)
    return _Opened(str(source), model, contract, found.labels, get_task(found.task))
