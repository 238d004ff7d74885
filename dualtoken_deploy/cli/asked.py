"""What options of `export` ask of a plan: as they are given now, or as a manifest's command gave them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args

import typer

from dualtoken_deploy.errors import UsageError

# By the option's name in Python the field of Int8Options that it fills
INT8 = {
    "calibration_size": "size", "calibrator": "method", "metric": "metric", "max_drop": "max_drop",
    "quantizer": "quantizer", "search_seconds": "time_limit_s", "max_slowdown": "max_slowdown",
}  # fmt: skip


def int8_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Int8Options but the calibration set, those alone that were given."""
    found = {field: given[name] for name, field in INT8.items() if given[name] is not None}
    return found | ({"race": False} if given["no_race"] else {})


def check_int8(export: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raises UsageError on options of int8 without the set that they are about."""
    names = [name for name in (*INT8, "no_race") if given[name] not in (None, False)]
    if names and given["calibration"] is None:
        raise UsageError(
            f"{', '.join(option_names(export, names))} without --calibration changes nothing in {given['precision']}; "
            "give --calibration with a precision that is calibrated (int8), or leave "
            f"{'it' if len(names) == 1 else 'them'} out"
        )


def settings(given: Mapping[str, Any]) -> dict[str, str | None]:
    """Of one target alone each."""
    return {
        "deployment_target": given["deployment_target"],
        "layout": given["layout"],
        "backend": given["backend"],
        "compute_capability": ",".join(given["compute_capability"] or ()) or None,
        "weightless": "yes" if given["weightless"] else None,
        "batches": given["batches"],
    }


def option_names(command: Callable[..., None], names: list[str]) -> list[str]:
    """How parameters of a command are written: "--calibration-size"."""
    parameters = inspect.signature(command, eval_str=True).parameters
    return [_option(name, parameters[name]) for name in names]


def _option(name: str, parameter: inspect.Parameter) -> str:
    infos = (info for info in get_args(parameter.annotation) if isinstance(info, typer.models.OptionInfo))
    words = (text for info in infos for text in (info.default, *(info.param_decls or ())))  # the first stands there
    declared = [text for text in words if isinstance(text, str) and text.startswith("--")]
    return declared[0] if declared else f"--{name.replace('_', '-')}"
