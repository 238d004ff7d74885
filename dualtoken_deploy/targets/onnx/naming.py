"""Names of the model's own modules for what a converter numbers: `stage2.block3.token.broadcast.q`, not `MatMul_417`.

torch.onnx notes with every node which module it came from; onnxsim drops the note but keeps the names of values. So the
values take the notes' place before anything else touches the graph, and every later tool, a quantizer, a profiler or a
graph viewer, speaks of the model's layers.
"""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict

import onnx

from dualtoken_deploy.targets.tracing import path_below

_SCOPES = "pkg.torch.onnx.name_scopes"
_MADE = re.compile(r"_v_\d+$")  # onnxsim's own names
_SHORT = {"scaled_dot_product_attention": "attention", "__to_copy": "cast", "_to_copy": "cast", "to": "cast"}


def name_after_modules(model: onnx.ModelProto, inside: str) -> None:
    """Renames nodes and values in place; graph inputs and outputs keep their names.

    The value that a module without further modules ends in takes the module's path; others the path and the operation
    (`stage1.block1/add`), numbered from the second on. `inside`: the path in what was traced at which the model itself
    lies; what is beside it prepares the image (`input`).
    """
    operations = [(node, *_origin(node, inside)) for node in model.graph.node]
    by_path: dict[str, set[str]] = defaultdict(set)
    for _, path, operation in operations:
        if path is not None:
            by_path[path].add(operation)
    fixed = {v.name for v in (*model.graph.input, *model.graph.output)}
    names: dict[str, str] = {}
    taken: Counter[str] = Counter(fixed)
    for position, (node, path, operation) in enumerate(operations):
        if path is None:  # a constant, or a split that the exporter put together
            source = next((names[i] for i in node.input if i in names), "constant")
            path, operation = source.split("/")[0], node.op_type.lower()
            leaf = False
        else:
            leaf = len(by_path[path]) == 1 and not any(p.startswith(f"{path}.") for p in by_path)
        last = not any(p == path and o == operation for _, p, o in operations[position + 1 :])
        for index, output in enumerate(node.output):
            name = path if leaf else f"{path}/{_short(operation)}"
            name += "" if last else f"/{node.op_type}"
            name += f".{index}" if len(node.output) > 1 else ""
            taken[name] += 1
            names[output] = name if taken[name] == 1 else f"{name}_{taken[name]}"
    _rename(model, {old: new for old, new in names.items() if old not in fixed})
    _rename_weights(model)


def name_joined(model: onnx.ModelProto) -> None:
    """Names what a simplifier put together, `_v_175` from a node without a name: after what it reads and what it does.

    Runtimes tell by nodes' names which layers they run as integers.
    """
    fixed = {v.name for v in (*model.graph.input, *model.graph.output)}
    taken = {v for node in model.graph.node for v in node.output} | {t.name for t in model.graph.initializer} | fixed
    names: dict[str, str] = {}
    for node in model.graph.node:
        for index, output in enumerate(node.output):
            if not _MADE.match(output) or output in fixed:
                continue
            source = names.get(node.input[0], node.input[0]) if node.input else "constant"
            name = f"{source}/{node.op_type}" + (f".{index}" if len(node.output) > 1 else "")
            while name in taken:
                name += "_2"
            taken.add(name)
            names[output] = name
    _rename(model, names)
    _rename_weights(model)


def _origin(node: onnx.NodeProto, inside: str) -> tuple[str | None, str]:
    """Path of the innermost module and name of the traced operation; None where the exporter left no note."""
    note = next((p.value for p in node.metadata_props if p.key == _SCOPES), None)
    if note is None:
        return None, ""
    *scopes, operation = ast.literal_eval(note)
    return path_below(scopes[-1] if scopes else "", inside), operation


def _short(operation: str) -> str:
    plain = re.sub(r"_\d+$", "", operation)
    return _SHORT.get(plain, plain)


def _rename(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for node in model.graph.node:
        for values in (node.input, node.output):
            for i, value in enumerate(values):
                values[i] = names.get(value, value)
        node.name = node.output[0]
    for info in model.graph.value_info:
        info.name = names.get(info.name, info.name)


def _rename_weights(model: onnx.ModelProto) -> None:
    """Initializers that one node alone reads are called after it: `<layer>.weight`, `<layer>.bias`."""
    users: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            users[value].append((node, i))
    taken = {v for node in model.graph.node for v in (*node.input, *node.output)}
    for tensor in model.graph.initializer:
        readers = users[tensor.name]
        if len(readers) != 1 or not tensor.dims:
            continue
        node, place = readers[0]
        kind = {"MatMul": "weight", "Add": "bias"}.get(node.op_type) or ("weight", "bias")[place == 2]
        name = f"{node.output[0].removesuffix('/MatMul')}.{kind}"
        if name in taken or node.op_type not in ("MatMul", "Add", "Conv", "Gemm", "LayerNormalization"):
            continue
        taken.add(name)
        node.input[place] = tensor.name = name
