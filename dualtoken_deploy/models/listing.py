"""What `dualtoken models` lists: figures that were counted when a version was made, and ship as data.

So the list is there at once, and without torch; tests hold the file against the counts.

python -m dualtoken_deploy.models.listing     counts them anew, with torch
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

FILE = Path(__file__).with_name("counted.json")
COUNTERS: Mapping[str, tuple[tuple[str, str], ...]] = MappingProxyType(
    {
        "variants": (("registry", "describe_variants"), ("systems", "describe_systems")),
        "heads": (("heads.table", "describe_heads"),),
        "ablations": (("ablations", "describe_ablations"),),
    }
)


def counted(kind: str) -> list[dict[str, Any]]:
    """The rows of a kind, one of COUNTERS, counted here. Raises ModuleNotFoundError without torch."""
    rows: list[dict[str, Any]] = []
    for module, name in COUNTERS[kind]:
        rows += getattr(importlib.import_module(f"dualtoken_deploy.models.{module}"), name)()
    return rows


def shipped(kind: str) -> list[dict[str, Any]]:
    """The rows of a kind as they were counted when this version was made."""
    rows: list[dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    return rows


def main() -> None:
    FILE.write_text(json.dumps({kind: counted(kind) for kind in COUNTERS}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
