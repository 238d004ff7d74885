"""THE table of targets: one row each, with what it takes to export and to run it.

A row's name is also the name of its exporter (`export/<name>.py`) and of its runner (`runtimes/<name>.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.spec import Tolerance


@dataclass(frozen=True)
class Target:
    """One deployment target.

    `files` are written by the exporter, the first is the one an app loads. `source` is what the exporter converts:
    "onnx" or "torch". `modules` must import to run it; exporting needs those and the extra [export]. `settings`:
    options of export that are this target's own. `check_images`: photographs that export checks on, where
    the runtime is too slow here for all of them. `dense`: heads with the forms of their outputs that are on offer.

    `portable`: the artifact runs on any machine of its kind; otherwise it is code for the machine that made it, slow to
    make, and `--target all` leaves it out. `built_by` names a command that finishes the bundle on the device: exporting
    then needs none of `modules`, and the files are checked with the runner of the target `checked_by` instead. `vendor`
    is what running needs besides the extra, from no package index.
    """

    name: str
    title: str
    files: tuple[str, ...]
    extra: str
    source: str
    modules: tuple[str, ...]
    tolerances: Mapping[str, Tolerance]  # by precision; the keys are the precisions on offer
    aliases: tuple[str, ...] = ()
    any_size: bool = False  # offers --image-size dynamic
    portable: bool = True
    built_by: str | None = None
    checked_by: str | None = None
    vendor: str | None = None
    settings: tuple[str, ...] = ()
    check_images: int | None = None
    dense: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def precisions(self) -> tuple[str, ...]:
        return tuple(self.tolerances)

    def missing(self, modules: tuple[str, ...] | None = None) -> list[str]:
        """Modules that are not installed here; those that running needs unless others are named."""
        return [m for m in modules or self.modules if importlib.util.find_spec(m) is None]

    @property
    def export_modules(self) -> tuple[str, ...]:
        """Modules that exporting needs: those of its source, and of the target itself where that takes part."""
        source = EXPORT_MODULES if self.source == "onnx" else ("torch",)
        return source if self.built_by else tuple(dict.fromkeys((*source, *self.modules)))


EXPORT_MODULES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")

# fp32 measured 118-125 dB and fp16 54-75 dB on S over photographs; the gates leave room for other weights.
# int8 is gated by its accuracy on held-out pictures instead, so all that is asked of the logits is to be of use.
_TOLERANCES = MappingProxyType({"fp32": Tolerance(sqnr_db=100.0), "fp16": Tolerance(sqnr_db=45.0)})
# bf16 keeps 8 bits of a number; measured 46 dB on S, 19 dB less than fp16 with its 11, as three bits should be.
_BF16 = Tolerance(sqnr_db=30.0)
_TOLERANCES_INDUCTOR = MappingProxyType({**_TOLERANCES, "bf16": _BF16})
_TOLERANCES_INT8 = MappingProxyType({**_TOLERANCES, "int8": Tolerance(sqnr_db=3.0, top1_agreement=0.0)})
_TOLERANCES_OPENVINO = MappingProxyType({**_TOLERANCES, "bf16": _BF16, "int8": _TOLERANCES_INT8["int8"]})

W8A8 = "int8-w8a8"  # Core ML's precision whose activations are calibrated
# Core ML's, oldest first. Measured by the reference runner on S: see docs/coreml.md.
DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
_COREML_TOLERANCES = MappingProxyType(
    {
        "fp32": Tolerance(sqnr_db=90.0),
        "fp16": Tolerance(sqnr_db=40.0),
        "int8": Tolerance(sqnr_db=25.0, top1_agreement=0.9),
        W8A8: Tolerance(sqnr_db=10.0, top1_agreement=0.8),
        "palettized8": Tolerance(sqnr_db=25.0, top1_agreement=0.9),
        "palettized6": Tolerance(sqnr_db=15.0, top1_agreement=0.8),
        "palettized4": Tolerance(sqnr_db=3.0, top1_agreement=0.0),
    }
)

_COREAI_TOLERANCES = MappingProxyType({"fp32": Tolerance(sqnr_db=90.0), "fp16": Tolerance(sqnr_db=35.0)})

_SEGMENTERS = dict.fromkeys(("deeplabv3", "pspnet"), ("raw", "labels"))
_RAW_DEEPLABV3 = MappingProxyType({"deeplabv3": ("raw",)})  # coreai-torch 0.4.3 cannot take PSPNet's pooling
_RAW_SEGMENTERS = dict.fromkeys(_SEGMENTERS, ("raw",))
_RAW_DENSE = MappingProxyType({"retinanet": ("raw",), **_SEGMENTERS})  # NonMaxSuppression is not to be had everywhere
_ALL_DENSE = MappingProxyType({"retinanet": ("raw", "detections"), "mask-rcnn": ("detections",), **_SEGMENTERS})

DENSE_PRECISIONS = ("fp32", "fp16", "int8")
DENSE_INT8 = ("onnxruntime", "openvino")  # whose files run here, so that AP and mean IoU of them are known

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
                tolerances=_TOLERANCES_INT8,
                aliases=("onnx",),
                any_size=True,
                dense=_ALL_DENSE,
            ),
            Target(
                name="openvino",
                title="OpenVINO",
                files=("model.xml", "model.bin"),
                extra="openvino",
                source="onnx",
                modules=("openvino",),
                tolerances=_TOLERANCES_OPENVINO,
                any_size=True,
                dense=_ALL_DENSE,
            ),
            Target(
                name="tensorrt",
                title="TensorRT",
                files=("model.onnx",),  # `dualtoken build` puts model.engine beside it, on the device
                extra="tensorrt",
                source="onnx",
                modules=("tensorrt", "cuda"),
                tolerances=_TOLERANCES_INT8,
                aliases=("trt",),
                portable=False,
                built_by="build",
                checked_by="onnxruntime",
                dense=_RAW_DENSE,
                vendor="TensorRT from NVIDIA (docs/tensorrt.md)",
            ),
            Target(
                name="aotinductor",
                title="AOTInductor",
                files=("model.pt2",),
                extra="export",
                source="torch",
                modules=("torch",),
                tolerances=_TOLERANCES_INDUCTOR,
                aliases=("aoti",),
                portable=False,
                dense=_RAW_SEGMENTERS,
            ),
            Target(
                name="coreml",
                title="Core ML",
                files=("model.mlpackage",),
                extra="coreml",
                source="torch",
                modules=("coremltools",),
                tolerances=_COREML_TOLERANCES,
                dense=_RAW_DENSE,
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
                dense=_RAW_DEEPLABV3,
                check_images=2,  # float16 takes 38 s an image on two cores
            ),
            Target(
                name="litert",
                title="LiteRT",
                files=("model.tflite",),
                extra="litert",
                source="torch",
                modules=("ai_edge_litert", "ai_edge_quantizer"),
                tolerances=_TOLERANCES,
                aliases=("tflite",),
                dense=_RAW_DENSE,
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


def check_dense(target: Target, head: str, form: str, precision: str) -> None:
    """Raises UsageError where the target does not offer the head, the form of its outputs, or the precision for it."""
    if head not in target.dense:
        offered = ", ".join(t.name for t in TARGETS.values() if head in t.dense)
        raise UsageError(f"{target.name} takes no {head}; targets that do: {offered}")
    if form not in target.dense[head]:
        offered = ", ".join(t.name for t in TARGETS.values() if form in t.dense.get(head, ()))
        option = "--suppress" if form == "detections" else "--argmax"
        raise UsageError(f"{target.name} has no {form} of {head} in the graph; leave {option} out, or take {offered}")
    if precision not in DENSE_PRECISIONS:
        raise UsageError(f"{head} is exported in {' or '.join(DENSE_PRECISIONS)}, not in {precision}")
    if precision == "fp16" and form == "detections" and target.name == "onnxruntime":
        raise UsageError(
            f"{target.name} computes in float16, which has steps of half a pixel from 512 on, so {head} has no "
            "detections in it; give --precision fp32, or for RetinaNet leave --suppress out"
        )
    if precision == "int8" and (target.name not in DENSE_INT8 or head == "mask-rcnn"):
        raise UsageError(
            f"{head} has no int8 for {target.name}; RetinaNet and the segmenters have it for {', '.join(DENSE_INT8)}"
        )
