"""Tables for people, one a command, built from the same results that --json prints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.bundle.manifest import EAGER, REFERENCES
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import PLAIN, get_task
from dualtoken_deploy.use.text import printable

if TYPE_CHECKING:
    from dualtoken_deploy.bench.report import BenchReport
    from dualtoken_deploy.pipeline.build import BuildResult
    from dualtoken_deploy.pipeline.check import ExportResult
    from dualtoken_deploy.pipeline.several import Failed
    from dualtoken_deploy.prove.relabel import Relabelled
    from dualtoken_deploy.prove.verify import Verification
    from dualtoken_deploy.recipe.reproduce import Reproduction
    from dualtoken_deploy.recipe.steps import Result
    from dualtoken_deploy.train.loop import TrainResult
    from dualtoken_deploy.use.compare import Comparison
    from dualtoken_deploy.use.diagnose import Diagnosis
    from dualtoken_deploy.use.doctor import Report
    from dualtoken_deploy.use.evaluate import Evaluation
    from dualtoken_deploy.use.inspect import Inspection
    from dualtoken_deploy.use.model import Model, Prediction
    from dualtoken_deploy.use.validate import Validation


LONGEST_WORD = 24  # of a text column: longer ones, paths for one, are folded inside


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, left: int = 1) -> Table:
    """The first `left` columns are aligned left, the others right."""
    heading = None if title is None else Text(printable(title, lines=True), style="table.title")
    out = Table(title=heading, title_justify="left")
    for i, column in enumerate(columns):
        out.add_column(Text(printable(column)), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        out.add_row(*(Text(printable(cell)) for cell in row))  # as Text: a string would be read as rich's markup
    return out


def fitted(made: Table | Group, console: Console) -> Table | Group:
    """Each table as `_fitted` makes it."""
    if isinstance(made, Group):
        return Group(*(_fitted(part, console) if isinstance(part, Table) else part for part in made.renderables))
    return _fitted(made, console)


def _fitted(made: Table, console: Console) -> Table:
    """The table without the columns that say nothing in any row; one that its words do not fit the console with becomes
    a list of each row's figures, one below the other."""
    kept = [(column, list(column.cells)) for column in made.columns]
    if made.row_count > 0:
        kept = [(column, cells) for column, cells in kept if any(str(cell) not in ("", "-") for cell in cells)]
    if made.row_count == 0:
        return made
    widths = [_widest_word(column, cells) for column, cells in kept]
    room = console.width - 3 * len(kept) - 1 - sum(widths)
    if room >= 0:
        whole = [max(cell_len(str(text)) for text in (column.header, *cells)) for column, cells in kept]
        for i in sorted(range(len(kept)), key=lambda i: whole[i] - widths[i]):  # those that lack least, first
            more = min(max(whole[i] - widths[i], 0), room)
            widths[i], room = widths[i] + more, room - more
        out = Table(title=made.title, title_justify="left")
        for (column, _), width in zip(kept, widths, strict=True):
            out.add_column(column.header, justify=column.justify, overflow="fold", width=width)
        for row in zip(*(cells for _, cells in kept), strict=True):
            out.add_row(*row)
        return out
    listed = Table(title=made.title, title_justify="left", show_header=False)
    listed.add_column(justify="left")
    listed.add_column(justify="left", overflow="fold")
    for row in zip(*(cells for _, cells in kept), strict=True):
        for (column, _), cell in zip(kept, row, strict=True):
            if str(cell):
                listed.add_row(column.header, cell)
        listed.add_section()
    return listed


def _widest_word(column: Any, cells: Sequence[Any]) -> int:
    """Of a column's cells and head; a path or a name may fold inside."""
    words = [word for text in (column.header, *cells) for word in str(text).split()]
    most = max((cell_len(word) for word in words), default=0)
    return min(most, LONGEST_WORD) if column.justify == "left" else most


def share(value: float | None) -> str:
    """A fraction of 1 as a percentage; "-" where it was not measured."""
    return "-" if value is None else f"{100 * value:.2f} %"


def figure(name: str, value: float | None) -> str:
    """A score by its name: a percentage, or the number where it is no share of 1."""
    return "-" if value is None else f"{value:.4f}" if name in PLAIN else share(value)


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
            {"device": "yes", "no": "no"}.get(r["runs_as"], r["runs_as"]),
            r["install"] or "-",
        )
        for r in rows
    ]
    return table(columns, cells, left=5)


