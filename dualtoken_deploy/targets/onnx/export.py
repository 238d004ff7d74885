"""torch -> ONNX, simplified and checked: the source of every target that takes ONNX."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from dualtoken_deploy import numerics
from dualtoken_deploy.deploy import deploy_form
from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.errors import ConversionError, UsageError, first_line
from dualtoken_deploy.models.registry import MAX_IMAGE_SIZE, MIN_IMAGE_SIZE
from dualtoken_deploy.models.scan import as_operator
from dualtoken_deploy.targets.onnx.brief import brief
from dualtoken_deploy.targets.onnx.from_file import graph_of_file, is_file
from dualtoken_deploy.targets.onnx.naming import name_after_modules, name_joined
from dualtoken_deploy.targets.request import Request, Tell, quiet
from dualtoken_deploy.targets.tracing import own_path, why
from dualtoken_deploy.tasks.table import get_task

ATTENTION_OPSET = 23  # the first with the Attention operator
DECOMPOSED_OPSET = 20  # Gelu and LayerNormalization are operators, attention is MatMul, Softmax, MatMul
OPSETS = range(DECOMPOSED_OPSET, 24)
ROI_ALIGN_OPSET = 21  # onnxruntime 1.31 has no kernel for the RoiAlign of opset 22

# A simplifier only reorders float32 arithmetic; measured on S: 130 dB and more.
SIMPLIFIED_SQNR_DB = 110.0
SIMPLIFIED_AGREEMENT = 0.98

# onnxsim would turn each linear layer over (B, N, C) into Reshape, Gemm, Reshape: no gain, and harder to quantize.
SKIPPED_OPTIMIZERS = ["fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched"]

WEIGHTED = ("Conv", "MatMul", "Gemm")  # operators with weights of two axes and more
# Kept in float32 by `to_float16`: statistics and exponentials lose or overflow in half precision.
FLOAT32_OPERATORS = ("LayerNormalization", "Softmax", "ReduceMean", "Sigmoid")


_OUTPUT = "dualtoken_output_"  # of a graph, until it has its own names

_DIMS: Mapping[str, Any] = MappingProxyType(
    {
        "batch": torch.export.Dim("batch", min=1, max=1024),
        "height": torch.export.Dim("height", min=MIN_IMAGE_SIZE, max=MAX_IMAGE_SIZE),
        "width": torch.export.Dim("width", min=MIN_IMAGE_SIZE, max=MAX_IMAGE_SIZE),
    }
)


@dataclass(frozen=True)
class OnnxExport:
    """The graph, the rules that made its source, and its operator counts before and after each step."""

    model: onnx.ModelProto
    rules: tuple[str, ...]
    operators: Mapping[str, Mapping[str, int]]


def export_onnx(model: nn.Module, request: Request, rules: Iterable[str], opset: int, tell: Tell) -> OnnxExport:
    """The deploy form of `model` as a checked ONNX model in float32.

    Raises UsageError on an opset outside of OPSETS, ConversionError where an exporter, the simplifier or the checker
    fails, or where simplifying changed the result.
    """
    if opset not in OPSETS:
        raise UsageError(f"opset {opset} is not offered; choose one of {OPSETS.start} to {OPSETS.stop - 1}")
    if _cuts_out(request) and opset > ROI_ALIGN_OPSET:
        raise UsageError(f"ONNX Runtime has RoiAlign up to opset {ROI_ALIGN_OPSET}, not for {opset}; leave --opset out")
    applied: tuple[str, ...] = ()
    if is_file(model):  # which there is no module of, to rewrite and to trace
        tell(f"putting the file behind its input, in opset {opset}")
        exported = graph_of_file(model, request, opset)
    else:
        exported, applied = _traced(model, request, rules, opset, tell)
    tell("simplifying")
    simplified = simplify(exported, request)
    name_joined(simplified)
    pool_whole_maps(simplified)
    operators = {"exported": operator_counts(exported), "simplified": operator_counts(simplified)}
    _finish(simplified, request)
    return OnnxExport(simplified, applied, operators)


def _traced(
    model: nn.Module, request: Request, rules: Iterable[str], opset: int, tell: Tell
) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """The deploy form of a module as a graph with the modules' names, and the rules that applied."""
    tell("rewriting to the deploy form")
    form = deploy_form(model, rules, request.contract.size, any_size=request.contract.any_size)
    module = with_input(form.module, request)
    tell(f"tracing to ONNX opset {opset}")
    exported = trace(module, request, opset)
    name_after_modules(exported, inside=own_path(module))
    return exported, tuple(name for name, count in form.rules.items() if count)


def default_opset(request: Request) -> int:
    """The newest opset whose operators ONNX Runtime has."""
    return DECOMPOSED_OPSET if _cuts_out(request) else ATTENTION_OPSET


