"""The cells of a recipe over a Ray cluster: every bundle's export and gates is a task; a worker that dies is replaced.

What measures time, signs or reports is done here afterwards, one after the other: a baseline is of one machine, and
two exports beside each other would be in its figures. So is an INT8 export that is raced against float (`race` of the
recipe's int8). The recipe's folder has to be the same place on every node.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import DualTokenError, MissingError, missing_extra
from dualtoken_deploy.recipe.file import Recipe
from dualtoken_deploy.recipe.steps import DONE, FAILED, LEFT_OUT, SKIPPED, Kitchen, Result, Step

Tell = Callable[[str], None]
CELL = ("export", "gates")  # steps of a bundle that need nothing of another and no quiet machine
RETRIES = 3  # of a cell whose worker died: an export leaves a whole bundle or none, so it may be done again
STORE = 80 << 20  # bytes, the least that Ray takes: what cells hand over are words, bundles are files
OURS = "DUALTOKEN_"  # variables of the environment that go along


@dataclass(frozen=True)
class Cell:
    """What a worker is told: the bundle of a recipe in a folder, and the steps that are left of it."""

    recipe: Recipe
    folder: str
    directory: str  # paths in the recipe's words may be from the working directory
    environment: Mapping[str, str]
    bundle: str
    steps: tuple[str, ...]


def cook(
    kitchen: Kitchen, tell: Tell, force: bool = False, address: str | None = None, workers: int | None = None
) -> Iterator[Result]:
    """As Kitchen.cook. `address`: of a cluster that runs; None: one of this machine with so many `workers`, or as many
    as it has cores, which ends with the run. Raises MissingError without Ray, or where no cluster answers."""
    results: dict[tuple[str, str], Result] = {}
    cells: list[Cell] = []
    for bundle, steps in _by_bundle(kitchen).items():
        left = [step for step in steps if force or not kitchen.is_done(step)]
        for step in steps:
            if step not in left:
                results[step.name, bundle] = Result(step.name, bundle, SKIPPED, kitchen.seconds(step))
        if left:
            cells.append(_cell(kitchen, bundle, left))
    yield from results.values()
    if cells:
        for result in _spread(cells, tell, address, workers):
            results[result.step, result.bundle] = result
            if result.state == DONE:
                kitchen.note(kitchen.step(result.step, result.bundle), result.seconds or 0.0)
            yield result
    yield from kitchen.cook(tell, force, results)


def _by_bundle(kitchen: Kitchen) -> dict[str, list[Step]]:
    timed = {plan.output.name for plan in kitchen.plans if plan.int8 is not None and plan.int8.race}
    found: dict[str, list[Step]] = {}
    for step in kitchen.steps():
        if step.name in CELL and step.bundle not in timed:
            found.setdefault(step.bundle, []).append(step)
    return found


def _cell(kitchen: Kitchen, bundle: str, left: list[Step]) -> Cell:
    environment = {name: value for name, value in os.environ.items() if name.startswith(OURS)}
    names = tuple(step.name for step in left)
    return Cell(kitchen.recipe, str(kitchen.folder), str(Path.cwd()), environment, bundle, names)


def run_cell(cell: Cell) -> list[Result]:
    """On a worker: the cell's steps; those behind one that fails are left out."""
    os.chdir(cell.directory)
    os.environ.update(cell.environment)
    kitchen, found = Kitchen(cell.recipe, Path(cell.folder)), list[Result]()
    for name in cell.steps:
        if any(result.error is not None for result in found):
            found.append(Result(name, cell.bundle, LEFT_OUT))
            continue
        start, error = time.perf_counter(), None
        try:
            kitchen.step(name, cell.bundle).run(lambda _: None)
        except DualTokenError as caught:
            error = caught
        seconds = round(time.perf_counter() - start, 1)
        found.append(Result(name, cell.bundle, DONE if error is None else FAILED, seconds, error))
    return found


def _spread(cells: list[Cell], tell: Tell, address: str | None, workers: int | None) -> Iterator[Result]:
    """What became of the cells' steps, as they come."""
    with redirect_stdout(sys.stderr):  # Ray prints there that a worker died; stdout is for the answer
        yield from _spread_by(_start(address, workers), cells, tell)


def _spread_by(ray: Any, cells: list[Cell], tell: Tell) -> Iterator[Result]:
    try:
        remote = ray.remote(run_cell).options(max_retries=RETRIES, num_cpus=1)
        pending = {remote.remote(cell): cell for cell in cells}
        while pending:
            tell(f"{len(cells) - len(pending)} of {len(cells)} bundles came from the cluster")
            (ready, *_), _ = ray.wait(list(pending), num_returns=1)
            cell = pending.pop(ready)
            try:
                yield from ray.get(ready)
            except ray.exceptions.RayError as error:
                yield from _lost(cell, ray, error)
    finally:
        ray.shutdown()


def _lost(cell: Cell, ray: Any, error: Exception) -> Iterator[Result]:
    """The steps of a cell that no worker brought to its end."""
    if isinstance(error, ray.exceptions.RayTaskError):  # raised by our code there: a fault of the program
        raise error
    said = MissingError(
        f"{cell.bundle} was lost with its worker, after {RETRIES} retries ({type(error).__name__}); give nodes more "
        "memory, or leave --engine out to see why"
    )
    for number, name in enumerate(cell.steps):
        yield Result(name, cell.bundle, LEFT_OUT if number else FAILED, None, None if number else said)


def _start(address: str | None, workers: int | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to its makers, unless the user says so
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise missing_extra("ray", "spreading a recipe over a cluster (--engine ray)") from error
    local = {} if address is not None else {"num_cpus": workers or os.cpu_count(), "object_store_memory": STORE}
    try:
        ray.init(
            address=address or "local", include_dashboard=False, log_to_driver=False, configure_logging=False, **local
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise MissingError(
            f"no Ray cluster answers at {address or 'this machine'} ({type(error).__name__}); look at `ray status` "
            "there, and give the same RAY_AUTH_TOKEN where it asks for one"
        ) from error
    return ray
