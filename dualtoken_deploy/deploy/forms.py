"""Modules that stand in the deploy form where the eager model has others; each computes what that one does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.dualformer import PartitionAttention
from dualtoken_deploy.models.layers import Grid, merge_heads, split_heads, to_map, to_tokens


class ImageInput(nn.Module):
    """uint8 NHWC RGB -> normalised NCHW: (x - 255 mean) / (255 std)."""

    shift: Tensor
    gain: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("shift", 255.0 * torch.tensor(mean, dtype=dtype))
        self.register_buffer("gain", 1.0 / (255.0 * torch.tensor(std, dtype=dtype)))

    def forward(self, image: Tensor) -> Tensor:
        # transposed last, beside the first convolution, which OpenVINO runs channels-last: there the transpose is free
        x = (image.to(self.shift.dtype) - self.shift) * self.gain  # (B, H, W, 3)
        return x.permute(0, 3, 1, 2)


class SplitBiDim(nn.Module):
    """BiDimAttention without its concatenation. (B, N, C)."""

    def __init__(self, norm: nn.Module, global_reduce: nn.Linear, local_reduce: nn.Linear, channel_select: nn.Linear,
                 spatial_local: nn.Linear, spatial_global: nn.Linear) -> None:  # fmt: skip
        super().__init__()
        self.norm = norm
        self.global_reduce, self.local_reduce = global_reduce, local_reduce
        self.channel_select = channel_select
        self.spatial_local, self.spatial_global = spatial_local, spatial_global

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        x_global = F.gelu(self.global_reduce(z.mean(1, keepdim=True)))  # (B, 1, C/r)
        x_local = F.gelu(self.local_reduce(z))  # (B, N, C/r)
        c_attn = torch.sigmoid(self.channel_select(x_global))  # (B, 1, C)
        s_attn = torch.sigmoid(self.spatial_local(x_local) + self.spatial_global(x_global))  # (B, N, 1)
        return x * c_attn * s_attn


class AffinePool(nn.Module):
    """The average over 2x2 of gain x + shift, which is gain and shift of the average. (B, C, H, W) -> a half each."""

    gain: Tensor
    shift: Tensor

    def __init__(self, gain: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain.detach().reshape(-1, 1, 1).clone())
        self.register_buffer("shift", shift.detach().reshape(-1, 1, 1).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 2) * self.gain + self.shift


class FoldedDownsample(nn.Module):
    """Downsample with each convolution and the average after it in one. (B, N, C) -> (B, N/4^(convs+1), C)."""

    def __init__(self, pool: nn.Module, convs: list[nn.Conv2d]) -> None:
        super().__init__()
        self.pool = pool
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.pool(to_map(x, grid))
        for conv in self.convs:
            x = conv(x)
        return to_tokens(x)


class ReshapeMerge(nn.Module):
    """PatchMerge with space-to-depth as one reshape, a transpose and a reshape. (B, H*W, C) -> (B, H/2 * W/2, C')."""

    def __init__(self, norm: nn.LayerNorm, reduce: nn.Linear, residual: nn.Linear) -> None:
        super().__init__()
        self.norm, self.reduce, self.residual = norm, reduce, residual

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        (b, n, c), (h, w) = x.shape, grid
        patches = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(b, n // 4, 4 * c)
        # a MaxPool, and no maximum over a reshaped axis: that took OpenVINO's reference kernel and 1.6 ms
        pooled = to_tokens(F.max_pool2d(to_map(x, grid), kernel_size=2, stride=2))
        out: Tensor = self.reduce(self.norm(patches)) + self.residual(pooled)
        return out


class FoldedFuse(nn.Module):
    """Fuse whose weights alpha and 1 - alpha lie in the layers before it. Both (B, n*n, C)."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, g: Tensor, x_ga: Tensor) -> Tensor:
        out: Tensor = self.mlp(g) + x_ga
        return out


class ConstantTokens(nn.Module):
    """Stands for the MLP over G where G is the learned parameter: its value. (1, n*n, C)."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, _: Tensor) -> Tensor:
        return self.value


class ConstantQuery(nn.Module):
    """Stands for the query of global tokens that are the learned parameter: its value. (B, T, C) -> (B, T, C)."""

    value: Tensor

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, g: Tensor) -> Tensor:
        return self.value.expand(g.shape[0], -1, -1)


class MatrixResize(nn.Module):
    """TokenResize at one grid: X_ga' = R X_ga. (B, h*w, C) -> (B, n*n, C)."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x_ga: Tensor, grid: Grid) -> Tensor:
        return self.matrix @ x_ga


class AnyResize(nn.Module):
    """TokenResize for every grid: always interpolates, which at G's own grid changes nothing."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x_ga: Tensor, grid: Grid) -> Tensor:
        target = (self.side, self.side)
        return to_tokens(F.interpolate(to_map(x_ga, grid), target, mode="bilinear", align_corners=False))


class NoResize(nn.Module):
    """TokenResize where the grid is that of G already."""

    def forward(self, x_ga: Tensor, grid: Grid) -> Tensor:
        return x_ga


class JoinedAggregation(nn.Module):
    """GlobalAggregation behind its product. (B, N, C) three times -> (B, N, C)."""

    def __init__(self, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))  # (B, heads, N, d)
        return merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))


