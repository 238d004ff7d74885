"""S on an NVIDIA GPU: eager, CUDA graph, torch.compile, AOTInductor, ONNX Runtime, TensorRT where it is, in one run.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME.json [--batches 1,8,64] [--contestants a,b]
    python benchmarks/gpu.py --tiny --output out.json        # a small model on the CPU: proves that the script works

One process for each contestant and batch, rounds interleaved. A time is from a host array of uint8 pictures to a host
array of logits. A contestant that cannot run here is in the JSON with its reason. SQNR: against eager fp32 on the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy import export, load_runner, numerics
from dualtoken_deploy.errors import DualTokenError, MissingError
from dualtoken_deploy.machine import describe_machine, library_versions

Run = Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
LIBRARIES = (
    "torch",
    "triton",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "cuda-bindings",
    "numpy",
    "dualtoken-deploy",
)
SETTINGS = {False: ("s", 224, 1000), True: ("t-mix", 64, 10)}  # by --tiny: variant, image size, classes


# --- contestants: each makes a function from pictures to logits, or raises MissingError ---------------------------


def eager(setting: dict[str, Any], dtype: str, compiled: bool = False, graph: bool = False) -> Run:
    """The reference model, normalisation included, as a user would run it."""
    import torch

    from dualtoken_deploy.deploy.forms import ImageInput
    from dualtoken_deploy.models.registry import random_model
    from dualtoken_deploy.spec import IMAGENET_MEAN, IMAGENET_STD

    size, device = setting["size"], setting["device"]
    kind = getattr(torch, dtype)
    network = random_model(setting["variant"], 0, image_size=(size, size), num_classes=setting["classes"]).eval()
    image = ImageInput(IMAGENET_MEAN, IMAGENET_STD, torch.float32).to(device)
    model: Any = network.to(device=device, dtype=kind)
    if compiled:
        model = torch.compile(model)

    def forward(pictures: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = model(image(pictures).to(kind)).float()
        return logits

    if graph:
        forward = capture(forward, setting)
    return lambda pictures: forward(torch.from_numpy(pictures).to(device)).cpu().numpy()


def capture(forward: Callable[[Any], Any], setting: dict[str, Any]) -> Callable[[Any], Any]:
    """`forward` as one CUDA graph over static tensors."""
    import torch

    if setting["device"] != "cuda":
        raise MissingError("a CUDA graph needs a CUDA device")
    held = torch.zeros((setting["batch"], setting["size"], setting["size"], 3), dtype=torch.uint8, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen and loaded outside of the capture
        for _ in range(3):
            forward(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward(held)

    def replay(pictures: Any) -> Any:
        held.copy_(pictures)
        graph.replay()
        return out

    return replay


def bundle(setting: dict[str, Any], target: str, precision: str, runs_as: str | None = None) -> Run:
    """A bundle exported for this batch; `runs_as` runs its ONNX with another target's runner."""
    from dataclasses import replace

    from dualtoken_deploy import Bundle

    on_cuda = setting["device"] == "cuda"
    if runs_as == "onnxruntime" and on_cuda:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise MissingError("this onnxruntime has no CUDAExecutionProvider")
    folder = Path(setting["folder"]) / f"{target}-{precision}-{setting['batch']}-{runs_as}"
    result = export(
        setting["variant"], target, precision, image_size=setting["size"], batch=setting["batch"], output=folder,
        num_classes=setting["classes"], device=setting["device"] if target == "aotinductor" else None,
    )  # fmt: skip
    opened = Bundle.open(folder)
    if runs_as:
        opened = Bundle(folder, replace(opened.manifest, target=runs_as))
    elif result.next_step:
        raise MissingError(result.next_step)
    runner = load_runner(opened, "cuda" if on_cuda else None)
    return lambda pictures: runner.run({"image": pictures})["logits"]


CONTESTANTS: dict[str, Callable[[dict[str, Any]], Run]] = {
    "eager-fp32": lambda s: eager(s, "float32"),
    "eager-fp16": lambda s: eager(s, "float16"),
    "eager-fp16-graph": lambda s: eager(s, "float16", graph=True),
    "compile-fp16": lambda s: eager(s, "float16", compiled=True),
    "aotinductor-fp32": lambda s: bundle(s, "aotinductor", "fp32"),
    "aotinductor-fp16": lambda s: bundle(s, "aotinductor", "fp16"),
    "aotinductor-bf16": lambda s: bundle(s, "aotinductor", "bf16"),
    "onnxruntime-fp32": lambda s: bundle(s, "tensorrt", "fp32", "onnxruntime"),
    "onnxruntime-fp16": lambda s: bundle(s, "tensorrt", "fp16", "onnxruntime"),
    "tensorrt-fp32": lambda s: bundle(s, "tensorrt", "fp32"),
    "tensorrt-fp16": lambda s: bundle(s, "tensorrt", "fp16"),
}


# --- one process for each ------------------------------------------------------------------------------------------


