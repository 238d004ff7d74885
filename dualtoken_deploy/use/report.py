"""Tables for people, one a command, built from the same results that --json prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task
from dualtoken_deploy.use.text import printable

if TYPE_CHECKING:
    from dualtoken_deploy.bench.report import BenchReport
    from dualtoken_deploy.pipeline.build import BuildResult
    from dualtoken_deploy.pipeline.check import ExportResult
    from dualtoken_deploy.train.loop import TrainResult
    from dualtoken_deploy.use.compare import Comparison
    from dualtoken_deploy.use.diagnose import Diagnosis
    from dualtoken_deploy.use.evaluate import Evaluation
    from dualtoken_deploy.use.inspect import Inspection
    from dualtoken_deploy.use.predict import Prediction
    from dualtoken_deploy.use.validate import Validation


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, left: int = 1) -> Table:
    """The first `left` columns are aligned left, the others right."""
    heading = None if title is None else Text(printable(title, lines=True), style="table.title")
    out = Table(title=heading, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(Text(printable(column)), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(cell)) for cell in row))  # as Text: a string would be read as rich's markup
    return out


def share(value: float | None) -> str:
    """A fraction of 1 as a percentage; "-" where it was not measured."""
    return "-" if value is None else f"{100 * value:.2f} %"


def models_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Counted figures beside the paper's."""
    columns = ("variant", "params (M)", "paper", "MACs (G)", "paper")
    cells = [
        (
            r["variant"],
            f"{r['params'] / 1e6:.2f}",
            _or_dash(r["paper_params_m"]),
            f"{r['macs'] / 1e9:.3f}",
            _or_dash(r["paper_macs_g"]),
        )
        for r in rows
    ]
    title = "224 x 224, 1000 classes; counted here and printed in the paper (detectors and segmenters: --heads)"
    return table(columns, cells, title)


def heads_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The dense heads on the paper's variants, counted figures beside the paper's."""
    columns = ("head", "on", "at", "params (M)", "paper", "MACs (G)", "paper")
    cells = [
        (
            r["head"],
            r["variant"],
            "x".join(str(side) for side in r["image_size"]),
            f"{r['params'] / 1e6:.2f}",
            f"{r['paper_params_m']:.1f}",
            f"{r['macs'] / 1e9:.1f}",
            _or_dash(r["paper_macs_g"]),
        )
        for r in rows
    ]
    return table(
        columns, cells, "Detectors with 80 classes, segmenters with 150; Mask R-CNN's 1000 boxes and 100 masks", 3
    )


def ablations_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The paper's ablations: which row of which table, how to make it, counted figures beside the paper's."""
    columns = ("table", "row", "variant and options", "params (M)", "paper", "MACs (G)", "paper")
    cells = [
        (
            str(r["table"]),
            r["row"],
            " ".join([r["variant"], *(f"{name}={value}" for name, value in r["options"].items())]),
            f"{r['params'] / 1e6:.2f}",
            f"{r['paper_params_m']:.1f}",
            f"{r['macs'] / 1e9:.3f}",
            f"{r['paper_macs_g']:.2f}",
        )
        for r in rows
    ]
    return table(columns, cells, "DualToken-ViT's ablations, 224 x 224, 1000 classes", left=3)


def targets_tables(rows: Sequence[Mapping[str, Any]]) -> Group:
    """Each target with what can be done with it here; then the way from a device to its target."""
    columns = ("which device you have", "target", "commands", "where")
    cells = [
        (d["device"], row["target"], ", then ".join(d["commands"]), d["where"]) for row in rows for d in row["devices"]
    ]
    return Group(_targets_table(rows), table(columns, cells, left=4))


def _targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("target", "precisions", "export here", "run here", "to have it all")
    cells = [
        (
            r["target"],
            ", ".join(r["precisions"]),
            _yes(r["can_export"]),
            _yes(r["can_run"]),
            r["install"] or "-",
        )
        for r in rows
    ]
    return table(columns, cells, left=5)


def export_table(results: Sequence[ExportResult]) -> Table:
    columns = ("bundle", "target", "precision", "executes", "INT8 MACs", "lost", "SQNR (dB)", "alike", "MiB", "s")
    cells = [
        (
            *(r.bundle, r.target, get_target(r.target).precision(r.precision).title, r.executed_precision),
            share(r.int8_mac_share if r.precision == "int8" else None),
            "-" if r.drop is None else f"{r.drop:.2f}",
            f"{r.sqnr_db:.1f}",
            share(r.top1_agreement),
            f"{r.size_mib:.1f}",
            f"{r.seconds:.0f}",
        )
        for r in results
    ]
    return table(columns, cells, "exported, and checked on the saved files against eager", left=4)


def build_table(result: BuildResult) -> Table:
    columns = ("bundle", "TensorRT", "GPU", "products run in", "SQNR (dB)", "MiB", "seconds")
    cells = (
        result.bundle, result.tensorrt, result.gpu, result.executed_precision, f"{result.sqnr_db:.1f}",
        f"{result.size_mib:.1f}", f"{result.seconds:.0f}",
    )  # fmt: skip
    return table(columns, [cells], "built, and checked on the saved engine against the golden logits", left=4)


