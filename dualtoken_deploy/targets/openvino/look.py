"""Looks into a bundle for OpenVINO: any of its values by name."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.inner import Look
from dualtoken_deploy.targets.onnx.inner import onnx_insides
from dualtoken_deploy.targets.openvino.runner import float_dtype


def probe_openvino(bundle: Bundle, names: Sequence[str], inputs: Array) -> dict[str, Array]:
    """Those of the named values that the bundle's model.xml has, for inputs given one at a time."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(bundle.path / "model.xml")
    own = {name for output in model.outputs for name in output.get_names()}
    present = {name for op in model.get_ordered_ops() for output in op.outputs() for name in output.get_names()}
    wanted = [name for name in names if name in present]
    model.add_outputs([name for name in wanted if name not in own])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": float_dtype(bundle.manifest.precision)})
    request = compiled.create_infer_request()
    feed = compiled.input(0).get_any_name()
    runs: list[dict[str, Array]] = []
    for i in range(len(inputs)):
        results = request.infer({feed: inputs[i : i + 1]}, share_outputs=False)
        runs.append({name: np.array(results[name]) for name in wanted})
    return {name: np.concatenate([run[name] for run in runs]) for name in wanted}


LOOK = Look(onnx_insides, probe_openvino)
