"""The blocks of a manifest, each a frozen dataclass; in JSON a field that is None is left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

from dualtoken_deploy.bundle.decode import decode, plain
from dualtoken_deploy.errors import BundleError

T = TypeVar("T")
RANDOM = "random"
OriginKind = Literal["variant", "head", "module", "reference", "onnx"]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the eager model is rebuilt from. `kind` and `name`: a "variant" or a "head" by its name in our tables; a
    "module" that lived in memory alone, by its class, which nothing rebuilds; a "reference" or an "onnx" file.

    `reference`: of a "reference" its "package.module:callable" or "file.py:callable", of an "onnx" the file's path.
    `arguments`: what is passed to the callable, JSON values. `outputs`: the names that its outputs were given, in their
    order. `sha256`: of the file that `reference` names, None where there is none.
    """

    kind: OriginKind
    name: str
    reference: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """`source`: "random" (then `seed`), a word of the weights that come along, or a file's path. `sha256`: of the
    tensors, whatever file they lie in."""

    source: str
    seed: int | None = None
    sha256: str

    @property
    def random_seed(self) -> int:
        """The seed of random weights. Raises BundleError where the manifest has none."""
        if self.seed is None:
            raise BundleError("the manifest says random weights and no seed; export the bundle again")
        return self.seed


@dataclass(frozen=True, kw_only=True)
class Licenses:
    """SPDX expressions; None: not said. `code`: of the network's code, not of what exported it."""

    weights: str | None = None
    code: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How good the saved files are on pictures whose truth is known: `scores` by the task's metrics. `engine`: what
    stood in for the target's own runtime; `date`: the day, UTC."""

    data: str
    images: int
    scores: Mapping[str, float]
    date: str
    cpu: str | None = None
    engine: str | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How near a file came to eager. `top1_agreement` (classifiers) and `agreement` (other tasks) in 0..1; `images`:
    over how many."""

    images: int | None = None
    sqnr_db: float
    max_abs_error: float
    mean_abs_error: float | None = None
    cosine: float | None = None
    agreement: float | None = None
    top1_agreement: float | None = None
    more: Mapping[str, float] | None = None

    @staticmethod
    def of(numbers: Mapping[str, Any], images: int | None = None) -> Figures:
        """From a task's numbers by name; `more` are those that not every task has."""
        own = {field.name for field in fields(Figures)}
        more = {name: value for name, value in numbers.items() if name not in own}
        known = {name: value for name, value in numbers.items() if name in own}
        return Figures(images=images, **known, more=more or None)


@dataclass(frozen=True)
class NearTies:
    """Pictures left out of the comparison: they come within `margin` of a point where the model jumps."""

    margin: float
    images: int


@dataclass(frozen=True)
class Level:
    """Pictures of which no agreement was asked: their two best answers are so near that the precision's numbers, which
    have steps of `step` at one, cannot say which comes first."""

    step: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A quantized bundle beside the target's own float files (`against`), raced on the machine that made it.

    `ratio`: the float files' time over this one's, above 1 where this one is faster; the median of `rounds`, and `low`
    to `high` hold it with 90 %. `verdict`: by that interval. `max_slowdown`: what was asked for, if anything was.
    """

    against: str
    ratio: float
    low: float
    high: float
    verdict: Literal["faster", "slower", "cannot tell"]
    p50_ms: float
    against_p50_ms: float
    threads: int
    batch: int
    rounds: int
    max_slowdown: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Counted on the model, and measured on the saved files before the bundle got its name.

    `checked_by`: the target that ran the files in place of their own. `engine`: what stood in for the target's own
    runtime; of a built bundle the figures of its engine on golden. `speed`: None where it was not raced.
    """

    params: int | None = None
    macs: int | None = None
    int8_mac_share: float = 0.0
    near_ties: NearTies | None = None
    level: Level | None = None
    golden: Figures | None = None
    photographs: Figures | None = None
    checked_by: str | None = None
    engine: str | Figures | None = None
    speed: Speed | None = None


@dataclass(frozen=True)
class HeldOutSet:
    """The pictures that the loss of INT8 was measured on."""

    name: str
    images: int


@dataclass(frozen=True)
class Step:
    """One assignment that was scored in full; `int8_share` is the share of all MACs that it leaves in INT8."""

    action: str
    in_float: tuple[str, ...]
    drop: float
    sqnr_db: float
    int8_share: float


@dataclass(frozen=True)
class SearchResult:
    """What a search for the layers that stay in float found. `met`: whether the budget is held. `noise`: of a unit or a
    block its noise-to-signal ratio with it alone in INT8. `trace`: every assignment that was scored, in order.
    `timed_out`: its time limit ended it, and with more it may have found a better one; None where it came to its end.
    """

    in_float: tuple[str, ...]
    drop: float
    sqnr_db: float
    int8_share: float
    met: bool
    seconds: float = 0.0
    scores: int = 0
    noise: Mapping[str, float] = field(default_factory=dict)
    trace: tuple[Step, ...] = ()
    timed_out: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What ranges were taken from (`sha256` of the pictures), how, and what it costs: `drop` points of `metric` on
    pictures that calibration did not see.

    `in_float`: layers that were left in float for the sake of accuracy, `in_float_for_speed` those whose float kernels
    are faster. `macs`: of every product at batch 1, by name; with
    `planned_int8_mac_share` and `search` where the layers were searched for.
    """

    name: str
    images: int
    sha256: str
    method: str
    quantizer: str
    held_out: HeldOutSet | None = None
    metric: str | None = None
    max_drop: float | None = None
    drop: float | None = None
    sqnr_db: float | None = None
    planned_int8_mac_share: float | None = None
    in_float: tuple[str, ...] = ()
    in_float_for_speed: tuple[str, ...] = ()
    macs: Mapping[str, int] | None = None
    search: SearchResult | None = None


@dataclass(frozen=True, kw_only=True)
class AskedInt8:
    """How a precision with ranges was asked for, in the words of `quantize.gate.Int8Options`. `calibration`: a word, or
    the folder as it was given."""

    calibration: str
    size: int
    method: str
    metric: str | None = None
    max_drop: float
    quantizer: str | None = None
    time_limit_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What export was asked for that no other field has, whoever asked: command line, recipe or Python. `int8` None: a
    precision without ranges, or with those of the built-in photographs."""

    opset: int | None = None
    device: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    int8: AskedInt8 | None = None


@dataclass(frozen=True, kw_only=True)
class Build:
    """What a compiled file depends on. `ships`: the files that an app takes along, all where it is empty.
    `float32_share_allowed`: of the layers with matrix products. `details`: the target's own, read with `typed`; in JSON
    they lie beside the other two."""

    ships: tuple[str, ...] = ()
    float32_share_allowed: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def typed(self, kind: type[T]) -> T:
        """The details as the target's own dataclass. Raises BundleError where they are none."""
        return decode(self.details, kind, "the manifest's build")

    def to_json(self) -> dict[str, Any]:
        own = {"ships": self.ships or None, "float32_share_allowed": self.float32_share_allowed}
        return {**plain(self.details), **{key: plain(value) for key, value in own.items() if value is not None}}

    @staticmethod
    def from_json(data: object) -> Build:
        """Raises BundleError."""
        known = decode(data, Build, "the manifest's build")
        every = decode(data, dict[str, Any], "the manifest's build")
        details = {key: value for key, value in every.items() if key not in ("ships", "float32_share_allowed")}
        return Build(ships=known.ships, float32_share_allowed=known.float32_share_allowed, details=details)
