"""A dual-vocabulary tokenizer of edge size, after DualToken (Song et al., arXiv:2503.14324) on DualToken-ViT's T (mix).

Two depths of one backbone become two vocabularies: the maps of stage 1 are pixel codes, which a small decoder draws the
picture from, and those of stage 3 semantic codes. Both are quantized residually (RQ-VAE, Lee et al., arXiv:2203.01941):
the nearest code, then the nearest to what that one left, `depth` times from one codebook. The codebooks follow the
running mean of the vectors that chose them (van den Oord et al., arXiv:1711.00937, appendix A), and codes that nobody
chooses restart as vectors of the batch. What was chosen here, and why: docs/decisions/016-tokenizer.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualtoken_deploy.models.base import ImageModel, init_weights
from dualtoken_deploy.models.heads.neck import Backbone
from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD

STRIDE = 8  # of the pixel codes
DECAY = 0.99  # of the codebooks' running means
RARE = 0.05  # vectors a step, on average, below which a code restarts


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of one tokenizer. `decoder`: channels at strides 8, 4 and 2."""

    backbone: str = "t-mix"
    codes: int = 512  # K, of either codebook
    depth: int = 4  # D
    code_dim: int = 32
    decoder: tuple[int, int, int] = (96, 64, 32)
    num_classes: int = 26  # of the linear probe
    image_size: tuple[int, int] = (64, 64)
    drop_path: float = field(default=0.0, repr=False)  # the recipe's name; nothing here drops


class Quantized(NamedTuple):
    """The sum of the codes (B, N, w), their indices (B, N, D), and how far the vectors are from them."""

    sum: Tensor
    codes: Tensor
    commitment: Tensor