def relabelled_table(result: Relabelled) -> Table:
    cells = [(result.bundle, str(result.classes), str(result.changed))]
    return table(("bundle", "classes", "new names"), cells)


def doctor_table(found: Report) -> Table:
    """What works here and what does not, with the command that mends it."""
    m, versions = found.machine, ", ".join(f"{name} {version}" for name, version in found.versions.items())
    memory = "memory unknown" if not m.get("memory_mib") else f"{m['memory_mib'] / 1024:.0f} GiB"
    title = (
        f"{m['cpu']} ({m['architecture']}), {m['cores']} cores, {memory}, {m['os']}, Python {m['python']}; "
        f"GPU: {found.gpu or 'no NVIDIA driver'}\n{versions}"
    )
    rows = [(c.name, c.state, "; ".join(filter(None, (c.detail, c.mend)))) for c in found.checks]
    return table(("what", "state", "why, and what mends it"), rows, title, left=3)


def cache_table(data: Mapping[str, Any]) -> Table:
    rows = [(e["name"], e["what"], f"{e['bytes'] / 2**20:.1f}") for e in data["entries"]]
    total = sum(e["bytes"] for e in data["entries"]) / 2**20
    return table(("entry", "what", "MiB"), rows, f"{data['folder']}: {total:.1f} MiB; cleared by --clear", left=2)


def export_table(results: Sequence[ExportResult | Failed]) -> Table:
    """One row a target, those that gave no bundle with their reason in place of the figures."""
    columns: tuple[str, ...] = (
        *("bundle", "target", "precision", "state", "executes", "INT8 MACs", "lost", "SQNR (dB)", "alike", "MiB", "s"),
        "beside float",
    )
    cells: list[tuple[str, ...]] = []
    for r in results:
        error: Exception | None = getattr(r, "error", None)
        if error is not None:
            cells.append((r.bundle, r.target, r.precision, f"failed: {error}", *[""] * (len(columns) - 4)))
            continue
        made: Any = r
        row = get_target(made.target).precision(made.precision)
        cells.append(
            (
                *(made.bundle, made.target, row.title, made.state),
                *(made.executed_precision, share(made.int8_mac_share if row.integers else None)),
                "-" if made.drop is None else f"{made.drop:.2f}",
                *(f"{made.sqnr_db:.1f}", share(made.top1_agreement), f"{made.size_mib:.1f}", f"{made.seconds:.0f}"),
                "-" if made.speed is None else f"{made.speed.verdict}, {made.speed.ratio:.2f}x of {made.speed.against}",
            )
        )
    if all(cell[-1] in ("", "-") for cell in cells):  # nothing was raced
        columns, cells = columns[:-1], [cell[:-1] for cell in cells]
    if len({cell[3] for cell in cells}) == 1 and cells[0][3] == "complete":
        columns, cells = (*columns[:3], *columns[4:]), [(*cell[:3], *cell[4:]) for cell in cells]
    against = dict.fromkeys(REFERENCES[made] for r in results if (made := getattr(r, "reference", None)) is not None)
    said = " and ".join(against) or REFERENCES[EAGER]
    return table(columns, cells, f"exported, and checked on the saved files against {said}", left=5)


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
            *(r.bundle, r.reference, _counted(r), f"{r.likeness.sqnr_db:.1f}", f"{r.likeness.max_abs_error:.2e}"),
            share(r.likeness.agreement),
            *(_beside(name, (r.scores or {}).get(name), (r.eager_scores or {}).get(name)) for name in names),
        )
        for r in results
    ]
    alike = dict.fromkeys(f"equal {get_task(r.task).alike}" for r in results if get_task(r.task).agrees)
    columns = ("bundle", "against", "images", "SQNR (dB)", "max error", ", ".join(alike) or "alike", *names)
    return table(columns, cells, _engines(results), left=2)


def _counted(result: Validation) -> str:
    """Of how many images the figures are: of golden the likeness is of the one stored input, the scores of the data."""
    if result.likeness_images == result.images:
        return str(result.images)
    return f"{result.likeness_images} stored; scores of {result.images}"


def _beside(name: str, own: float | None, reference: float | None) -> str:
    return figure(name, own) if reference is None else f"{figure(name, own)} / {figure(name, reference)}"


def bench_table(report: BenchReport) -> Table:
    return table(report.columns(), report.rows(), f"{report.machine_line()}; {report.setting_line()}")


