"""How far a bundle is from the eager model it was made from, and how good both are, whatever the task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.manifest import EAGER
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.data.samples import Sample, SampleSet, left_out, read_or_none
from dualtoken_deploy.errors import ToleranceError, UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import InputContract
from dualtoken_deploy.targets.load import Runner, RunnerOptions, choose_reference, engine_of, load_runner
from dualtoken_deploy.targets.runner import AT_ONCE, run_each
from dualtoken_deploy.tasks.base import Found, Likeness, Outputs, Pair, Task
from dualtoken_deploy.tasks.table import TASKS, get_task

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Validation:
    """A bundle against its reference. Shares are fractions of 1; None: that could not be measured.

    `reference` "eager": the model rebuilt from where it came from, on every image, or on the golden input where no data
    was given; "onnx-file": the same with the ONNX file that the bundle was made from, in ONNX Runtime in float32.
    "golden": the outputs stored at export, for the one golden input; the likeness is then of that input alone
    (`likeness_images` says of how many), scores are over the data, `images` of it.
    `likeness` as the task measures it, `scores` the bundle's and `eager_scores` its reference's, by metric.
    `engine`: what stood in for the target's own runtime, if anything did. `asked_db`: the least SQNR that export asks
    of the golden input; None where the likeness is of others.
    """

    bundle: str
    task: str
    reference: str
    images: int
    likeness_images: int
    likeness: Likeness
    scores: Mapping[str, float] | None = None
    eager_scores: Mapping[str, float] | None = None
    engine: str | None = None
    unreadable: int = 0  # pictures of the data that were left out
    asked_db: float | None = None

    @property
    def sqnr_db(self) -> float:
        return self.likeness.sqnr_db

    @property
    def max_abs_error(self) -> float:
        return self.likeness.max_abs_error

    @property
    def agreement(self) -> float | None:
        return self.likeness.agreement

    @property
    def measured(self) -> dict[str, float | None]:
        """Every figure by its name in reports; those of the task that were not measured are None."""
        task = get_task(self.task)
        return {**task.numbers(self.likeness), **dict.fromkeys(task.metrics), **(self.scores or {})}

    def to_json(self) -> dict[str, Any]:
        figures = {k: v if v is None or np.isfinite(v) else None for k, v in self.measured.items()}
        return {
            "bundle": self.bundle,
            "task": self.task,
            "reference": self.reference,
            "images": self.images,
            "likeness_images": self.likeness_images,
            "unreadable": self.unreadable,
            **figures,
            "agreement": self.likeness.agreement,
            "scores": None if self.scores is None else dict(self.scores),
            "eager_scores": None if self.eager_scores is None else dict(self.eager_scores),
            "engine": self.engine,
        }


def validate(
    bundles: Sequence[Bundle | str | Path],
    data: str | Path | None = None,
    limit: int | None = None,
    reference: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    progress: Tell | None = None,
) -> list[Validation]:
    """Validates bundles on `data` (a folder or a word that their task takes, its val part; None: the golden input).

    `reference`: eager (of a bundle that was made from an ONNX file that file) or golden; None: with data eager where
    torch is installed, else golden; each result says which.
    Raises UsageError, DatasetError, BundleError, MissingError, WeightsError.
    """
    if not bundles:
        raise UsageError("no bundle to validate")
    chosen = "golden" if reference is None and data is None else choose_reference(reference)
    results = []
    for item in bundles:
        bundle = item if isinstance(item, Bundle) else Bundle.open(item)
        images = None if data is None else open_for(bundle, data, limit)
        if progress:
            against = bundle.manifest.reference if chosen == EAGER else chosen
            progress(f"validating {bundle.name} against {against}")
        results.append(_validate(bundle, images, chosen, RunnerOptions(device, threads), progress or (lambda _: None)))
    return results


def open_for(bundle: Bundle, data: str | Path, limit: int | None = None) -> SampleSet:
    """The set that `data` names, for a bundle: its val part, the truth in the bundle's classes."""
    task = get_task(bundle.manifest.task)
    images = task.match(task.open(data, "val"), bundle.labels)
    return images if limit is None else images.limit(limit)


def parse_minima(words: Sequence[str]) -> dict[str, float]:
    """METRIC=VALUE words, of any task's metrics. Raises UsageError."""
    known = [metric for task in TASKS.values() if not task.lower for metric in task.metrics]
    minima: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise UsageError(f"--minimum takes METRIC=VALUE with a number, not {word!r}")
        if name not in known:
            raise UsageError(f"--minimum of {name!r}: valid metrics are {', '.join(dict.fromkeys(known))}")
        minima[name] = value
    return minima


def gate(results: Sequence[Validation], **minima: float | None) -> None:
    """Raises ToleranceError that names all measures below their minimum (sqnr_db, agreement, or a metric of the task),
    UsageError where one was not measured. Unless a minimum of sqnr_db is given, golden has to reach what export asks.
    """
    failures = []
    for result in results:
        if minima.get("sqnr_db") is None and result.asked_db is not None and not result.sqnr_db >= result.asked_db:
            failures.append(
                f"{result.bundle}: SQNR {result.sqnr_db:.1f} dB on golden, and its export asks for "
                f"{result.asked_db:g}; see what runs with `dualtoken inspect {result.bundle}`, or say what is enough "
                "with --min-sqnr"
            )
        measured = {**result.measured, "agreement": result.likeness.agreement}
        for measure, minimum in minima.items():
            if minimum is None:
                continue
            value = measured.get(measure)
            if value is None:
                raise UsageError(f"{result.bundle}: {measure} was not measured; {_why_not(result, measure)}")
            if value < minimum:
                failures.append(f"{result.bundle}: {measure} {value:.4g} is below {minimum:g}")
    if failures:
        raise ToleranceError("; ".join(failures))