class ResidualQuantizer(nn.Module):
    """Residual quantization with one codebook for all depths. (B, N, w) -> Quantized.

    |r - e|^2 / 2 = |e|^2 / 2 - r . e + const: one product and an ArgMin. The gradient passes as if nothing happened.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, codes: int, width: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.register_buffer("codebook", torch.randn(codes, width))
        self.register_buffer("counts", torch.zeros(codes))  # 0: nothing was learned yet
        self.register_buffer("sums", torch.zeros(codes, width))

    def forward(self, x: Tensor) -> Quantized:
        if self.training and not bool(self.counts.any()):
            self._begin(x.detach())
        rest, codes, rests = x, [], []
        for _ in range(self.depth):
            index = self.scores(rest).argmin(-1)  # (B, N)
            codes.append(index)
            rests.append(rest)
            rest = rest - F.embedding(index, self.codebook)
        every = torch.stack(codes, dim=-1)
        if not self.training:
            return Quantized(x - rest, every, rest.new_zeros(()))
        commitment = torch.stack(
            [((r - F.embedding(i, self.codebook)) ** 2).mean() for r, i in _detach(x, rests, codes)]
        )
        self._follow(torch.stack(rests, dim=-2).detach(), every)
        return Quantized(x - rest.detach(), every, commitment.mean())

    def scores(self, rest: Tensor) -> Tensor:
        """Half of the squared distances to all codes, but for the vector's own norm. (B, N, w) -> (B, N, K)."""
        return 0.5 * (self.codebook**2).sum(-1) - rest @ self.codebook.T

    def margin(self, x: Tensor) -> Tensor:
        """How near a vector comes to where it would choose another code, in shares of its length, (B,)."""
        rest, least = x, torch.full_like(x[:, 0, 0], torch.inf)
        length = x.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        for _ in range(self.depth):
            scores = self.scores(rest)
            chosen = scores.argmin(-1, keepdim=True)
            first = F.embedding(chosen.squeeze(-1), self.codebook)
            apart = torch.cdist(first, self.codebook.expand(len(x), -1, -1))  # (B, N, K), 0 to itself
            way = (scores - scores.gather(-1, chosen)) / (apart * length).clamp(min=1e-30)
            way = way.scatter(-1, chosen, torch.inf)  # the half of |r - e|^2 grows by |e - e'| a step towards e'
            least, rest = torch.minimum(least, way.amin((1, 2))), rest - first
        return least

    @torch.no_grad()
    def _begin(self, x: Tensor) -> None:
        """Random vectors of the first batch, smaller the deeper they will serve."""
        vectors = x.reshape(-1, x.shape[-1])
        chosen = vectors[torch.randint(len(vectors), (len(self.codebook),), device=x.device)]
        shrink = torch.linspace(1.0, 0.2, len(self.codebook), device=x.device)[:, None]
        self.codebook.copy_(shrink * chosen)
        self.counts.fill_(1.0)
        self.sums.copy_(self.codebook)

    @torch.no_grad()
    def _follow(self, rests: Tensor, codes: Tensor) -> None:
        """Running means, and restarts. rests (B, N, D, w), codes (B, N, D)."""
        vectors, chosen = rests.reshape(-1, rests.shape[-1]), codes.reshape(-1)
        counts = torch.zeros_like(self.counts).index_add_(0, chosen, torch.ones_like(vectors[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, vectors)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for total in (counts, sums):
                torch.distributed.all_reduce(total)
        self.counts.lerp_(counts, 1 - DECAY)
        self.sums.lerp_(sums, 1 - DECAY)
        rare = self.counts < RARE
        others = vectors[torch.randint(len(vectors), (len(rare),), device=vectors.device)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(others, 0)
        self.sums[rare], self.counts[rare] = others[rare], 1.0
        self.codebook.copy_(self.sums / self.counts[:, None])


def _detach(x: Tensor, rests: list[Tensor], codes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each residual with the gradient of x alone, and the code that it chose."""
    return [(x + (rest - x).detach(), code) for rest, code in zip(rests, codes, strict=True)]


class Block(nn.Module):
    """A ConvNeXt block without its norm's affine part: depth-wise 5x5, norm over channels, MLP, residual. (B, C, H,
    W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.pw1 = nn.Linear(channels, 2 * channels)
        self.pw2 = nn.Linear(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(self.dw(x).permute(0, 2, 3, 1))
        z: Tensor = self.pw2(F.gelu(self.pw1(normed)))  # (B, H, W, C)
        return x + z.permute(0, 3, 1, 2)


class Decoder(nn.Module):
    """The sums of pixel codes as a map (B, w, H/8, W/8) -> the normalised picture (B, 3, H, W)."""

    def __init__(self, width: int, channels: tuple[int, int, int]) -> None:
        super().__init__()
        first, second, third = channels
        self.enter = nn.Conv2d(width, first, 3, padding=1)
        self.at8 = nn.Sequential(Block(first), Block(first), Block(first))
        self.to4 = nn.Conv2d(first, 4 * second, 1)
        self.at4 = nn.Sequential(Block(second), Block(second))
        self.to2 = nn.Conv2d(second, 4 * third, 1)
        self.at2 = nn.Sequential(Block(third), Block(third))
        self.leave = nn.Conv2d(third, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.at8(self.enter(x))
        x = self.at4(F.pixel_shuffle(self.to4(x), 2))
        x = self.at2(F.pixel_shuffle(self.to2(x), 2))
        return F.pixel_shuffle(self.leave(x), 2)


class Told(NamedTuple):
    """What training sees: the normalised picture (B, 3, H, W), the semantic map (B, C, h, w) as its codes say it, the
    probe's logits (B, classes) and the commitment of both vocabularies."""

    picture: Tensor
    semantics: Tensor
    logits: Tensor
    commitment: Tensor


class Tokenizer(nn.Module):
    """Normalised image (B, 3, H, W), sides multiples of 32 -> in evaluation mode: `reconstruction` (B, 3, H, W) of
    0..1, `pixel_codes` (B, H/8 * W/8, D) and `semantic_codes` (B, H/32 * W/32, D) int32, `logits` (B, classes) of the
    linear probe on the mean of the semantic codes; in training Told."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: ImageModel, channels: tuple[int, int, int], config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(backbone, channels)
        self.to_pixel = nn.Linear(channels[0], config.code_dim)
        self.to_semantic = nn.Linear(channels[2], config.code_dim)
        self.pixel = ResidualQuantizer(config.codes, config.code_dim, config.depth)
        self.semantic = ResidualQuantizer(config.codes, config.code_dim, config.depth)
        self.decoder = Decoder(config.code_dim, config.decoder)
        self.tell = nn.Linear(config.code_dim, channels[2])  # the semantic codes as the backbone's own features
        self.probe = nn.Linear(config.code_dim, config.num_classes)
        for part in (self.to_pixel, self.to_semantic, self.decoder, self.tell, self.probe):
            part.apply(init_weights)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).reshape(1, 3, 1, 1), persistent=False)

    def vectors(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What is quantized: (B, H/8 * W/8, w) of the pixels, (B, H/32 * W/32, w) of what is seen."""
        fine, _, coarse = self.backbone(image)
        return self.to_pixel(fine.flatten(2).transpose(1, 2)), self.to_semantic(coarse.flatten(2).transpose(1, 2))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | Told:
        height, width = image.shape[2] // STRIDE, image.shape[3] // STRIDE
        fine, coarse = self.vectors(image)
        pixel, semantic = self.pixel(fine), self.semantic(coarse)
        picture = self.decoder(pixel.sum.transpose(1, 2).reshape(-1, self.config.code_dim, height, width))
        logits = self.probe(semantic.sum.mean(1).detach())  # a probe: it teaches the codes nothing
        if self.training:
            said = self.tell(semantic.sum).transpose(1, 2).reshape(-1, self.tell.out_features, height // 4, width // 4)
            return Told(picture, said, logits, pixel.commitment + semantic.commitment)
        reconstruction = (picture * self.std + self.mean).clamp(0, 1)
        return reconstruction, pixel.codes.int(), semantic.codes.int(), logits

    def smallest_margin(self, image: Tensor) -> Tensor:
        """How near each image comes to a code that flips, (B,); in shares of a vector's length."""
        with torch.no_grad():
            fine, coarse = self.vectors(image)
            return torch.minimum(self.pixel.margin(fine), self.semantic.margin(coarse))


S = TokenizerConfig()
