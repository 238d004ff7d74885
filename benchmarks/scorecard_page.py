"""The scorecard's page: Markdown tables of its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.table import PLAIN

NOT_MEASURED = "not measured"

INTRO = """# Scorecard

<!-- made by python -m benchmarks.scorecard --page from benchmarks/results/scorecard.json; do not edit -->

Every model, target and precision that there is: {count} cells, of which {measured} were measured (complete, or prepared
and compiled where no device was at hand), {refused} refused, and **{rest} not measured**. `.venv/bin/python -m
benchmarks.scorecard --only "MODEL TARGET PRECISION"` measures one, `--latency MODEL` times the bundles of a model in
one interleaved bench. The same as data, with each cell's commands and library versions:
`benchmarks/results/scorecard.json` (schema: `docs/schemas/results/scorecard.schema.json`).

A reference execution, a prepared file and a compiled engine are no execution on a device: the column *executed* says
which it was. "lost" are points against eager on the same held-out pictures; SQNR is to eager on the photographs of the
export check. Models without a data set in their name have random weights of seed 0: what is calibrated is of 64 x 64
there and judged by SQNR, and so are all cells of vim2, whose scans take a stand-in minutes at 224 x 224. Latency: one
thread, p50, and speed against eager with the slowest and fastest round.
"""


def counts(cells: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Cells, and how many of them were measured (prepared and compiled among them), refused, and neither."""
    states = [cell["state"] for cell in cells]
    refused, rest = states.count("refused"), states.count(NOT_MEASURED)
    return {"count": len(cells), "measured": len(cells) - refused - rest, "refused": refused, "rest": rest}


SUMMARY = "- [docs/scorecard.md](docs/scorecard.md): "


def summary(data: Mapping[str, Any]) -> str:
    """The line of README.md that the page stands behind."""
    said = counts(data["cells"])
    ran = sum(cell["state"] == "measured" for cell in data["cells"])
    whole = [name for name in models(data["cells"]) if not _open(data["cells"], name)]
    done = f"; every cell of {', '.join(f'`{name}`' for name in whole)}" if whole else ""
    return (
        f"{SUMMARY}every model, target and precision, {said['count']} cells, each with what was measured, when, where, "
        f"by which command, or that it was not: {ran} exported and run, {said['measured'] - ran} prepared or compiled "
        f"for engines that are not here, {said['refused']} refused with the reason{done}"
    )


def _open(cells: Sequence[Mapping[str, Any]], name: str) -> bool:
    return any(cell["model"] == name and cell["state"] == NOT_MEASURED for cell in cells)


def page(data: Mapping[str, Any]) -> str:
    cells = data["cells"]
    intro = INTRO.format(**counts(cells))
    parts = [intro, "## All cells", overview(cells)]
    for name in models(cells):
        own = [cell for cell in cells if cell["model"] == name and (cell["state"] != NOT_MEASURED or "why" in cell)]
        if own:
            parts += [f"## {name}", model_table(own, data["eager"].get(name))]
    machines = "\n".join(f"- `{key}`: {machine_line(record)}" for key, record in data["machines"].items())
    return "\n\n".join(part.rstrip("\n") for part in (*parts, "## Machines", machines)) + "\n"


def models(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """In the order of the cells."""
    return list(dict.fromkeys(cell["model"] for cell in cells))


def overview(cells: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of each model on each target, precisions in the order of the target's; "." where nothing was measured."""
    lines = [
        "SQNR in dB, a figure for each precision; `P` prepared, `C` compiled, `x` refused, `·` not measured.",
        "",
        "| model | " + " | ".join(f"{t.name}<br>{', '.join(t.precisions)}" for t in TARGETS.values()) + " |",
        "| --- |" + " --- |" * len(TARGETS),
    ]
    for name in models(cells):
        row = []
        for target in TARGETS:
            own = [cell for cell in cells if cell["model"] == name and cell["target"] == target]
            marks = [mark(cell) for cell in own]
            row.append("·" if set(marks) == {"·"} else " / ".join(marks))
        lines.append(f"| {name} | {' | '.join(row)} |")
    return "\n".join(lines)


def mark(cell: Mapping[str, Any]) -> str:
    if cell["state"] in (NOT_MEASURED, "refused"):
        return "·" if cell["state"] == NOT_MEASURED else "x"
    letter = {"prepared": " P", "compiled": " C"}.get(cell["state"], "")
    return f"{cell['sqnr_db']:.0f}{letter}"


COLUMNS = ("target", "precision", "executed", "in", "accuracy", "lost", "SQNR (dB)", "MACs in int8", "MiB", "p50 (ms)",
           "to eager", "date", "on")  # fmt: skip


def model_table(cells: Sequence[Mapping[str, Any]], eager: Mapping[str, Any] | None) -> str:
    lines = []
    if eager is not None:
        lines += [f"Eager: {eager['metric']} {show(eager)} of {eager['images']} ({eager['data']}).", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "| --- | --- | --- | --- |" + " ---: |" * 7 + " --- | --- |"]
    lines += [f"| {' | '.join(row(cell, eager))} |" for cell in cells]
    return "\n".join(lines)


def row(cell: Mapping[str, Any], eager: Mapping[str, Any] | None) -> list[str]:
    """What a model's table says of a cell, under COLUMNS."""
    head, tail = [cell["target"], cell["precision"]], [cell["date"], cell["machine"]]
    if "why" in cell:
        what = f"refused, exit {cell['exit']}" if cell["state"] == "refused" else NOT_MEASURED
        why = f"{what}: {cell['why']}".replace("|", "\\|").replace("<", "&lt;")
        return [*head, why, *[""] * 8, *tail]
    found, timed = cell["accuracy"], cell["latency"]
    score = lost = share = ratio = "-"
    if found is not None:
        score = f"{found['metric']} {show(found)} of {found['images']}"
        if eager is not None and eager["images"] == found["images"]:
            lost = f"{loss(found, eager):.2f}"
    if cell["int8_mac_share"] is not None:
        share = f"{100 * cell['int8_mac_share']:.1f} %"
    if timed is not None:
        speed = timed["against_eager"]
        ratio = f"{speed['median']:.2f}x ({speed['low']:.2f}-{speed['high']:.2f})"
    size = "-" if cell["size_mib"] is None else f"{cell['size_mib']:.2f}"
    p50 = "not measured" if timed is None else f"{timed['p50_ms']:.2f}"
    ran = [cell["executed_where"], cell["executed_precision"]]
    return [*head, *ran, score, lost, f"{cell['sqnr_db']:.1f}", share, size, p50, ratio, *tail]


def loss(found: Mapping[str, Any], eager: Mapping[str, Any]) -> float:
    """Points; of a figure that is no share of 1, an error, by how much it grew."""
    if found["metric"] in PLAIN:
        return float(found["value"] - eager["value"])
    return float(100 * (eager["value"] - found["value"]))


def show(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.4f}" if found["metric"] in PLAIN else f"{100 * found['value']:.2f} %"


def machine_line(record: Mapping[str, Any]) -> str:
    isa = " ".join(record["isa"]) or "no known instruction sets"
    memory = f"{record['memory_mib'] / 1024:.0f} GiB" if record["memory_mib"] else "memory unknown"
    return (
        f"{record['cpu']} ({record['architecture']}: {isa}), {record['cores']} cores, {memory}, {record['os']}, "
        f"Python {record['python']}"
    )
