"""How far a bundle is from the eager model it was made from, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy import numerics
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.folders import ImageSet, match_labels, open_dataset
from dualtoken_deploy.data.images import load_batch
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.spec import InputContract
from dualtoken_deploy.targets.load import Runner, RunnerOptions, choose_reference, engine_of, load_runner

Array = numerics.Array
LOAD_AT_ONCE = 16  # images decoded at a time: 224x224x3 float32 is 0.6 MB each


@dataclass(frozen=True)
class Validation:
    """A bundle against its reference. Shares are fractions of 1; None: that could not be measured.

    `reference` "eager": the model rebuilt from its weights, on every image. "golden": the logits stored at export, for
    the one golden input; agreement is then over that input alone, top1 and top5 over the labelled images.
    `engine`: what stood in for the target's own runtime, if anything did.
    """

    bundle: str
    reference: str
    images: int
    sqnr_db: float
    max_abs_error: float
    mean_abs_error: float
    cosine: float
    top1_agreement: float
    top1: float | None
    top5: float | None
    engine: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {k: v if not isinstance(v, float) or np.isfinite(v) else None for k, v in asdict(self).items()}


def validate(
    bundles: Sequence[Bundle | str | Path],
    data: str | Path | None = None,
    limit: int | None = None,
    reference: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Validation]:
    """Validates bundles on `data` (a folder or a word that open_dataset takes; None: the golden input alone).

    `reference`: eager or golden; None: eager where torch is installed, else golden; each result says which.
    Raises UsageError, DatasetError, BundleError, MissingError, WeightsError.
    """
    if not bundles:
        raise UsageError("no bundle to validate")
    chosen = choose_reference(reference)
    images = None if data is None else open_dataset(data)
    if images is not None and limit is not None:
        images = images.limit(limit)
    results = []
    for item in bundles:
        bundle = item if isinstance(item, Bundle) else Bundle.open(item)
        bundle.need_classifier("this validation", "call validate_dense")
        if progress:
            progress(f"validating {bundle.name} against {chosen}")
        results.append(_validate(bundle, images, chosen, device, threads))
    return results


def gate(
    results: Sequence[Validation],
    min_agreement: float | None = None,
    min_top1: float | None = None,
    min_sqnr: float | None = None,
) -> None:
    """Raises ToleranceError that names all measures below their minimum, UsageError where one was not measured."""
    minima = {"top1_agreement": min_agreement, "top1": min_top1, "sqnr_db": min_sqnr}
    failures = []
    for result in results:
        for measure, minimum in minima.items():
            value = getattr(result, measure)
            if minimum is None:
                continue
            if value is None:
                raise UsageError(
                    f"{result.bundle}: {measure} was not measured; give --data with labelled class folders"
                )
            if value < minimum:
                failures.append(f"{result.bundle}: {measure} {value:.4g} is below {minimum:g}")
    if failures:
        raise ToleranceError("; ".join(failures))


def run_batches(runner: Runner, contract: InputContract, inputs: Array) -> Array:
    """Logits (N, classes) for N inputs, fed in the batch that the contract fixes; a short last batch is filled up."""
    batch = contract.batch or LOAD_AT_ONCE
    logits = []
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        full = part
        if contract.batch is not None and len(part) < batch:
            full = np.concatenate((part, np.repeat(part[-1:], batch - len(part), axis=0)))
        (out,) = runner.run({contract.tensor.name: full}).values()
        logits.append(out[: len(part)])
    return np.concatenate(logits)


def measure(expected: Array, actual: Array) -> dict[str, Any]:
    """The numbers of a Validation that compare logits: SQNR, errors, cosine and the share of equal top-1."""
    difference = numerics.compare(expected, actual)
    return {
        "sqnr_db": difference.sqnr_db,
        "max_abs_error": difference.max_abs_error,
        "mean_abs_error": difference.mean_abs_error,
        "cosine": difference.cosine,
        "top1_agreement": float((expected.argmax(1) == actual.argmax(1)).mean()),
    }


def _validate(
    bundle: Bundle, images: ImageSet | None, reference: str, device: str | None, threads: int | None
) -> Validation:
    contract = bundle.manifest.input
    with load_runner(bundle, device, threads) as runner:
        engine = engine_of(runner)
        golden = run_batches(runner, contract, bundle.golden["input"])
        logits = None if images is None else run_over(images, contract, runner)
    labels = None if images is None or images.labels is None else np.array(match_labels(images, bundle.labels))
    if reference == "golden" or images is None or logits is None:
        numbers = measure(bundle.golden["logits"], golden)
    else:
        from dualtoken_deploy.targets import eager

        with eager.load(bundle, RunnerOptions(threads=threads)) as model:
            numbers = measure(run_over(images, contract, model), logits)
    hits = None if labels is None or logits is None else [numerics.top_k_hits(logits, labels, k) for k in (1, 5)]
    return Validation(
        bundle=str(bundle.path),
        reference="golden" if images is None else reference,
        images=len(bundle.golden["input"]) if images is None else len(images),
        top1=None if hits is None or labels is None else hits[0] / len(labels),
        top5=None if hits is None or labels is None else hits[1] / len(labels),
        engine=engine,
        **numbers,
    )


def run_over(images: ImageSet, contract: InputContract, runner: Runner) -> Array:
    """Logits (N, classes) over a whole set; its pictures are loaded LOAD_AT_ONCE at a time."""
    return np.concatenate([run_batches(runner, contract, part) for part in _inputs(images, contract)])


def _inputs(images: ImageSet, contract: InputContract) -> Iterator[Array]:
    step = (
        LOAD_AT_ONCE if contract.batch is None else max(contract.batch, LOAD_AT_ONCE // contract.batch * contract.batch)
    )
    for start in range(0, len(images), step):
        yield load_batch(images.images[start : start + step], contract)
