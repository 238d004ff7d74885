"""Parameters, MACs and matrix products of a model, counted by running it once.

What the papers call FLOPs are multiply-accumulates of convolutions, linear layers and matrix products, plus the
normalisations (five operations an element for LayerNorm, two for BatchNorm, as fvcore counts them); softmax,
activations and element-wise sums are not counted.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dualtoken_deploy.models.onnx_count import count_graph
from dualtoken_deploy.models.onnx_reference import reference_inside

aten = torch.ops.aten

Product = tuple[int, int, int, int, int]  # batch, m, k, n, how often


def _layer_norm(shape: Any, *_: Any, **__: Any) -> int:
    return 2 * 5 * int(torch.Size(shape).numel())  # FlopCounterMode counts two for each MAC


def _batch_norm(shape: Any, *_: Any, **__: Any) -> int:
    return 2 * 2 * int(torch.Size(shape).numel())


_NORMS: dict[Any, Any] = {
    aten.native_layer_norm: _layer_norm,
    aten.native_batch_norm: _batch_norm,
    aten._native_batch_norm_legit_no_training: _batch_norm,
}


def count_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def example_shape(model: nn.Module, size: tuple[int, int]) -> tuple[int, ...]:
    """That of one input of a model: a picture (1, 3, H, W), unless the model, or what is wrapped here, says another."""
    says = (getattr(module, "example_shape", None) for module in model.modules())
    shape: tuple[int, ...] = next((own(size) for own in says if own is not None), (1, 3, *size))
    return shape


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-accumulates for one image of (H, W), or one series of (L, M)."""
    return count_products(model, size)[0]


def count_part(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Multiply-accumulates of any module for an input of this shape."""
    with FlopCounterMode(display=False, custom_mapping=_NORMS) as counter:
        _run(module, shape)
    return int(counter.get_total_flops()) // 2


def count_products(model: nn.Module, size: tuple[int, int]) -> tuple[int, tuple[Product, ...]]:
    """`count_macs`, and the matrix products of one input, convolutions with groups = 1 as the product they unroll to.

    Depth-wise convolutions are no matrix products and are left out. Sorted by shape.
    """
    file = reference_inside(model)
    if file is not None:
        macs, products = count_graph(file.proto, file.input, size)
    else:
        with _ProductRecorder() as recorder:  # the outer of the two: what the counter takes apart reaches it
            macs = count_part(model, example_shape(model, size))
        products = recorder.products
    return macs, tuple((*shape, count) for shape, count in sorted(products.items()))


def _run(model: nn.Module, shape: tuple[int, ...]) -> None:
    parameter = next(model.parameters())
    image = torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)
    detached = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    # The math back-end writes attention as its two products, so that both counters see them. Parameters are detached
    # because FlopCounterMode's module tracker trips over one that wants a gradient while gradients are off.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        torch.func.functional_call(model, detached, image)


class _ProductRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: Counter[tuple[int, int, int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet is aten.mm:
            self._add(1, args[0], args[1])
        elif packet is aten.addmm:
            self._add(1, args[1], args[2])
        elif packet in (aten.bmm, aten.matmul):
            self._add(args[0].shape[0], args[0][0], args[1][0])
        elif packet is aten.convolution and args[8] == 1:
            weight: Tensor = args[1]
            self.products[(1, out.shape[0] * out.shape[2] * out.shape[3], weight[0].numel(), weight.shape[0])] += 1
        return out

    def _add(self, batch: int, a: Tensor, b: Tensor) -> None:
        self.products[(batch, a.shape[0], a.shape[1], b.shape[1])] += 1
