"""An ONNX file of anyone's as the graph that exporters take: behind our input contract, with our outputs and opset."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx.inliner import inline_local_functions
from torch import nn

from dualtoken_deploy.errors import ConversionError, InputError, UsageError, first_line
from dualtoken_deploy.models.named_outputs import NamedOutputs
from dualtoken_deploy.models.onnx_reference import DOMAINS, reference_inside
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.request import Request

IR_VERSION = 10  # the least that the opsets of our exporters ask for


def is_file(model: nn.Module) -> bool:
    """Whether a module is an ONNX file, so that there is nothing to trace."""
    return isinstance(model, NamedOutputs) and reference_inside(model) is not None


def graph_of_file(model: nn.Module, request: Request, opset: int) -> onnx.ModelProto:
    """The file's graph in this opset: the contract's input in front, fixed shapes, the outputs that were asked for.

    Raises UsageError on an output named as the input is, ConversionError where the opset cannot be had, InputError
    where the picture's shape does not go through.
    """
    reference = reference_inside(model)
    assert isinstance(model, NamedOutputs)  # noqa: S101  # is_file() was asked
    assert reference is not None  # noqa: S101
    if request.contract.tensor.name in {spec.name for spec in request.outputs}:
        raise UsageError(f"an output is called {request.contract.tensor.name!r}, as the input is; give --output-names")
    graph = ir.from_proto(_in_opset(reference.proto, opset, reference.path.name))
    _drop_notes(graph)
    _put_constants_second(graph.graph)
    picture = next(v for v in graph.graph.inputs if v.name == reference.input)
    _choose_outputs(graph.graph, model, request.outputs)
    _put_input(graph.graph, picture, request.contract)
    return _with_shapes(ir.to_proto(graph), request, reference.path.name)


def _in_opset(given: onnx.ModelProto, opset: int, file: str) -> onnx.ModelProto:
    """A copy in another opset, its functions written out."""
    proto = onnx.ModelProto()
    proto.CopyFrom(given)
    if proto.functions:
        proto = inline_local_functions(proto)
    own = next((o.version for o in proto.opset_import if o.domain in DOMAINS), opset)
    if own != opset:
        try:
            proto = onnx.version_converter.convert_version(proto, opset)
        except (RuntimeError, ValueError) as error:
            raise ConversionError(
                f"{file} is of opset {own} and cannot be taken to opset {opset} ({first_line(error)}); export it in "
                f"opset {opset}"
            ) from error
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    return proto


def _drop_notes(model: ir.Model) -> None:
    """Shapes that were noted for another picture, and inputs that only stand for weights."""
    graph = model.graph
    weights = set(graph.initializers)
    for value in [v for v in graph.inputs if v.name in weights]:
        graph.inputs.remove(value)
    for node in graph.all_nodes():
        for value in node.outputs:
            value.shape = None


def _put_constants_second(graph: ir.Graph) -> None:
    """x + b for b + x, as our own graphs have it: what is known of runtimes' fusions (qdq.py) is known of that."""
    for node in graph:
        if node.op_type in ("Add", "Mul") and len(node.inputs) == 2:
            first, second = node.inputs
            if _constant_value(first) and not _constant_value(second):
                node.replace_input_with(0, second)
                node.replace_input_with(1, first)


def _constant_value(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None


def _choose_outputs(graph: ir.Graph, model: NamedOutputs, specs: tuple[TensorSpec, ...]) -> None:
    """The picked outputs in their order, under the bundle's names and types; others go."""
    every = list(graph.outputs)
    _make_free(graph, {spec.name for spec in specs})
    del graph.outputs[:]
    for (place, _), spec in zip(model.picks, specs, strict=True):
        node = ir.node(
            "Cast", [every[place]], {"to": ir.DataType.from_numpy(np.dtype(spec.dtype))}, name=f"{spec.name}/Cast"
        )
        node.outputs[0].name = spec.name
        node.outputs[0].dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
        graph.append(node)
        graph.outputs.append(node.outputs[0])


def _make_free(graph: ir.Graph, names: set[str], beside: ir.Value | None = None) -> None:
    """Takes names of the bundle's own off the file's values, but off `beside`."""
    inside = [value for node in graph.all_nodes() for value in node.outputs]
    for value in (*inside, *graph.inputs, *list(graph.initializers.values())):
        if value.name in names and value is not beside:
            value.name = f"{value.name}_inside"


def _put_input(graph: ir.Graph, picture: ir.Value, contract: InputContract) -> None:
    """The contract's tensor in front: as it is, or uint8 NHWC RGB -> (x - 255 mean) / (255 std) in NCHW."""
    spec = contract.tensor
    _make_free(graph, {spec.name}, beside=picture)
    if contract.kind == "tensor":
        picture.name, picture.shape = spec.name, ir.Shape(spec.shape)
        return
    given = ir.Value(
        name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
    )
    shift = _constant(graph, "input.shift", 255.0 * np.array(contract.mean))
    gain = _constant(graph, "input.gain", 1.0 / (255.0 * np.array(contract.std)))
    cast = ir.node("Cast", [given], {"to": ir.DataType.FLOAT}, name="input/Cast")
    less = ir.node("Sub", [cast.outputs[0], shift], name="input/Sub")
    scaled = ir.node("Mul", [less.outputs[0], gain], name="input/Mul")
    # transposed last, beside the first convolution, as in ImageInput
    moved = ir.node("Transpose", [scaled.outputs[0]], {"perm": [0, 3, 1, 2]}, name="input/Transpose")
    for node in (cast, less, scaled, moved):
        node.outputs[0].name = node.name
    ir.convenience.replace_all_uses_with(picture, moved.outputs[0])
    graph.inputs[graph.inputs.index(picture)] = given
    first = next(iter(graph), None)
    if first is None:
        graph.extend([cast, less, scaled, moved])
    else:
        graph.insert_before(first, [cast, less, scaled, moved])


def _constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    tensor = ir.tensor(values.astype(np.float32), name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _with_shapes(proto: onnx.ModelProto, request: Request, file: str) -> onnx.ModelProto:
    """Shapes of all values, from the picture's; the outputs' as they were seen."""
    for output, spec in zip(proto.graph.output, request.outputs, strict=True):
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(spec.dtype))
        output.CopyFrom(onnx.helper.make_tensor_value_info(spec.name, kind, spec.shape))
    try:
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        size = "x".join(map(str, request.contract.size))
        raise InputError(f"{file} does not take pictures of {size}: {first_line(error)}") from error
    return inferred
