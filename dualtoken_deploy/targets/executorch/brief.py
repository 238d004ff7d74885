"""Lowering in less time to the same program: what ExecuTorch does to one without any change to it is left out.

Nearly every pass traces the whole program anew, also where it found nothing to change. Two of XNNPACK's print all of it
for a log that nobody keeps, and two trace patterns with Dynamo first. Here a pass runs only where the graph has
something of the kind that it looks for. Graphs, constants and plans are the same; the numbers by which debuggers group
operators, which count such traces, are not. Whatever of this another version has no more is left as it is there.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from torch import SymBool, SymFloat, SymInt, TensorType, export, fx
from torch.fx.passes.infra.pass_base import PassResult

from dualtoken_deploy.targets.tracing import replaced


@contextlib.contextmanager
def brief() -> Iterator[None]:
    """In it to_edge_transform_and_lower leaves out what changes nothing."""
    with contextlib.ExitStack() as stack:
        for shorter in (_without_history(), _decomposed_once(), *_without_idle_passes()):
            stack.enter_context(shorter)
        yield


def _without_history() -> contextlib.AbstractContextManager[None]:
    """Without the history of each node that torch keeps for debugging: every pass copies all of it anew."""
    from torch.fx import traceback

    def make(whole: Any) -> Any:
        class Brief(whole):  # type: ignore[misc]
            def __init__(self, node: Any, pass_name: str = "", action: Any = None) -> None:
                super().__init__(None, pass_name, action)

        return Brief

    return replaced(traceback, "NodeSource", make)


def _decomposed_once() -> contextlib.AbstractContextManager[None]:
    """Without traces that decompose nothing: one that only makes a program functional, which the next one does too, and
    one of a program in which the last left nothing to decompose."""

    def make(whole: Any) -> Any:
        made: weakref.WeakSet[Any] = weakref.WeakSet()

        def run_decompositions(self: Any, decomp_table: Any = None, *given: Any, **named: Any) -> Any:
            if decomp_table is not None and not (given or named):
                nodes = self.graph.nodes
                idle = self in made and not any(n.op == "get_attr" or n.target in decomp_table for n in nodes)
                if idle or not decomp_table:
                    return self
            made.add(program := whole(self, decomp_table, *given, **named))
            return program

        return run_decompositions

    return replaced(export.ExportedProgram, "run_decompositions", make)


def trace_patterns_once() -> None:
    """Keeps the graphs of rotary embeddings that Vulkan's partitioner and its passes look for: each traces them anew,
    which takes two seconds and more."""
    from executorch.backends.vulkan import patterns

    for entry in patterns.fusable_patterns.values():
        if entry.get_graphs_fn is not None and not hasattr(entry.get_graphs_fn, "cache_info"):
            entry.get_graphs_fn = functools.cache(entry.get_graphs_fn)


def _without_idle_passes() -> Iterator[contextlib.AbstractContextManager[None]]:
    """Without passes that find nothing in a graph: XNNPACK's, and those before and behind them."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.exir.program import _program

    def xnnpack(whole: Any) -> Any:
        class Brief(whole):  # type: ignore[misc]
            def transform(self) -> Any:
                program = self.exported_program
                for step in self.passes:
                    if _has_work(step.__name__, program.graph):
                        program = whole(program, [step]).transform()
                return program

        return Brief

    def before(whole: Any) -> Any:
        def passes(*given: Any, **named: Any) -> Any:
            first, last = whole(*given, **named)
            return [_when_needed(step) for step in first], last

        return passes

    def behind(whole: Any) -> Any:
        return lambda *given, **named: [_when_needed(step) for step in whole(*given, **named)]

    yield replaced(xnnpack_preprocess, "XNNPACKPassManager", xnnpack)
    yield replaced(_program, "_get_aten_to_edge_passes", before)
    yield replaced(_program, "edge_to_executorch_passes", behind)


def _when_needed(step: Any) -> Any:
    """A pass that leaves a graph alone where it has no work."""
    name = getattr(step, "__name__", type(step).__name__)
    if name not in WORK:
        return step

    def run(module: fx.GraphModule) -> Any:
        return step(module) if _has_work(name, module.graph) else PassResult(module, False)

    return run


def _has_work(name: str, graph: fx.Graph) -> bool:
    return name not in WORK or any(WORK[name](node) for node in graph.nodes)


