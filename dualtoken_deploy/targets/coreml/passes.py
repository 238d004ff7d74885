"""What coremltools is taught, once, when a conversion first needs it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=1)
def teach() -> None:
    """Registers the operations below with coremltools' torch front end."""
    _channel_norm()
    _named_linear()
    _alias()


def _channel_norm() -> None:
    """Converts `dualtoken::channel_norm` to one layer_norm over axis 1; torch's own has the last axes only."""
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    @register_torch_op(torch_alias=["dualtoken::channel_norm", "dualtoken.channel_norm"])  # type: ignore[untyped-decorator]
    def channel_norm(context: Any, node: Any) -> None:
        x, weight, bias, epsilon = _get_inputs(context, node, expected=4)
        affine = {k: v for k, v in (("gamma", weight), ("beta", bias)) if v is not None}
        context.add(Builder.layer_norm(x=x, axes=[1], epsilon=epsilon.val, name=node.name, **affine))


def _named_linear() -> None:
    """coremltools 9.0 names the result of a linear layer and not the operation, and the float16 pass names the new
    result after the operation: `linear_17_cast_fp16`, and the layer's name is lost."""
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    original = ops.linear

    @register_torch_op(override=True)  # type: ignore[untyped-decorator]
    def linear(context: Any, node: Any) -> None:
        original(context, node)
        context[node.name].op.name = node.name


def _alias() -> None:
    """Passes on what torch gives a second name: what an operation of our own (the scan of ViM2) returns unchanged is
    traced as `aten.alias`, which coremltools 9.0 does not know."""
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op

    @register_torch_op  # type: ignore[untyped-decorator]
    def alias(context: Any, node: Any) -> None:
        (x,) = _get_inputs(context, node, expected=1)
        context.add(x, torch_name=node.name)