def _cuts_out(request: Request) -> bool:
    """Whether the graph has RoiAlign: what gives masks does."""
    return any(output.name == "masks" for output in request.outputs)


def with_input(module: nn.Module, request: Request) -> nn.Module:
    """The module behind its input contract: an image contract gets cast, mean and std in front."""
    contract = request.contract
    if contract.kind != "image":
        return module
    return nn.Sequential(ImageInput(contract.mean, contract.std, torch.float32), module)


def trace(module: nn.Module, request: Request, opset: int) -> onnx.ModelProto:
    """ONNX through torch.export. Dimensions with a name stay dynamic; the others are fixed."""
    spec = request.contract.tensor
    # two and 96, because torch.export takes a batch of one for a constant, and as well what a size happens to equal
    example = torch.zeros(spec.concrete(batch=2, side=96), dtype=getattr(torch, spec.dtype))
    named = {axis: _DIMS[name] for axis, name in enumerate(spec.shape) if isinstance(name, str)}
    dynamic = (named,) if named else None
    arguments: dict[str, Any] = {
        "dynamo": True,
        "opset_version": opset,
        "input_names": [spec.name],
        "output_names": [f"{_OUTPUT}{place}" for place in range(len(request.outputs))],
        "dynamic_shapes": dynamic,
        "verbose": False,
        "optimize": False,  # a fifth of an export's time, for what `_fold` and onnxsim do as well
    }
    from dualtoken_deploy.targets.onnx.scan import TRANSLATIONS as SCAN  # a table

    arguments["custom_translation_table"] = dict(SCAN)
    if request.task == "detect":  # whose heads have operations of their own
        from dualtoken_deploy.targets.onnx.custom_operators import TRANSLATIONS

        arguments["custom_translation_table"] |= TRANSLATIONS
    try:
        # torch prints the graph that it gave up on
        with quiet(), as_operator(), brief(), contextlib.redirect_stderr(io.StringIO()):
            program = torch.onnx.export(module, (example,), **arguments)
    except Exception as error:  # torch.export has no common base for what it raises, nor has the user's code
        raise ConversionError(f"torch.onnx cannot export {why(error, module)}") from error
    if program is None:
        raise ConversionError("torch.onnx returned no program")
    _fold(program.model)
    proto: onnx.ModelProto = program.model_proto
    name_outputs(proto, [o.name for o in request.outputs])
    return proto


def _fold(model: Any) -> None:
    """Folds constants of an onnx_ir.Model, casts to what a value is and sequences of a split, in place."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass  # comes with onnxscript
    from onnxscript.optimizer import fold_constants

    fold_constants(model, onnx_shape_inference=True)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Gives the graph's outputs their names, in place. torch.onnx does not see where a value inside has one already: an
    `embedding` of indices beside an output of that name."""
    new = {name: f"{name}_inside" for name in names}
    new |= {output.name: name for output, name in zip(model.graph.output, names, strict=True)}
    for node in model.graph.node:
        for values in (node.input, node.output):
            for place, value in enumerate(values):
                values[place] = new.get(value, value)
    for held in (model.graph.value_info, model.graph.initializer, model.graph.output):
        for one in held:
            one.name = new.get(one.name, one.name)


