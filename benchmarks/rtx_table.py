"""What TensorRT for RTX takes of real models: layers in, layers taken, seconds and size, as one Markdown table.

    nice -n 10 .venv/bin/python benchmarks/rtx_table.py --output benchmarks/results/rtx-NAME.json [--models s,t-mix]

No GPU and no driver. Random weights; a process for each model, so that its memory is given back; a cell that is in the
file already is not compiled again, so that a run that was stopped goes on. In int8, fp8 and int4 every product that may
be is quantized, with ranges of ten photographs: this says what the builder takes, not what the accuracy is, which the
search of `dualtoken export` decides. SQNR is of the ONNX in ONNX Runtime against eager, on two other photographs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from dualtoken_deploy import numerics
from dualtoken_deploy.data.images import preprocess
from dualtoken_deploy.data.pictures import open_pictures
from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.files import write_atomically
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.own_sources import head_source, variant_source
from dualtoken_deploy.models.source import Source
from dualtoken_deploy.quantize.calibration import CalibrationSet
from dualtoken_deploy.targets.eager import EagerRunner
from dualtoken_deploy.targets.onnx.export import export_onnx
from dualtoken_deploy.targets.onnx.qdq import NEUTRAL, QdqQuantizer
from dualtoken_deploy.targets.onnxruntime.runner import OnnxRuntimeRunner
from dualtoken_deploy.targets.request import Request
from dualtoken_deploy.targets.runner import RunnerOptions
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.targets.tensorrt.export import PRODUCTS, type_onnx
from dualtoken_deploy.targets.tensorrt_rtx import fp8, int4
from dualtoken_deploy.targets.tensorrt_rtx.compile import CompileOptions, compile_engine, left_out
from dualtoken_deploy.targets.tensorrt_rtx.export import RULES, opset_of

CALIBRATED, CHECKED = 10, 2  # photographs


def foreign(name: str) -> Source:
    """A model of benchmarks/foreign_zoo.py, which nobody here wrote: transformers' own code, small, random weights."""
    from foreign_zoo import ZOO

    row = ZOO[name]
    reference = f"{Path(__file__).with_name('foreign_zoo.py')}:{name}"
    return Source.reference(reference, task=row.task, image_size=row.size, output_names=row.output_names)


MODELS: dict[str, Callable[[], Source]] = {
    "s": lambda: variant_source("s"),
    "t-mix": lambda: variant_source("t-mix"),
    "lightvit-t": lambda: variant_source("lightvit-t"),
    "dualformer-t": lambda: variant_source("dualformer-t"),
    "vim2-t, 64": lambda: variant_source("vim2-t", image_size=64),
    "retinanet on t-mix, 320": lambda: head_source("retinanet", "t-mix", None, (320, 320)),
    "pspnet on t-mix, 256": lambda: head_source("pspnet", "t-mix", None, (256, 256)),
    "swin of transformers, 64": lambda: foreign("swin"),
    "mobilevit of transformers, 64": lambda: foreign("mobilevit"),
}
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")


class Subject:
    """One model with its photographs; each float graph is exported once."""

    def __init__(self, source: Source) -> None:
        self.module = source.make()
        contract = source.contract("image", 1, False)
        outputs = source.outputs(contract.size, 1)
        self.request = Request("fp32", contract, outputs, None, {}, task=source.task)
        pictures = open_pictures("photographs")
        inputs = np.stack([preprocess(pictures[i].image, contract) for i in range(CALIBRATED + CHECKED)])
        self.inputs, self.held_out = inputs[:CALIBRATED], inputs[CALIBRATED:]
        self.calibration = CalibrationSet.of_arrays("photographs", self.inputs, contract)
        self._graphs: dict[int, onnx.ModelProto] = {}

    def graph(self, opset: int) -> onnx.ModelProto:
        if opset not in self._graphs:
            made = export_onnx(self.module, replace(self.request, precision="fp32"), RULES, opset, say)
            self._graphs[opset] = made.model
        return self._graphs[opset]

    def typed(self, precision: str) -> onnx.ModelProto:
        graph = self.graph(opset_of(precision))
        if precision == "int8":
            graph = QdqQuantizer(graph, self.calibration, NEUTRAL).quantize()
        elif precision == "fp8":
            graph = fp8.Fp8Backend(graph, self.calibration, "minmax", say).quantize(())
        elif precision == "int4":
            graph = int4.Int4Backend(graph).quantize(())
        return type_onnx(graph, get_target("tensorrt-rtx").precision(precision).beside, opset_of(precision))

    def sqnr_db(self, path: Path, precision: str) -> float:
        contract, outputs = self.request.contract, self.request.outputs
        specs = (contract.tensor,), outputs
        name = contract.tensor.name
        with (
            EagerRunner(self.module, contract, outputs, RunnerOptions()) as eager,
            OnnxRuntimeRunner(path, *specs, RunnerOptions(), precision) as found,
        ):
            pairs = [(eager.run({name: x[None]}), found.run({name: x[None]})) for x in self.held_out]
        flat = [np.concatenate([p[side][o.name].ravel() for p in pairs for o in outputs]) for side in (0, 1)]
        return float(numerics.compare(flat[0][None], flat[1][None]).sqnr_db)