RANDOM_WEIGHTS = "the weights are random: answers mean nothing"


def prediction_table(rows: Sequence[tuple[str, Exception | None, Prediction | None]], model: Model) -> Table:
    """The answers for each picture, best first; of one that could not be read the reason."""
    columns, cells = model.task.columns, []
    for name, error, found in rows:
        blank = [""] * (len(columns) - 1)
        if found is None:
            cells.append((name, f"not read: {error}", *blank))
            continue
        answers = [answer.cells() for answer in found.answers] or [("nothing found", *blank)]
        cells += [(name if rank == 0 else "", *row) for rank, row in enumerate(answers)]
    title = "; ".join(filter(None, (RANDOM_WEIGHTS if model.random_weights else None, model.engine)))
    return table(("image", *columns), cells, title or None, left=2)


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
    metric = result.metric
    last, best = figure(metric, result.last), figure(metric, result.best)
    cells = [(result.weights, str(result.epochs), last, best, str(result.best_epoch), f"{result.seconds:.0f}")]
    return table(("best weights", "epochs", f"last {metric}", f"best {metric}", "in epoch", "seconds"), cells)


def evaluation_table(result: Evaluation) -> Table:
    """The whole set in the first row, then each class by the first metric."""
    scores = [figure(name, value) for name, value in result.scores.items()]
    rows = [(f"{result.data}, all {result.images}", *scores, _or_dash(result.images_per_s))]
    rest = ("",) * len(result.scores)
    first = next(iter(result.scores))  # the task's first metric, which per_class is of
    rows += [(name, figure(first, value), *rest) for name, value in result.per_class.items()]
    title = f"{result.source} ({result.engine})" if result.engine else result.source
    if result.weights == RANDOM:
        title += f"; {RANDOM_WEIGHTS}"
    if result.unreadable:
        title += f"; {result.unreadable} pictures could not be read"
    return table(("class", *result.scores, "images/s"), rows, title)


def drift_table(found: Diagnosis, rows: int) -> Table:
    """The ends of the blocks, then the layers that lose most by themselves."""
    worst = sorted(found.layers, key=lambda layer: -layer.lost_db)[:rows]
    cells = [(d.name, "end of block", f"{d.sqnr_db:.1f}", f"{d.max_abs_error:.2e}", "") for d in found.blocks]
    cells += [(d.name, d.kind, f"{d.sqnr_db:.1f}", f"{d.max_abs_error:.2e}", f"{d.lost_db:.1f}") for d in worst]
    title = f"{found.bundle} over {found.images} pictures of {found.data}; {found.unseen} values have no name in it"
    if found.engine:
        title += f" ({found.engine})"
    return table(("layer", "kind", "SQNR (dB)", "max error", "lost here (dB)"), cells, title, left=2)


def _engines(results: Sequence[Validation]) -> str | None:
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
        f"vs {found.reference}",
        "verdict",
    )
    cells = [
        (
            *(row.bundle, figure(found.metric or "", row.score)),
            "-" if row.drop is None else f"{row.drop:.2f} ({row.drop_low:.2f} to {row.drop_high:.2f})",
            *(f"{row.sqnr_db:.1f}", f"{row.size_mib:.1f}"),
            "-" if row.p50_ms is None else f"{row.p50_ms:.2f}",
            "-" if row.against_fp32 is None else str(row.against_fp32),
            "-" if row.against_eager is None else str(row.against_eager),
            row.verdict,
        )
        for row in found.rows
    ]
    eager = f"{REFERENCES[found.reference]}: {figure(found.metric or '', found.eager_score)}"
    title = f"{found.data}, {found.images} images; {eager}; lost: points, 95 % interval"
    engines = {row.engine: row.target for row in found.rows if row.engine}
    title += "".join(f"; {target}: {engine}" for engine, target in engines.items())
    machine = "" if found.bench is None else f"\n{found.bench.machine_line()}; {found.bench.setting_line()}"
    return table(columns, cells, title + machine)


