"""The scorecard: every model x target x precision in one JSON and one page, cell by cell.

    .venv/bin/python benchmarks/scorecard.py --only "t-mix-digits onnxruntime" [--minutes 10] [--again]
    .venv/bin/python benchmarks/scorecard.py --latency t-mix-digits       # one interleaved bench of its bundles
    .venv/bin/python benchmarks/scorecard.py --page                       # the page again, nothing is measured

A cell is `dualtoken export`, `inspect`, and where its data has the truth `evaluate`; each has its date, versions,
machine, commands and CPU seconds. Cells that are there are kept, so that a run that was ended goes on; `--again`
measures them anew, `--minutes` ends after so many minutes of CPU. What was not measured says so, and what was refused
says why. Bundles stay in --bundles, for the latency; it is a part of its own, since it wants a quiet machine.

    benchmarks/results/scorecard.json   docs/schemas/results/scorecard.schema.json   docs/scorecard.md
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.models.registry import VARIANTS
from dualtoken_deploy.targets.precision import SEARCH
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.table import PLAIN, get_task

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/scorecard.json", ROOT / "docs/scorecard.md"
BUNDLES = Path("bundles/scorecard")
NOT_MEASURED = "not measured"
SLOW_IMAGES = 40  # for what stands in for a runtime, a second and more each
MAX_DROP = "0.5"  # points, of models with trained weights

Json = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """`words`: of export. `data`: where it can be scored, and what calibrates it; None: random weights of seed 0."""

    name: str
    words: tuple[str, ...]
    data: str | None = None


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("t-mix-digits", ("--variant", "t-mix", "--weights", "digits"), "digits"),
        Model("t-mix-shapes", ("--variant", "t-mix", "--weights", "shapes"), "shapes"),
        Model("retinanet-scenes", ("--head", "retinanet", "--weights", "scenes-detect"), "scenes"),
        Model("pspnet-scenes", ("--head", "pspnet", "--weights", "scenes-segment"), "scenes"),
        Model("tokenizer-shapes", ("--variant", "dualtoken-tokenizer-s", "--weights", "shapes-tokens"), "shapes"),
        Model("tsm2-lorenz", ("--variant", "tsm2", "--weights", "lorenz"), "lorenz"),
        *(Model(name, ("--variant", name)) for name in VARIANTS),
    )
}


def keys() -> Iterator[tuple[Model, str, str]]:
    """Every cell there is: a model, a target and one of its precisions."""
    for model in MODELS.values():
        for target in TARGETS.values():
            for precision in target.precisions:
                yield model, target.name, precision


def export_words(model: Model, target: str, precision: str, folder: Path) -> list[str]:
    """Random weights have no accuracy to lose: their INT8 is judged by SQNR, on 64 x 64."""
    words = ["export", *model.words, "--target", target, "--precision", precision, "--output", str(folder), "--force"]
    row = TARGETS[target].precision(precision)
    if row.calibration != "none":
        searched = row.calibration == SEARCH
        if model.data is not None:
            words += ["--calibration", model.data, *(("--max-drop", MAX_DROP) if searched else ())]
        else:
            words += ["--image-size", "64", "--calibration", "photographs"]
            words += ["--metric", "sqnr", "--max-drop", "10"] if searched else []
    return words


def dualtoken(words: Sequence[str]) -> tuple[int, Any, str]:
    """Exit code, the JSON that was printed, and the line of the error."""
    command = [sys.executable, "-m", "dualtoken_deploy", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        raise SystemExit(f"{shown(words)} was ended by signal {-done.returncode}; that says nothing of the cell")
    errors = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.startswith("error: ")]
    try:
        said = json.loads(done.stdout)
    except ValueError:
        said = {}
    return done.returncode, said, errors[-1] if errors else (done.stderr.strip().splitlines() or ["no message"])[-1]


Run = Callable[[Sequence[str]], tuple[int, Any, str]]


def shown(words: Sequence[str]) -> str:
    return shlex.join(["dualtoken", *words])


def measure(model: Model, target: str, precision: str, bundles: Path, run: Run = dualtoken) -> Json:
    """What one cell is, or how it was refused."""
    folder = bundles / f"{model.name}-{target}-{precision}"
    words = export_words(model, target, precision, folder)
    cell: Json = {"model": model.name, "target": target, "precision": precision, "state": "refused"}
    about: Json = {"date": today(), "versions": versions(target), "commands": [shown(words)]}
    used = cpu_seconds()
    code, made, error = run(words)
    state = made.get("state") if isinstance(made, dict) else None
    if state not in ("complete", "prepared", "compiled"):
        return cell | {"why": error, "exit": code} | about | {"cpu_s": round(cpu_seconds() - used, 1)}
    size = made.get("size_mib")
    cell |= {
        "state": "measured" if state == "complete" else state,
        "sqnr_db": made["sqnr_db"],
        "agreement": made.get("top1_agreement"),
        "size_mib": None if size is None else round(size, 3),
        "accuracy": None,
        "executed_where": where(target, state, None),
        "executed_precision": made["executed_precision"],
        "int8_mac_share": made["int8_mac_share"] if TARGETS[target].precision(precision).integers else None,
        "latency": None,
    }
    if state == "complete":
        words = ["inspect", str(folder)]
        about["commands"].append(shown(words))
        code, seen, error = run(words)
        if code in (0, 5):
            cell["executed_where"] = where(target, state, seen.get("engine"))
            cell["executed"] = seen["executed_precision"]
        if model.data is not None:
            limit = () if code == 0 and seen.get("engine") is None else ("--limit", str(SLOW_IMAGES))
            cell["accuracy"] = accuracy(model.data, str(folder), about["commands"], run, limit)
    return cell | about | {"cpu_s": round(cpu_seconds() - used, 1)}


def accuracy(data: str, what: str, commands: list[str], run: Run, limit: Sequence[str] = ()) -> Json | None:
    """The first metric of the task over the held-out part of the data, of a bundle or of weights."""
    words = ["evaluate", what, "--data", data, *limit]
    commands.append(shown(words))
    code, said, _ = run(words)
    if code:
        return None
    metric = next(name for name in get_task(said["task"]).metrics if name in said)
    return {"metric": metric, "value": said[metric], "images": said["images"], "data": data}


def where(target: str, state: str, engine: str | None) -> str:
    """In which library the figures of a cell came about; "prepared" and "compiled" are no execution of the engine."""
    row = TARGETS[target]
    if state != "complete":
        stand_in = TARGETS[row.checked_by].title if row.checked_by else "another runtime"
        return f"{state}: its file ran in {stand_in}, no engine was executed"
    return f"{row.title}: {engine}" if engine else f"{row.title}, CPU"


def versions(target: str) -> dict[str, str]:
    """Of the target's libraries, and the commit of this program; "+" where the tree has other bytes."""
    changed = "+" if git("status", "--porcelain", "dualtoken_deploy") else ""
    found = {"commit": git("rev-parse", "--short=10", "HEAD") + changed}
    for name in ("dualtoken-deploy", "torch", *TARGETS[target].libraries):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() or ("unknown" if words[0] == "rev-parse" else "")


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def latency(model: str, cards: Card, bundles: Path, rounds: int, seconds: float, run: Run = dualtoken) -> None:
    """One bench of every bundle of a model that runs here, against eager, one thread. Raises SystemExit on failure."""
    cells = [cell for cell in cards.cells() if cell["model"] == model and cell["state"] == "measured"]
    # a reference execution has no time of the device's
    timed = {str(bundles / name_of(cell)): cell for cell in cells if ": " not in cell["executed_where"]}
    timed = {path: cell for path, cell in timed.items() if Path(path, "manifest.json").exists()}
    if not timed:
        raise SystemExit(f"no bundle of {model} in {bundles} can be timed; measure its cells first")
    how = ("--against", "eager", "--threads", "1", "--rounds", str(rounds), "--seconds", str(seconds))
    words = ["bench", *timed, *how]
    code, said, error = run(words)
    if code:
        raise SystemExit(f"bench failed: {error}")
    for row in said["contestants"]:
        if row.get("bundle") in timed:
            cell = timed[row["bundle"]]
            cell["latency"] = {
                "p50_ms": round(row["p50_ms"], 4),
                "against_eager": {key: round(value, 4) for key, value in row["ratio"].items()},
                "threads": 1,
                "rounds": rounds,
                "seconds": seconds,
                "date": today(),
                "machine": cards.machine,
                "command": shown(words),
            }
            cards.put(cell)


