"""The scorecard: every model x target x precision in one JSON and one page, cell by cell.

    .venv/bin/python -m benchmarks.scorecard --only "t-mix-digits onnxruntime" [--only ...] [--minutes 10] [--again]
    .venv/bin/python -m benchmarks.scorecard --shared --only "s fp32" --cell-seconds 300   # one process a model
    .venv/bin/python -m benchmarks.scorecard --latency t-mix-digits       # one interleaved bench of its bundles
    .venv/bin/python -m benchmarks.scorecard --page                       # the page again, nothing is measured

A cell is `dualtoken export`, `inspect`, and where its data has the truth `evaluate`; each has its date, versions,
machine, commands and CPU seconds. Cells that are there are kept, so that a run that was ended goes on; `--again`
measures them anew, `--minutes` ends after so many minutes of CPU. The `--only` are taken in their order, within each
the cells that cost least first. What was not measured says so, and what was refused says why. Bundles stay in
--bundles, for the latency; it is a part of its own, since it wants a quiet machine. `--shared` runs the same commands
in one process a model, with what they have in common made once (scorecard_process.py): the figures are the same, the
CPU seconds are fewer and are said to be of a shared process.

    benchmarks/results/scorecard.json   docs/schemas/results/scorecard.schema.json   docs/scorecard.md
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.scorecard_page import NOT_MEASURED, SUMMARY, page, summary
from benchmarks.scorecard_process import GivenUpError, Own, Run, Shared
from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.models.registry import VARIANTS
from dualtoken_deploy.targets.precision import NO_CALIBRATION, SEARCH
from dualtoken_deploy.targets.table import TARGETS
from dualtoken_deploy.tasks.table import get_task

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/scorecard.json", ROOT / "docs/scorecard.md"
README = ROOT / "README.md"
BUNDLES = Path("bundles/scorecard")
SMALL = 64  # pixels a side
SLOW_IMAGES = 40  # for what stands in for a runtime, a second and more each
MAX_DROP = "0.5"  # points, of models with trained weights

Json = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """`words`: of export. `data`: where it can be scored, and what calibrates it; None: random weights of seed 0.
    `small`: of SMALL pixels in every cell, since its scans of 196 tokens take a stand-in minutes."""

    name: str
    words: tuple[str, ...]
    data: str | None = None
    small: bool = False


MODELS: Mapping[str, Model] = {
    model.name: model
    for model in (
        Model("t-mix-digits", ("--variant", "t-mix", "--weights", "digits"), "digits"),
        Model("t-mix-shapes", ("--variant", "t-mix", "--weights", "shapes"), "shapes"),
        Model("retinanet-scenes", ("--head", "retinanet", "--weights", "scenes-detect"), "scenes"),
        Model("pspnet-scenes", ("--head", "pspnet", "--weights", "scenes-segment"), "scenes"),
        Model("tokenizer-shapes", ("--variant", "dualtoken-tokenizer-s", "--weights", "shapes-tokens"), "shapes"),
        Model("tsm2-lorenz", ("--variant", "tsm2", "--weights", "lorenz"), "lorenz"),
        *(Model(name, ("--variant", name), small=name.startswith("vim2")) for name in VARIANTS),
    )
}


# Beside the runtimes that run here by themselves: what compiles, converts elsewhere, or runs in a stand-in for seconds
COSTLY = ("tensorrt-rtx", "ncnn", "executorch", "litert", "coreml", "aotinductor", "coreai")


def cost(key: tuple[Model, str, str]) -> tuple[int, int]:
    """Of a cell within its model, to sort by: float files before searched ones, light targets before heavy ones."""
    _, target, precision = key
    searched = TARGETS[target].precision(precision).calibration != NO_CALIBRATION
    return int(searched), COSTLY.index(target) + 1 if target in COSTLY else 0


def asked_for(only: Sequence[str]) -> list[tuple[Model, str, str]]:
    """The cells that have all words of one of `only`, in the order of `only`, then of the models, then of cost."""
    order = list(MODELS)
    found = []
    for key in keys():
        words = {key[0].name, *key[1:]}
        place = next((n for n, ask in enumerate(only) if set(ask.split()) <= words), None)
        if place is not None or not only:
            found.append((place or 0, order.index(key[0].name), *cost(key), key))
    return [key for *_, key in sorted(found, key=lambda row: row[:-1])]


def keys() -> Iterator[tuple[Model, str, str]]:
    """Every cell there is: a model, a target and one of its precisions."""
    for model in MODELS.values():
        for target in TARGETS.values():
            for precision in target.precisions:
                yield model, target.name, precision


def export_words(model: Model, target: str, precision: str, folder: Path) -> list[str]:
    """Random weights have no accuracy to lose: what is calibrated is judged by SQNR there, on SMALL pixels. None is
    raced against float: --latency times all of a model's bundles side by side, on a machine that does nothing else."""
    words = ["export", *model.words, "--target", target, "--precision", precision, "--output", str(folder), "--force"]
    calibration = TARGETS[target].precision(precision).calibration
    calibrated, searched = calibration != NO_CALIBRATION, calibration == SEARCH
    if model.small or (calibrated and model.data is None):
        words += ["--image-size", str(SMALL)]
    if calibrated and model.data is not None:
        words += ["--calibration", model.data, *(("--max-drop", MAX_DROP) if searched else ())]
    elif calibrated:
        words += ["--calibration", "photographs", "--metric", "sqnr", "--max-drop", "10"]
    return [*words, "--no-race"] if searched else words


def shown(words: Sequence[str]) -> str:
    return shlex.join(["dualtoken", *words])


