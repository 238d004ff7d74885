"""What every task is: a row that knows how its pictures are opened and its outputs compared, read, scored and shown.

Nothing outside of this package asks which task a bundle is for; it takes the row and calls it. numpy alone, so that a
device without torch has it. Training adds a loss and augmentation to a row (train/).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.data.objects import Objects
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.data.samples import Sample, SampleSet
from dualtoken_deploy.errors import DatasetError
from dualtoken_deploy.numerics import SQNR_LIMIT_DB, Array, Difference, Running
from dualtoken_deploy.spec import InputContract, Tolerance

GOLDEN_VALUES = 2**18  # kept of each output in golden.npz; the logits of a whole picture would be up to 150 MB

Outputs = Mapping[str, Array]  # of a runner, by name, the batch first
Size = tuple[int, int]  # (H, W)
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """What outputs say of one picture, in its own pixels: of a classifier `logits` (classes,); `boxes` and perhaps
    `masks`, best first; `label_map` uint8 (h, w); an embedding `vector` (D,); or `tensors`, outputs without the batch's
    axis or as they are."""

    logits: Array | None = None
    boxes: Objects | None = None
    masks: Objects | None = None
    label_map: NDArray[np.uint8] | None = None
    vector: Array | None = None
    tensors: Outputs | None = None


Pair = tuple[Sample, Found]  # truth and answer


@dataclass(frozen=True)
class Likeness:
    """How near outputs come to the expected ones. `agreement` in 0..1 in the task's own sense, None where it has none;
    `more`: further measures by name."""

    sqnr_db: float
    max_abs_error: float
    agreement: float | None
    more: Mapping[str, float] = field(default_factory=dict)


class Meter(Protocol):
    """Adds up a Likeness over many pictures, whose outputs need not be kept."""

    def add(self, expected: Outputs, actual: Outputs) -> None: ...

    def likeness(self) -> Likeness:
        """Of all that was added. Raises ValueError where nothing was."""
        ...


class JointMeter:
    """One SQNR over the values of all pictures, the worst of the outputs; `alike` gives each picture's agreement (N,).

    `more` are the mean error and the cosine, where there is one output.
    """

    def __init__(self, alike: Callable[[Outputs, Outputs], Array] | None) -> None:
        self._alike, self._same = alike, [np.zeros(0)]
        self._running: dict[str, Running] = {}

    def add(self, expected: Outputs, actual: Outputs) -> None:
        for name, want in expected.items():
            self._running.setdefault(name, Running()).add(want, actual[name])
        if self._alike is not None:
            self._same.append(np.atleast_1d(self._alike(expected, actual)).astype(np.float64))

    def likeness(self) -> Likeness:
        found = [running.difference() for running in self._running.values()]
        agreement = None if self._alike is None else float(np.concatenate(self._same).mean())
        more = {} if len(found) != 1 else {"mean_abs_error": found[0].mean_abs_error, "cosine": found[0].cosine}
        return Likeness(*_worst(found), agreement, more)


class WorstMeter:
    """Each picture by itself: the worst of each figure over them, the mean of the agreements."""

    def __init__(self, compare: Callable[[Outputs, Outputs], Likeness]) -> None:
        self._compare, self._found = compare, list[Likeness]()

    def add(self, expected: Outputs, actual: Outputs) -> None:
        self._found.append(self._compare(expected, actual))

    def likeness(self) -> Likeness:
        found = self._found
        agreements = [f.agreement for f in found if f.agreement is not None]
        return Likeness(
            min(f.sqnr_db for f in found),
            max(f.max_abs_error for f in found),
            float(np.mean(agreements)) if agreements else None,
        )


def _worst(found: Sequence[Difference]) -> tuple[float, float]:
    return min(d.sqnr_db for d in found), max(d.max_abs_error for d in found)


def worst_of(expected: Outputs, actual: Outputs) -> tuple[float, float]:
    """SQNR in dB and largest error, the worst of all outputs."""
    running = JointMeter(None)
    running.add(expected, actual)
    found = running.likeness()
    return found.sqnr_db, found.max_abs_error


@dataclass(frozen=True)
class OutputKind:
    """An output that a model of the task gives: its name, its number of axes, whether it holds indices, its layout."""

    name: str
    rank: int
    indices: bool = False
    layout: str = ""


class Answer(Protocol):
    """One line of what a picture was answered with; a frozen dataclass, whose fields are those of --json."""

    def cells(self) -> tuple[str, ...]:
        """As a row of a table, under the task's `columns`."""
        ...


@dataclass(frozen=True)
class Ask:
    """How much is wanted of an answer: the `top` likeliest classes, objects of at least `min_score` in 0..1."""

    top: int = 5
    min_score: float = 0.5


