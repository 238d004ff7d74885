"""Core ML: an ML program from torch.export, converted and compressed by coremltools, saved as an .mlpackage."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from dualtoken_deploy.bundle.blocks import Calibration
from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.ane import LAYOUTS, to_ane_layout
from dualtoken_deploy.deploy.rewrite import DEFAULT_RULES
from dualtoken_deploy.errors import ConversionError, InputError, UsageError, first_line
from dualtoken_deploy.models.dualtoken_vit import DualTokenViT
from dualtoken_deploy.quantize.calibration import FITTED
from dualtoken_deploy.targets.apple.constants import fold_constants
from dualtoken_deploy.targets.apple.names import name_after_modules, operation, path_of
from dualtoken_deploy.targets.apple.torch_program import PROBABILITIES, ImageClassifier, ImageDense, quiet, trace
from dualtoken_deploy.targets.coreml.activation_pass import quantize_activations
from dualtoken_deploy.targets.coreml.compress import COMPRESSIONS, GROUP, compress
from dualtoken_deploy.targets.coreml.mil.ops import OPERATIONS
from dualtoken_deploy.targets.coreml.mil.program import Program, load_program
from dualtoken_deploy.targets.coreml.mil.vendor import coremltools
from dualtoken_deploy.targets.coreml.package import OUTPUTS, describe, save
from dualtoken_deploy.targets.coreml.passes import teach
from dualtoken_deploy.targets.coreml.rounding import PICTURES, round_layers
from dualtoken_deploy.targets.coreml.structure import structure
from dualtoken_deploy.targets.coreml.validation import validated_once
from dualtoken_deploy.targets.request import Artifact, Request, Samples, Tell
from dualtoken_deploy.targets.runner import planar, planar_shape
from dualtoken_deploy.targets.table import DEPLOYMENT_TARGETS, W8A8, get_target
from dualtoken_deploy.targets.tracing import is_foreign, own_path, place_in, stack_names

DEFAULT_DEPLOYMENT_TARGET = "iOS18"
W8A8_SINCE = "iOS17"
ATTENTION_SINCE = "iOS18"  # scaled_dot_product_attention, and tables for groups of channels
PALETTES = MappingProxyType({"palettized4": 4, "palettized6": 6})  # of 8 bits the nearest of 256 values is near enough
ONES = MappingProxyType({"fp32": "FLOAT32"})  # coremltools' compute precision; float16 for every other


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.mlpackage. Raises UsageError on a combination that Core ML does not have, ConversionError."""
    ct = coremltools("exporting to Core ML")
    deployment = request.settings.get("deployment_target", DEFAULT_DEPLOYMENT_TARGET)
    has_ane = default_layout(model) == "ane"
    layout = request.settings.get("layout") or default_layout(model)
    check_request(request, deployment, layout)
    if layout == "ane" and not has_ane:
        raise UsageError("the ane layout is for DualToken-ViT with position-aware tokens alone; give --layout plain")
    tell("rewriting to the deploy form")
    module, rules = make_form(model, request, deployment, layout)
    calibration: Calibration | None = None
    if request.precision in PALETTES:
        calibration = _round_to_palettes(module, request, _since(deployment, ATTENTION_SINCE), tell)
    program, names = convert(ct, module, request, deployment, tell)
    if request.precision == W8A8:
        samples = calibration_samples(request)
        tell(f"measuring activations on {len(samples)} pictures by reference execution")
        program, in_float = quantize_activations(program, samples)
        calibration = _said(request, in_float)
    if request.precision in COMPRESSIONS:
        tell(f"compressing weights to {request.precision}")
        program = compress(program, request.precision, _since(deployment, ATTENTION_SINCE))
    describe(program, request.contract, {**request.metadata, "deployment_target": deployment, "layout": layout})
    package = folder / "model.mlpackage"
    labels = request.labels if request.contract.kind == "image" and request.task == CLASSIFY else None
    save(program, package, labels, OUTPUTS.get(request.task, {}))
    saved = load_program(package)
    check_executed_here(saved, names)
    kinds = Counter(op.kind for op in saved.operations if op.kind != "const")
    return Artifact(rules, {"mil": dict(kinds.most_common()), "structure": structure(saved)}, calibration=calibration)


