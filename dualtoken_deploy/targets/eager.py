"""Runs the eager PyTorch model behind the input contract of a bundle: the reference that everything is held against."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import MissingError, missing_extra
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.runner import Array, Bordered, Execution, RunnerOptions

if TYPE_CHECKING:
    from torch import nn


def load(bundle: Bundle, options: RunnerOptions) -> EagerRunner:
    """The eager model that the bundle was made from. Raises MissingError (no torch, or a model that lived in memory
    alone), WeightsError (no file)."""
    try:
        from dualtoken_deploy.models.own_sources import rebuild
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("dualtoken_deploy"):
            raise
        raise missing_extra("export", "the eager model") from error
    manifest = bundle.manifest
    return EagerRunner(rebuild(manifest), manifest.input, manifest.outputs, options)


def check_device(device: str | None) -> str:
    """PyTorch's name of a device that is here, its CPU unless given. Raises MissingError."""
    import torch

    device = device or "cpu"
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise MissingError(f"PyTorch {torch.__version__} has no device {device!r} here; use cpu")
    return device


class EagerRunner(Bordered):
    """The model in eager mode, its preprocessing in numpy, so that a fault baked into a graph cannot hide here."""

    def __init__(
        self, model: nn.Module, contract: InputContract, outputs: tuple[TensorSpec, ...], options: RunnerOptions
    ) -> None:
        import torch

        self._device = check_device(options.device)
        if options.threads:
            torch.set_num_threads(options.threads)
        self._model = model.eval().to(self._device)
        self._contract = contract
        self._inputs, self._outputs = (contract.tensor,), outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        (name,) = (s.name for s in self.inputs)
        image = torch.from_numpy(np.ascontiguousarray(self.normalised(feeds[name])))
        with torch.inference_mode():
            found = self._model(image.to(self._device))
        values = found if isinstance(found, tuple) else (found,)
        return {s.name: v.cpu().numpy().astype(s.dtype) for s, v in zip(self._outputs, values, strict=True)}

    def execution(self) -> Execution:
        """Kinds of leaf modules, with the dtype of their parameters."""
        leaves = [m for m in self._model.modules() if not list(m.children())]
        dtypes: dict[str, Counter[str]] = {}
        for leaf in leaves:
            parameter: Any = next(leaf.parameters(), None)
            dtype = "none" if parameter is None else str(parameter.dtype).removeprefix("torch.")
            dtypes.setdefault(type(leaf).__name__, Counter())[dtype] += 1
        operators = {kind: sum(counts.values()) for kind, counts in sorted(dtypes.items())}
        return Execution(operators, {kind: tuple(c) for kind, c in sorted(dtypes.items())})

    def normalised(self, batch: Array) -> Array:
        """float32 NCHW, (x / 255 - mean) / std of an image batch; any other batch as it is."""
        if self._contract.kind != "image":
            return batch
        mean, std = np.array(self._contract.mean), np.array(self._contract.std)
        out: Array = ((batch / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
        return out