@dataclass(frozen=True)
class Task:
    """One task.

    `classes`: whether a model has named classes. `resize`: of the input contract, unless another is asked for.
    `agreement`: what reports call it in JSON; `alike`: what is equal, in words. `metrics`: what `score` measures, that
    which matters most first; INT8 is judged by it where the data has the truth. `rows`: what reports call the answers,
    `columns` the heads of their table.

    `open(data, part)`: the pictures that a folder or word names, "train" or "val"; raises UsageError, DatasetError.
    `match(data, labels)`: the same set with its truth in the model's classes; raises DatasetError where they differ.
    `known(data)`: whether the set has the truth that `score` needs.
    `interpret(outputs, model_size, size)`: what the outputs for one image say of the picture of `size` (h, w).
    `score(pairs, classes)`: {metric: value in 0..1}. `score_classes(pairs, labels)`: the first metric of each class.
    `describe(found, labels, size, ask)`: the answers for one picture, best first, and what of `found` they are.
    `paint(picture, found, answers)`: the answers drawn over the picture; None where there is nothing to draw.
    `tolerance(base, precision, gated, outputs)`: what a saved file must reach, from that of its target and precision
    and the names of the outputs; `gated`: what it loses on held-out pictures has a limit of its own.
    `outputs`: of a model of the user's, in the alternatives that the task takes; empty: any.
    `check_images`: photographs that export checks
    on, where outputs are large; None: all. `held_out`: pictures that the loss of int8 is measured on at most.
    `most_classes`: that outputs can tell apart; None: any number. `level(expected, step)`: (N,), whether the two best
    answers to a picture lie so near that numbers with steps of that part of themselves cannot say which comes first;
    None: the task chooses no best one.

    `kinds`: of the inputs that a model of the task may take, the first unless another is asked for. `load(path)`: one
    of them as a sample. `prepare(sample, contract)`: what is fed, without the batch's axis. `keep(sample, contract)`:
    what `score` needs of a sample, and as little more as can be. `examples(contract)`: what export checks on. `plain`:
    the scores that are no shares of 1; `lower`: whether less of the first metric is better. `by_pixel`: whether answers
    are in the picture's own pixels, so that a large one takes longer to answer. `pipeline_tag`: what the Hugging Face
    Hub calls the task (huggingface.co/tasks); None where it has no word for it.
    """

    name: str
    classes: bool
    resize: str
    agreement: str
    alike: str
    metrics: tuple[str, ...]
    rows: str
    columns: tuple[str, ...]
    open: Callable[[str | Path, str], SampleSet]
    match: Callable[[SampleSet, Sequence[str]], SampleSet]
    known: Callable[[SampleSet], bool]
    meter: Callable[[], Meter]
    interpret: Callable[[Outputs, Size, Size], Found]
    score: Callable[[Sequence[Pair], int], dict[str, float]]
    score_classes: Callable[[Sequence[Pair], Sequence[str]], dict[str, float]]
    describe: Callable[[Found, Sequence[str], Size, Ask], tuple[tuple[Answer, ...], Found]]
    paint: Callable[[Pixels, Found, Sequence[Any]], Pixels] | None
    tolerance: Callable[[Tolerance, str, bool, Sequence[str]], Tolerance]
    outputs: tuple[tuple[OutputKind, ...], ...] = ()
    check_images: int | None = None
    held_out: int | None = None
    most_classes: int | None = None
    level: Callable[[Outputs, float], Array] | None = None
    kinds: tuple[str, ...] = ("image", "tensor")
    load: Callable[[str | Path], Sample] = lambda path: Sample(load_image(path))
    prepare: Callable[[Sample, InputContract], Array] = lambda sample, contract: preprocess(sample.image, contract)
    keep: Callable[[Sample, InputContract], Sample] = lambda sample, _: sample.truth
    examples: Callable[[InputContract], SampleSet] = lambda _: open_pictures("photographs")
    plain: tuple[str, ...] = ()
    lower: bool = False
    by_pixel: bool = False
    pipeline_tag: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether a likeness has an agreement."""
        return bool(self.alike)

    def compare(self, expected: Outputs, actual: Outputs) -> Likeness:
        """Of one batch of outputs."""
        meter = self.meter()
        meter.add(expected, actual)
        return meter.likeness()

    def numbers(self, found: Likeness) -> dict[str, float | None]:
        """A likeness as reports and manifests have it."""
        return {
            "sqnr_db": found.sqnr_db,
            "max_abs_error": found.max_abs_error,
            **found.more,
            self.agreement: found.agreement,
        }

    @staticmethod
    def thin(outputs: Outputs) -> dict[str, Array]:
        """What golden keeps of outputs: each as it is, or where it is large every n-th of its values, (N,)."""
        return {name: _thin(array) for name, array in outputs.items()}


def _thin(array: Array) -> Array:
    return array if array.size <= GOLDEN_VALUES else array.ravel()[:: -(-array.size // GOLDEN_VALUES)]


def same_tolerance(base: Tolerance, _precision: str, _gated: bool, _outputs: Sequence[str]) -> Tolerance:
    """What the target asks for, whatever the outputs."""
    return base


def gated_or(wanted: Tolerance, gated: bool) -> Tolerance:
    """`wanted`, but nothing of what is gated by its accuracy on held-out pictures."""
    return Tolerance(-SQNR_LIMIT_DB, 0.0) if gated else wanted


def check_labels(data: SampleSet, labels: Sequence[str]) -> SampleSet:
    """The set as it is. Raises DatasetError where its classes are not the model's, in the same order."""
    if tuple(data.labels or ()) != tuple(labels):
        raise DatasetError(
            f"{data.name} has the classes {_few(data.labels or ())}, the model {_few(labels)}; use data with the same "
            "classes"
        )
    return data


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


def any_labels(data: SampleSet, _labels: Sequence[str]) -> SampleSet:
    """Data whose classes need not be the model's."""
    return data
