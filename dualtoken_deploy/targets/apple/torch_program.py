"""The torch program that Apple's converters take: preprocessing, the deploy form, and probabilities behind logits."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.spec import InputContract
from dualtoken_deploy.targets.runner import planar_shape
from dualtoken_deploy.targets.tracing import Around, Prepares, why

PROBABILITIES = "probabilities"  # second output of a program with image input


class PixelInput(Prepares):
    """Pixels 0..255 as floats, NCHW RGB -> normalised: (x - 255 mean) / (255 std).

    In float16 a pixel less a multiple of 1/16 is exact, so subtracting first loses nothing but the mean's own rounding.
    """

    shift: Tensor
    gain: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("shift", 255.0 * torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("gain", 1.0 / (255.0 * torch.tensor(std).reshape(1, 3, 1, 1)))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.shift) * self.gain


class ImageClassifier(Around):
    """Pixels -> logits and probabilities, both (B, classes)."""

    def __init__(self, model: nn.Module, contract: InputContract) -> None:
        super().__init__()
        self.pixels, self.model = PixelInput(contract.mean, contract.std), model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(self.pixels(image))
        logits = found[0] if isinstance(found, tuple) else found
        return logits, torch.softmax(logits, dim=-1)


class ImageDense(Around):
    """Pixels -> whatever a dense model gives."""

    def __init__(self, model: nn.Module, contract: InputContract) -> None:
        super().__init__()
        self.pixels, self.model = PixelInput(contract.mean, contract.std), model

    def forward(self, image: Tensor) -> Any:
        return self.model(self.pixels(image))


def example_input(contract: InputContract) -> Tensor:
    """Zeros in the form that the program takes, float32 NCHW whatever the contract's own form."""
    return torch.zeros(planar_shape(contract))


def trace(module: nn.Module, contract: InputContract) -> torch.export.ExportedProgram:
    """torch.export of `module` at a fixed size. Raises ConversionError.

    An attention whose scale is the default one, said by number, gets it unsaid: Core ML's attention operation has no
    scale, and its converter takes any number for another one.
    """
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(module.eval(), (example_input(contract),))
    except Exception as error:  # torch.export has no common base for what it raises
        raise ConversionError(f"torch.export cannot export {why(error, module)}") from error
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.scaled_dot_product_attention.default and "scale" in node.kwargs:
            width = node.args[0].meta["val"].shape[-1]
            if abs(float(node.kwargs["scale"]) - width**-0.5) < 1e-12:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars, warnings and prints of the converters off the user's terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
