"""python -m tests.made_twice FOLDER: small bundles of the targets that promise the same bytes, by another process."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from dualtoken_deploy import export
from dualtoken_deploy.targets.onnx import export as onnx_export
from dualtoken_deploy.targets.table import TARGETS
from tests.small import SMALL, make_known
from tests.traces import shared

# target -> files of its bundle. These two of the small model, which both trace alike
WITH_OWN_MODEL = {"onnxruntime": 6, "openvino": 7}  # OpenVINO's model is two files
# and these, whose converters take longer, of a small net: a package has three files, ncnn's model is two; behind a
# target its backend
WITH_A_NET = {"coreml": 8, "executorch": 6, "executorch coreml": 6, "litert": 6, "ncnn": 7}


def targets() -> dict[str, int]:
    """Those that are installed here, and how many files their bundles have."""
    every = {**WITH_OWN_MODEL, **WITH_A_NET}
    return {name: n for name, n in every.items() if not any(TARGETS[word].missing() for word in name.split())}


def make_net(folder: Path) -> None:
    """Bundles of a net with the same weights in every process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    for name in targets().keys() & WITH_A_NET:
        target, _, backend = name.partition(" ")
        export(net, target=target, output=folder / name, image_size=32, settings={"backend": backend or None})


if __name__ == "__main__":
    place = Path(sys.argv[1])
    make_known()
    onnx_export.trace = shared(onnx_export.trace, place.with_name("traces"))  # type: ignore[assignment]
    for name in targets().keys() & WITH_OWN_MODEL:
        export(target=name, output=place / name, **SMALL)  # type: ignore[arg-type]
    make_net(place)
