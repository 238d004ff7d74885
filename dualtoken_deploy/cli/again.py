"""Making a bundle again by its manifest: what both doors to it, `reproduce` and `export --lock`, have in common."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from dualtoken_deploy.cli import asked
from dualtoken_deploy.cli.common import importing, progress, show, with_torch
from dualtoken_deploy.errors import UsageError

if TYPE_CHECKING:
    from dualtoken_deploy.bundle.manifest import Manifest
    from dualtoken_deploy.recipe.reproduce import Said

LOCK = "lock"
WITH_LOCK = (LOCK, "labels", "output", "force", "allow_native", "json_output")  # what --lock leaves open


def said(manifest: Manifest, export: Callable[..., None]) -> Said:
    """What the export was asked for beside the model."""
    module = with_torch("making a bundle again", importing("recipe.reproduce"))
    return module.Said.of(manifest) or _of_command(module, manifest.command, export)


def _of_command(module: Any, command: str, export: Callable[..., None]) -> Said:
    """Of a manifest of before `asked`, what its command says; nothing of a bundle that Python or a recipe made."""
    app = typer.Typer(add_completion=False)
    app.command()(export)
    found: Said = module.Said()
    words = shlex.split(command)
    if words[:2] != ["dualtoken", "export"]:
        return found
    known: Any = typer.main.get_command(app)
    try:
        given = known.make_context("export", words[2:]).params
    except Exception as error:  # typer carries a click of its own, whose classes have no public name
        if not hasattr(error, "format_message"):
            raise
        raise UsageError(f"the manifest's command cannot be read ({error.format_message()}): {command}") from error
    int8 = None
    if given["calibration"] is not None:
        said_of_int8 = {**asked.int8_fields(given), "race": False, "max_slowdown": None}  # it is compared by bytes
        int8 = module.Int8Options(given["calibration"], **said_of_int8)
    return module.Said(given["opset"], given["device"], asked.settings(given), int8)  # type: ignore[no-any-return]


def check_alone(export: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raises UsageError that names the options which `--lock` leaves no choice about."""
    parameters = inspect.signature(export, eval_str=True).parameters
    others = [name for name, p in parameters.items() if name not in WITH_LOCK and given[name] != p.default]
    if others:
        names = ", ".join(asked.option_names(export, others))
        raise UsageError(
            f"--lock takes everything from the manifest but --labels, --output and --force; leave {names} out"
        )


def export_locked(
    export: Callable[..., None], lock: Path, labels: Path | None, output: Path | None, force: bool, as_json: bool
) -> None:
    """Makes the bundle of a manifest again; where a file comes out otherwise nothing is left, with exit code 5."""
    module = with_torch("making a bundle again", importing("recipe.reproduce"))
    locked = module.Lock.read(lock, labels)
    with progress() as tell:
        found, result = module.remake(locked, said(locked.manifest, export), output, force, tell)
    document = None if result is None else result.to_json() | {LOCK: found.to_json()}
    show(as_json, document or {LOCK: found.to_json()}, lambda r: r.reproduction_table(found))
    found.gate()
