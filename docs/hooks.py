"""What the site has that is made of the program itself: the page of the commands, and links to files beside docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from dualtoken_deploy.cli.reference import reference

CLI = "cli.md"
OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?!docs/)[^)#]+)\)")


def on_config(config: Any) -> Any:
    """Decisions, and pages that nobody put into the navigation, in the order of their names."""
    docs = Path(config["docs_dir"])
    named = re.findall(r"[\w/-]+\.md", str(config["nav"]))
    rest = [page.name for page in sorted(docs.glob("*.md")) if page.name not in named]
    decisions = [f"decisions/{page.name}" for page in sorted((docs / "decisions").glob("*.md"))]
    config["nav"] += [*rest, {"Decisions": decisions}]
    return config


def on_files(files: Files, *, config: Any) -> Files:
    """Adds the page of the commands, made of the application as it is now."""
    files.append(File.generated(config, CLI, content=reference()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A file of the repository that is no page is named, not linked: the site is whole without the repository."""
    return OUTSIDE.sub(r"\1 (`\2` in the repository)", markdown)
