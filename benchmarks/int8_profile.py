"""Where a bundle's time goes, by operator: what docs/int8.md says integers win and lose.

    python benchmarks/int8_profile.py BUNDLE... [--threads 1] [--runs 30]

ONNX Runtime's profiler, OpenVINO's performance counters: of each node the median over the runs, added up by kind and
kernel. Medians of nodes hold on a machine that others use too, where a whole run hardly ever goes undisturbed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.store import Bundle

WARM_UP = 5
Nodes = dict[tuple[str, str, str], float]  # microseconds by node, kind, kernel or dtype


def of_onnxruntime(path: Path, feed: Any, threads: int, runs: int) -> Nodes:
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        settings = ort.SessionOptions()
        settings.log_severity_level, settings.intra_op_num_threads = 3, threads
        settings.enable_profiling, settings.profile_file_prefix = True, f"{folder}/run"
        session = ort.InferenceSession(str(path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
        for _ in range(WARM_UP + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            types = [next(iter(t)) for t in event["args"].get("input_type_shape", [])]
            found[event["name"], event["args"]["op_name"], (types or ["-"])[0]].append(event["dur"])
    return {key: statistics.median(laps[WARM_UP:]) for key, laps in found.items()}


def of_openvino(path: Path, feed: Any, threads: int, runs: int, hint: str) -> Nodes:
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERF_COUNT": True}
    request = ov.Core().compile_model(str(path / "model.xml"), "CPU", settings).create_infer_request()
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for number in range(WARM_UP + runs):
        request.infer(feed)
        for layer in request.get_profiling_info() if number >= WARM_UP else ():
            if "EXECUTED" in str(layer.status):
                found[layer.node_name, layer.node_type, layer.exec_type].append(1e6 * layer.real_time.total_seconds())
    return {key: statistics.median(laps) for key, laps in found.items()}


def show(name: str, nodes: Nodes) -> None:
    kinds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (_, kind, kernel), microseconds in nodes.items():
        kinds[kind, kernel].append(microseconds)
    print(f"\n{name}: {sum(nodes.values()) / 1e3:.2f} ms in {len(nodes)} nodes\n\n| ms | nodes | kind | kernel |")
    print("| ---: | ---: | --- | --- |")
    for (kind, kernel), laps in sorted(kinds.items(), key=lambda item: -sum(item[1])):
        print(f"| {sum(laps) / 1e3:.3f} | {len(laps)} | {kind} | {kernel} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    asked = parser.parse_args()
    for path in asked.bundles:
        bundle = Bundle.open(path)
        feed = {bundle.manifest.input.tensor.name: bundle.golden["input"]}
        if bundle.manifest.target == "onnxruntime":
            nodes = of_onnxruntime(path, feed, asked.threads, asked.runs)
        else:
            hint = "bf16" if bundle.manifest.precision == "bf16" else "f32"
            nodes = of_openvino(path, feed, asked.threads, asked.runs, hint)
        show(path.name, nodes)


if __name__ == "__main__":
    main()
