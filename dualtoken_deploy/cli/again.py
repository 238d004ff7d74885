"""Making a bundle again by its manifest: what both doors to it, `reproduce` and `export --lock`, have in common."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer

from dualtoken_deploy.cli.common import importing, progress, show, with_torch
from dualtoken_deploy.errors import UsageError

if TYPE_CHECKING:
    from dualtoken_deploy.recipe.reproduce import Said

LOCK = "lock"
WITH_LOCK = (LOCK, "labels", "output", "force", "allow_native", "json_output")  # what --lock leaves open


def said(command: str, export: Callable[..., None]) -> Said:
    """What the command in a manifest gave beside the model; nothing of a bundle that Python made."""
    module = with_torch("making a bundle again", importing("recipe.reproduce"))
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


def check_alone(export: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raises UsageError that names the options which `--lock` leaves no choice about."""
    parameters = inspect.signature(export, eval_str=True).parameters
    others = [name for name, p in parameters.items() if name not in WITH_LOCK and given[name] != p.default]
    if others:
        names = ", ".join(_option(name, parameters[name]) for name in others)
        raise UsageError(
            f"--lock takes everything from the manifest but --labels, --output and --force; leave {names} out"
        )


def _option(name: str, parameter: inspect.Parameter) -> str:
    infos = (info for info in get_args(parameter.annotation) if isinstance(info, typer.models.OptionInfo))
    words = (text for info in infos for text in (info.default, *(info.param_decls or ())))  # the first stands there
    declared = [text for text in words if isinstance(text, str) and text.startswith("--")]
    return declared[0] if declared else f"--{name.replace('_', '-')}"


def export_locked(
    export: Callable[..., None], lock: Path, labels: Path | None, output: Path | None, force: bool, as_json: bool
) -> None:
    """Makes the bundle of a manifest again; where a file comes out otherwise nothing is left, with exit code 5."""
    module = with_torch("making a bundle again", importing("recipe.reproduce"))
    locked = module.Lock.read(lock, labels)
    with progress() as tell:
        found, result = module.remake(locked, said(locked.manifest.command, export), output, force, tell)
    document = None if result is None else result.to_json() | {LOCK: found.to_json()}
    show(as_json, document or {LOCK: found.to_json()}, lambda r: r.reproduction_table(found))
    found.gate()