def work() -> None:
    """Reads one JSON a line: the setting first, then {"seconds"} for each round; answers in one line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print; stdout is for the answers
    setting = json.loads(sys.stdin.readline())
    try:
        run = CONTESTANTS[setting["name"]](setting)
        pictures = make_pictures(setting)
        difference = numerics.compare(reference(setting, pictures), run(pictures))
    except (DualTokenError, RuntimeError, ImportError, ValueError, OSError) as error:  # this contestant's result
        reason = str(error) if isinstance(error, DualTokenError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"skipped": reason.splitlines()[0]}), file=answers, flush=True)
        return
    print(json.dumps({"sqnr_db": round(difference.sqnr_db, 1)}), file=answers, flush=True)
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        print(json.dumps({"ms": sample(run, pictures, seconds)}), file=answers, flush=True)


def make_pictures(setting: dict[str, Any]) -> np.ndarray[Any, Any]:
    shape = (setting["batch"], setting["size"], setting["size"], 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def reference(setting: dict[str, Any], pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return eager({**setting, "device": "cpu"}, "float32")(pictures)


def sample(run: Run, pictures: np.ndarray[Any, Any], seconds: float) -> list[float]:
    """Milliseconds of each call for `seconds`, ten calls at least, after three that are not counted."""
    for _ in range(3):
        run(pictures)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        run(pictures)
        times.append(1e3 * (time.perf_counter() - start))
    return times


@contextmanager
def started() -> Iterator[Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path[1:]])}
    process = subprocess.Popen(
        [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def ask(process: Any, question: dict[str, Any]) -> dict[str, Any]:
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    return json.loads(line) if line else {"skipped": "its process ended"}


def race(settings: list[dict[str, Any]], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All contestants of one batch: prepared one after the other, then timed in interleaved rounds."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        alive, results = [], []
        for setting in settings:
            say(f"batch {setting['batch']}: preparing {setting['name']}")
            start, process = time.perf_counter(), stack.enter_context(started())
            result = {"name": setting["name"], "batch": setting["batch"], **ask(process, setting)}
            result["prepare_s"] = round(time.perf_counter() - start, 1)
            results.append(result)
            if "skipped" not in result:
                alive.append((result, process))
        for number in range(rounds):
            say(f"batch {settings[0]['batch']}: round {number + 1}/{rounds}")
            for result, process in alive:
                answer = ask(process, {"seconds": seconds})
                if "ms" in answer:
                    result.setdefault("rounds", []).append(answer["ms"])
                else:
                    result["skipped"] = answer["skipped"]
        return summarise(results)


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """p50, p90 and images/s over all samples; the ratio of the first contestant's round p50 over this one's."""
    base = next((r for r in results if "rounds" in r), None)
    for result in results:
        samples = sorted(ms for part in result.get("rounds", ()) for ms in part)
        if not samples or base is None or "skipped" in result:
            continue
        p50 = statistics.median(samples)
        pairs = zip(base["rounds"], result["rounds"], strict=True)
        ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in pairs)
        result |= {
            "p50_ms": round(p50, 4),
            "p90_ms": round(samples[int(0.9 * (len(samples) - 1))], 4),
            "images_per_s": round(1e3 * result["batch"] / p50, 1),
            "ratio": {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1], "to": base["name"]},
            "samples": len(samples),
        }
    return [{k: v for k, v in r.items() if k != "rounds"} for r in results]


# --- the machine ---------------------------------------------------------------------------------------------------


def describe(device: str) -> dict[str, Any]:
    """CPU, GPU, driver, and what there is of TensorRT."""
    data = {**describe_machine(), "versions": library_versions(LIBRARIES), "tensorrt": find_tensorrt()}
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        data["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_mib": properties.total_memory >> 20,
            "cuda_of_torch": torch.version.cuda,
            "smi": output("nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader"),
        }
    return data


def find_tensorrt() -> dict[str, Any]:
    libraries = [line.strip() for line in (output("ldconfig", "-p") or "").splitlines() if "nvinfer" in line]
    return {"module": importlib.util.find_spec("tensorrt") is not None, "libraries": libraries}


def output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batches", default=None, help="1,8,64 unless given")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU")
    arguments = parser.parse_args()
    if arguments.worker:
        work()
        return
    names = arguments.contestants.split(",")
    if unknown := set(names) - set(CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; valid: {', '.join(CONTESTANTS)}")
    import torch

    device = "cpu" if arguments.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        say("error: PyTorch finds no CUDA device; --tiny runs a small model on the CPU")
        sys.exit(3)
    variant, size, classes = SETTINGS[arguments.tiny]
    batches = [int(b) for b in (arguments.batches or ("1" if arguments.tiny else "1,8,64")).split(",")]
    common = {"variant": variant, "size": size, "classes": classes, "device": device}
    with tempfile.TemporaryDirectory() as folder:
        results = [
            row
            for batch in batches
            for row in race(
                [{**common, "name": n, "batch": batch, "folder": folder} for n in names],
                arguments.rounds,
                arguments.seconds,
            )
        ]
    text = json.dumps({"machine": describe(device), "setting": common, "results": results}, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