def _why_not(result: Validation, measure: str) -> str:
    task = get_task(result.task)
    if measure not in (*task.metrics, "agreement"):
        owners = ", ".join(name for name, other in TASKS.items() if measure in other.metrics)
        return f"it is a measure of the task {owners}, and this bundle is for {task.name}"
    if measure == "agreement":
        return f"the task {task.name} has none; give --min-sqnr"
    return "give --data with the truth of the pictures (labelled class folders for a classifier)"


def compare_golden(bundle: Bundle, runner: Runner) -> Likeness:
    """A bundle's runner on the golden input, against the outputs stored at export."""
    task, golden = get_task(bundle.manifest.task), dict(bundle.golden)
    actual = runner.run({bundle.manifest.input.tensor.name: golden.pop("input")})
    return task.compare(golden, task.thin(actual))


def _validate(
    bundle: Bundle, images: SampleSet | None, reference: str, options: RunnerOptions, tell: Tell
) -> Validation:
    task, path = get_task(bundle.manifest.task), str(bundle.path)
    skipped: list[str] = []
    if images is not None and reference == "golden" and not task.known(images):
        raise UsageError(
            f"golden is one stored input with its outputs, and {images.name} does not say what is true of its "
            "pictures, so nothing would be measured on them; leave --data out, or give --reference eager (needs torch)"
        )
    with load_runner(bundle, options.device, options.threads) as runner:
        engine = engine_of(runner)
        if reference == "golden":
            found, stored = compare_golden(bundle, runner), len(bundle.golden["input"])
            asked = bundle.manifest.tolerance.sqnr_db
            if images is None:
                return Validation(path, task.name, reference, stored, stored, found, engine=engine, asked_db=asked)
            pairs = pairs_over(bundle, task, images, runner, skipped)
            left_out(images, skipped)
            own = _score(task, pairs, bundle)
            return Validation(
                path, task.name, reference, len(pairs), stored, found, own,
                engine=engine, unreadable=len(skipped), asked_db=asked,
            )  # fmt: skip
        from dualtoken_deploy.targets import eager

        reference = bundle.manifest.reference
        with eager.load(bundle, RunnerOptions(threads=options.threads)) as model:
            if images is None:
                feeds = {bundle.manifest.input.tensor.name: bundle.golden["input"]}
                stored = len(bundle.golden["input"])
                found = task.compare(model.run(feeds), runner.run(feeds))
                return Validation(path, task.name, reference, stored, stored, found, engine=engine)
            found, ours, theirs = _side_by_side(bundle, task, images, runner, model, skipped, tell)
    left_out(images, skipped)
    scores, eager_scores = (_score(task, pairs, bundle) if task.known(images) else None for pairs in (ours, theirs))
    count = len(images) - len(skipped)
    return Validation(
        path, task.name, reference, count, count, found, scores, eager_scores, engine, unreadable=len(skipped)
    )


def _side_by_side(
    bundle: Bundle, task: Task, images: SampleSet, runner: Runner, model: Runner, skipped: list[str], tell: Tell
) -> tuple[Likeness, list[Pair], list[Pair]]:
    """Both on every picture, read once; outputs are compared and interpreted at once, and not kept."""
    contract, meter = bundle.manifest.input, task.meter()
    ours: list[Pair] = []
    theirs: list[Pair] = []
    seen = 0
    for samples, inputs in chunks(images, contract, task, skipped):
        both = zip(samples, run_each(model, contract, inputs), run_each(runner, contract, inputs), strict=True)
        tell(f"{bundle.name} against eager: {seen}/{len(images)} images")
        seen += len(samples)
        for sample, want, got in both:
            meter.add(want, got)
            if task.known(images):
                kept = task.keep(sample, contract)
                theirs.append((kept, read(bundle, task, sample, want)))
                ours.append((kept, read(bundle, task, sample, got)))
    return meter.likeness(), ours, theirs


def pairs_over(
    bundle: Bundle, task: Task, images: SampleSet, runner: Runner, skipped: list[str] | None = None
) -> list[Pair]:
    """Truth and answer for every picture of a set."""
    contract = bundle.manifest.input
    return [
        (task.keep(sample, contract), read(bundle, task, sample, outputs))
        for samples, inputs in chunks(images, contract, task, skipped)
        for sample, outputs in zip(samples, run_each(runner, contract, inputs), strict=True)
    ]


def chunks(
    images: SampleSet, contract: InputContract, task: Task, skipped: list[str] | None = None
) -> Iterator[tuple[list[Sample], list[Array]]]:
    """The samples of a set with their inputs, as many at a time as are run at once.

    Pictures that cannot be read are added to `skipped`; without it the first raises ImageError.
    """
    step = max(AT_ONCE // (contract.batch or 1), 1) * (contract.batch or 1)
    for start in range(0, len(images), step):
        samples = []
        for i in range(start, min(start + step, len(images))):
            sample = images[i] if skipped is None else read_or_none(images, i)
            if sample is not None:
                samples.append(sample)
            elif skipped is not None:
                skipped.append(images.where(i))
        if samples:
            yield samples, [task.prepare(sample, contract) for sample in samples]


def read(bundle: Bundle, task: Task, sample: Sample, outputs: Outputs) -> Found:
    """What outputs say of a sample, in its own pixels."""
    return task.interpret(outputs, bundle.manifest.input.size, sample.size)


def _score(task: Task, pairs: Sequence[Pair], bundle: Bundle) -> dict[str, float]:
    return task.score(pairs, len(bundle.labels))
