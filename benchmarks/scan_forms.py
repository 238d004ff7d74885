"""The selective scan by its chunk length in ONNX Runtime and OpenVINO: one S6 of ViM2, nodes and time of a call.

    .venv/bin/python benchmarks/scan_forms.py [--case 14x768] [--chunks 7,14,28,49,98,196] [--calls 12]

SIDExWIDTH: of the token mixers at 224 56x192, 28x384, 14x768, 7x1536. Random weights, one thread, float32. All graphs
of a runtime are called in turn, and the least CPU time of a call is shown, which other jobs stretch less than the time
on the wall. The last column is the largest difference to eager, of the largest element.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from dualtoken_deploy.models import scan
from dualtoken_deploy.models.registry import randomise
from dualtoken_deploy.models.vim2 import S6
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.onnx.scan import TRANSLATIONS
from dualtoken_deploy.targets.request import quiet

STATES = 16
Call = Callable[[], Array]


class Layer(nn.Module):
    """An S6 alone: (1, L, E) -> (1, L, E)."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side, self.s6 = side, S6(width, width // 32, STATES)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.s6(x, (self.side, self.side))
        return out


def graph(layer: Layer, x: Tensor, chunk: int) -> onnx.ModelProto:
    with patch.object(scan, "chunk_length", lambda _length: chunk), scan.as_operator(), quiet():
        program = torch.onnx.export(
            layer, (x,), dynamo=True, custom_translation_table=dict(TRANSLATIONS), verbose=False, optimize=False
        )
    assert program is not None  # noqa: S101  # torch's type
    program.optimize()
    made: onnx.ModelProto = program.model_proto
    return made


def in_onnxruntime(model: onnx.ModelProto, x: Array) -> Call:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options)
    feeds = {session.get_inputs()[0].name: x}
    return lambda: np.asarray(session.run(None, feeds)[0])


def in_openvino(model: onnx.ModelProto, x: Array) -> Call:
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    request = core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings).create_infer_request()
    return lambda: np.array(next(iter(request.infer([x]).values())))


RUNTIMES = {"ONNX Runtime": in_onnxruntime, "OpenVINO": in_openvino}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="14x768")
    parser.add_argument("--chunks", default="7,14,28,49,98,196")
    parser.add_argument("--calls", type=int, default=12)
    arguments = parser.parse_args()
    side, width = (int(word) for word in arguments.case.split("x"))
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layer = Layer(side, width).eval()
    randomise(layer, 0)
    x = torch.randn(1, side * side, width)
    with torch.no_grad():
        expected = layer(x).numpy()
    chunks = [int(q) for q in arguments.chunks.split(",")]
    models = {q: graph(layer, x, q) for q in chunks}
    print("| runtime | chunk | nodes | least ms of CPU | off |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    for runtime, load in RUNTIMES.items():
        calls = {q: load(model, x.numpy()) for q, model in models.items()}
        off = {q: float(np.abs(call() - expected).max() / np.abs(expected).max()) for q, call in calls.items()}
        least = dict.fromkeys(calls, np.inf)
        for _ in range(arguments.calls):
            for q, call in calls.items():
                start = time.process_time()
                call()
                least[q] = min(least[q], time.process_time() - start)
        for q, seconds in least.items():
            print(f"| {runtime} | {q} | {len(models[q].graph.node)} | {1e3 * seconds:.1f} | {off[q]:.0e} |", flush=True)


if __name__ == "__main__":
    main()
