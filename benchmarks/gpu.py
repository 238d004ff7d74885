"""S on an NVIDIA GPU in one run: eager, torch.compile, AOTInductor, ONNX Runtime, TensorRT, TensorRT for RTX.

    python benchmarks/gpu.py --output benchmarks/results/gpu-NAME.json [--batches 1,8,64] [--contestants a,b]
    python benchmarks/gpu.py --prepare --bundles DIR     # on any machine: ONNX files and RTX engines to carry
    python benchmarks/gpu.py --device cpu --quick --output out.json    # a small model on the CPU: the script at work

A GPU machine without a network takes its wheels along (`pip download`, then `pip install --no-index --find-links DIR`):
this package with [export,tensorrt-rtx], onnxruntime-gpu in the place of onnxruntime, torch with CUDA.

One process for each contestant and batch, rounds interleaved. `p50_ms` is from uint8 pictures on the host to logits on
the host, `resident_ms` with both on the device. A contestant that cannot run here is in the results with its reason.
SQNR: against eager fp32 on the CPU. Limits: the model's matrix products alone, by cuBLAS in a CUDA graph, and a copy on
the device of the bytes that must be moved once (weights in float16, pictures, logits).
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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu_contestants import (
    BASE,
    CONTESTANTS,
    LIMITS,
    Call,
    Setting,
    least_bytes,
    made,
    pictures_of,
    reference_of,
    refusal,
)

from dualtoken_deploy import numerics
from dualtoken_deploy.bench.worker import peak_rss_mib
from dualtoken_deploy.errors import DualTokenError
from dualtoken_deploy.machine import describe_machine, library_versions

LIBRARIES = (
    "torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13-libs", "cuda-bindings", "numpy",
    "dualtoken-deploy",
)  # fmt: skip
FULL, QUICK = ("s", 224, 1000), ("t-mix", 64, 10)  # variant, image size, classes
# What is to be shown at batch 1: a contestant, how many times faster, than which.
GOALS = (("aotinductor-fp16-graph", 5.0, BASE), ("aotinductor-fp16-graph", 1.2, "compile-fp16"))


# --- one process for each ---


def work() -> None:
    """Reads one JSON a line: the setting first, then {"seconds"} for each round; answers in one line each."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # compilers print; stdout is for the answers
    setting = Setting(**json.loads(sys.stdin.readline()))
    try:
        before = free_mib(setting)
        call = CONTESTANTS[setting.name](setting)
        pictures = pictures_of(setting)
        first = check(setting, call, pictures)
    except (DualTokenError, RuntimeError, ImportError, ValueError, OSError) as error:  # this contestant's result
        print(json.dumps({"skipped": refusal(error)}), file=answers, flush=True)
        return
    after = free_mib(setting)
    first["device_mib"] = None if before is None or after is None else before - after
    first["peak_rss_mib"] = round(peak_rss_mib(), 1)
    print(json.dumps(first), file=answers, flush=True)
    run = call.run
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        laps = {
            "ms": None if run is None else sample(lambda: run(pictures), seconds),
            "resident_ms": None if call.resident is None else sample(call.resident, seconds),
        }
        print(json.dumps(laps), file=answers, flush=True)


def check(setting: Setting, call: Call, pictures: Any) -> dict[str, Any]:
    """Runs it once; against eager where it has an answer."""
    if call.run is None:
        sample(call.resident or (lambda: None), 0)
        return {"sqnr_db": None}
    found, reference = call.run(pictures), reference_of(setting)(pictures)
    return {"sqnr_db": round(numerics.compare(reference, found).sqnr_db, 1)}


def free_mib(setting: Setting) -> int | None:
    """Free memory of the device; the other contestants stand still while this one is prepared."""
    if not setting.on_cuda:
        return None
    import torch

    torch.cuda.synchronize()
    return int(torch.cuda.mem_get_info()[0]) >> 20


