"""Rules over a traced program, for converters that take operators one by one: exact, and of any model.

They come behind the rules over modules (rewrite.py) and know none of them. Each takes a program that is functional
(`run_decompositions({})`), rewrites its graph in place and says how often it applied. No rule adds a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from dualtoken_deploy.errors import UsageError

aten = torch.ops.aten
Program = torch.export.ExportedProgram
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default)
_LAYOUTS = ((0, 2, 3, 1), (0, 3, 1, 2))
_KEPT = ("nn_module_stack", "source_fn_stack", "stack_trace", "from_node")  # where a node comes from in the model


class Editor:
    """Puts operators in front of a node; they belong to its module."""

    def __init__(self, node: fx.Node) -> None:
        self.node, self.graph = node, node.graph

    def call(self, target: Any, *arguments: Any) -> fx.Node:
        """The new operator over nodes and numbers, with its shape and dtype known."""
        with self.graph.inserting_before(self.node):
            new = self.graph.call_function(target, arguments)
        new.meta |= {key: self.node.meta[key] for key in _KEPT if key in self.node.meta}
        values = fx.node.map_arg(arguments, lambda n: n.meta["val"])
        mode = next(v.fake_mode for v in values if hasattr(v, "fake_mode"))
        with mode:
            new.meta["val"] = target(*values)
        return new

    def replace(self, new: fx.Node) -> None:
        """The node's readers read `new` from now on."""
        self.node.replace_all_uses_with(new)
        self.graph.erase_node(self.node)


def rewrite_program(
    program: Program, rules: Iterable[str], more: Mapping[str, Callable[[Program], int]] = MappingProxyType({})
) -> tuple[Program, dict[str, int]]:
    """A functional program with these rules of TRACED_RULES applied, in the order of that table, and their counts.

    `more`: rules that come behind them and take the whole program. The program given is left as it is. Raises
    UsageError on an unknown rule.
    """
    wanted = set(rules)
    if unknown := wanted - set(TRACED_RULES):
        raise UsageError(f"unknown rules {', '.join(sorted(unknown))}; valid rules: {', '.join(TRACED_RULES)}")
    program = program.run_decompositions({})
    counts = {name: rule(program.graph_module.graph) for name, rule in TRACED_RULES.items() if name in wanted}
    counts |= {name: rule(program) for name, rule in more.items()}
    program.graph_module.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program, counts


def plain_norm(graph: fx.Graph) -> int:
    """LayerNorm(x) = (x - m) / sqrt(mean((x - m)^2) + epsilon) gamma + beta, m = mean(x): seven operators and two.

    Converters that take it apart themselves come to thirteen, since they lose the axis that they have averaged.
    """
    nodes = _calls(graph, aten.layer_norm.default)
    for node in nodes:
        given = _arguments(node)
        x, shape, gamma, beta, epsilon = (*given, *(None, None, 1e-5)[len(given) - 2 :])[:5]
        axes, edit = list(range(-len(shape), 0)), Editor(node)
        centred = edit.call(aten.sub.Tensor, x, edit.call(aten.mean.dim, x, axes, True))
        variance = edit.call(aten.mean.dim, edit.call(aten.mul.Tensor, centred, centred), axes, True)
        gain = edit.call(aten.rsqrt.default, edit.call(aten.add.Tensor, variance, epsilon))
        out = edit.call(aten.mul.Tensor, centred, gain)
        out = out if gamma is None else edit.call(aten.mul.Tensor, out, gamma)
        edit.replace(out if beta is None else edit.call(aten.add.Tensor, out, beta))
    return len(nodes)


def plain_attention(graph: fx.Graph) -> int:
    """attention(q, k, v) = softmax((s q) k^T + mask) v; a causal one, or one with grouped heads, stays whole."""
    count = 0
    for node in _calls(graph, aten.scaled_dot_product_attention.default):
        given = _arguments(node)
        q, k, v, mask, dropout, causal = (*given, *(None, 0.0, False)[len(given) - 3 :])[:6]
        mask = node.kwargs.get("attn_mask", mask)
        if causal or dropout or node.kwargs.get("is_causal") or node.kwargs.get("enable_gqa"):
            continue
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            continue
        edit, scale = Editor(node), node.kwargs.get("scale")
        factor = float(_shape(q)[-1]) ** -0.5 if scale is None else float(str(scale))
        q, k, v = (_products_alone(edit, x) for x in (q, k, v))
        q = q if factor == 1.0 else edit.call(aten.mul.Tensor, q, factor)
        scores = edit.call(aten.matmul.default, q, edit.call(aten.transpose.int, k, -2, -1))
        if mask is not None:
            whole = [*_shape(node)[:-1], _shape(k)[-2]]
            scores = edit.call(aten.add.Tensor, edit.call(aten.reshape.default, scores, whole), mask)
            scores = _products_alone(edit, scores)
        out = edit.call(aten.matmul.default, edit.call(aten.softmax.int, scores, -1), v)
        edit.replace(edit.call(aten.reshape.default, out, _shape(node)))
        count += 1
    return count


def _products_alone(edit: Editor, x: fx.Node) -> fx.Node:
    """(..., N, d) -> (the product of the others, N, d): what batched products are in the end."""
    shape = _shape(x)
    return edit.call(aten.reshape.default, x, [math.prod(shape[:-2]), *shape[-2:]])