class JoinedBroadcast(nn.Module):
    """GlobalBroadcast whose queries are made already. (B, N, C), (B, n*n, C) -> (B, N, C)."""

    def __init__(self, kv: nn.Linear, proj: nn.Linear, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.kv, self.proj = kv, proj

    def forward(self, q: Tensor, g_new: Tensor) -> Tensor:
        q = split_heads(q, self.heads)  # (B, heads, N, d)
        k, v = (split_heads(t, self.heads) for t in self.kv(g_new).chunk(2, dim=-1))  # (B, heads, n*n, d)
        out: Tensor = self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))
        return out


class JoinedTokenModule(nn.Module):
    """PositionAwareTokenModule without downsampling: one product for both attentions' q and for k, v.

    The attentions are modules of their own with the names that they have in the model, since exported layers are named
    after modules.
    """

    def __init__(self, norm: nn.Module, qkvq: nn.Linear, aggregate: JoinedAggregation, resize: nn.Module,
                 fuse: nn.Module | None, broadcast: JoinedBroadcast) -> None:  # fmt: skip
        super().__init__()
        self.norm, self.qkvq, self.resize, self.fuse = norm, qkvq, resize, fuse
        self.aggregate, self.broadcast = aggregate, broadcast

    def forward(self, x_local: Tensor, g: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
        q, k, v, q_image = self.qkvq(self.norm(x_local)).chunk(4, dim=-1)  # (B, N, C)
        x_ga = self.resize(self.aggregate(q, k, v), grid)  # (B, n*n, C)
        g_new = x_ga if self.fuse is None else self.fuse(g, x_ga)
        return self.broadcast(q_image, g_new), g_new


class ProjectedBroadcast(nn.Module):
    """GlobalBroadcast whose output projection lies in its values. (B, N, C), (B, n, C) -> (B, N, C)."""

    bias: Tensor

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear, bias: Tensor, heads: int, scale: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.q, self.k, self.v = q, k, v
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, g_new: Tensor) -> Tensor:
        b, n, c = g_new.shape
        q = split_heads(self.q(x), self.heads)  # (B, heads, N, d)
        k = split_heads(self.k(g_new), self.heads)  # (B, heads, n, d)
        attention = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)  # (B, heads, N, n)
        attention = attention.transpose(1, 2).flatten(2)  # (B, N, heads*n)
        v = self.v(g_new).reshape(b, n, self.heads, c).transpose(1, 2).flatten(1, 2)  # (B, heads*n, C)
        out: Tensor = attention @ v + self.bias
        return out


class OneHotPartition(nn.Module):
    """PartitionAttention with groups as one-hot rows: sums and look-ups are matrix products. (B, N, w) -> (B, N, w)."""

    planes: Tensor

    def __init__(self, attention: PartitionAttention) -> None:
        super().__init__()
        self.heads = attention.heads
        self.register_buffer("planes", attention.planes)
        self.value, self.importance, self.mix = attention.value, attention.importance, attention.mix

    def forward(self, x: Tensor) -> Tensor:
        value = split_heads(self.value(x), self.heads)  # (B, heads, N, d)
        x = split_heads(x, self.heads)
        d = x.shape[3]
        one_hot = self.one_hot(x)  # (B, heads, N, K)
        weight = torch.sigmoid(x)
        sums = one_hot.transpose(2, 3) @ torch.cat((weight, value), dim=-1)  # (B, heads, K, 2d)
        weights, values = sums[..., :d], sums[..., d:]
        count = one_hot.sum(2).unsqueeze(-1)  # (B, heads, K, 1)
        empty = (count < 0.5).to(x.dtype)  # no clamp: the float16 converter breaks on its constants
        descriptor = values / (count + empty)  # eq. 8
        m = self.importance(descriptor) * (1 - empty)
        inter = descriptor * (m / m.sum(2, keepdim=True))  # eq. 9, (B, heads, K, d)
        mine = one_hot @ torch.cat((weights, inter), dim=-1)  # (B, heads, N, 2d)
        intra = weight / mine[..., :d] * value  # eq. 6; the weights of a group sum to one, so eq. 7 divides by one
        out: Tensor = self.mix(torch.cat((merge_heads(intra), merge_heads(mine[..., d:])), dim=-1))
        return out

    def one_hot(self, x: Tensor) -> Tensor:
        """(B, heads, N, d) -> (B, heads, N, K): the outer product of (not b, b) over the sides b of the hyperplanes."""
        sides = (x @ self.planes >= 0).to(x.dtype)  # (B, heads, N, hyperplanes), 0 or 1
        out = torch.cat((1 - sides[..., :1], sides[..., :1]), dim=-1)
        for i in range(1, sides.shape[3]):  # the later hyperplane is the higher bit: it becomes the slower index
            side = sides[..., i : i + 1]
            out = torch.cat((out * (1 - side), out * side), dim=-1)
        return out
