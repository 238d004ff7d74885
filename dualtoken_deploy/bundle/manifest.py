"""What a bundle says of itself: manifest.json as frozen dataclasses. Knows no target and no file system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dualtoken_deploy.spec import InputContract, TensorSpec, Tolerance

SCHEMA_VERSION = 1
COMPLETE, COMPILED, PREPARED = "complete", "compiled", "prepared"
CLASSIFY = "classify"


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a bundle. `files` (name -> sha256) is filled in when the bundle is written.

    `weights` has "source" ("random" or the file's path), "seed" for random ones and "sha256" of the tensors.
    `products` lists the model's matrix products at batch 1 as [batch, m, k, n, count]; bench times them alone.
    `task`: classify, detect or segment; of the last two `head` names the model and `dense` has its "form" (raw, labels,
    detections), "classes" and "width".
    `state` "prepared": a step on the device (`dualtoken build`) is still to come; "compiled": the vendor's compiler
    made what ships, and no device has run it; "complete": what ships was run. `build`: how it was compiled or built.
    """

    variant: str
    options: Mapping[str, Any]
    weights: Mapping[str, Any]
    target: str
    precision: str
    executed_precision: Mapping[str, Any]
    input: InputContract
    outputs: tuple[TensorSpec, ...]
    tolerance: Tolerance
    measured: Mapping[str, Any]
    rules: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]]
    products: tuple[tuple[int, int, int, int, int], ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    command: str
    calibration: Mapping[str, Any] | None = None
    state: str = COMPLETE
    build: Mapping[str, Any] | None = None
    task: str = CLASSIFY
    head: str | None = None
    dense: Mapping[str, Any] | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data in the order of the fields, `schema_version` first."""
        data = asdict(self) | {"input": self.input.to_json()}
        return {"schema_version": data.pop("schema_version"), **data}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or IndexError on data that is no manifest of this schema version."""
        known = {k: v for k, v in data.items() if k in Manifest.__dataclass_fields__}
        return Manifest(
            **known
            | {
                "input": InputContract.from_json(data["input"]),
                "outputs": tuple(TensorSpec.from_json(o) for o in data["outputs"]),
                "tolerance": Tolerance(**data["tolerance"]),
                "rules": tuple(data["rules"]),
                "products": tuple(tuple(p) for p in data["products"]),
            }
        )
