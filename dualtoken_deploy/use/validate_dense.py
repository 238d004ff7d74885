"""How far a dense bundle is from the eager model it was made from, and how good both are: AP or mean IoU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.annotated import DenseSample, DenseSet, open_dense
from dualtoken_deploy.data.stretch import prepare_input
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.targets.load import Runner, RunnerOptions, choose_reference, engine_of, load_runner
from dualtoken_deploy.tasks import dense_outputs
from dualtoken_deploy.tasks.boxes import Array
from dualtoken_deploy.tasks.dense_evaluation import Pair, check_labels, image_size, score
from dualtoken_deploy.tasks.dense_outputs import Found, Likeness, interpret


@dataclass(frozen=True)
class DenseValidation:
    """A dense bundle against its reference. Scores are fractions of 1, those of `scores` the bundle's: ap, ap50, ap75
    and, with masks, mask_ap, mask_ap50, mask_ap75; or miou. None: not measured.

    `reference` "eager": the model rebuilt from its weights, on every image; "golden": the outputs stored at export.
    `agreement`: share of detections, pixels or anchors that both see alike (`dense_outputs.compare`).
    """

    bundle: str
    reference: str
    images: int
    sqnr_db: float
    max_abs_error: float
    agreement: float
    scores: dict[str, float] | None = None
    eager_scores: dict[str, float] | None = None
    engine: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(self).items()}


def all_dense(bundles: Sequence[Bundle]) -> bool:
    """Whether bundles are dense. Raises UsageError where some are and some are not."""
    kinds = {b.manifest.task == CLASSIFY for b in bundles}
    if len(kinds) > 1:
        raise UsageError("classifiers and dense models are judged by different measures; name bundles of one kind")
    return kinds == {False}


def validate_dense(
    bundles: Sequence[Bundle | str | Path],
    data: str | Path | None = None,
    limit: int | None = None,
    reference: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[DenseValidation]:
    """Validates dense bundles on `data` (what open_dense takes, its val part; None: the golden input alone).

    `reference`: eager or golden; None: eager where torch is installed, else golden.
    Raises UsageError, DatasetError, BundleError, MissingError, WeightsError.
    """
    if not bundles:
        raise UsageError("no bundle to validate")
    chosen = choose_reference(reference)
    results = []
    for item in bundles:
        bundle = item if isinstance(item, Bundle) else Bundle.open(item)
        images = None if data is None else open_dense(data, bundle.manifest.task, "val")
        if images is not None and limit is not None:
            images = images.limit(limit)
        if progress:
            progress(f"validating {bundle.name} against {chosen}")
        results.append(_validate(bundle, images, chosen, device, threads))
    return results


def gate_dense(
    results: Sequence[DenseValidation],
    min_ap: float | None = None,
    min_miou: float | None = None,
    min_sqnr: float | None = None,
    min_agreement: float | None = None,
) -> None:
    """Raises ToleranceError that names all measures below their minimum, UsageError where one was not measured."""
    failures = []
    for result in results:
        measured: dict[str, float] = {**(result.scores or {}), "sqnr_db": result.sqnr_db, "agreement": result.agreement}
        minima = {"ap": min_ap, "miou": min_miou, "sqnr_db": min_sqnr, "agreement": min_agreement}
        for name, minimum in minima.items():
            if minimum is None:
                continue
            if name not in measured:
                hint = "give --data" if result.scores is None else "it is a measure of the other task"
                raise UsageError(f"{result.bundle}: {name} was not measured; {hint}")
            if measured[name] < minimum:
                failures.append(f"{result.bundle}: {name} {measured[name]:.4g} is below {minimum:g}")
    if failures:
        raise ToleranceError("; ".join(failures))


def compare_golden(bundle: Bundle, runner: Runner) -> Likeness:
    """A dense bundle's runner on the golden input, against the outputs stored at export."""
    golden = dict(bundle.golden)
    actual = runner.run({bundle.manifest.input.tensor.name: golden.pop("input")})
    return dense_outputs.compare(golden, dense_outputs.thin(actual))


def _validate(
    bundle: Bundle, images: DenseSet | None, reference: str, device: str | None, threads: int | None
) -> DenseValidation:
    with load_runner(bundle, device, threads) as runner:
        engine = engine_of(runner)
        if images is None:
            return _result(bundle, "golden", 1, compare_golden(bundle, runner), engine)
        check_labels(images, bundle.labels)
        if reference == "golden":
            pairs = [(sample, read(bundle, sample, run(bundle, runner, sample))) for sample in _samples(images)]
            found = compare_golden(bundle, runner)
            return _result(bundle, reference, len(images), found, engine, _score(bundle, pairs))
        from dualtoken_deploy.targets import eager

        ours: list[Pair] = []
        theirs: list[Pair] = []
        likenesses: list[Likeness] = []
        with eager.load(bundle, RunnerOptions(threads=threads)) as model:
            for sample in _samples(images):
                want, got = run(bundle, model, sample), run(bundle, runner, sample)
                likenesses.append(dense_outputs.compare(want, got))
                ours.append((sample, read(bundle, sample, got)))
                theirs.append((sample, read(bundle, sample, want)))
    scores = [_score(bundle, pairs) for pairs in (ours, theirs)]
    return _result(bundle, reference, len(images), dense_outputs.worst(likenesses), engine, *scores)


def _samples(images: DenseSet) -> Iterator[DenseSample]:
    return (images[i] for i in range(len(images)))


def run(bundle: Bundle, runner: Runner, sample: DenseSample) -> dict[str, Array]:
    """A dense bundle's outputs for a sample, by the runner given."""
    contract = bundle.manifest.input
    return runner.run({contract.tensor.name: prepare_input(sample.image, contract)})


def read(bundle: Bundle, sample: DenseSample, outputs: dict[str, Array]) -> Found:
    """What outputs say of a sample, in its own pixels."""
    return interpret(outputs, bundle.manifest.task, bundle.manifest.input.size, image_size(sample))


def _score(bundle: Bundle, pairs: Sequence[Pair]) -> dict[str, float]:
    return score(pairs, bundle.manifest.task, len(bundle.labels))


def _result(
    bundle: Bundle,
    reference: str,
    images: int,
    found: Likeness,
    engine: str | None,
    scores: dict[str, float] | None = None,
    eager: dict[str, float] | None = None,
) -> DenseValidation:
    return DenseValidation(
        str(bundle.path), reference, images, found.sqnr_db, found.max_abs_error, found.agreement, scores, eager, engine
    )
