"""What a report says of bundles: what each is, how good, what executes, how fast, and where it came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dualtoken_deploy.bundle.blocks import Calibration, Licenses
from dualtoken_deploy.bundle.manifest import COMPLETE
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.prove.document import Bar, Bars, Block, Document, Points, Section, Table, pairs
from dualtoken_deploy.prove.measure import Report
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task

if TYPE_CHECKING:
    from dualtoken_deploy.use.diagnose import Diagnosis

STATES = {
    COMPLETE: "complete: what ships was run and checked",
    "compiled": "compiled: the vendor's compiler made what ships, and no device has run it",
    "prepared": "prepared: a step on the device is still to come",
}
WORST = 8  # layers that are listed


@dataclass(frozen=True)
class Subject:
    """A bundle with what was measured of it now. `missing`: why it was not. `drift`: layer by layer, where asked."""

    bundle: Bundle
    report: Report | None
    missing: str | None = None
    drift: Diagnosis | None = None


def document(subjects: Sequence[Subject], date: str) -> Document:
    """One bundle fills the page; several share it, with their figures side by side first."""
    first = subjects[0]
    if len(subjects) == 1:
        title = f"{_model(first.bundle)} for {get_target(first.bundle.manifest.target).title}"
        return Document(title, f"{_lead(first)} Report of {date}.", tuple(_sections(first)))
    sections = [Section("Side by side", tuple(_side_by_side(subjects)))]
    for subject in subjects:
        for section in _sections(subject):
            sections.append(Section(f"{subject.bundle.name}: {section.title}", section.blocks))
    return Document(f"{len(subjects)} bundles", f"Report of {date}.", tuple(sections))


def _model(bundle: Bundle) -> str:
    manifest = bundle.manifest
    return manifest.variant if manifest.head is None else f"{manifest.head} on {manifest.variant}"


def _lead(subject: Subject) -> str:
    manifest = subject.bundle.manifest
    random = ", random weights: its answers mean nothing" if manifest.weights.source == "random" else ""
    return f"Bundle {subject.bundle.name}, {manifest.precision}, {STATES[manifest.state]}{random}."


def _sections(subject: Subject) -> Iterable[Section]:
    yield Section("What it is", (what(subject.bundle),))
    yield Section("What an app feeds and gets", (contract(subject.bundle),))
    yield Section("How near it is to the model", tuple(_accuracy(subject)))
    if subject.drift is not None:
        yield Section("Where it drifts", tuple(_drift(subject.drift)))
    if (calibration := subject.bundle.manifest.calibration) is not None:
        yield Section("INT8", tuple(int8(calibration)))
    yield Section("What executes", tuple(_executes(subject)))
    yield Section("How fast it is", tuple(_latency([subject])))
    yield Section("Where it came from", (origin(subject.bundle),))


def _side_by_side(subjects: Sequence[Subject]) -> Iterable[Block]:
    names = list(dict.fromkeys(name for s in subjects if s.report for name in s.report.figures))
    rows = []
    for s in subjects:
        figures = s.report.figures if s.report else {}
        cells = (_figure(name, figures[name]) if name in figures else "-" for name in names)
        rows.append((s.bundle.name, s.bundle.manifest.state, *cells))
    yield Table(("bundle", "state", *map(_title, names)), tuple(rows))
    yield from _latency(subjects)


def what(bundle: Bundle) -> Table:
    """The model, what it is for, and its size."""
    manifest, target = bundle.manifest, get_target(bundle.manifest.target)
    measured = manifest.measured
    return pairs(
        [
            ("model", _model(bundle)),
            ("task", manifest.task),
            ("target", f"{target.title} ({target.name})"),
            ("precision", target.precision(manifest.precision).title),
            ("state", STATES[manifest.state]),
            ("size of what ships", f"{bundle.size_bytes / 2**20:.1f} MiB"),
            ("parameters", "-" if measured.params is None else f"{measured.params / 1e6:.2f} M"),
            ("MACs of one picture", "-" if measured.macs is None else f"{measured.macs / 1e9:.3f} G"),
            ("files", ", ".join(manifest.files)),
        ]
    )


def contract(bundle: Bundle) -> Table:
    """What is fed and given, and what is done to a picture before."""
    fed, outputs = bundle.manifest.input, bundle.manifest.outputs
    tensor = fed.tensor
    rows = [
        ("input", f"{tensor.name}: {tensor.dtype} {tensor.layout} {_shape(tensor.shape)}, {fed.color}"),
        ("the graph does", ", ".join(fed.baked) or "nothing: feed normalised numbers"),
        ("resized by", f"{fed.resize}, crop ratio {fed.crop_ratio:g}"),
        ("mean, std", f"{_three(fed.mean)}; {_three(fed.std)}"),
    ]
    rows += [("output", f"{o.name}: {o.dtype} {o.layout} {_shape(o.shape)}") for o in outputs]
    return pairs([*rows, ("classes", str(len(bundle.labels)))])


def _accuracy(subject: Subject) -> Iterable[Block]:
    measured = subject.bundle.manifest.measured
    rows = []
    for name, found in (("golden input", measured.golden), ("photographs", measured.photographs)):
        if found is not None:
            alike = found.top1_agreement if found.agreement is None else found.agreement
            said = "-" if alike is None else f"{100 * alike:.2f} %"
            rows.append((f"at export, {name}", f"{found.sqnr_db:.1f} dB", said))
    report = subject.report
    if report is not None:
        alike = report.figures.get("agreement")
        said = "-" if alike is None else f"{100 * alike:.2f} %"
        sqnr = f"{report.figures['sqnr_db']:.1f} dB" if "sqnr_db" in report.figures else "exact"
        what = f"now, against {report.setting.reference}"
        rows.append((what, sqnr, said))
    yield Table(("", "SQNR to eager", "equal answers"), tuple(rows))
    if report is None:
        yield f"Not measured here: {subject.missing}."
        return
    scores = [name for name in get_task(subject.bundle.manifest.task).metrics if name in report.figures]
    if scores:
        cells = tuple((name, f"{100 * report.figures[name]:.2f} %") for name in scores)
        yield Table((f"on {report.setting.data}, {report.images} pictures", "now"), cells)
    else:
        yield "No accuracy: no pictures with their truth were given."
    if report.engine:
        yield f"Run by {report.engine}, which stands in for the target's own runtime."


def _drift(found: Diagnosis) -> Iterable[Block]:
    ends = [(float(i), layer.sqnr_db, layer.name) for i, layer in enumerate(found.layers)]
    if ends:
        at = (found.threshold_db, f"threshold {found.threshold_db:g} dB")
        yield Points(f"SQNR of {len(ends)} layers over {found.images} pictures", "layer", "dB", tuple(ends), at)
    worst = sorted(found.layers, key=lambda layer: -layer.lost_db)[:WORST]
    rows = tuple((d.name, d.kind, f"{d.sqnr_db:.1f} dB", f"{d.lost_db:.1f} dB") for d in worst)
    yield Table(("loses most by itself", "kind", "SQNR", "lost here"), rows)
    yield "No layer is past the threshold." if found.first is None else f"First past the threshold: {found.first}."


def int8(calibration: Calibration) -> Iterable[Block]:
    """What it was calibrated on, what stays in float, what that costs."""
    held = calibration.held_out
    rows = [
        ("calibrated on", f"{calibration.name}, {calibration.images} pictures, {calibration.method}"),
        ("kept in float", ", ".join(calibration.in_float) or "nothing"),
        ("MACs in INT8, planned", _share(calibration.planned_int8_mac_share)),
    ]
    if calibration.drop is not None and held is not None:
        lost = f"{calibration.drop:.2f} points of {calibration.metric} on {held.images} pictures of {held.name}"
        rows.append(("loses", f"{lost} (allowed {calibration.max_drop:g})"))
    yield pairs(rows)
    search = calibration.search
    if search is not None and search.trace:
        steps = tuple(
            (100 * s.int8_share, s.drop, f"{s.action}: {s.drop:.2f} points, {100 * s.int8_share:.1f} % in INT8")
            for s in search.trace
        )
        budget = None if calibration.max_drop is None else (calibration.max_drop, f"budget {calibration.max_drop:g}")
        title = f"The search: {search.scores} assignments scored in full"
        yield Points(title, "% of MACs in INT8", "points lost", steps, budget)


def _executes(subject: Subject) -> Iterable[Block]:
    report, manifest = subject.report, subject.bundle.manifest
    if report is None:
        yield f"Not read here: {subject.missing}."
        return
    promised = manifest.executed_precision
    rows = tuple((kind, dtype, promised.get(kind, "-")) for kind, dtype in sorted(report.executed.items()))
    yield Table(("operator", "runs in, here", "at export"), rows)
    if "int8_mac_share" in report.figures:
        yield f"{100 * report.figures['int8_mac_share']:.1f} % of the MACs run in INT8 here."


def _latency(subjects: Sequence[Subject]) -> Iterable[Block]:
    timed = [(s.bundle.name, s.report.latency, s.report) for s in subjects if s.report and s.report.latency]
    if timed:
        bars = tuple(Bar(name, found.ratio, found.low, found.high) for name, found, _ in timed)
        yield Bars("times the speed of the model's matrix products alone", bars, "x", (1.0, "products alone"))
        setting = timed[0][2].setting
        rows = tuple((name, f"{f.p50_ms:.2f} ms", f"{f.ratio:.2f}x ({f.low:.2f}-{f.high:.2f})") for name, f, _ in timed)
        yield Table(("bundle", "p50", "of the products' speed"), rows)
        machine = timed[0][2].machine
        yield (
            f"{setting.rounds} interleaved rounds of {setting.seconds:g} s on {machine.get('cpu')}, "
            f"{machine.get('cores')} cores, Python {machine.get('python')}."
        )
    for s in subjects:
        if s.report is None:
            yield f"{s.bundle.name} was not timed: {s.missing}."
        else:
            yield from (f"{s.bundle.name}: {note}." for note in s.report.notes)


def origin(bundle: Bundle) -> Table:
    """Weights, command, machine, versions, licences, and the hash of every file."""
    manifest = bundle.manifest
    weights, machine = manifest.weights, manifest.machine
    licenses = manifest.licenses or Licenses()
    rows = [
        ("weights", weights.source if weights.seed is None else f"{weights.source}, seed {weights.seed}"),
        ("licence of the weights", licenses.weights or "not said"),
        ("licence of the network's code", licenses.code or "not said"),
        ("sha256 of the weights", weights.sha256),
        ("made by", manifest.command),
        ("made on", f"{machine.get('cpu', '-')}, {machine.get('os', '-')}, Python {machine.get('python', '-')}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
        ("deploy rules", ", ".join(manifest.rules) or "none"),
    ]
    rows += [(f"sha256 of {name}", digest) for name, digest in manifest.files.items()]
    return pairs(rows)


TITLES = {"sqnr_db": "SQNR", "agreement": "equal answers", "size_mib": "size", "int8_mac_share": "MACs in INT8"}


def _title(name: str) -> str:
    return TITLES.get(name, name)


def _figure(name: str, value: float) -> str:
    if name == "sqnr_db":
        return f"{value:.1f} dB"
    return f"{value:.1f} MiB" if name == "size_mib" else f"{100 * value:.2f} %"


def _shape(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape))


def _three(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
