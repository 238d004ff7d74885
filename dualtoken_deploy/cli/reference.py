"""The page of all commands, made of the application itself: python -m dualtoken_deploy.cli.reference"""

from __future__ import annotations

import re
from typing import Any

import typer

from dualtoken_deploy.cli.main import COMMANDS, app
from dualtoken_deploy.cli.shape import EXAMPLES


def reference() -> str:
    """Markdown: what each command does, how it is called, its arguments and options, and examples."""
    group: Any = typer.main.get_command(app)
    lines = [
        "# Commands", "", "Made of the program itself; `dualtoken COMMAND -h` shows the same. Every command takes `-q` "
        "(results and errors alone) and `-v` (let the libraries below speak); those that have `--json` print one "
        "document on stdout, errors too. Completion for bash, zsh and fish: `dualtoken --install-completion`.", "",
    ]  # fmt: skip
    for panel, commands in COMMANDS.items():
        lines += [f"## {panel}", ""]
        for command in commands:
            lines += _command(command.__name__, group.commands[command.__name__])
    return "\n".join(lines)


def _command(name: str, command: Any) -> list[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    calls = " ".join(f"{p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in arguments)
    lines = [
        f"### {name}",
        "",
        *_paragraphs(command.help),
        "",
        "```",
        f"dualtoken {name} {calls} [OPTIONS]".replace("  ", " "),
    ]
    lines += ["```", "", "```", *EXAMPLES[name], "```", ""]
    if arguments:
        lines += [
            "| argument | |",
            "| --- | --- |",
            *(f"| `{p.name.upper()}` | {_cell(p.help)} |" for p in arguments),
            "",
        ]
    lines += ["| option | | default |", "| --- | --- | --- |"]
    for p in options:
        names = ", ".join(f"`{text}`" for text in (*p.opts, *p.secondary_opts))
        said = isinstance(p.default, int | float | str) and not isinstance(p.default, bool)
        default = f"`{p.default}`" if said else ""
        lines.append(f"| {names} | {_cell(p.help)} | {'required' if p.required else default} |")
    return [*lines, ""]


def _paragraphs(text: str | None) -> list[str]:
    return [line.strip() for line in (text or "").strip().splitlines()]


def _cell(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference())