def sample(run: Callable[[], object], seconds: float) -> list[float]:
    """Milliseconds of each call for `seconds`, ten calls at least, after three that are not counted."""
    for _ in range(3):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 10:
        start = time.perf_counter()
        run()
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
    try:
        process.stdin.write(json.dumps(question) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return {"skipped": f"its process ended with {process.wait()}"}
    line = process.stdout.readline()
    return json.loads(line) if line else {"skipped": f"its process ended with {process.wait()}"}


def race(settings: list[Setting], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All contestants of one batch: prepared one after the other, then timed in interleaved rounds."""
    with ExitStack() as stack:
        results, processes = [], []
        for setting in settings:
            say(f"batch {setting.batch}: preparing {setting.name}")
            start, process = time.perf_counter(), stack.enter_context(started())
            result = {"name": setting.name, "batch": setting.batch, **ask(process, asdict(setting))}
            result["prepare_s"] = round(time.perf_counter() - start, 1)
            results.append(result)
            processes.append(process)
        for number in range(rounds):
            say(f"batch {settings[0].batch}: round {number + 1}/{rounds}")
            for result, process in zip(results, processes, strict=True):
                if "skipped" in result:
                    continue
                answer = ask(process, {"seconds": seconds})
                if "skipped" in answer:
                    result["skipped"] = answer["skipped"]
                    continue
                for key in ("ms", "resident_ms"):
                    if answer[key] is not None:
                        result.setdefault(f"rounds_{key}", []).append(answer[key])
        return summarise(results)


# --- figures ---


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """p50, p90 and images/s over all samples; ratios are the median and the range over the rounds."""
    whole = [r for r in results if "skipped" not in r]
    base = next((r for r in whole if r["name"] == BASE), None)
    for r in whole:
        ms = sorted(lap for laps in r.get("rounds_ms", ()) for lap in laps)
        if ms:
            p50 = statistics.median(ms)
            r |= {"p50_ms": round(p50, 4), "p90_ms": round(ms[int(0.9 * (len(ms) - 1))], 4), "samples": len(ms),
                  "images_per_s": round(1e3 * r["batch"] / p50, 1)}  # fmt: skip
        if base is not None and ms:
            r["ratio"] = {**ratio(base, r, "rounds_ms"), "to": BASE}
        if "rounds_resident_ms" in r:
            laps = [lap for part in r["rounds_resident_ms"] for lap in part]
            r["resident_ms"] = round(statistics.median(laps), 4)
            distances = {lim["name"]: ratio(r, lim, "rounds_resident_ms") for lim in whole if lim["name"] in LIMITS}
            if r["name"] not in LIMITS:  # how many times the limit's time it takes
                r["times_the_limit"] = {name: d["median"] for name, d in distances.items()}
    return [{k: v for k, v in r.items() if not k.startswith("rounds_")} for r in results]


def ratio(slow: dict[str, Any], fast: dict[str, Any], key: str) -> dict[str, float]:
    pairs = zip(slow[key], fast[key], strict=True)
    found = sorted(statistics.median(a) / statistics.median(b) for a, b in pairs)
    return {"median": round(statistics.median(found), 3), "low": round(found[0], 3), "high": round(found[-1], 3)}


def verdicts(results: list[dict[str, Any]]) -> list[str]:
    """The goals at batch 1, each with what was measured."""
    rows = {r["name"]: r for r in results if r["batch"] == 1 and "p50_ms" in r}
    said = []
    for name, times, than in GOALS:
        if name not in rows or than not in rows:
            said.append(f"{name} at least {times}x {than}: not measured")
            continue
        found = rows[than]["p50_ms"] / rows[name]["p50_ms"]
        said.append(f"{name} at least {times}x {than}: {found:.2f}x, {'reached' if found >= times else 'not reached'}")
    return said


def table(results: list[dict[str, Any]]) -> str:
    columns = ("contestant", "batch", "p50 (ms)", "images/s", "vs eager fp32", "on the device (ms)", "x products fp16",
               "x copy", "SQNR (dB)", "device MiB", "host MiB")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for r in results:
        if "skipped" in r:
            lines.append(f"| {r['name']} | {r['batch']} | not run: {r['skipped']} |" + " |" * 8)
            continue
        times, far = r.get("ratio"), r.get("times_the_limit", {})
        cells = (
            r["name"], r["batch"], r.get("p50_ms"), r.get("images_per_s"),
            times and f"{times['median']:.2f}x ({times['low']:.2f}-{times['high']:.2f})", r.get("resident_ms"),
            far.get("products-fp16"), far.get("copy"), r["sqnr_db"], r["device_mib"], r["peak_rss_mib"],
        )  # fmt: skip
        lines.append("| " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
    return "\n".join(lines)


# --- the machine ---


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


def prepare(settings: list[Setting]) -> None:
    """Exports what needs no GPU, so that a lent one is not spent on it."""
    rows: list[tuple[str, str, dict[str, str]]] = [("tensorrt", p, {}) for p in ("fp32", "fp16", "int8")]
    rows += [("tensorrt-rtx", "fp16", more) for more in ({}, {"compute_capability": "8.0"})]
    for setting in settings:
        for target, precision, more in rows:
            say(f"{made(setting, target, precision, **more)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a small model, batch 2, two short rounds")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--bundles", type=Path, help="folder where exported bundles are kept and found again")
    parser.add_argument("--prepare", action="store_true", help="only export into --bundles what needs no GPU")
    parser.add_argument("--batches", help="1,8,64 unless given")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    if unknown := set(arguments.contestants.split(",")) - set(CONTESTANTS):
        parser.error(f"unknown contestants {', '.join(sorted(unknown))}; valid: {', '.join(CONTESTANTS)}")
    if arguments.prepare and arguments.bundles is None:
        parser.error("--prepare needs --bundles DIR")
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.worker:
        work()
        return
    import torch

    if arguments.device == "cuda" and not arguments.prepare and not torch.cuda.is_available():
        say("error: PyTorch finds no CUDA device; --device cpu --quick runs a small model on the CPU")
        sys.exit(3)
    names, quick = arguments.contestants.split(","), arguments.quick
    batches = [int(b) for b in (arguments.batches or ("2" if quick else "1,8,64")).split(",")]
    rounds = arguments.rounds or (2 if quick else 5)
    seconds = arguments.seconds or (0.05 if quick else 1.0)
    variant, size, classes = QUICK if quick else FULL
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.bundles or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        common = Setting("", 1, variant, size, classes, arguments.device, str(folder))
        if arguments.prepare:
            prepare([replace(common, batch=batch) for batch in batches])
            return
        for batch in batches:
            results += race([replace(common, name=n, batch=batch) for n in names], rounds, seconds)
    bytes_ = {batch: {f"fp{8 * i}": least_bytes(replace(common, batch=batch), i) for i in (2, 4)} for batch in batches}
    report = {
        "machine": describe(arguments.device), "setting": {"variant": variant, "size": size, "classes": classes,
        "device": arguments.device, "rounds": rounds, "seconds": seconds}, "bytes_to_move": bytes_,
        "results": results, "goals": verdicts(results), "table": table(results),
    }  # fmt: skip
    say(report["table"])
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