def name_of(cell: Mapping[str, Any]) -> str:
    return f"{cell['model']}-{cell['target']}-{cell['precision']}"


class Card:
    """The file of results: one line a cell, so that a change of one is a change of one line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.machines: dict[str, Json] = {}
        self.eager: dict[str, Json] = {}
        self._cells: dict[str, Json] = {}
        self.read()

    def read(self) -> None:
        """What the file has now; another run may have put cells into it."""
        if self.path.exists():
            data = json.loads(self.path.read_text(encoding="utf-8"))
            self.machines, self.eager = data["machines"], data["eager"]
            self._cells = {name_of(cell): cell for cell in data["cells"] if cell["state"] != NOT_MEASURED}

    @property
    def machine(self) -> str:
        """This machine's key; its record is kept once."""
        record = describe_machine()
        record.pop("kernel", None)
        found = next((key for key, known in self.machines.items() if known == record), None)
        if found is None:
            found = f"m{len(self.machines) + 1}"
            self.machines[found] = record
        return found

    def measured(self, model: Model, target: str, precision: str) -> bool:
        return f"{model.name}-{target}-{precision}" in self._cells

    def need_eager(self, model: Model, run: Run) -> None:
        """What the weights score in eager, once for each model with data."""
        if model.data is None or model.name in self.eager:
            return
        commands: list[str] = []
        found = accuracy(model.data, model.words[-1], commands, run)
        if found is not None:
            self.read()
            about = {"date": today(), "machine": self.machine, "command": commands[0]}
            self.eager[model.name] = found | about | {"versions": versions("onnxruntime")}
            self.write()

    def put(self, cell: Json) -> None:
        """Keeps a cell, at once."""
        self.read()
        self._cells[name_of(cell)] = {**cell, "machine": cell.get("machine", self.machine)}
        self.write()

    def cells(self) -> list[Json]:
        """Every cell there is, in the order of the tables; those that were not measured say so."""
        return [
            self._cells.get(f"{model.name}-{target}-{precision}")
            or {"model": model.name, "target": target, "precision": precision, "state": NOT_MEASURED}
            for model, target, precision in keys()
        ]

    def to_json(self) -> Json:
        return {
            "$schema": "scorecard.schema.json",
            "machines": self.machines,
            "eager": self.eager,
            "cells": self.cells(),
        }

    def write(self) -> None:
        lines = ",\n".join(f"  {json.dumps(cell, ensure_ascii=False)}" for cell in self.cells())
        head = {key: value for key, value in self.to_json().items() if key != "cells"}
        text = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        text += f',\n "cells": [\n{lines}\n ]\n}}\n'
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


