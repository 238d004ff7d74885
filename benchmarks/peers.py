"""S and what a user would pick instead, through the same pipeline: latency on each runtime beside published accuracy.

    python benchmarks/peers.py prepare FOLDER    # exports each for ONNX Runtime and OpenVINO, fp32; can be gone on with
    python benchmarks/peers.py race FOLDER [--minutes 10] [--picture peers.svg] > peers.md

The peers are architectures of transformers with random weights at 224x224 (latency does not depend on them, so long as
no values are denormal: see `settled`), so the accuracies are those that their authors publish, on ImageNet-1k with
their own recipes; nothing here measures them.
MACs are counted here.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dualtoken_deploy import export
from dualtoken_deploy.bench import bench, run
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import DualTokenError

EXAMPLE = Path(__file__).parents[1] / "examples" / "python" / "efficientnet_lite0.py"
SIZE, TARGETS = 224, ("onnxruntime", "openvino")
SECONDS, FEWEST, WIDTH, ROUND_S = 0.25, 5, 0.1, 0.75


@dataclass(frozen=True)
class Peer:
    """`top1`: published, in percent, and `source` where. `variant`: of this package; else a class of transformers with
    its configuration."""

    top1: float | None
    source: str
    variant: str | None = None
    model: str = ""
    config: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    made: str = ""  # what --model takes, with weights of its own
    settle: bool = True  # not RegNetY: it has no denormals, and settled float32 keeps 74 dB of it


PEERS = {
    "dualtoken-s": Peer(79.5, "arXiv:2309.12424, Table 2", variant="s"),
    "dualtoken-t-mix": Peer(75.4, "arXiv:2309.12424, Table 2", variant="t-mix"),
    "lightvit-t": Peer(78.7, "arXiv:2207.05557", variant="lightvit-t"),
    "dualformer-t": Peer(78.4, "its paper", variant="dualformer-t"),
    "levit-192": Peer(
        80.0, "arXiv:2104.01136, distilled, 1000 epochs", model="LevitForImageClassification", config="LevitConfig",
        options={"hidden_sizes": [192, 288, 384], "num_attention_heads": [3, 5, 6], "depths": [4, 4, 4],
                 "key_dim": [32, 32, 32]},
    ),
    "mobilenetv2": Peer(71.9, "torchvision's weights, V1", model="MobileNetV2ForImageClassification",
                        config="MobileNetV2Config"),
    "mobilevitv2-1.0": Peer(78.1, "arXiv:2206.02680 and ml-cvnets' model zoo (78.09), at 256",
                            model="MobileViTV2ForImageClassification", config="MobileViTV2Config"),
    "pvtv2-b0": Peer(70.5, "arXiv:2106.13797", model="PvtV2ForImageClassification", config="PvtV2Config"),
    "pvtv2-b1": Peer(78.7, "arXiv:2106.13797", model="PvtV2ForImageClassification", config="PvtV2Config",
                     options={"hidden_sizes": [64, 128, 320, 512]}),
    "convnextv2-atto": Peer(76.7, "arXiv:2301.00808", model="ConvNextV2ForImageClassification",
                            config="ConvNextV2Config",
                            options={"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}),
    "efficientnet-b0": Peer(77.7, "torchvision's weights, V1", model="EfficientNetForImageClassification",
                            config="EfficientNetConfig",
                            options={"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224,
                                     "hidden_dim": 1280, "depthwise_padding": []}),
    "regnety-400mf": Peer(74.0, "torchvision's weights, V1", model="RegNetForImageClassification",
                          config="RegNetConfig",
                          options={"embedding_size": 32, "hidden_sizes": [48, 104, 208, 440], "depths": [1, 3, 6, 6],
                                   "groups_width": 8, "layer_type": "y"}, settle=False),
    # 2.9 M parameters: the class of transformers lacks the last 1x1 convolution of the published head (6.0 M)
    "hgnetv2-b0": Peer(
        77.8, "PaddleClas, distilled from 22k classes", model="HGNetV2ForImageClassification", config="HGNetV2Config",
        options={"embedding_size": 16, "hidden_sizes": [64, 256, 512, 1024], "depths": [1, 1, 2, 1],
                 "stem_channels": [3, 16, 16], "stage_in_channels": [16, 64, 256, 512],
                 "stage_mid_channels": [16, 32, 64, 128], "stage_out_channels": [64, 256, 512, 1024],
                 "stage_num_blocks": [1, 1, 2, 1], "stage_numb_of_layers": [3, 3, 3, 3],
                 "use_learnable_affine_block": True},
    ),
    # its own weights, though latency does not depend on them
    "efficientnet-lite0": Peer(75.1, "its package, at 224", made=f"{EXAMPLE}:make"),
}  # fmt: skip


def make(name: str = "mobilenetv2") -> nn.Module:
    """The peer of that name with random weights: what --model names, with --model-arg name=..."""
    import transformers

    torch.manual_seed(0)
    peer = PEERS[name]
    options = {"num_labels": 1000, **peer.options}
    made: nn.Module = getattr(transformers, peer.model)(getattr(transformers, peer.config)(**options))
    return settled(made) if peer.settle else made.eval()


def settled(model: nn.Module) -> nn.Module:
    """The model with its batch norms' statistics taken from noise. With those of a fresh model, of no pictures, values
    shrink from layer to layer until they are denormal, and a CPU takes 30 times as long for those."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, SIZE, SIZE))
    return model.eval()


