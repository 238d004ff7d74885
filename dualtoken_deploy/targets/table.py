"""THE table of targets: one row each, with what it takes to export and to run it.

A row's name is also the name of the folder with its exporter, its runner, and what quantizes and looks into its files.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType, ModuleType

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.devices import BUILD, Device
from dualtoken_deploy.targets.precision import RANGES, SEARCH, Precision, by_name


@dataclass(frozen=True)
class Target:
    """One deployment target.

    `files` are written by the exporter, the first is the one an app loads. `source` is what the exporter converts:
    "onnx" or "torch". `modules` must import to run it; exporting needs those and the extra [export]. `settings`:
    options of export that are this target's own; `named`: those that are in a bundle's name; `set_precisions`: those
    that some alone offer. `check_images`: photographs that export checks on, where the runtime is too slow here for all
    of them. `heads`: those of this package with the forms of their outputs that are on offer. `product_kinds`: what the
    runtime calls operators that hold a model's matrix products. `libraries`: whose versions a manifest keeps. `triton`:
    the backend that takes the files, and their names there. `triton_switches`: of the backend, by precision, those that
    are on. `quantizers`: for precisions that search, the default first. `looks`: of a target whose bundles can be
    looked into, by precision the dB below which a layer counts as drifted. `devices`: the kinds of device that it is
    for.

    `portable`: the artifact runs on any machine of its kind; otherwise it is code for the machine that made it, slow to
    make, and `--target all` leaves it out. `built_by` names a command that finishes the bundle on the device: exporting
    then needs none of `modules`, and the files are checked with the runner of the target `checked_by` instead. `vendor`
    is what running needs besides the extra, from no package index. `compiler`: modules of a compiler that needs no
    device; exporting then ends with the target's `compile_files`, and the bundle is "compiled", not "prepared".
    `labels_inside`: the artifact of a classifier holds the class names itself.
    """

    name: str
    title: str
    files: tuple[str, ...]
    extra: str
    source: str
    modules: tuple[str, ...]
    precisions: Mapping[str, Precision]  # by name
    set_precisions: Mapping[str, Precision] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    any_size: bool = False  # offers --image-size dynamic
    portable: bool = True
    built_by: str | None = None
    checked_by: str | None = None
    vendor: str | None = None
    compiler: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    check_images: int | None = None
    heads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    product_kinds: tuple[str, ...] = ()
    libraries: tuple[str, ...] = ()
    triton: tuple[str, Mapping[str, str]] | None = None
    triton_switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    quantizers: tuple[str, ...] = ()
    looks: Mapping[str, float] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()
    labels_inside: bool = False

    def precision(self, name: str) -> Precision:
        """The row of a precision. Raises UsageError where the target does not offer it."""
        offered = {**self.precisions, **self.set_precisions}
        if name not in offered:
            raise UsageError(f"unknown precision {name!r} for {self.name}; valid precisions: {', '.join(offered)}")
        return offered[name]

    def takes(self, origin: str) -> bool:
        """Whether the exporter converts models of that origin: an "onnx" file is none that can be traced."""
        return origin != "onnx" or self.source == "onnx"

    @property
    def folder(self) -> str:
        """The package under dualtoken_deploy.targets with its exporter and runner."""
        return self.name.replace("-", "_")

    def part(self, name: str) -> ModuleType:
        """One of its modules: "export", "runner", ... Loaded when it is needed, and here alone."""
        return importlib.import_module(f"dualtoken_deploy.targets.{self.folder}.{name}")

    def missing(self, modules: tuple[str, ...] | None = None) -> list[str]:
        """Modules that are not installed here; those that running needs unless others are named."""
        return [m for m in modules or self.modules if importlib.util.find_spec(m) is None]

    @property
    def export_modules(self) -> tuple[str, ...]:
        """Modules that exporting needs: those of its source, and of the target itself where that takes part."""
        source = EXPORT_MODULES if self.source == "onnx" else ("torch",)
        return (*source, *self.compiler) if self.built_by else tuple(dict.fromkeys((*source, *self.modules)))


EXPORT_MODULES = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")

# fp32 measured 118-125 dB and fp16 54-75 dB on S over photographs; the gates leave room for other weights.
_FP32 = Precision("fp32", "float32", "float32", Tolerance(100.0))
_FP16 = Precision("fp16", "float16", "float16", Tolerance(45.0))
_FP16_WEIGHTS = Precision("fp16", "float16", "float32", Tolerance(45.0))
# bf16 keeps 8 bits of a number; measured 46 dB on S, 19 dB less than fp16 with its 11, as three bits should be.
_BF16 = Precision("bf16", "bfloat16", "bfloat16", Tolerance(30.0))
# int8 is gated by its accuracy on held-out pictures instead, so all that is asked of the logits is to be of use.
_INT8 = Precision("int8", "int8", "int8", Tolerance(3.0, 0.0), SEARCH)
_INT8_WEIGHTS = Precision("int8-weights", "int8", "float32", Tolerance(3.0, 0.0), SEARCH)
_INT4_WEIGHTS = Precision("int4-weights", "int4", "float32", Tolerance(3.0, 0.0), SEARCH)
# TensorRT's is Q/DQ around float16.
_INT8_HALF = replace(_INT8, floats="float16")

# Attention in its parts, which the builder fuses by itself. Convolutions and pooling have bfloat16 from opset 22 on,
# DequantizeLinear has INT4 and blocks from 21 on. The oldest GPUs are those for which the builder 1.7.1 does not refuse
# the precision; a test asks it.
_RTX = by_name(
    replace(_FP32, oldest=(8, 0)),
    replace(_FP16, oldest=(7, 5)),
    replace(_BF16, oldest=(8, 0), opset=22),
    replace(_INT8_HALF, oldest=(7, 5)),
    Precision("fp8", "float8", "float8", Tolerance(3.0, 0.0), SEARCH, "float16", oldest=(8, 9), part="fp8"),
    Precision("int4", "int4", "float16", Tolerance(3.0, 0.0), SEARCH, opset=21, oldest=(8, 0), part="int4"),
)

W8A8 = "int8-w8a8"  # Core ML's precision whose activations are calibrated
# Core ML's, oldest first. Measured by the reference runner on S: see docs/coreml.md.
DEPLOYMENT_TARGETS = ("iOS16", "iOS17", "iOS18", "iOS26")
_COREML = by_name(
    Precision("fp32", "float32", "float32", Tolerance(90.0)),
    Precision("fp16", "float16", "float16", Tolerance(40.0)),
    Precision("int8", "int8", "float16", Tolerance(25.0, 0.9)),
    Precision(W8A8, "int8", "int8", Tolerance(10.0, 0.8), RANGES),
    Precision("palettized8", "int8 palette", "float16", Tolerance(25.0, 0.9)),
    Precision("palettized6", "int6 palette", "float16", Tolerance(15.0, 0.8), RANGES),
    Precision("palettized4", "int4 palette", "float16", Tolerance(3.0, 0.0), RANGES),
)
_COREAI = by_name(
    Precision("fp32", "float32", "float32", Tolerance(90.0)), Precision("fp16", "float16", "float16", Tolerance(35.0))
)

_SEGMENTERS = dict.fromkeys(("deeplabv3", "pspnet"), ("raw", "labels"))
_RAW_DEEPLABV3 = MappingProxyType({"deeplabv3": ("raw",)})  # coreai-torch 0.4.3 cannot take PSPNet's pooling
_RAW_SEGMENTERS = dict.fromkeys(_SEGMENTERS, ("raw",))
_RAW_DENSE = MappingProxyType({"retinanet": ("raw",), **_SEGMENTERS})  # NonMaxSuppression is not to be had everywhere
_ALL_DENSE = MappingProxyType({"retinanet": ("raw", "detections"), "mask-rcnn": ("detections",), **_SEGMENTERS})

HEAD_PRECISIONS = ("fp32", "fp16", "int8")  # in which heads were measured
HEAD_INT8 = ("onnxruntime", "openvino", "litert")  # whose files run here, so that AP and mean IoU of them are known

# The bundles of this project keep 110, 45, 15 and 12 dB at their worst layer.
_LOOKS = MappingProxyType({"fp32": 80.0, "fp16": 35.0, "bf16": 10.0, "int8": 8.0})
# Core ML's round every tensor to float16: T (mix) with trained weights keeps 33 dB at its worst layer. A fault of a
# whole layer, a transposed or rescaled weight, leaves less than 3 dB whatever the precision.
_COREML_LOOKS = MappingProxyType(
    {
        "fp32": 80.0,
        "fp16": 25.0,
        "int8": 18.0,
        W8A8: 8.0,
        "palettized8": 18.0,
        "palettized6": 10.0,
        "palettized4": 3.0,
    }
)

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
                precisions=by_name(_FP32, _FP16_WEIGHTS, _INT8),
                aliases=("onnx",),
                any_size=True,
                heads=_ALL_DENSE,
                product_kinds=(
                    *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "Attention"),
                    *("MultiHeadAttention", "QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "MatMulInteger"),
                    *("QGemm", "ConvInteger"),
                ),
                libraries=("onnxruntime",),
                triton=("onnxruntime", {"model.onnx": "model.onnx"}),
                quantizers=("qdq", "qdq-symmetric"),
                looks=_LOOKS,
                devices=(
                    Device("CPU of a server or PC (x86 or Arm; Linux, Windows, macOS)", "fp32", "export anywhere"),
                ),
            ),
            Target(
                name="openvino",
                title="OpenVINO",
                files=("model.xml", "model.bin"),
                extra="openvino",
                source="onnx",
                modules=("openvino",),
                precisions=by_name(_FP32, _FP16_WEIGHTS, _BF16, _INT8),
                any_size=True,
                heads=_ALL_DENSE,
                product_kinds=(
                    *("FullyConnected", "Convolution", "GroupConvolution", "ScaledDotProductAttention", "MatMul"),
                    *("FullyConnectedQuantizedLegacy", "FullyConnectedCompressed"),
                ),
                libraries=("openvino", "nncf"),
                triton=("openvino", {"model.xml": "model.xml", "model.bin": "model.bin"}),
                triton_switches={"bf16": ("HINT_BF16",)},
                quantizers=("qdq", "nncf"),
                looks=_LOOKS,
                devices=(Device("CPU or GPU of Intel", "fp16", "export anywhere"),),
            ),
            Target(
                name="tensorrt",
                title="TensorRT",
                files=("model.onnx",),  # `dualtoken build` puts model.engine beside it, on the device
                extra="tensorrt",
                source="onnx",
                modules=("tensorrt", "cuda"),
                precisions=by_name(_FP32, _FP16, _INT8_HALF),
                aliases=("trt",),
                portable=False,
                built_by="build",
                checked_by="onnxruntime",
                heads=_RAW_DENSE,
                vendor="TensorRT from NVIDIA (docs/tensorrt.md)",
                libraries=("tensorrt", "cuda-bindings"),
                triton=("tensorrt", {"model.engine": "model.plan"}),
                quantizers=("qdq-symmetric",),
                devices=(
                    Device(
                        "NVIDIA Jetson (JetPack 6: TensorRT 10.x)",
                        "fp16",
                        "export anywhere, build on the Jetson",
                        then=(BUILD,),
                    ),
                    Device(
                        "NVIDIA data centre (A100, L4, H100, B200: TensorRT 10 or 11)",
                        "fp16",
                        "export anywhere, build on that GPU",
                        then=(BUILD,),
                    ),
                ),
            ),
            Target(
                name="tensorrt-rtx",
                title="TensorRT for RTX",
                files=("model.engine", "model.onnx"),
                extra="tensorrt-rtx",
                source="onnx",
                modules=("tensorrt_rtx_bindings", "cuda"),
                precisions=_RTX,
                aliases=("rtx",),
                portable=False,
                built_by="build",
                checked_by="onnxruntime",
                compiler=("tensorrt_rtx_bindings",),
                heads=_RAW_DENSE,
                settings=("compute_capability", "weightless", "batches"),
                libraries=("tensorrt-rtx-cu13-libs", "cuda-bindings"),
                quantizers=("qdq-symmetric",),
                devices=(
                    Device(
                        "NVIDIA RTX PC or workstation (RTX 30 and later; Linux, Windows)",
                        "fp16",
                        "an engine from any Linux x86-64 machine, no GPU",
                    ),
                    Device(
                        "NVIDIA RTX 20",
                        "fp16",
                        "the same",
                        options="--compute-capability 7.5",
                    ),
                ),
            ),
            Target(
                name="aotinductor",
                title="AOTInductor",
                files=("model.pt2",),
                extra="export",
                source="torch",
                modules=("torch",),
                precisions=by_name(_FP32, _FP16, _BF16),
                aliases=("aoti",),
                portable=False,
                heads=_RAW_SEGMENTERS,
                libraries=("torch",),
                devices=(
                    Device(
                        "the machine you are on, with PyTorch", "fp32", "export there: the code is for its CPU or GPU"
                    ),
                ),
            ),
            Target(
                name="coreml",
                title="Core ML",
                files=("model.mlpackage",),
                extra="coreml",
                source="torch",
                modules=("coremltools",),
                precisions=_COREML,
                heads=_RAW_DENSE,
                settings=("deployment_target", "layout"),
                product_kinds=("linear", "conv", "matmul", "scaled_dot_product_attention"),
                libraries=("coremltools",),
                labels_inside=True,
                looks=_COREML_LOOKS,
                devices=(Device("iPhone, iPad, Mac", "fp16", "export anywhere, run on the device"),),
            ),
            Target(
                name="coreai",
                title="Core AI",
                files=("model.aimodel",),
                extra="coreai",
                source="torch",
                modules=("coreai", "coreai_torch"),
                precisions=_COREAI,
                heads=_RAW_DEEPLABV3,
                check_images=2,  # float16 takes 38 s an image on two cores
                product_kinds=("batch_matmul", "conv2d"),
                libraries=("coreai-core", "coreai-torch"),
                devices=(Device("iPhone, iPad, Mac with Core AI", "fp16", "export on Linux or macOS"),),
            ),
            Target(
                name="litert",
                title="LiteRT",
                files=("model.tflite",),
                extra="litert",
                source="torch",
                modules=("ai_edge_litert", "ai_edge_quantizer"),
                precisions=by_name(_FP32, _FP16_WEIGHTS, _INT8, _INT8_WEIGHTS, _INT4_WEIGHTS),
                aliases=("tflite",),
                heads=_RAW_DENSE,
                product_kinds=("FULLY_CONNECTED", "BATCH_MATMUL", "CONV_2D", "DEPTHWISE_CONV_2D"),
                libraries=("ai-edge-litert", "ai-edge-quantizer"),
                labels_inside=True,
                devices=(Device("Android phone, Raspberry Pi", "fp32", "export on Linux"),),
                quantizers=("dynamic", "static"),
                looks=MappingProxyType({**_LOOKS, "int8-weights": 8.0, "int4-weights": 2.0}),
            ),
            Target(
                name="executorch",
                title="ExecuTorch",
                files=("model.pte",),
                extra="executorch",
                source="torch",
                modules=("executorch", "torch"),
                precisions=by_name(_FP32, _INT8),
                set_precisions=by_name(replace(_FP16, tolerance=_COREML["fp16"].tolerance)),
                settings=("backend",),
                named=("backend",),
                aliases=("pte",),
                heads=_RAW_DENSE,
                product_kinds=(
                    *("XNNFullyConnected", "XNNConv2d", "XNNDepthwiseConv2d", "XNNBatchMatrixMultiply"),
                    *("aten::linear.out", "aten::addmm.out", "aten::mm.out", "aten::bmm.out", "aten::convolution.out"),
                    *("aten.linear.default", "aten.mm.default", "aten.bmm.default", "aten.convolution.default"),
                    "et_vk.conv_with_clamp.default",
                ),
                libraries=("executorch", "torchao"),
                quantizers=("static", "dynamic"),
                looks=_LOOKS,
                devices=(Device("Android phone or iPhone, in an app built on ExecuTorch", "fp32", "export on Linux"),),
            ),
            Target(
                name="ncnn",
                title="ncnn",
                files=("model.ncnn.param", "model.ncnn.bin"),
                extra="ncnn",
                source="torch",
                modules=("ncnn",),
                precisions=by_name(_FP32, _FP16_WEIGHTS),
                product_kinds=("Convolution", "ConvolutionDepthWise", "InnerProduct", "Gemm", "MatMul"),
                libraries=("ncnn", "pnnx"),
                devices=(Device("phone or board, in C++ without a framework", "fp32", "export on Linux"),),
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


def check_head(target: Target, head: str, form: str, precision: str) -> None:
    """Raises UsageError where the target does not offer the head, the form of its outputs, or the precision for it."""
    if head not in target.heads:
        offered = ", ".join(t.name for t in TARGETS.values() if head in t.heads)
        raise UsageError(f"{target.name} takes no {head}; targets that do: {offered}")
    if form not in target.heads[head]:
        offered = ", ".join(t.name for t in TARGETS.values() if form in t.heads.get(head, ()))
        option = "--suppress" if form == "detections" else "--argmax"
        raise UsageError(f"{target.name} has no {form} of {head} in the graph; leave {option} out, or take {offered}")
    if precision not in HEAD_PRECISIONS:
        raise UsageError(f"{head} is exported in {' or '.join(HEAD_PRECISIONS)}, not in {precision}")
    if precision == "fp16" and form == "detections" and target.name == "onnxruntime":
        raise UsageError(
            f"{head} with detections was not measured in fp16 on {target.name}; give --precision fp32, or for "
            "RetinaNet leave --suppress out"
        )
    if precision == "int8" and (target.name not in HEAD_INT8 or head == "mask-rcnn"):
        raise UsageError(
            f"{head} has no int8 for {target.name}; RetinaNet and the segmenters have it for {', '.join(HEAD_INT8)}"
        )


def product_kinds() -> frozenset[str]:
    """Kinds that hold a model's matrix products, by the names that the runtimes, and eager's modules, give them."""
    return frozenset({"Linear", "Conv2d", *(kind for row in TARGETS.values() for kind in row.product_kinds)})
