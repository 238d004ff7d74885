"""Looks into a traced program: the values of its operations, computed by PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dualtoken_deploy.numerics import Array


class Recorder(torch.fx.Interpreter):
    """Runs a program and keeps the values of the operations in `names`, by the names that these stand for."""

    def __init__(self, module: torch.fx.GraphModule, names: Mapping[str, str]) -> None:
        super().__init__(module)
        self._names = names
        self._found: dict[str, Array] = {}

    def record(self, inputs: torch.Tensor) -> dict[str, Array]:
        self._found = {}
        self.run(inputs)
        return self._found

    def run_node(self, n: torch.fx.Node) -> object:
        result = super().run_node(n)
        if n.name in self._names:
            self._found[self._names[n.name]] = result.numpy().copy()
        return result