def simplify(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """onnxsim's form of the graph, held against the original on a fixed random input."""
    import onnxsim

    try:
        with quiet():
            simplified, ok = onnxsim.simplify(model, skipped_optimizers=SKIPPED_OPTIMIZERS)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        raise ConversionError(f"onnxsim cannot simplify the model: {first_line(error)}") from error
    if not ok:
        raise ConversionError("onnxsim reports that its result does not check against the original")
    out: onnx.ModelProto = simplified
    check_same(model, out, request, "onnxsim")
    return out


def pool_whole_maps(model: onnx.ModelProto) -> int:
    """AveragePool whose one window covers the map, without padding -> GlobalAveragePool, in place; how many there were.

    A window that reaches over the edge is cut there (ceil_mode), so its mean is the map's. OpenVINO 2026.4 takes no
    kernel larger than the map.
    """
    found = 0
    graph = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    for node in model.graph.node:
        given, made = shapes.get(node.input[0] if node.input else "", []), shapes.get(node.output[0], [])
        if node.op_type != "AveragePool" or not all(given[2:]) or made[2:] != [1, 1] or given[2:] == [1, 1]:
            continue
        how = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        covers = all(k >= side for k, side in zip(how["kernel_shape"], given[2:], strict=True))
        if covers and not any(how.get("pads", ())) and how.get("auto_pad", b"NOTSET") == b"NOTSET":
            node.op_type = "GlobalAveragePool"
            del node.attribute[:]
            found += 1
    return found


def check_same(before: onnx.ModelProto, after: onnx.ModelProto, request: Request, who: str) -> None:
    """Holds a changed graph against the one before, on a fixed random input. Raises ConversionError.

    Detections and label maps jump where two candidates are level, so of them most have to be the same.
    """
    old, new = _run(before, request), _run(after, request)
    found = get_task(request.task).compare(old, new)
    chosen = {"boxes", "labels"} & set(old)  # what was chosen among candidates: its values say nothing of rounding
    sqnr = SIMPLIFIED_SQNR_DB if chosen else found.sqnr_db
    agreement = 1.0 if not chosen and "top1" in get_task(request.task).metrics else (found.agreement or 1.0)
    if sqnr < SIMPLIFIED_SQNR_DB or agreement < SIMPLIFIED_AGREEMENT:
        raise ConversionError(
            f"{who} changed the result: SQNR {sqnr:.1f} dB and {agreement:.2%} the same; at least "
            f"{SIMPLIFIED_SQNR_DB} dB and {SIMPLIFIED_AGREEMENT:.0%} are needed"
        )


def to_float16(model: onnx.ModelProto) -> onnx.ModelProto:
    """float16 tensors and weights; float32 inputs, outputs and FLOAT32_OPERATORS."""
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    try:
        with quiet():
            converted: onnx.ModelProto = convert_float_to_float16(
                model, keep_io_types=True, op_block_list=[*DEFAULT_OP_BLOCK_LIST, *FLOAT32_OPERATORS]
            )
            drop_repeated_casts(converted)
            OnnxModel(converted).topological_sort()  # the converter appends its casts at the end
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"the float16 converter failed: {first_line(error)}") from error
    return converted


def drop_repeated_casts(model: onnx.ModelProto) -> int:
    """Removes the second cast of a value, in place: the float16 converter writes one of the same name for each node
    that reads the value in float32. Returns how many went."""
    made: set[str] = set()
    repeated = []
    for node in model.graph.node:
        if node.op_type == "Cast" and node.output[0] in made:
            repeated.append(node)
        made.update(node.output)
    for node in repeated:
        model.graph.node.remove(node)
    return len(repeated)


def store_halves(model: onnx.ModelProto) -> int:
    """Keeps the weights of products in float16, in place, each with a Cast to float32 behind it; how many.

    A runtime folds casts of constants once, when it loads the file, and then computes what it would with float32
    weights: half the file, and as fast. Everything else, statistics, anchors, what is added, stays as exact as it was.
    """
    read = {name for node in model.graph.node if node.op_type in WEIGHTED for name in node.input[:2]}
    casts = []
    for tensor in model.graph.initializer:
        if tensor.name not in read or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        weight = numpy_helper.to_array(tensor)
        if weight.ndim < 2 or float(np.abs(weight).max(initial=0.0)) > np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(weight.astype(np.float16), f"{name}/half"))
        casts.append(helper.make_node("Cast", [f"{name}/half"], [name], f"{name}/cast", to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return len(casts)


def operator_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Nodes by operator, most frequent first."""
    return dict(Counter(node.op_type for node in model.graph.node).most_common())


def _finish(model: onnx.ModelProto, request: Request) -> None:
    """Metadata in, stack traces of this machine out, and a last check."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del model.metadata_props[:]
    for key, value in request.metadata.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    model.graph.name = request.metadata.get("variant", "model")
    check_whole(model, "the exported ONNX")


def check_whole(model: onnx.ModelProto, what: str) -> None:
    """Raises ConversionError where onnx's checker does not take the model."""
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ConversionError(f"{what} does not check: {first_line(error)}") from error


def run_all(model: onnx.ModelProto, feeds: Mapping[str, numerics.Array]) -> list[numerics.Array]:
    """Every output of the graph in its order, by ONNX Runtime on the CPU, operator by operator as they are written.

    Raises ConversionError where it cannot.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # which takes longer than one run
    try:
        session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        outputs: list[numerics.Array] = session.run(None, dict(feeds))
    except Exception as error:  # ONNX Runtime's exceptions share no base but this
        raise ConversionError(f"ONNX Runtime cannot run the exported graph: {first_line(error)}") from error
    return outputs


def _run(model: onnx.ModelProto, request: Request) -> dict[str, numerics.Array]:
    """All outputs for a fixed random input, by name."""
    spec = request.contract.tensor
    values = np.random.default_rng(0).random(spec.concrete(batch=2, side=160))
    feed = (values * 255).astype(np.uint8) if spec.dtype == "uint8" else (4 * values - 2).astype(np.float32)
    names = [output.name for output in model.graph.output]
    return dict(zip(names, run_all(model, {spec.name: feed}), strict=True))
