"""What ONNX Runtime's CPU kernels like of a graph with Q/DQ pairs; no value's numbers change but by rounding.

Measured on T (mix) and S in docs/int8.md: pairs as a quantizer leaves them cost more than integers gain there.

    linear:     DQ(x) DQ(w) -> MatMul -> Add b     =>  MatMulIntegerToFloat(x, w, b), one pass over the outputs, not two
    attention:  MatMul -> Softmax -> MatMul        =>  Attention, without the four transposes around it
    readers:    Q -> DQ -> what has no integers    =>  reads the float value, and the pair goes
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import helper, numpy_helper

from dualtoken_deploy.targets.onnx.export import ATTENTION_OPSET
from dualtoken_deploy.targets.onnx.graph import Graph, drop_unused
from dualtoken_deploy.targets.onnx.qdq import PRODUCTS
from dualtoken_deploy.targets.onnx.slow import BETWEEN, attentions
from dualtoken_deploy.targets.onnxruntime.layout import transpose_first

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators


def lay_out(model: onnx.ModelProto, newer: bool = True) -> onnx.ModelProto:
    """A copy of a quantized graph with all of the above, and its picture transposed before it is normalised. `newer`:
    the opset may become that of Attention."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    out = onnx.ModelProto()
    out.CopyFrom(model)
    sort = ONNXModel(out).topological_sort  # the quantizer puts its nodes at the end
    sort()
    transpose_first(out)
    read_floats(out)
    if newer:
        join_attention(out)
    join_biases(out)
    del out.graph.value_info[:]  # of values that are laid out otherwise now
    sort()
    return out


def join_attention(model: onnx.ModelProto) -> int:
    """Puts the operator in the place of its parts; the opset becomes the first that has it. Returns how many."""
    found = attentions(model)
    quantized = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    count = 0
    for one in found:
        if quantized & {v for product in one.products for v in product.input}:
            continue  # runs in integers
        node = helper.make_node(
            "Attention", one.inputs, [one.joined.output[0]], name=one.products[1].output[0],
            q_num_heads=one.heads, kv_num_heads=one.heads, scale=1.0,
        )  # fmt: skip
        model.graph.node.insert(list(model.graph.node).index(one.joined), node)
        model.graph.node.remove(one.joined)
        count += 1
    if count:
        for opset in model.opset_import:
            opset.version = max(opset.version, ATTENTION_OPSET) if not opset.domain else opset.version
        drop_unused(model)
    return count


def read_floats(model: onnx.ModelProto) -> int:
    """What has no integer kernel reads a value that was in float before its pair. Returns how many pairs went."""
    graph = Graph(model)
    whole = _whole(model, graph)
    pairs = 0
    for node in model.graph.node:
        if node.op_type in (*PRODUCTS, "QuantizeLinear", "DequantizeLinear"):
            continue
        for place, name in enumerate(node.input):
            value = _before_pair(name, graph)
            if value is not None and value not in whole:
                node.input[place] = value
                pairs += 1
    drop_unused(model)
    return pairs


def _before_pair(name: str, graph: Graph) -> str | None:
    end = graph.made_by(name, "DequantizeLinear")
    start = None if end is None else graph.made_by(end.input[0], "QuantizeLinear")
    return None if start is None else start.input[0]


def _whole(model: onnx.ModelProto, graph: Graph) -> set[str]:
    """Values that kernels write in integers: of convolutions over integers, and what is done to those in between."""
    found: set[str] = set()
    for node in model.graph.node:
        read = [name for name in node.input if graph.maker(name) is not None]
        pairs = [value for name in read if (value := _before_pair(name, graph)) is not None]
        if node.op_type == "Conv" and len(pairs) == 1 and graph.made_by(read[0], "DequantizeLinear") is not None:
            found.add(node.output[0])
        elif (
            node.op_type in BETWEEN
            and read
            and all(name in found or _before_pair(name, graph) in found for name in read)
        ):
            found.update(node.output)
    return found


def join_biases(model: onnx.ModelProto) -> int:
    """Products of integers with a weight become the operator that ONNX Runtime makes of them, with the bias that it
    does not take along. Returns how many."""
    graph = Graph(model)
    weights = graph.weights
    own = {output.name for output in model.graph.output}
    count = 0
    for node in [n for n in model.graph.node if n.op_type == "MatMul"]:
        left, right = (graph.made_by(name, "DequantizeLinear") for name in node.input)
        if left is None or right is None:
            continue
        if right.input[0] not in weights or len(weights[right.input[0]].dims) != 2 or left.input[0] in weights:
            continue
        add = _bias_add(node, graph) if node.output[0] not in own else None
        bias, out = "", node.output[0]
        if add is not None:
            term, out = next(name for name in add.input if name in weights), add.output[0]
            bias = f"{term}/row"
            if bias not in weights:
                graph.add(numpy_helper.to_array(weights[term]).reshape(-1), bias)
            model.graph.node.remove(add)
            if (narrow := _taken_off(graph.readers[out], out)) is not None:
                out = narrow.output[0]
                model.graph.node.remove(narrow)
        read = [left.input[0], right.input[0], left.input[1], right.input[1], _zero(left), _zero(right), bias]
        joined = helper.make_node("MatMulIntegerToFloat", read, [out], name=node.output[0], domain=MICROSOFT)
        model.graph.node.insert(list(model.graph.node).index(node), joined)
        model.graph.node.remove(node)
        count += 1
    if count and MICROSOFT not in {opset.domain for opset in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    drop_unused(model)
    return count


def _taken_off(found: Sequence[onnx.NodeProto], value: str) -> onnx.NodeProto | None:
    """The Squeeze of the axis that a bias of rank 3 gave the product of a matrix (qdq._keep_bias_apart)."""
    (node,) = found if len(found) == 1 else (None,)
    return node if node is not None and node.op_type == "Squeeze" and value == f"{node.output[0]}/wide" else None


def _zero(node: onnx.NodeProto) -> str:
    return node.input[2] if len(node.input) > 2 else ""


def _bias_add(product: onnx.NodeProto, graph: Graph) -> onnx.NodeProto | None:
    """The Add of a constant row that alone reads a product."""
    add = graph.only_reader(product, "Add")
    constants = [] if add is None else [graph.weights[name] for name in add.input if name in graph.weights]
    rows = len(constants) == 1 and all(side == 1 for side in list(constants[0].dims)[:-1])
    return add if rows and len(constants[0].dims) else None
