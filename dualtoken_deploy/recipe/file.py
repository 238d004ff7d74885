"""A recipe's TOML as frozen, typed tables; an unknown key is named with its line and those that there are."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import msgspec

from dualtoken_deploy.errors import InputError
from dualtoken_deploy.files import read_toml

MAX_RECIPE = 1 << 20
Names = tuple[str, ...]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """What is not said has its default; what is not known is an error."""


class ModelTable(_Table, frozen=True):
    """The model: what `dualtoken export` calls by the same names."""

    variant: str | None = None
    head: str | None = None
    model: str | None = None
    weights: str | None = None
    labels: str | None = None
    image_size: int | str | None = None
    seed: int = 0
    classes: int | None = None
    width: int | None = None
    suppress: bool = False
    argmax: bool = False
    task: str | None = None
    output_names: Names = ()
    preprocess: str | None = None
    licenses: Names = ()
    arguments: dict[str, Any] = {}
    options: dict[str, Any] = {}


class Int8Table(_Table, frozen=True):
    """How a precision with ranges is calibrated and gated."""

    calibration: str
    size: int = 300
    method: str = "minmax"
    metric: str | None = None
    max_drop: float = 0.5
    quantizer: str | None = None
    time_limit_s: float | None = None
    race: bool = True
    max_slowdown: float | None = None


class ExportTable(_Table, frozen=True):
    """Every target with every precision: a bundle each. `int8` is for those that are calibrated."""

    targets: Names
    precisions: Names = ("fp32",)
    batch: int | str = 1
    input: str = "image"
    opset: int | None = None
    device: str | None = None
    settings: dict[str, str] = {}
    int8: Int8Table | None = None


class GateTable(_Table, frozen=True):
    """Least figures of every bundle, as `dualtoken validate --min-...` asks for them."""

    data: str | None = None
    limit: int | None = None
    reference: str | None = None
    sqnr_db: float | None = None
    agreement: float | None = None
    top1: float | None = None
    ap: float | None = None
    miou: float | None = None


class VerifyTable(_Table, frozen=True):
    """`baselines`: the folder with a report for each bundle, BUNDLE.json; one that is not there is made."""

    baselines: str
    tolerances: str | None = None
    data: str | None = None
    limit: int | None = None
    rounds: int = 5
    seconds: float = 0.5


class DevicesTable(_Table, frozen=True):
    """Where the bundles are timed: `names` as `--on` takes them. `folder`: a report for each, DEVICE.json, as
    `dualtoken bench --on DEVICE --json` prints it."""

    names: Names
    folder: str = "measured"
    rounds: int = 5
    seconds: float = 2.0
    threads: int | None = None


class SignTable(_Table, frozen=True):
    """`key`: a private key in PEM, as `dualtoken sign --key` takes it."""

    key: str


class ReportTable(_Table, frozen=True):
    """One report of all bundles."""

    html: str | None = None
    markdown: str | None = None
    data: str | None = None
    limit: int | None = None
    rounds: int = 5
    seconds: float = 0.5


class Recipe(_Table, frozen=True):
    """A whole file. Paths in it are from its own folder; `output` is the folder of the bundles."""

    model: ModelTable
    export: tuple[ExportTable, ...]
    output: str = "bundles"
    gates: GateTable | None = None
    verify: VerifyTable | None = None
    devices: DevicesTable | None = None
    sign: SignTable | None = None
    report: ReportTable | None = None


TABLES = {
    "": Recipe, "model": ModelTable, "export": ExportTable, "int8": Int8Table, "gates": GateTable,
    "verify": VerifyTable, "devices": DevicesTable, "sign": SignTable, "report": ReportTable,
}  # fmt: skip


def read_recipe(path: Path) -> Recipe:
    """Raises InputError with the line, what is wrong there, and what may stand there."""
    data, text = read_toml(path, MAX_RECIPE, InputError, "give a recipe's TOML file")
    try:
        return msgspec.convert(data, Recipe)
    except msgspec.ValidationError as error:
        raise InputError(_explain(path, text, str(error))) from error


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe."""
    return msgspec.json.schema(Recipe)


def _explain(path: Path, text: str, said: str) -> str:
    """msgspec says what and where: "Object contains unknown field `tagets` - at `$.export[0]`"."""
    what, _, where = said.partition(" - at ")
    steps = re.findall(r"[A-Za-z_][\w-]*", where.replace("$", ""))
    unknown = re.search(r"unknown field `([^`]+)`", what)
    if unknown is None:
        key = steps[-1] if steps else ""
        return f"{_line(path, text, steps[:-1], key)}: {key or 'the recipe'}: {what[0].lower()}{what[1:]}"
    key, table = unknown[1], next((s for s in reversed(steps) if s in TABLES), "")
    known = TABLES[table].__struct_fields__
    near = difflib.get_close_matches(key, known, 1)
    meant = f"; did you mean {near[0]}?" if near else ""
    name = f"[{table}]" if table else "a recipe"
    return f"{_line(path, text, steps, key)}: {name} has no {key!r}{meant} Valid: {', '.join(known)}"


def _line(path: Path, text: str, tables: list[str], key: str) -> str:
    """The first line with the key behind the header of its table; tomllib keeps no lines."""
    inside, header = not tables, re.compile(r"^\s*\[\[?\s*([\w.\s-]+?)\s*\]\]?")
    for number, line in enumerate(text.split("\n"), 1):
        found = header.match(line)
        if found:
            parts = found[1].split(".")
            if key and parts[-1].strip() == key:
                return f"{path}, line {number}"
            inside = bool(tables) and parts[-1].strip() == tables[-1]
        elif inside and key and re.match(rf"^\s*[\"']?{re.escape(key)}[\"']?\s*=", line):
            return f"{path}, line {number}"
    return str(path)