def _called(node: fx.Node) -> str:
    """`aten.linear.default`, as operators of the edge dialect are called."""
    return getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _of(*names: str) -> Callable[[fx.Node], bool]:
    return lambda node: _called(node) in names


def _resized(node: fx.Node) -> bool:
    """Whether a node may belong to a bilinear resize, whole or taken apart."""
    return any(word in _called(node) for word in ("index", "upsample"))


def _linear(node: fx.Node) -> bool:
    """Whether a node becomes a linear layer, or is one with views around it that would be taken into it."""
    name, users = _called(node), list(node.users)
    if name == "aten.linear.default":
        return len(users) == 1 and _called(users[0]) == "aten.view_copy.default" and _same_shape(node, users[0])
    products = ("aten.mm.default", "aten.addmm.default", "quantized_decomposed.dequantize_per_tensor.tensor")
    return name in products or "source_fn_stack" in node.meta


def _same_shape(one: fx.Node, other: fx.Node) -> bool:
    return bool(one.meta["val"].shape == other.meta["val"].shape)


def _constant(node: fx.Node) -> bool:
    """Whether a node's value is known without the model's inputs and parameters."""
    if node.op == "placeholder":
        return getattr(node.meta.get("val"), "constant", None) is not None
    return node.op == "get_attr" or (node.op == "call_function" and not node.all_input_nodes)


def _marked(node: fx.Node) -> bool:
    return "custom" in node.meta


def _one_axis(node: fx.Node) -> bool:
    """Whether a node is a convolution over one axis."""
    return _called(node) == "aten.convolution.default" and node.meta["val"].dim() == 3


def _schema(node: fx.Node) -> Any:
    return getattr(node.target, "_schema", None)


def _number(node: fx.Node) -> bool:
    """Whether a number stands where an operator takes a tensor."""
    for place, argument in enumerate(getattr(_schema(node), "arguments", ())):
        value = node.kwargs.get(argument.name, node.args[place] if place < len(node.args) else None)
        if isinstance(value, (bool, int, float)) and isinstance(argument.type, TensorType):
            return True
    return False


def _symbolic(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (SymBool, SymFloat, SymInt))


def _view(node: fx.Node) -> bool:
    return bool(getattr(node.target, "is_view", False))


def _mixed(node: fx.Node) -> bool:
    """Whether an operator may have to bring what it reads to one dtype."""
    if _called(node).split(".")[0] not in ("add", "sub", "mul", "div", "minimum"):
        return False
    dtypes = {getattr(x.meta.get("val"), "dtype", None) for x in node.args if isinstance(x, fx.Node)}
    numbers = any(not isinstance(x, fx.Node) for x in node.args)
    return numbers or len(dtypes) != 1 or not all(dtype is not None and dtype.is_floating_point for dtype in dtypes)


_NORMS = ("aten.native_batch_norm.default", "aten._native_batch_norm_legit_no_training.default")

# {pass: whether a node may be one that it looks for}; passes that are not here always run
WORK: Mapping[str, Callable[[fx.Node], bool]] = MappingProxyType(
    {
        "ReplaceBrokenOpsWithFunctionalOpsPass": _view,
        "ScalarToTensorPass": _number,
        "SymToTensorPass": _symbolic,
        "RemoveMixedTypeOperators": _mixed,
        "LegalizePortableDimOrderPass": _of(
            *("aten._adaptive_avg_pool2d.default", "aten.avg_pool2d.default", "aten.expand_copy.default"),
            *("aten.mean.dim", "aten.sum.dim_IntList"),
        ),
        "DimOrderOpsRevertPass": lambda node: _called(node).startswith("dim_order_ops."),
        "ConvertToUpsampleBilinear2d": _resized,
        "ConvertToLinearPass": _linear,
        "PropagateCustomMetaPass": _marked,
        "ConvertToSDPAPass": _of("aten.mul.Scalar"),
        "ConstPropPass": _constant,
        "FuseBatchNormPass": _of(*_NORMS),
        "DecomposeBatchNorm": _of(*_NORMS),
        "FuseActivationPass": _of("aten.relu.default", "aten.hardtanh.default"),
        "DecomposeConcatenate": _of("aten.cat.default"),
        "RemoveGetItemPass": _of("aten.max_pool2d_with_indices.default", "aten.max.dim"),
        "Conv1dUnsqueezePass": _one_axis,
        "PReLUReshapePass": _of("aten._prelu_kernel.default"),
    }
)
