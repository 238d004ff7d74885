"""The values inside a .tflite: the saved file with all of them as outputs, run by LiteRT as ever."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.deploy.traced import TRACED_RULES
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.inner import Insides, Look, Tell
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.litert.runner import MODEL, open_interpreter
from dualtoken_deploy.targets.mobile.inner import as_saved, batch_of, first_of, mobile_insides


def litert_insides(bundle: Bundle, inputs: Array, tell: Tell) -> Insides:
    """As mobile_insides, maps with their channels last as the file has them."""
    inside = mobile_insides(bundle, TRACED_RULES, inputs, tell)
    model = flat.read(bundle.path / MODEL)
    tensors = model.subgraphs[0].tensors
    shapes = {
        flat.tensor_name(model, i): tuple(map(int, tensors[i].shape))
        for op in flat.operators(model)
        for i in op.outputs
    }
    turned = {name: as_saved(value, shapes.get(name), inside.kinds[name]) for name, value in inside.values.items()}
    return replace(inside, values=turned)


def probe_litert(bundle: Bundle, names: Sequence[str], inputs: Array) -> dict[str, Array]:
    """Those of the named values that the bundle's model.tflite has in float, for inputs given one at a time."""
    model = flat.read(bundle.path / MODEL)
    graph, float32 = model.subgraphs[0], flat.schema().TensorType.FLOAT32
    made = {flat.tensor_name(model, i): i for op in flat.operators(model) for i in op.outputs}
    wanted = {name: made[name] for name in names if name in made and graph.tensors[made[name]].type == float32}
    model.signatureDefs = []  # a signature names the outputs that there were
    graph.outputs = list(wanted.values())
    with tempfile.TemporaryDirectory(prefix="dualtoken-litert.") as folder:
        path = Path(folder) / MODEL
        flat.write(model, path)
        interpreter = open_interpreter(path, None)
        (feed,) = interpreter.get_input_details()
        places = [d["index"] for d in interpreter.get_output_details()]
        runs: list[list[Array]] = []
        for image in inputs:
            interpreter.set_tensor(feed["index"], batch_of(bundle, image))
            interpreter.invoke()
            runs.append([first_of(bundle, interpreter.get_tensor(place)) for place in places])
    return {name: np.concatenate([run[k] for run in runs]) for k, name in enumerate(wanted)}


LOOK = Look(litert_insides, probe_litert)