def phone_table(found: Mapping[str, Any]) -> Table:
    """What the runtimes' programs on Android say; "-" where they do not."""
    columns = ("contestant", "program", "p50 ms", "mean ms", "min ms", "max ms", "runs", "vs baseline", "size MiB")

    def ms(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"

    cells = [
        (
            *(c["name"], c["program"], *(ms(c[key]) for key in ("p50_ms", "mean_ms", "min_ms", "max_ms"))),
            *(str(c["runs"]), f"{c['ratio']['median']:.2f}x ({c['ratio']['low']:.2f}-{c['ratio']['high']:.2f})"),
            f"{c['size_mib']:.1f}",
        )
        for c in found["contestants"]
    ]
    m, threads = found["machine"], found["threads"] or "as the program chooses"
    title = (
        f"{m['model']} ({m['cpu']}, {m['architecture']}), {m['cores']} cores, {m['os']}; {found['device']}, "
        f"threads {threads}, {found['rounds']} interleaved rounds of {found['seconds']:g} s; ratios of means"
    )
    return table(columns, cells, title, left=2)


def across_table(found: Mapping[str, Any]) -> Table:
    """Bundles over devices, a device's machine in its first row; one that failed is a row with its error."""
    metric = found["metric"] or "score"
    columns = ("device", "bundle", metric, "lost", "SQNR (dB)", "MiB", "p50 (ms)", "vs fp32", "verdict, or error")
    cells = []
    for row in found["rows"]:
        if row["error"] is not None:
            cells.append((row["device"], *("-",) * (len(columns) - 2), row["error"]["message"]))
            continue
        faster = row["against_fp32"]
        cells.append(
            (
                *(row["device"], row["bundle"], figure(metric, row["score"])),
                "-" if row["drop"] is None else f"{row['drop']:.2f} ({row['drop_low']:.2f} to {row['drop_high']:.2f})",
                *(f"{row['sqnr_db']:.1f}", f"{row['size_mib']:.1f}"),
                "-" if row["p50_ms"] is None else f"{row['p50_ms']:.2f}",
                "-" if faster is None else f"{faster['median']:.2f}x ({faster['low']:.2f}-{faster['high']:.2f})",
                row["verdict"],
            )
        )
    machines = "".join(
        f"\n{d['device']}: {d['machine'].get('cpu')}, {d['machine'].get('cores')} cores, {d['machine'].get('os')}, "
        f"Python {d['machine'].get('python')}"
        for d in found["devices"]
        if d["machine"]
    )
    against = (
        ""
        if found["reference"] is None
        else (
            f", {found['images']} images; {REFERENCES[found['reference']]}, computed here: "
            f"{figure(metric, found['eager_score'])}; lost: points, 95 % interval"
        )
    )
    return table(columns, cells, f"{found['data']}{against}{machines}", left=2)


def verification_table(found: Verification) -> Table:
    """One row each, the verdict last."""
    cells = [(row.name, _cell(row.baseline), _cell(row.now), row.allowed, row.verdict) for row in found.rows]
    title = f"{found.bundle} against {found.baseline}"
    return table(("row", "baseline", "now", "allowed", "verdict"), cells, title)


def devices_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each device with what it says of itself, or why it does not answer."""
    cells = [
        (
            *(r["device"], r["url"], "not asked" if r["answers"] is None else _yes(r["answers"])),
            *(
                r.get("system", "-"),
                r.get("python", "-"),
                r.get("architecture", "-"),
                "-" if "free_mib" not in r else str(r["free_mib"]),
            ),
            r["why"] or "",
        )
        for r in rows
    ]
    return table(("device", "url", "answers", "system", "Python", "architecture", "free MiB", "why"), cells, left=8)


def plan_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The steps of a recipe before any is done."""
    cells = [
        (
            r["step"],
            r["bundle"],
            r["state"],
            _seconds(r["seconds_before"]),
            "-" if r["mib"] is None else f"{r['mib']:.0f}",
        )
        for r in rows
    ]
    return table(("step", "bundle", "state", "took before (s)", "disk, at most (MiB)"), cells, left=3)


def steps_table(results: Sequence[Result]) -> Table:
    """What became of the steps of a recipe."""
    cells = [(r.step, r.bundle, r.state, _seconds(r.seconds), "" if r.error is None else str(r.error)) for r in results]
    return table(("step", "bundle", "state", "seconds", "why"), cells, left=3)


def reproduction_table(found: Reproduction) -> Table:
    """One row a file."""
    cells = [(name, "the same" if same else "other bytes") for name, same in found.files.items()]
    title = f"{found.bundle}, made again"
    title += f"; not as it was then: {', '.join(found.different)}" if found.different else ""
    return table(("file", "bytes"), cells, title, left=2)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _cell(value: float | str | None) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.4g}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