# --- the page ---

INTRO = """# Scorecard

<!-- made by benchmarks/scorecard.py --page from benchmarks/results/scorecard.json; do not edit -->

Every model, target and precision that there is: {count} cells, of which {measured} were measured (complete, or prepared
and compiled where no device was at hand), {refused} refused, and **{rest} not measured**. `.venv/bin/python
benchmarks/scorecard.py --only "MODEL TARGET PRECISION"` measures one, `--latency MODEL` times the bundles of a model in
one interleaved bench. The same as data, with each cell's commands and library versions:
`benchmarks/results/scorecard.json` (schema: `docs/schemas/results/scorecard.schema.json`).

A reference execution, a prepared file and a compiled engine are no execution on a device: the column *executed* says
which it was. "lost" are points against eager on the same held-out pictures; SQNR is to eager on the photographs of the
export check. Models without a data set in their name have random weights of seed 0, whose INT8 is of 64 x 64 and judged
by SQNR. Latency: one thread, p50, and speed against eager with the slowest and fastest round.
"""


def page(data: Mapping[str, Any]) -> str:
    cells = data["cells"]
    states = [cell["state"] for cell in cells]
    refused, rest = states.count("refused"), states.count(NOT_MEASURED)
    measured = len(cells) - refused - rest
    intro = INTRO.format(count=len(cells), measured=measured, refused=refused, rest=rest)
    parts = [intro, "## All cells", overview(cells)]
    for name in MODELS:
        own = [cell for cell in cells if cell["model"] == name and cell["state"] != NOT_MEASURED]
        if own:
            parts += [f"## {name}", model_table(own, data["eager"].get(name))]
    machines = "\n".join(f"- `{key}`: {machine_line(record)}" for key, record in data["machines"].items())
    return "\n\n".join(part.rstrip("\n") for part in (*parts, "## Machines", machines)) + "\n"


