"""THE table of targets: one row each, with what it takes to export and to run it.

A row's name is also the name of its exporter (`export/<name>.py`) and of its runner (`runtimes/<name>.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.spec import Tolerance


@dataclass(frozen=True)
class Target:
    """One deployment target.

    `files` are written by the exporter, the first is the one an app loads. `source` is what the exporter converts:
    "onnx" or "torch". `modules` must import to run it; exporting needs those and the extra [export]. `settings`:
    options of export that are this target's own. `check_images`: photographs that export checks on, where
    the runtime is too slow here for all of them.
    """

    name: str
    title: str
    files: tuple[str, ...]
    extra: str
    source: str
    modules: tuple[str, ...]
    tolerances: Mapping[str, Tolerance]  # by precision; the keys are the precisions on offer
    aliases: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    check_images: int | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(self.tolerances)

    def missing(self, modules: tuple[str, ...] | None = None) -> list[str]:
        """Modules that are not installed here; those that running needs unless others are named."""
        return [m for m in modules or self.modules if importlib.util.find_spec(m) is None]


EXPORT_MODULES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")

# fp32 measured 118-125 dB and fp16 54-75 dB on S over photographs; the gates leave room for other weights.
_TOLERANCES = MappingProxyType({"fp32": Tolerance(sqnr_db=100.0), "fp16": Tolerance(sqnr_db=45.0)})

# Core ML's, oldest first. Measured by the reference runner on S: see docs/coreml.md.
DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
_COREML_TOLERANCES = MappingProxyType(
    {
        "fp32": Tolerance(sqnr_db=90.0),
        "fp16": Tolerance(sqnr_db=40.0),
        "int8": Tolerance(sqnr_db=25.0, top1_agreement=0.9),
        "int8-w8a8": Tolerance(sqnr_db=10.0, top1_agreement=0.8),
        "palettized8": Tolerance(sqnr_db=25.0, top1_agreement=0.9),
        "palettized6": Tolerance(sqnr_db=15.0, top1_agreement=0.8),
        "palettized4": Tolerance(sqnr_db=3.0, top1_agreement=0.0),
    }
)

_COREAI_TOLERANCES = MappingProxyType({"fp32": Tolerance(sqnr_db=90.0), "fp16": Tolerance(sqnr_db=35.0)})

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                name="onnxruntime",
                title="ONNX Runtime",
                files=("model.onnx",),
                extra="onnxruntime",
                source="onnx",
                modules=("onnxruntime",),
                tolerances=_TOLERANCES,
                aliases=("onnx",),
            ),
            Target(
                name="openvino",
                title="OpenVINO",
                files=("model.xml", "model.bin"),
                extra="openvino",
                source="onnx",
                modules=("openvino",),
                tolerances=_TOLERANCES,
            ),
            Target(
                name="coreml",
                title="Core ML",
                files=("model.mlpackage",),
                extra="coreml",
                source="torch",
                modules=("coremltools",),
                tolerances=_COREML_TOLERANCES,
                settings=("deployment_target", "layout"),
            ),
            Target(
                name="coreai",
                title="Core AI",
                files=("model.aimodel",),
                extra="coreai",
                source="torch",
                modules=("coreai", "coreai_torch"),
                tolerances=_COREAI_TOLERANCES,
                check_images=2,  # float16 takes 38 s an image on two cores
            ),
        )
    }
)


def get_target(name: str) -> Target:
    """The row of a target or of one of its aliases. Raises UsageError that lists the valid names."""
    for target in TARGETS.values():
        if name == target.name or name in target.aliases:
            return target
    raise UsageError(f"unknown target {name!r}; valid targets: {', '.join(TARGETS)}")


def check_precision(target: Target, precision: str) -> None:
    """Raises UsageError where the target does not offer the precision."""
    if precision not in target.precisions:
        raise UsageError(
            f"unknown precision {precision!r} for {target.name}; valid precisions: {', '.join(target.precisions)}"
        )
