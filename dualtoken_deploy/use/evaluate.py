"""Accuracy on labelled pictures, the same numbers whether the eager model or a bundle runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.bundle.store import MANIFEST, Bundle
from dualtoken_deploy.data.annotated import open_dense
from dualtoken_deploy.data.folders import ImageSet, match_labels, open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import DatasetError, UsageError, WeightsError, missing_extra
from dualtoken_deploy.numerics import top_k_hits
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.load import Runner, RunnerOptions, engine_of, load_runner
from dualtoken_deploy.tasks.dense_evaluation import DenseEvaluation, judge
from dualtoken_deploy.use.validate import LOAD_AT_ONCE, run_batches

EAGER_BATCH = 16


@dataclass(frozen=True)
class Evaluation:
    """Shares are fractions of 1; `confusion[i][j]` counts pictures of class i that were taken for class j.

    `images_per_s` is that of the model alone, on pictures that are loaded already; None where `engine` stood in for the
    target's own runtime, whose time says nothing of a device.
    """

    source: str
    data: str
    images: int
    top1: float
    top5: float
    images_per_s: float | None
    labels: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    engine: str | None = None

    @property
    def per_class(self) -> dict[str, float]:
        """Top-1 of each class that the data has."""
        counts = zip(self.labels, self.confusion, strict=True)
        return {name: row[i] / sum(row) for i, (name, row) in enumerate(counts) if sum(row)}

    def to_json(self) -> dict[str, Any]:
        return vars(self) | {"per_class": self.per_class}


def evaluate(
    source: Bundle | str | Path,
    data: str | Path,
    limit: int | None = None,
    variant: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Evaluates a bundle, or weights in eager PyTorch, on labelled `data` (its val part where it has two).

    `source`: a bundle or its folder, a word of BUILT_IN_WEIGHTS or a weights file. `variant` is needed for weights
    that do not say it themselves. Raises UsageError, DatasetError, BundleError, WeightsError, MissingError.
    """
    images = open_dataset(data)
    if images.labels is None:
        raise DatasetError(f"{images.name} has no class folders; evaluation needs labelled images")
    if limit is not None:
        images = images.limit(limit)
    runner, contract, labels = _open(source, variant, device, threads)
    truth = np.array(match_labels(images, labels))
    logits, seconds = [], 0.0
    with runner as running:
        engine = engine_of(running)
        for start in range(0, len(images), LOAD_AT_ONCE):
            if progress:
                progress(f"evaluating {start}/{len(images)}")
            inputs = load_batch(images.images[start : start + LOAD_AT_ONCE], contract)
            began = time.perf_counter()
            logits.append(run_batches(running, contract, inputs))
            seconds += time.perf_counter() - began
    return _count(source, images, np.concatenate(logits), truth, labels, seconds, engine)


def evaluate_dense(
    weights: str | Path,
    data: str | Path,
    limit: int | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> DenseEvaluation:
    """Evaluates a detector's or segmenter's weights in eager PyTorch on the val part of `data` (`dense_data`).

    `weights`: a word of BUILT_IN_WEIGHTS, a file, or a run's folder. Raises UsageError, DatasetError, WeightsError,
    MissingError.
    """
    try:
        import torch

        from dualtoken_deploy.models.heads.eager import eager_predictor
        from dualtoken_deploy.models.heads.table import create_dense_model
        from dualtoken_deploy.models.heads.weights import describe_dense
        from dualtoken_deploy.targets.eager import check_device
    except ModuleNotFoundError as error:
        raise missing_extra("export", "evaluating weights in PyTorch") from error
    said = describe_dense(weights)
    samples = open_dense(data, said.task)
    if limit is not None:
        samples = samples.limit(limit)
    if threads:
        torch.set_num_threads(threads)
    where = check_device(device)
    predict = eager_predictor(create_dense_model(said.head, weights=weights), said.image_size, where)
    return judge(str(weights), samples, said.task, predict, said.image_size, said.labels, progress)


def holds_dense_model(source: str | Path) -> bool:
    """Whether `source` are weights of a detector or segmenter; False for bundles, and without torch."""
    if (Path(source) / MANIFEST).is_file():
        return False
    try:
        from dualtoken_deploy.models.heads import weights
    except ModuleNotFoundError:
        return False
    path = weights.dense_weights_path(source)
    return path.is_file() and weights.holds_dense_model(source)


def _count(
    source: Bundle | str | Path,
    images: ImageSet,
    logits: NDArray[Any],
    truth: NDArray[Any],
    labels: Sequence[str],
    seconds: float,
    engine: str | None,
) -> Evaluation:
    confusion = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(confusion, (truth, logits.argmax(1)), 1)
    return Evaluation(
        source=str(source.path if isinstance(source, Bundle) else source),
        data=images.name,
        images=len(images),
        top1=top_k_hits(logits, truth, 1) / len(truth),
        top5=top_k_hits(logits, truth, 5) / len(truth),
        images_per_s=None if engine else round(len(truth) / seconds, 2),
        labels=tuple(labels),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        engine=engine,
    )


def _open(
    source: Bundle | str | Path, variant: str | None, device: str | None, threads: int | None
) -> tuple[AbstractContextManager[Runner], InputContract, tuple[str, ...]]:
    if isinstance(source, Bundle) or (Path(source) / MANIFEST).is_file():
        bundle = source if isinstance(source, Bundle) else Bundle.open(source)
        bundle.need_classifier("evaluate", "use dualtoken validate --data")
        return load_runner(bundle, device, threads), bundle.manifest.input, bundle.labels
    if Path(source).is_dir():
        raise UsageError(f"{source} is a folder without {MANIFEST}; give a bundle, or the weights file in the folder")
    return _eager(source, variant, RunnerOptions(device, threads))


def _eager(
    weights: str | Path, variant: str | None, options: RunnerOptions
) -> tuple[AbstractContextManager[Runner], InputContract, tuple[str, ...]]:
    try:
        from dualtoken_deploy.models.registry import create_model
        from dualtoken_deploy.models.weights import describe_weights
        from dualtoken_deploy.targets.eager import EagerRunner
    except ModuleNotFoundError as error:
        raise missing_extra("export", "evaluating weights in PyTorch") from error
    info = describe_weights(weights)
    if info is None:
        raise WeightsError(f"{weights} does not say its variant and classes; export it, and evaluate the bundle")
    if variant not in (None, info.variant):
        raise WeightsError(f"{weights} are weights of variant {info.variant}, not of {variant}")
    model = create_model(info.variant, len(info.labels), info.image_size, weights, **info.options)
    tensor = TensorSpec("image", "uint8", "NHWC", ("batch", *info.image_size, 3))
    contract = InputContract(tensor, "image", info.image_size)
    outputs = (TensorSpec("logits", "float32", "NC", ("batch", len(info.labels))),)
    return EagerRunner(model, contract, outputs, options), contract, info.labels