def prepare(folder: Path) -> None:
    for name, peer in PEERS.items():
        for target in TARGETS:
            place = folder / f"{name}-{target}"
            if place.exists():
                continue
            start = time.monotonic()
            try:
                if peer.variant is not None:
                    export(peer.variant, target, output=place)
                elif peer.made:
                    export(peer.made, target, image_size=SIZE, output=place)
                else:
                    export(f"{__file__}:make", target, arguments={"name": name}, image_size=SIZE, output=place)
            except DualTokenError as error:
                print(f"{name} {target}: {error}", file=sys.stderr, flush=True)
                continue
            print(f"{name} {target}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


def race(folder: Path, minutes: float, threads: int, picture: Path | None) -> None:
    """Each runtime by itself, all of its bundles in one bench against S, fewest MACs first."""
    end, points = time.monotonic() + 60 * minutes, []
    for number, target in enumerate(TARGETS):
        bundles = [Bundle.open(place) for name in PEERS if (place := folder / f"{name}-{target}").exists()]
        bundles.sort(key=lambda b: b.manifest.measured.macs or 0)
        share = (end - time.monotonic()) / (len(TARGETS) - number)
        run.MOST_ROUNDS = max(FEWEST, int(share / (ROUND_S * 2 * len(bundles))))
        report = bench(bundles, f"dualtoken-s-{target}", threads, 1, FEWEST, SECONDS, until=WIDTH)
        if number == 0:
            print(f"Machine: {report.machine_line()}.\n\nthreads {threads}, batch 1, fp32\n")
            print("| model | published top-1 | GMACs | runtime | p50 (ms) | S's time over it |")
            print("| --- | ---: | ---: | --- | ---: | ---: |")
        for one in report.contestants:
            if one.kind != "bundle" or one.bundle is None:
                continue
            name = Path(one.bundle).name.removesuffix(f"-{target}")
            macs, top1 = Bundle.open(one.bundle).manifest.measured.macs, PEERS[name].top1
            low, high = one.ratio_interval or (one.ratio.low, one.ratio.high)
            print(
                f"| {name} | {'-' if top1 is None else f'{top1:.1f}'} | {(macs or 0) / 1e9:.2f} | {target} | "
                f"{one.p50_ms:.2f} | {one.ratio.median:.2f}x ({low:.2f}-{high:.2f}) |",
                flush=True,
            )
            if top1 is not None:
                points.append((target, name, one.p50_ms, top1))
    if picture is not None:
        draw(points, picture)


def draw(points: list[tuple[str, str, float, float]], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(TARGETS), figsize=(11, 4.5), sharey=True)
    for axis, target in zip(axes, TARGETS, strict=True):
        for where, name, latency, top1 in points:
            if where == target:
                own = PEERS[name].variant is not None
                axis.scatter(latency, top1, color="#c1121f" if own else "#33658a", zorder=3)
                axis.annotate(name, (latency, top1), textcoords="offset points", xytext=(5, 4), fontsize=7)
        axis.set_title(target)
        axis.set_xlabel("p50 (ms), fp32, batch 1")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("published top-1 (%)")
    figure.tight_layout()
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("prepare", "race"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path)
    asked = parser.parse_args()
    if asked.what == "prepare":
        prepare(asked.folder)
    else:
        race(asked.folder, asked.minutes, asked.threads, asked.picture)


if __name__ == "__main__":
    main()