def _said(request: Request, in_float: Sequence[str]) -> Calibration | None:
    return None if request.samples is None else replace(request.samples.said, in_float=tuple(in_float))


def _round_to_palettes(module: nn.Module, request: Request, grouped: bool, tell: Tell) -> Calibration:
    """Puts the weights of a deploy form on palettes, which compression then finds; says by which pictures."""
    samples, bits = _samples(request), PALETTES[request.precision]
    inputs = torch.from_numpy(planar(samples.inputs, request.contract.tensor)).float()
    count = min(PICTURES, len(inputs))
    tell(f"rounding weights to {bits} bits with what they read on {count} pictures")
    round_layers(module, _whole(module, request), inputs, bits, GROUP if grouped else None)
    how = f"palettes of {bits} bits over {count} of them"
    return replace(samples.said, method=FITTED, quantizer=how)


def _samples(request: Request) -> Samples:
    if request.samples is None:
        raise UsageError(f"{request.precision} needs pictures to be calibrated on")
    return request.samples


def default_layout(model: nn.Module) -> str:
    """The Neural Engine's layout where there is one for the model, else plain."""
    own = isinstance(model, DualTokenViT) and model.config.token_method == "position-aware"
    return "ane" if own else "plain"


def calibration_samples(request: Request) -> list[np.ndarray[Any, Any]]:
    """The request's samples as the program takes them, (B, 3, H, W) each. Raises UsageError without any."""
    inputs = planar(_samples(request).inputs, request.contract.tensor)
    return [np.repeat(one[None], request.contract.batch or 1, axis=0) for one in inputs]


def check_request(request: Request, deployment: str, layout: str) -> None:
    """Raises UsageError, InputError on what Core ML cannot have, with what would do."""
    if deployment not in DEPLOYMENT_TARGETS:
        raise UsageError(
            f"unknown deployment target {deployment!r}; valid deployment targets: {', '.join(DEPLOYMENT_TARGETS)}"
        )
    if request.precision == W8A8 and not _since(deployment, W8A8_SINCE):
        others = ", ".join(p for p in get_target("coreml").precisions if p != W8A8)
        raise UsageError(
            f"{W8A8} needs the quantize operation of {W8A8_SINCE}, which {deployment} lacks; give --deployment-target "
            f"{W8A8_SINCE} or later, or one of the precisions {others}"
        )
    if layout not in LAYOUTS:
        raise UsageError(f"unknown layout {layout!r}; valid layouts: {', '.join(LAYOUTS)}")
    if request.opset is not None:
        raise UsageError("opset is a matter of ONNX, and Core ML takes none; leave --opset out")
    if request.contract.batch is None:
        raise UsageError("a Core ML program here has fixed shapes, for the Neural Engine; give --batch a number")
    if request.contract.kind == "image":
        if request.contract.batch != 1:
            raise UsageError(
                f"Core ML's image input is one picture, not {request.contract.batch}; use --batch 1 or --input tensor"
            )
        repeated = [label for label, count in Counter(request.labels).items() if count > 1]
        if repeated and request.task == CLASSIFY:
            raise InputError(
                f"label {repeated[0]!r} stands for several classes, and Core ML's classifier needs each but once; "
                "make the labels distinct or use --input tensor"
            )


