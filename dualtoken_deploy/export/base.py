"""What every exporter takes and gives."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dualtoken_deploy.models.dualtoken_vit import DualTokenViT
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets import Target

Tell = Callable[[str], None]  # is told what happens now, for a progress display


@dataclass(frozen=True)
class Request:
    """What is to be made. `opset` None: the exporter's own choice. `metadata` goes into the artifact where it can, as
    do `labels`, one a class. `settings`: those of the target's own (`Target.settings`) that were given."""

    precision: str
    contract: InputContract
    outputs: tuple[TensorSpec, ...]
    opset: int | None
    metadata: Mapping[str, str]
    labels: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Artifact:
    """What an exporter did: the deploy rules that applied, operator counts by step ("exported", "simplified", ...)."""

    rules: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]]


def run_exporter(target: Target, model: DualTokenViT, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes `target.files` into `folder`. Raises ConversionError where the vendor's tool fails."""
    module = importlib.import_module(f"dualtoken_deploy.export.{target.name}")
    artifact: Artifact = module.export(model, request, folder, tell)
    return artifact
