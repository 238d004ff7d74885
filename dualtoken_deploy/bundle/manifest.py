"""What a bundle says of itself: manifest.json as frozen dataclasses. Knows no target and no file system."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dualtoken_deploy.bundle.blocks import Asked, Build, Calibration, Evaluated, Licenses, Measured, Origin, Weights
from dualtoken_deploy.bundle.decode import decode, parse, plain
from dualtoken_deploy.errors import BundleError, install_command
from dualtoken_deploy.spec import InputContract, TensorSpec, Tolerance

SCHEMA_VERSION = 1
COMPLETE, COMPILED, PREPARED = "complete", "compiled", "prepared"
CLASSIFY = "classify"
# References: the PyTorch model, or the ONNX file that a bundle was made from, in ONNX Runtime in float32
EAGER, ONNX_FILE = "eager", "onnx-file"
REFERENCES = {EAGER: "eager", ONNX_FILE: "the ONNX file in ONNX Runtime, float32"}  # as tables say it


@dataclass(frozen=True)
class Manifest:
    """Everything that is known of a bundle. `files` (name -> sha256) is filled in when the bundle is written.

    `products` lists the model's matrix products at batch 1 as [batch, m, k, n, count]; bench times them alone.
    `task`: a name of the tasks' table; of detect and segment `head` names the model and `dense` has its "form" (raw,
    labels, detections), "classes" and "width". `origin`: what eager is rebuilt from; None in bundles of before it.
    `state` "prepared": a step on the device (`dualtoken build`) is still to come; "compiled": the vendor's compiler
    made what ships, and no device has run it; "complete": what ships was run. `build`: how it was compiled or built.
    `asked`: options of the export, from which it can be made again; None in bundles of before it.
    `evaluated`: accuracies that `dualtoken card --data` measured, one a set of pictures.
    """

    variant: str
    options: Mapping[str, Any]
    weights: Weights
    target: str
    precision: str
    executed_precision: Mapping[str, str]
    input: InputContract
    outputs: tuple[TensorSpec, ...]
    tolerance: Tolerance
    measured: Measured
    rules: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]]
    products: tuple[tuple[int, int, int, int, int], ...]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    command: str
    calibration: Calibration | None = None
    state: str = COMPLETE
    build: Build | None = None
    task: str = CLASSIFY
    head: str | None = None
    dense: Mapping[str, Any] | None = None
    origin: Origin | None = None
    licenses: Licenses | None = None
    asked: Asked | None = None
    evaluated: tuple[Evaluated, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def reference(self) -> str:
        """What the files are held against, where that can be had: "eager", or ONNX_FILE."""
        return EAGER if self.origin is None or self.origin.kind != "onnx" else ONNX_FILE

    def to_json(self) -> dict[str, Any]:
        """Plain data in the order of the fields, `schema_version` first."""
        data = asdict(self) | {
            "input": self.input.to_json(),
            "weights": plain(self.weights),
            "measured": plain(self.measured),
            "calibration": plain(self.calibration),
            "build": None if self.build is None else self.build.to_json(),
            "origin": plain(self.origin),
            "licenses": plain(self.licenses),
            "asked": plain(self.asked),
            "evaluated": plain(self.evaluated),
        }
        return {"schema_version": data.pop("schema_version"), **data}

    @staticmethod
    def parse(text: bytes, what: str = "the manifest") -> Manifest:
        """From the bytes of a manifest.json. Raises BundleError, which names `what`, whatever the bytes."""
        return Manifest.from_json(parse(text, what), what)

    @staticmethod
    def from_json(data: object, what: str = "the manifest") -> Manifest:
        """Fields that this version does not know are left out.

        Raises BundleError on data that is no manifest, or one of a newer schema.
        """
        version = decode(data, _Version, what).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{what} has schema version {version}, this program reads up to {SCHEMA_VERSION}; "
                f"upgrade it (this one was installed by: {install_command()})"
            )
        found = decode(data, Manifest, what)
        if found.build is None:
            return found
        return replace(found, build=Build.from_json(decode(data, _Whole, what).build))


@dataclass(frozen=True)
class _Version:
    schema_version: int


@dataclass(frozen=True)
class _Whole:
    """The block whose fields are not all known here."""

    build: Any
