"""Commands over many steps: a recipe, and a bundle made again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from dualtoken_deploy.cli.again import said
from dualtoken_deploy.cli.common import (
    AllowNative,
    Json,
    OneBundle,
    importing,
    progress,
    remark,
    show,
    with_torch,
    write_out,
)
from dualtoken_deploy.cli.making import export
from dualtoken_deploy.errors import UsageError


def run(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe (TOML).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps, and what they take; do none.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Do every step again, done or not.")] = False,
    engine: Annotated[str, typer.Option(help="local, or ray: exports and gates over a Ray cluster.")] = "local",
    address: Annotated[str | None, typer.Option(help="--engine ray: of a cluster that runs; else one here.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="--engine ray: workers of the one here.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe.")] = False,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Does what a recipe says: exports, gates, baselines, signatures, a report. What is done already is skipped."""
    from dualtoken_deploy.bundle.trust import permit_native
    from dualtoken_deploy.recipe.file import read_recipe
    from dualtoken_deploy.recipe.file import schema as recipe_schema

    if schema:
        write_out(json.dumps(recipe_schema(), indent=2))
        return
    if recipe is None:
        raise UsageError("give a recipe's TOML file, or --schema; docs/ci.md has one")
    if engine not in ENGINES:
        raise UsageError(f"unknown engine {engine!r}; valid engines: {', '.join(ENGINES)}")
    if engine == "local" and (address is not None or workers is not None):
        raise UsageError("--address and --workers are for --engine ray; without it steps are done one after the other")
    if address is not None and workers is not None:
        raise UsageError("--workers is for a cluster of this machine; the one at --address has its own")
    permit_native(allow_native)
    read = read_recipe(recipe)
    module = with_torch("a recipe's exports", importing("recipe.steps"))
    kitchen = module.Kitchen(read, recipe.parent)
    if dry_run:
        steps = list(kitchen.expect())
        rows = [
            {"step": s.name, "bundle": s.bundle, "state": state, "seconds_before": seconds, "mib": s.mib}
            for s, state, seconds in steps
        ]
        show(json_output, {"steps": rows}, lambda r: r.plan_table(rows))
        return
    with progress() as tell:
        results = []
        for result in _cook(kitchen, engine, tell, force, address, workers):
            results.append(result)
            remark(f"{result.step} {result.bundle}: {result.state}")
    show(json_output, {"steps": [r.to_json() for r in results]}, lambda r: r.steps_table(results))
    failed = [r.error for r in results if r.error is not None]
    if failed:
        raise max(failed, key=lambda error: error.exit_code)


ENGINES = ("local", "ray")


def _cook(kitchen: Any, engine: str, tell: Any, force: bool, address: str | None, workers: int | None) -> Iterator[Any]:
    if engine == "local":
        return kitchen.cook(tell, force)  # type: ignore[no-any-return]
    from dualtoken_deploy.recipe.cluster import cook

    return cook(kitchen, tell, force, address, workers)


def reproduce(
    bundle: OneBundle,
    output: Annotated[Path | None, typer.Option(help="Keep the bundle that was made again here.")] = None,
    allow_native: AllowNative = False,
    json_output: Json = False,
) -> None:
    """Makes a bundle again from what its manifest says, and compares every file; other bytes exit with 5."""
    from dualtoken_deploy.bundle.store import Bundle
    from dualtoken_deploy.bundle.trust import permit_native

    permit_native(allow_native)
    module = with_torch("making a bundle again", importing("recipe.reproduce"))
    opened = Bundle.open(bundle)
    with progress() as tell:
        found = module.reproduce(opened, said(opened.manifest, export), output, tell)
    show(json_output, found.to_json(), lambda r: r.reproduction_table(found))
    found.gate()
