"""Input contracts as a variant has them, without a model; and all logits of a runner over many inputs."""

from __future__ import annotations

import numpy as np

from dualtoken_deploy.numerics import Array
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.load import Runner
from dualtoken_deploy.targets.runner import run_each


def make_contract(kind: str, size: tuple[int, int], batch: int | str = 1) -> InputContract:
    """Kind "image" or "tensor"."""
    if kind == "image":
        return InputContract(TensorSpec("image", "uint8", "NHWC", (batch, *size, 3)), kind, size)
    return InputContract(TensorSpec("input", "float32", "NCHW", (batch, 3, *size)), kind, size)


def run_batches(runner: Runner, contract: InputContract, inputs: Array) -> Array:
    """Logits (N, classes) for N inputs."""
    return np.concatenate([next(iter(outputs.values())) for outputs in run_each(runner, contract, inputs)])