def measure(model: Model, target: str, precision: str, bundles: Path, run: Run) -> Json:
    """What one cell is, or how it was refused."""
    folder = bundles / f"{model.name}-{target}-{precision}"
    words = export_words(model, target, precision, folder)
    cell: Json = {"model": model.name, "target": target, "precision": precision, "state": "refused"}
    about: Json = {"date": today(), "versions": versions(target), "commands": [shown(words)]}
    used = run.used()
    code, made, error = run(words)
    state = made.get("state") if isinstance(made, dict) else None
    if state not in ("complete", "prepared", "compiled"):
        return cell | {"why": error, "exit": code} | about | {"cpu_s": round(run.used() - used, 1), "process": run.kind}
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
    return cell | about | {"cpu_s": round(run.used() - used, 1), "process": run.kind}


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


def latency(model: str, cards: Card, bundles: Path, rounds: int, seconds: float, run: Run) -> None:
    """One bench of every bundle of a model that runs here, against eager, one thread. Raises SystemExit on failure."""
    cells = [cell for cell in cards.cells() if cell["model"] == model and timeable(cell)]
    timed = {str(bundles / name_of(cell)): cell for cell in cells}
    sizes = {path: input_size(Path(path)) for path in timed if Path(path, "manifest.json").exists()}
    if not sizes:
        raise SystemExit(f"no bundle of {model} in {bundles} can be timed; measure its cells first")
    first = next(iter(sizes.values()))  # eager's: a smaller picture would be other work
    timed = {path: timed[path] for path, size in sizes.items() if size == first}
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


def input_size(bundle: Path) -> list[int]:
    """(H, W) of what a bundle takes."""
    found: list[int] = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["input"]["size"]
    return found


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
            said = (cell for cell in data["cells"] if cell["state"] != NOT_MEASURED or "why" in cell)
            self._cells = {name_of(cell): cell for cell in said}

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

    def give_up(self, model: Model, target: str, precision: str, why: str) -> None:
        """A cell stays without figures, and says why."""
        cell = {"model": model.name, "target": target, "precision": precision, "state": NOT_MEASURED, "why": why}
        self.put(cell | {"date": today()})

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="cells that have all these words")
    parser.add_argument("--shared", action="store_true", help="one process a model, what its cells have in common once")
    parser.add_argument("--cell-seconds", type=float, help="with --shared: give a cell up after so much CPU")
    parser.add_argument("--hold", type=Path, help="begin no cell while this file exists")
    parser.add_argument("--light", action="store_true", help="keep no bundle that the latency has no use for")
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
            latency(given.latency, card, given.bundles, given.rounds, given.seconds, Own())
        elif not given.page:
            kept = given.bundles / ".shared"
            run = Shared(kept, given.cell_seconds) if given.shared else Own()
            ask = Ask(tuple(given.only), given.again, given.minutes, given.hold, given.light)
            fill(card, ask, given.bundles, run)
    finally:
        card.read()
        given.output.write_text(page(card.to_json()), encoding="utf-8")
        if given.output == PAGE:
            summarize(README, summary(card.to_json()))


def summarize(path: Path, line: str) -> None:
    """Puts the line in the place of the one that begins as it does."""
    lines = path.read_text(encoding="utf-8").splitlines()
    (place,) = (n for n, text in enumerate(lines) if text.startswith(SUMMARY))
    lines[place] = line
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Ask:
    """Which cells, and how long: see the options of the same names."""

    only: tuple[str, ...] = ()
    again: bool = False
    minutes: float | None = None
    hold: Path | None = None
    light: bool = False


def fill(card: Card, ask: Ask, bundles: Path, run: Run) -> None:
    """Measures the cells asked for that are not there, and keeps each at once."""
    bundles.mkdir(parents=True, exist_ok=True)
    began, last = run.used(), None
    try:
        for model, target, precision in asked_for(ask.only):
            if card.measured(model, target, precision) and not ask.again:
                continue
            while ask.hold is not None and ask.hold.exists():
                time.sleep(1)
            if ask.minutes is not None and run.used() - began > 60 * ask.minutes:
                print(f"{ask.minutes:g} minutes of CPU are used; go on with the same command", file=sys.stderr)
                return
            if isinstance(run, Shared):
                if model is not last:
                    run.fresh()  # so that memory stays bounded
                run.begin()
            last = model
            one(card, (model, target, precision), bundles, run, ask.light)
    finally:
        if isinstance(run, Shared):
            run.fresh()


def one(card: Card, key: tuple[Model, str, str], bundles: Path, run: Run, light: bool) -> None:
    """Measures a cell and keeps it."""
    model, target, precision = key
    name, folder = " ".join((model.name, target, precision)), bundles / f"{model.name}-{target}-{precision}"
    used = run.used()
    try:
        card.need_eager(model, run)
        cell = measure(model, target, precision, bundles, run)
        card.put(cell)
    except GivenUpError as error:
        card.give_up(model, target, precision, str(error))
        cell = {"state": NOT_MEASURED, "cpu_s": run.used() - used, "why": str(error)}
    if cell["state"] == NOT_MEASURED or cell["state"] == "refused" or (light and not timeable(cell)):
        shutil.rmtree(folder, ignore_errors=True)
    said = f"{name}: {cell['state']} in {cell['cpu_s']:.0f} s of CPU {cell.get('why', '')}"
    print(said, file=sys.stderr, flush=True)


def timeable(cell: Mapping[str, Any]) -> bool:
    """Whether a cell's bundle runs here in its own runtime: a reference execution has no time of the device's."""
    return cell["state"] == "measured" and ": " not in cell["executed_where"]


if __name__ == "__main__":
    main()
