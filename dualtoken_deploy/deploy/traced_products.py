"""Rules over a traced program for runtimes whose kernels are matrix products and little else, as XNNPACK's are.

As in traced.py, and run behind those; exact, but that they may add constants, which become buffers of the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from dualtoken_deploy.deploy.traced import Editor, Program, _arguments, _calls, _shape, aten

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER)


def mean_as_product(program: Program) -> int:
    """mean(x) over the last axis, C long, = x (1/C, ..., 1/C)^T; over the last but one the same of x^T.

    Other means are left alone: over the two axes of a map there is a kernel.
    """
    count = 0
    for node in _calls(program.graph, aten.mean.dim):
        x, axes = _arguments(node)[:2]
        rank = len(_shape(x))
        found = [axis % rank for axis in axes]
        if len(found) != 1 or found[0] < rank - 2 or rank > 3 or node.kwargs.get("dtype"):
            continue
        long, edit = _shape(x)[found[0]], Editor(node)
        row = add_buffer(program, f"mean_{long}", torch.full((1, long), 1.0 / long, dtype=x.meta["val"].dtype))
        x = x if found[0] == rank - 1 else edit.call(aten.transpose.int, x, -2, -1)
        mean = edit.call(aten.linear.default, x, row)
        edit.replace(mean if _shape(mean) == _shape(node) else edit.call(aten.reshape.default, mean, _shape(node)))
        count += 1
    return count


def matrix_as_layer(program: Program) -> int:
    """a x of a matrix a and (B, m, C) = (x^T a^T)^T, what a linear layer does between two transposes."""
    count = 0
    for node in _calls(program.graph, aten.matmul.default):
        a, x = _arguments(node)
        if len(_shape(a)) != 2 or len(_shape(x)) != 3:
            continue
        edit = Editor(node)
        out = edit.call(aten.linear.default, edit.call(aten.transpose.int, x, 1, 2), a)
        edit.replace(edit.call(aten.transpose.int, out, 1, 2))
        count += 1
    return count


def three_axes(program: Program) -> int:
    """a b over any batch axes = the product of their stacks of matrices, three-dimensional: nothing is expanded."""
    count = 0
    for node in _calls(program.graph, aten.matmul.default):
        a, b = _arguments(node)
        left, right = _shape(a), _shape(b)
        if len(left) < 3 or left[:-2] != right[:-2]:
            continue
        edit, many = Editor(node), math.prod(left[:-2])
        if len(left) > 3:
            a = edit.call(aten.reshape.default, a, [many, *left[-2:]])
            b = edit.call(aten.reshape.default, b, [many, *right[-2:]])
        out = edit.call(aten.bmm.default, a, b)
        edit.replace(out if len(left) == 3 else edit.call(aten.reshape.default, out, _shape(node)))
        count += 1
    return count


def uneven_pool_as_product(program: Program) -> int:
    """The average over the k x l bins of a map whose sides they do not divide = P x over its flattened axes.

    Row (i, j) of P has 1/size where pixel lies in bin (i, j), as torch cuts them: rows floor(i h / k) up to
    ceil((i + 1) h / k), columns likewise. Even bins are left alone: those are pooling with a stride.
    """
    count = 0
    for node in _calls(program.graph, aten.adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d.default):
        x = _arguments(node)[0]
        (*lead, h, w), (*_, k, m) = _shape(x), _shape(node)
        if h % k == 0 and w % m == 0:
            continue
        rows, columns = (_bins(*sizes) for sizes in ((h, k), (w, m)))
        pool = torch.einsum("ih,jw->ijhw", rows, columns).reshape(k * m, h * w).to(x.meta["val"].dtype)
        name = f"mean_{h}_{w}_{k}_{m}"
        edit, matrix = Editor(node), add_buffer(program, name, pool)
        flat = edit.call(aten.reshape.default, x, [*lead, h * w])
        edit.replace(edit.call(aten.reshape.default, edit.call(aten.linear.default, flat, matrix), _shape(node)))
        count += 1
    return count


def _bins(long: int, bins: int) -> Tensor:
    """(bins, long) in float64: 1/size where a place belongs to a bin."""
    out = torch.zeros(bins, long, dtype=torch.float64)
    for i in range(bins):
        start, end = i * long // bins, -(-(i + 1) * long // bins)
        out[i, start:end] = 1.0 / (end - start)
    return out


def add_buffer(program: Program, name: str, value: Tensor) -> fx.Node:
    """The node of a constant of that name, made where there is none: a buffer of the program's root module."""
    nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    specs = program.graph_signature.input_specs
    known = {spec.target: nodes[spec.arg.name] for spec in specs}
    if name in known:
        return known[name]
    before = next((place for place, spec in enumerate(specs) if spec.kind not in _WEIGHTS), len(specs))
    with program.graph.inserting_before(nodes[specs[before].arg.name]):
        node: fx.Node = program.graph.placeholder(f"b_{name}")
    mode = next(v.fake_mode for n in program.graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))
    node.meta["val"] = mode.from_tensor(value, static_shapes=True)
    specs.insert(before, InputSpec(InputKind.BUFFER, TensorArgument(node.name), name, persistent=True))
    program.state_dict[name] = value
    return node


PRODUCT_RULES: Mapping[str, Callable[[Any], int]] = MappingProxyType(
    {function.__name__: function for function in (mean_as_product, matrix_as_layer, three_axes, uneven_pool_as_product)}
)