def cell(subject: Subject, precision: str) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        model = subject.typed(precision)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path)
            sqnr, size = subject.sqnr_db(path, precision), path.stat().st_size
            data = path.read_bytes()
        prepared = time.perf_counter() - start
        compiled = compile_engine(data, (subject.request.contract.tensor,), CompileOptions(), say)
    except DualTokenError as error:
        return {"refused": str(error)}
    nodes = [node.name for node in model.graph.node]
    lost = left_out(compiled, (n.name for n in model.graph.node if n.op_type in PRODUCTS))
    return {
        "nodes": len(nodes),
        "taken": len(nodes) - len(left_out(compiled, nodes)),
        "products_left_out": list(lost),
        "layers": compiled.layers,
        "seconds": compiled.seconds,
        "prepare_seconds": round(prepared, 1),
        "engine_mib": round(len(compiled.plan) / 2**20, 1),
        "onnx_mib": round(size / 2**20, 1),
        "sqnr_db": round(sqnr, 1),
        "warnings": list(compiled.warnings),
    }


def measure(name: str, precisions: list[str], output: Path) -> None:
    """The cells of one model that the file lacks."""
    subject = None
    for precision in precisions:
        data = read(output)
        if precision in data["models"].get(name, {}):
            continue
        subject = subject or Subject(MODELS[name]())
        print(f"{name} {precision}", file=sys.stderr, flush=True)
        data["models"].setdefault(name, {})[precision] = cell(subject, precision)
        text = json.dumps(data, indent=1)
        write_atomically(output, lambda path, text=text: path.write_text(text + "\n", encoding="utf-8"))


def read(output: Path) -> dict[str, Any]:
    if output.is_file():
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found
    libraries = ("tensorrt-rtx-cu13-libs", "torch", "onnx", "onnxruntime", "dualtoken-deploy")
    machine = {**describe_machine(), "python": platform.python_version()}
    return {"machine": machine, "versions": library_versions(libraries), "models": {}}


def table(data: dict[str, Any]) -> str:
    lines = [
        "| model | precision | ONNX nodes | taken | layers | compiles in | engine | ONNX | SQNR of the ONNX |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, cells in data["models"].items():
        for precision, c in cells.items():
            if "refused" in c:
                lines.append(f"| {name} | {precision} | refused: {c['refused']} | | | | | | |")
                continue
            lines.append(
                f"| {name} | {precision} | {c['nodes']} | {c['taken']} | {c['layers']} | {c['seconds']:.1f} s | "
                f"{c['engine_mib']:.1f} MiB | {c['onnx_mib']:.1f} MiB | {c['sqnr_db']:.1f} dB |"
            )
    return "\n".join(lines)


def say(_: str) -> None:
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS), help="names with ; or , between them")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    precisions = arguments.precisions.split(",")
    if arguments.one:
        measure(arguments.one, precisions, arguments.output)
        return
    asked = [name for name in MODELS if any(part in name for part in arguments.models.split(","))]
    for name in asked:
        command = [sys.executable, __file__, "--output", str(arguments.output), "--one", name]
        done = subprocess.run([*command, "--precisions", arguments.precisions], check=False)
        if done.returncode:
            print(f"{name}: its process ended with {done.returncode}", file=sys.stderr)
    print(table(read(arguments.output)))


if __name__ == "__main__":
    main()