def heads_before_split(graph: fx.Graph) -> int:
    """[q; k; v] split and each made heads = [q; k; v] made heads and split: one reshape and one transpose for all.

    Channel h d + i of part p is head p H + h, feature i, of the whole: the split moves to the axis of the heads, where
    a part lies in one piece. Applies where every part goes through the same reshape and transpose.
    """
    count = 0
    for node in _calls(graph, aten.split.Tensor):
        x, width, axis = (*_arguments(node), 0)[:3]
        parts = sorted(node.users, key=lambda n: int(_arguments(n)[1]))
        turned, shape = [t for part in parts if (t := _turned(part)) is not None], _shape(x)
        if len(turned) != len(parts) or len(shape) != 3 or axis not in (-1, 2) or shape[2] % width:
            continue
        forms = [_shape(_arguments(t)[0]) for t in turned]
        b, n, heads, d = forms[0]
        if any(form != forms[0] for form in forms) or heads * d != width or [b, n] != shape[:2]:
            continue
        edit, every = Editor(node), shape[2] // width * heads
        alone = [n, every, d] if b == 1 else [b, n, every, d]  # rank 3 where there is no batch
        at = len(alone) - 3
        whole = edit.call(aten.transpose.int, edit.call(aten.reshape.default, x, alone), at, at + 1)
        for part, old in zip(parts, turned, strict=True):
            start, own = int(_arguments(part)[1]) * heads, Editor(old)
            piece = own.call(aten.slice.Tensor, whole, at, start, start + heads)
            own.replace(own.call(aten.reshape.default, piece, [b, heads, n, d]))
        count += 1
    return count


def _turned(part: fx.Node) -> fx.Node | None:
    """The transpose(1, 2) of the reshape to rank 4 that is all that reads this part of a split; else None."""
    if len(part.users) != 1:
        return None
    view = next(iter(part.users))
    if not _is_view(view) or len(view.users) != 1 or len(_shape(view)) != 4:
        return None
    turn = next(iter(view.users))
    return turn if turn.target is aten.transpose.int and set(_arguments(turn)[1:]) == {1, 2} else None


def merge_axes(graph: fx.Graph) -> int:
    """Axes that a permutation leaves side by side are one axis, and axes of one element are none.

    So space-to-depth (B, H/2, 2, W/2, 2, C), third and fourth axis changed, is (B H/2, 2, W/2, 2 C) with its inner axes
    changed; a permutation that moves nothing is a reshape. Applies wherever that takes an axis away, but not to a map's
    change between channels first and last, which converters know by its four axes.
    """
    count = 0
    for node in _calls(graph, aten.permute.default, aten.transpose.int):
        source = _arguments(node)[0]
        shape, order = _shape(source), _order(node)
        groups = _kept_together(shape, order)
        if len(groups) == len(shape) or (len(groups) > 1 and tuple(order) in _LAYOUTS):
            continue
        edit = Editor(node)
        if len(groups) > 1:
            inputs = sorted(groups)
            source = edit.call(aten.reshape.default, source, [math.prod(shape[a] for a in g) for g in inputs])
            source = edit.call(aten.permute.default, source, [inputs.index(group) for group in groups])
        edit.replace(edit.call(aten.reshape.default, source, _shape(node)))
        count += 1
    return count


def _kept_together(shape: list[int], order: list[int]) -> list[list[int]]:
    """The input axes of more than one element in the order of the output, those together that follow each other in
    both."""
    long = [axis for axis, size in enumerate(shape) if size != 1]
    groups: list[list[int]] = []
    for axis in (a for a in order if shape[a] != 1):
        if groups and long.index(axis) == long.index(groups[-1][-1]) + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def join_views(graph: fx.Graph) -> int:
    """A reshape of a reshape is one; a reshape to the shape that there is, and a copy, are none.

    A view that was of a copy is a reshape from here on: its source need not lie in one piece.
    """
    count = 0
    for node in _calls(graph, *_VIEWS):
        source = first = _arguments(node)[0]
        while _is_view(source):
            source = _arguments(source)[0]
        if _shape(source) == _shape(node):
            node.replace_all_uses_with(source)
            count += 1
            continue
        count += source is not first
        node.target, node.args = aten.reshape.default, (source, _shape(node))
    graph.eliminate_dead_code()
    return count


def _is_view(node: fx.Node) -> bool:
    return node.target in _VIEWS


def _calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.target in targets]


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """A node's arguments, which the type checker would have be anything."""
    return tuple(node.args)


def _shape(node: fx.Node) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]


def _order(node: fx.Node) -> list[int]:
    """The input axis that each output axis of a permute or a transpose comes from."""
    given, rank = _arguments(node), len(_shape(node))
    if node.target is aten.permute.default:
        return [int(axis) % rank for axis in given[1]]
    order = list(range(rank))
    a, b = (int(axis) % rank for axis in given[1:3])
    order[a], order[b] = b, a
    return order


TRACED_RULES: Mapping[str, Callable[[fx.Graph], int]] = MappingProxyType(
    {
        function.__name__: function
        for function in (plain_norm, plain_attention, heads_before_split, merge_axes, join_views)
    }
)
