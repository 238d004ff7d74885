"""Looks into a bundle for ONNX Runtime: any of its values by name."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.inner import Look
from dualtoken_deploy.targets.onnx.inner import onnx_insides
from dualtoken_deploy.targets.onnx.values import Prober


def probe_onnx(bundle: Bundle, names: Sequence[str], inputs: Array) -> dict[str, Array]:
    """Those of the named values that the bundle's model.onnx has, for inputs given one at a time."""
    model = onnx.load(bundle.path / "model.onnx")
    present = {value for node in model.graph.node for value in node.output}
    return Prober(model, [name for name in names if name in present]).run_each(inputs)


LOOK = Look(onnx_insides, probe_onnx)