def make_form(model: nn.Module, request: Request, deployment: str, layout: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The deploy form in its layout, and the rules that applied.

    Where the target has an attention operation the scale stays in it, since it is the operation's own.
    """
    whole = _since(deployment, ATTENTION_SINCE)
    form = deploy_form(
        model, [r for r in DEFAULT_RULES if r != "fold_attention_scale" or not whole], request.contract.size
    )
    applied = tuple(name for name, count in form.rules.items() if count)
    if layout == "plain":
        return form.module, applied
    to_ane_layout(form.module, whole)
    return form.module, (*applied, "ane_layout")


def output_names(request: Request) -> list[str]:
    """Those of the request, and probabilities where a picture is classified."""
    classifier = request.contract.kind == "image" and request.task == CLASSIFY
    return [*(output.name for output in request.outputs), *([PROBABILITIES] if classifier else [])]


def _whole(module: nn.Module, request: Request) -> nn.Module:
    """The module behind what takes a picture's pixels, where the input is one."""
    if request.contract.kind != "image":
        return module
    wrapper = ImageClassifier if request.task == CLASSIFY else ImageDense
    return wrapper(module, request.contract)


def trace_named(module: nn.Module, request: Request) -> tuple[torch.export.ExportedProgram, dict[str, str]]:
    """The program that is converted, its operations named after the model's modules, and those names."""
    module = _whole(module, request)
    program = trace(module, request.contract).run_decompositions({})
    if is_foreign(module):
        fold_constants(program)
    return program, name_after_modules(program, own_path(module), output_names(request))


def convert(ct: Any, module: nn.Module, request: Request, deployment: str, tell: Tell) -> tuple[Any, Mapping[str, str]]:
    """The coremltools model of `module` behind the input contract, with uncompressed weights, and the names of its
    operations as trace_named gives them."""
    contract = request.contract
    image = contract.kind == "image"
    teach()
    tell("tracing with torch.export")
    program, names = trace_named(module, request)
    shape = planar_shape(contract)
    if image:
        inputs = [ct.ImageType(name=contract.tensor.name, shape=shape, color_layout=ct.colorlayout.RGB)]
    else:
        inputs = [ct.TensorType(name=contract.tensor.name, shape=shape, dtype=np.float32)]
    dtypes = {spec.name: getattr(np, spec.dtype) for spec in request.outputs}
    outputs = [(name, dtypes.get(name, np.float32)) for name in output_names(request)]
    tell(f"converting to Core ML for {deployment}")
    try:
        with quiet(), validated_once():
            converted = ct.convert(
                program,
                source="pytorch",
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, deployment),
                compute_precision=getattr(ct.precision, ONES.get(request.precision, "FLOAT16")),
                inputs=inputs,
                outputs=[ct.TensorType(name=name, dtype=dtype) for name, dtype in outputs],
                skip_model_load=True,
            )
            return converted, names
    except Exception as error:  # coremltools raises what its front end and its passes raise
        raise ConversionError(
            f"coremltools cannot convert {_where(program, _inside(module, request), error)}"
        ) from error


def _inside(module: nn.Module, request: Request) -> str:
    """Where the model lies in what trace_named traces."""
    path = own_path(module)
    return ".".join(part for part in ("model" if request.contract.kind == "image" else "", path) if part)


def _where(program: torch.export.ExportedProgram, inside: str, error: Exception) -> str:
    """Which operation of the model coremltools stopped at, by the name that its message or its stack has, and why."""
    text = first_line(error)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "call_function"}
    said = [word for word in re.findall(r"\w+", text) if word in nodes] or [n for n in stack_names(error) if n in nodes]
    if not said:
        return f"the model: {text}"
    node = nodes[said[0]]
    place = place_in(str(node.meta.get("stack_trace") or ""))
    return f"{operation(node)} in {path_of(node, inside)}{f' ({place})' if place else ''}: {text}"


def check_executed_here(program: Program, names: Mapping[str, str]) -> None:
    """Raises ConversionError on operations that the reference does not execute: nothing could be checked."""
    unknown = [op for op in program.operations if op.kind not in {*OPERATIONS, "const"}]
    if unknown:
        made = [op.outputs[0][0] for op in unknown]
        own = max((n for n in names if any(name.startswith(n) for name in made)), key=len, default=made[0])
        kinds = ", ".join(dict.fromkeys(op.kind for op in unknown))
        raise ConversionError(
            f"the Core ML program has {kinds} (in {names.get(own, own)}), which the reference here does not "
            "execute, so nothing could be checked; write that part with other operations"
        )


def _since(deployment: str, first: str) -> bool:
    order = list(DEPLOYMENT_TARGETS)
    return order.index(deployment) >= order.index(first)
