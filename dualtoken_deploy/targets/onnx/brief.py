"""Tracing in half the time: torch.onnx traces a program a second time to write it in operators that it can translate.

The programs of most models have hardly any others, and those few have an equal that it can: they are exchanged where
they stand (`EQUALS`). A program with an operator that is neither is traced again, as torch.onnx does by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from dualtoken_deploy.targets.tracing import replaced

aten = torch.ops.aten
Equal = tuple[Any, tuple[Any, ...], dict[str, Any]] | None  # an operator with its arguments; None: leave the node out


def brief() -> AbstractContextManager[None]:
    """Within, torch.onnx.export traces a second time only what needs it."""
    from torch.onnx._internal.exporter import _fx_passes

    def make(own: Any) -> Any:
        def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
            known = {rows[0].fx_target for rows in registry.functions.values()}
            return program if exchange(program, known) else own(program, registry)

        return decompose

    return replaced(_fx_passes, "decompose_with_registry", make)


def exchange(program: ExportedProgram, known: set[Any]) -> bool:
    """Writes the program in `known` operators, in place. False, and nothing is changed, where that needs a trace."""
    signature, graph = program.graph_signature, program.graph_module.graph
    if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
        return False
    others: list[Node] = []
    for node in graph.nodes:
        if node.op not in ("call_function", "placeholder", "output"):
            return False  # a graph within the graph
        if node.op != "call_function":
            continue
        if node.target in EQUALS:
            try:
                EQUALS[node.target](node)
            except _NoEqualError:
                return False
            others.append(node)
        elif node.target not in known or _writes_or_shares(node.target):
            return False
    for node in others:
        equal = EQUALS[node.target](node)  # of what its inputs are by now
        if equal is None:
            graph.erase_node(node)
            continue
        node.target, node.args, node.kwargs = equal  # under its name, which an output may have
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return True


class _NoEqualError(Exception):
    """Not with these arguments."""


def _writes_or_shares(target: Any) -> bool:
    """Whether an operator writes into its input, or is made of others whose result may be a view of its input: tracing
    again takes those apart, whether they can be translated or not."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable:
        return True
    views = any(one.alias_info is not None for one in target._schema.returns)
    return views and target._can_decompose()


def _nothing(node: Node) -> None:
    if node.users:
        raise _NoEqualError


def _cast(node: Node) -> Equal:
    value, dtype = node.args[:2]
    if len(node.args) > 2 or node.kwargs or not isinstance(value, Node):
        raise _NoEqualError
    if value.meta["val"].dtype == dtype:
        return aten.alias.default, (value,), {}
    return aten._to_copy.default, (value,), {"dtype": dtype}


def _subtract(node: Node) -> Equal:
    value, other, *factor = node.args
    return aten.sub.Tensor, (other, value), {"alpha": factor[0]} if factor else dict(node.kwargs)


def _reshape(node: Node) -> Equal:
    shape = list(node.meta["val"].shape)
    return aten.reshape.default, (node.args[0], shape if all(map(_fixed, shape)) else node.args[1]), {}


def _flatten(node: Node) -> Equal:
    """The shape that the result has, of which one number may be dynamic."""
    shape = [side if _fixed(side) else -1 for side in node.meta["val"].shape]
    if shape.count(-1) > 1:
        raise _NoEqualError
    return aten.reshape.default, (node.args[0], shape), {}


def _fixed(side: int | torch.SymInt) -> bool:
    return isinstance(side, int)


def _split(node: Node) -> Equal:
    value, parts, *axis = node.args
    if not isinstance(value, Node) or not isinstance(parts, int):
        raise _NoEqualError
    size = value.meta["val"].shape[axis[0] if axis else 0]
    if not isinstance(size, int):
        raise _NoEqualError
    return aten.split.Tensor, (value, math.ceil(size / parts), *axis), {}


def _itself(node: Node) -> Equal:
    return aten.alias.default, node.args[:1], {}


def _turned(node: Node) -> Equal:
    value = node.args[0]
    if not isinstance(value, Node) or value.meta["val"].ndim != 2:
        raise _NoEqualError
    return aten.permute.default, (value, [1, 0]), {}


def _mean(node: Node) -> Equal:
    value, sides = node.args
    if sides != [1, 1]:
        raise _NoEqualError
    return aten.mean.dim, (value, [-1, -2], True), {}


EQUALS: Mapping[Any, Callable[[Node], Equal]] = MappingProxyType(
    {
        aten._assert_tensor_metadata.default: _nothing,
        aten.to.dtype: _cast,
        aten.rsub.Scalar: _subtract,
        aten.reshape.default: _reshape,
        aten.flatten.using_ints: _flatten,
        aten.chunk.default: _split,
        aten.contiguous.default: _itself,
        aten.numpy_T.default: _turned,
        aten.adaptive_avg_pool2d.default: _mean,
    }
)