def overview(cells: Sequence[Mapping[str, Any]]) -> str:
    """SQNR of each model on each target, precisions in the order of the target's; "." where nothing was measured."""
    lines = [
        "SQNR in dB, a figure for each precision; `P` prepared, `C` compiled, `x` refused, `·` not measured.",
        "",
        "| model | " + " | ".join(f"{t.name}<br>{', '.join(t.precisions)}" for t in TARGETS.values()) + " |",
        "| --- |" + " --- |" * len(TARGETS),
    ]
    for name in MODELS:
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
    if cell["state"] == "refused":
        why = f"refused, exit {cell['exit']}: {cell['why']}".replace("|", "\\|").replace("<", "&lt;")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="cells whose 'model target precision' contains it")
    parser.add_argument("--again", action="store_true", help="cells that are there, too")
    parser.add_argument("--minutes", type=float, help="begin no cell after so many minutes of CPU")
    parser.add_argument("--latency", metavar="MODEL", choices=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--page", action="store_true", help="make the page alone")
    parser.add_argument("--bundles", type=Path, default=BUNDLES)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--output", type=Path, default=PAGE)
    given = parser.parse_args()
    card = Card(given.results)
    try:
        if given.latency:
            latency(given.latency, card, given.bundles, given.rounds, given.seconds)
        elif not given.page:
            fill(card, given.only, given.again, given.minutes, given.bundles)
    finally:
        card.read()
        given.output.write_text(page(card.to_json()), encoding="utf-8")


def fill(
    card: Card, only: Sequence[str], again: bool, minutes: float | None, bundles: Path, run: Run = dualtoken
) -> None:
    """Measures the cells asked for that are not there, and keeps each at once."""
    bundles.mkdir(parents=True, exist_ok=True)
    for model, target, precision in keys():
        name = f"{model.name} {target} {precision}"
        if only and not any(f" {word} " in f" {name} " for word in only):
            continue
        if card.measured(model, target, precision) and not again:
            continue
        if minutes is not None and cpu_seconds() > 60 * minutes:
            print(f"{minutes:g} minutes of CPU are used; go on with the same command", file=sys.stderr)
            return
        card.need_eager(model, run)
        cell = measure(model, target, precision, bundles, run)
        card.put(cell)
        if cell["state"] == "refused":
            shutil.rmtree(bundles / name_of(cell), ignore_errors=True)
        said = f"{name}: {cell['state']} in {cell['cpu_s']:.0f} s of CPU {cell.get('why', '')}"
        print(said, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
