"""Tables for people, one a command, built from the same results that --json prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from dualtoken_deploy.bench_report import BenchReport
    from dualtoken_deploy.inspection import Inspection
    from dualtoken_deploy.pipeline import ExportResult
    from dualtoken_deploy.predict import Prediction
    from dualtoken_deploy.validate import Validation


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, left: int = 1) -> Table:
    """The first `left` columns are aligned left, the others right."""
    out = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(column, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        out.add_row(*row)
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
    return table(columns, cells, "224 x 224, 1000 classes; counted here and printed in the paper")


def targets_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each target with what can be done with it here."""
    columns = ("target", "precisions", "export here", "run here", "to have it all")
    cells = [
        (r["target"], ", ".join(r["precisions"]), _yes(r["can_export"]), _yes(r["can_run"]), r["install"] or "-")
        for r in rows
    ]
    return table(columns, cells, left=5)


def export_table(results: Sequence[ExportResult]) -> Table:
    columns = ("bundle", "target", "precision", "executes", "SQNR (dB)", "equal top-1", "MiB", "seconds")
    cells = [
        (r.bundle, r.target, r.precision, r.executed_precision, f"{r.sqnr_db:.1f}", share(r.top1_agreement),
         f"{r.size_mib:.1f}", f"{r.seconds:.0f}")
        for r in results
    ]  # fmt: skip
    return table(columns, cells, "exported, and checked on the saved files against eager", left=4)


def validation_table(results: Sequence[Validation]) -> Table:
    columns = ("bundle", "against", "images", "SQNR (dB)", "max error", "mean error", "equal top-1", "top-1", "top-5")
    cells = [
        (r.bundle, r.reference, str(r.images), f"{r.sqnr_db:.1f}", f"{r.max_abs_error:.2e}", f"{r.mean_abs_error:.2e}",
         share(r.top1_agreement), share(r.top1), share(r.top5))
        for r in results
    ]  # fmt: skip
    return table(columns, cells, _engines(results), left=2)


def bench_table(report: BenchReport) -> Table:
    return table(report.columns(), report.rows(), f"{report.machine_line()}; {report.setting_line()}")


def prediction_table(predictions: Sequence[Prediction]) -> Table:
    cells = [
        (p.image if rank == 0 else "", g.label, f"{g.probability:.4f}")
        for p in predictions
        for rank, g in enumerate(p.guesses)
    ]
    return table(("image", "label", "probability"), cells, _engines(predictions), left=2)


def inspection_table(inspection: Inspection) -> Table:
    """Executed operators, most frequent first, with the dtype they run in."""
    ranked = sorted(inspection.operators.items(), key=lambda item: -item[1])
    cells = [(kind, inspection.executed_precision.get(kind, "-"), str(count)) for kind, count in ranked]
    m = inspection.manifest
    title = f"{m.variant} for {m.target} {m.precision}; files verified; what executes here:"
    if inspection.engine:
        title += f" ({inspection.engine})"
    return table(("operator", "runs in", "count"), cells, title, left=2)


def _engines(results: Sequence[Validation] | Sequence[Prediction]) -> str | None:
    """A title that says what stood in for a target's own runtime."""
    return "; ".join(dict.fromkeys(r.engine for r in results if r.engine)) or None


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
