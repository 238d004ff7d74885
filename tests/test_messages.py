"""Every command that this program tells a person to run is one that it takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from dualtoken_deploy.cli.main import app
from dualtoken_deploy.cli.shape import EXAMPLES
from dualtoken_deploy.targets.table import TARGETS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dualtoken_deploy"
VALUE = "VALUE"  # stands for what a message fills in
# A command ends where its sentence does, or with the quotes around it.
COMMAND = re.compile(r"dualtoken ((?:[a-z]+)\b[^`;,)\n]*)")
END = re.compile(r" (?:or|where|with|and|to|on its)\b|\.$|: ")
COMMANDS = frozenset(EXAMPLES)


def texts(tree: ast.AST) -> Iterator[str]:
    """The strings of a module but its docstrings, as they would be shown."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else VALUE for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation | inside:
            yield node.value


def suggested() -> list[tuple[str, str]]:
    """(module, command) of every message in the package, and of the help's examples."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for text in texts(ast.parse(source)) if "dualtoken " in source else ():
            for match in COMMAND.finditer(text):
                command = END.split(match[1])
                title = path.name in ("openapi.py", "devices.py")  # no command, and one that is put together: below
                if command[0].split()[0] in COMMANDS and not title:
                    found.append((str(path.relative_to(ROOT)), command[0].strip(" .\"'")))
    devices = [command for row in TARGETS.values() for d in row.devices for command in d.commands(row.name)]
    return found + [("dualtoken targets", command.removeprefix("dualtoken ")) for command in devices]


def parse(command: str) -> None:
    """As the command line does, without running it; raises a usage error."""
    words = shlex.split(command)
    group = typer.main.get_command(app)
    context = group.make_context("dualtoken", words, resilient_parsing=True)
    name, own, rest = group.resolve_command(context, words)  # type: ignore[attr-defined]
    assert own is not None
    own.make_context(name, rest, parent=context)


def test_there_are_commands_to_look_at() -> None:
    assert len(suggested()) >= 12


@pytest.mark.parametrize(("where", "command"), suggested(), ids=lambda value: str(value)[:60])
def test_a_suggested_command_parses(where: str, command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", ["label --json", "inspect", "validate --nothing", "targets --json x"])
def test_a_command_that_does_not_parse_is_seen(command: str) -> None:
    with pytest.raises(Exception, match=r"(?i)missing|no such|unexpected"):
        parse(command)
