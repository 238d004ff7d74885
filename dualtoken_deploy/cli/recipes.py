"""Commands over many steps: a recipe, and a bundle made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
from dualtoken_deploy.errors import UsageError

if TYPE_CHECKING:
    from dualtoken_deploy.recipe.reproduce import Said


def run(
    recipe: Annotated[Path | None, typer.Argument(help="The recipe (TOML).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the steps, and what they take; do none.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Do every step again, done or not.")] = False,
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
        for result in kitchen.cook(tell, force):
            results.append(result)
            remark(f"{result.step} {result.bundle}: {result.state}")
    show(json_output, {"steps": [r.to_json() for r in results]}, lambda r: r.steps_table(results))
    failed = [r.error for r in results if r.error is not None]
    if failed:
        raise max(failed, key=lambda error: error.exit_code)


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
        found = module.reproduce(opened, _said(opened.manifest.command, module), output, tell)
    show(json_output, found.to_json(), lambda r: r.reproduction_table(found))
    found.gate()


def _said(command: str, module: Any) -> Said:
    """What the command in the manifest gave beside the model; nothing of a bundle that Python made."""
    import shlex

    from dualtoken_deploy.cli.making import export

    app = typer.Typer(add_completion=False)
    app.command()(export)
    said: Said = module.Said()
    words = shlex.split(command)
    if words[:2] != ["dualtoken", "export"]:
        return said
    known: Any = typer.main.get_command(app)
    try:
        given = known.make_context("export", words[2:]).params
    except Exception as error:  # typer carries a click of its own, whose classes have no public name
        if not hasattr(error, "format_message"):
            raise
        raise UsageError(f"the manifest's command cannot be read ({error.format_message()}): {command}") from error
    int8 = None
    if given["calibration"] is not None:
        said_of_int8 = {
            "size": given["calibration_size"], "method": given["calibrator"], "metric": given["metric"],
            "max_drop": given["max_drop"], "quantizer": given["quantizer"], "time_limit_s": given["search_seconds"],
            "race": False,  # what it is compared by is bytes
        }  # fmt: skip
        int8 = module.Int8Options(
            given["calibration"], **{name: value for name, value in said_of_int8.items() if value is not None}
        )
    settings = {
        "deployment_target": given["deployment_target"],
        "layout": given["layout"],
        "compute_capability": ",".join(given["compute_capability"] or ()) or None,
        "weightless": "yes" if given["weightless"] else None,
        "batches": given["batches"],
    }
    return module.Said(given["opset"], given["device"], settings, int8)  # type: ignore[no-any-return]