def validation_table(results: Sequence[Validation]) -> Table:
    """One row a bundle; scores as the bundle's, with its reference's behind the stroke. What no row has is left out."""
    names = list(dict.fromkeys(name for r in results for name in r.scores or {}))
    cells = [
        (
            *(r.bundle, r.reference, str(r.images), f"{r.likeness.sqnr_db:.1f}", f"{r.likeness.max_abs_error:.2e}"),
            share(r.likeness.agreement),
            *(_beside((r.scores or {}).get(name), (r.eager_scores or {}).get(name)) for name in names),
        )
        for r in results
    ]
    alike = dict.fromkeys(f"equal {get_task(r.task).alike}" for r in results if get_task(r.task).agrees)
    columns = ("bundle", "against", "images", "SQNR (dB)", "max error", ", ".join(alike) or "alike", *names)
    return table(columns, cells, _engines(results), left=2)


def _beside(own: float | None, reference: float | None) -> str:
    return share(own) if reference is None else f"{share(own)} / {share(reference)}"


def bench_table(report: BenchReport) -> Table:
    return table(report.columns(), report.rows(), f"{report.machine_line()}; {report.setting_line()}")


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    """The answers for each picture, best first."""
    columns = get_task(predictions[0].task).columns
    cells = []
    for p in predictions:
        rows = [answer.cells() for answer in p.answers] or [("nothing found", *[""] * (len(columns) - 1))]
        cells += [(p.image if rank == 0 else "", *row) for rank, row in enumerate(rows)]
    return table(("image", *columns), cells, _engines(predictions), left=2)


def inspection_table(inspection: Inspection) -> Table:
    """Executed operators, most frequent first, with the dtype they run in."""
    ranked = sorted(inspection.operators.items(), key=lambda item: -item[1])
    cells = [(kind, inspection.executed_precision.get(kind, "-"), str(count)) for kind, count in ranked]
    m = inspection.manifest
    what = m.variant if m.head is None else f"{m.head} on {m.variant}"
    title = f"{what} for {m.target} {m.precision}; files verified; what executes here:"
    if inspection.engine:
        title += f" ({inspection.engine})"
    return table(("operator", "runs in", "count"), cells, title, left=2)


def training_table(result: TrainResult) -> Table:
    cells = [
        (result.weights, str(result.epochs), share(result.last), share(result.best), str(result.best_epoch),
         f"{result.seconds:.0f}")
    ]  # fmt: skip
    metric = result.metric
    return table(("best weights", "epochs", f"last {metric}", f"best {metric}", "in epoch", "seconds"), cells)


def evaluation_table(result: Evaluation) -> Table:
    """The whole set in the first row, then each class by the first metric."""
    scores = map(share, result.scores.values())
    rows = [(f"{result.data}, all {result.images}", *scores, _or_dash(result.images_per_s))]
    rest = ("",) * len(result.scores)
    rows += [(name, share(value), *rest) for name, value in result.per_class.items()]
    title = f"{result.source} ({result.engine})" if result.engine else result.source
    return table(("class", *result.scores, "images/s"), rows, title)


def drift_table(found: Diagnosis, rows: int) -> Table:
    """The ends of the blocks, then the layers that lose most by themselves."""
    worst = sorted(found.layers, key=lambda layer: -layer.lost_db)[:rows]
    cells = [(d.name, "end of block", f"{d.sqnr_db:.1f}", f"{d.max_abs_error:.2e}", "") for d in found.blocks]
    cells += [(d.name, d.kind, f"{d.sqnr_db:.1f}", f"{d.max_abs_error:.2e}", f"{d.lost_db:.1f}") for d in worst]
    title = f"{found.bundle} over {found.images} pictures; {found.unseen} values have no name in it"
    if found.engine:
        title += f" ({found.engine})"
    return table(("layer", "kind", "SQNR (dB)", "max error", "lost here (dB)"), cells, title, left=2)


def _engines(results: Sequence[Validation] | Sequence[Prediction]) -> str | None:
    """A title that says what stood in for a target's own runtime."""
    return "; ".join(dict.fromkeys(r.engine for r in results if r.engine)) or None


def comparison_table(found: Comparison) -> Table:
    """One row a bundle, the verdict last."""
    columns = (
        "bundle",
        found.metric or "score",
        "lost",
        "SQNR (dB)",
        "MiB",
        "p50 (ms)",
        "vs fp32",
        "vs eager",
        "verdict",
    )
    cells = [
        (
            *(row.bundle, share(row.score), f"{row.drop:.2f}", f"{row.sqnr_db:.1f}", f"{row.size_mib:.1f}"),
            "-" if row.p50_ms is None else f"{row.p50_ms:.2f}",
            "-" if row.against_fp32 is None else str(row.against_fp32),
            "-" if row.against_eager is None else str(row.against_eager),
            row.verdict,
        )
        for row in found.rows
    ]
    title = f"{found.data}; eager: {share(found.eager_score)}"
    engines = {row.engine: row.target for row in found.rows if row.engine}
    title += "".join(f"; {target}: {engine}" for engine, target in engines.items())
    machine = "" if found.bench is None else f"\n{found.bench.machine_line()}; {found.bench.setting_line()}"
    return table(columns, cells, title + machine)


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
