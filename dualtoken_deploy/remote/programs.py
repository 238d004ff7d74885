"""The runtimes' own programs on Android, a row for each target: how it is called, and how what it prints is read.

litert      benchmark_model of LiteRT   tflite/tools/benchmark: times, and outputs for an input in a file
executorch  executor_runner             examples/portable/executor_runner: the same
ncnn        benchncnn                   benchmark: times of the graph alone, its weights are not read
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.spec import TensorSpec

PROBE = 3  # calls from which the number of calls for some seconds is reckoned


@dataclass(frozen=True)
class Laps:
    """Milliseconds a call of one run; None: the program does not say it."""

    runs: int
    mean_ms: float
    p50_ms: float | None
    min_ms: float
    max_ms: float


@dataclass(frozen=True)
class Ask:
    """One run: `files` there in the target's order, `runs` calls, or `seconds` where the program counts those."""

    files: Sequence[str]
    threads: int | None
    seconds: float
    runs: int
    gpu: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """`time(program, ask)`: the words of a run; `read(text)`: None where it does not say its times.

    `by_seconds`: it repeats for some seconds; otherwise it takes a number of calls. `answer(program, model, input spec,
    input file, output)`: the words that make it write its outputs, `written(output, count)`: the files that it writes
    then; None where it cannot. `limit`: what its figures are not. `one_output`: its file does not say which is which.
    `names_threads`: it has to be told a number of threads; the others take one of their own.
    """

    name: str
    time: Callable[[str, Ask], list[str]]
    read: Callable[[str], Laps | None]
    by_seconds: bool = False
    gpu: bool = False
    answer: Callable[[str, str, TensorSpec, str, str], list[str]] | None = None
    written: Callable[[str, int], list[str]] = lambda output, _: [output]
    limit: str | None = None
    one_output: bool = False
    names_threads: bool = False


def _litert(program: str, ask: Ask) -> list[str]:
    threads = [] if ask.threads is None else [f"--num_threads={ask.threads}"]
    device = ["--use_gpu=true"] if ask.gpu else []
    seconds = [f"--min_secs={ask.seconds:g}", f"--max_secs={max(10 * ask.seconds, 10):g}", "--num_runs=1"]
    return [program, f"--graph={ask.files[0]}", *threads, *device, *seconds, "--warmup_runs=1"]


def _read_litert(text: str) -> Laps | None:
    """The last line of counts: the one before it is of the warm-up. Microseconds; `curr` alone where all are equal."""
    lines = [line for line in text.splitlines() if re.search(r"\bcount=\d+", line)]
    if not lines:
        return None
    said = {key: float(value) for key, value in re.findall(r"(\w+)=(-?[\d.]+(?:e[+-]?\d+)?)", lines[-1])}
    mean = said.get("avg", said.get("curr"))
    if mean is None or not said["count"]:
        return None
    middle = said.get("median", mean if "avg" not in said else None)
    low, high = said.get("min", mean), said.get("max", mean)
    return Laps(int(said["count"]), mean / 1000, None if middle is None else middle / 1000, low / 1000, high / 1000)


def _answer_litert(program: str, model: str, spec: TensorSpec, given: str, output: str) -> list[str]:
    shape = ",".join(str(side) for side in spec.concrete())
    return [
        *(program, f"--graph={model}", "--num_runs=1", "--min_secs=0", "--warmup_runs=0", "--warmup_min_secs=0"),
        *(f"--input_layer={spec.name}", f"--input_layer_shape={shape}"),
        *(f"--input_layer_value_files={spec.name}:{given}", f"--output_filepath={output}"),
    ]


def _executorch(program: str, ask: Ask) -> list[str]:
    threads = [] if ask.threads is None else [f"--cpu_threads={ask.threads}"]
    return [program, f"--model_path={ask.files[0]}", f"--num_executions={ask.runs}", *threads]


def _read_executorch(text: str) -> Laps | None:
    """Each call where the program says it (1.5 on); else their sum."""
    calls = sorted(float(ms) for ms in re.findall(r"Iteration \d+ of \d+: ([\d.]+) ms", text))
    if calls:
        count = len(calls)
        middle = (calls[(count - 1) // 2] + calls[count // 2]) / 2
        return Laps(count, sum(calls) / count, middle, calls[0], calls[-1])
    found = re.search(r"executed successfully (\d+) time\(s\) in ([\d.]+) ms", text)
    if found is None or not int(found.group(1)):
        return None
    mean = float(found.group(2)) / int(found.group(1))
    return Laps(int(found.group(1)), mean, None, mean, mean)


def _answer_executorch(program: str, model: str, _: TensorSpec, given: str, output: str) -> list[str]:
    return [program, f"--model_path={model}", f"--inputs={given}", f"--output_file={output}", "--print_output=none"]


def _ncnn(program: str, ask: Ask) -> list[str]:
    """[loops] [threads] [powersave] [gpu device] [cooling down], then the graph and its input as w, h, c."""
    channels, height, width = ask.shape[-3:]
    graph = [f"param={ask.files[0]}", f"shape=[{width},{height},{channels}]"]
    return [program, str(ask.runs), str(ask.threads or 1), "0", "-1", "0", *graph]


def _read_ncnn(text: str) -> Laps | None:
    found = re.findall(r"min =\s*([\d.]+)\s+max =\s*([\d.]+)\s+avg =\s*([\d.]+)", text)
    loops = re.search(r"loop_count = (\d+)", text)
    if not found:
        return None
    low, high, mean = map(float, found[-1])
    return Laps(int(loops.group(1)) if loops else 1, mean, None, low, high)


PROGRAMS: Mapping[str, Program] = MappingProxyType(
    {
        "litert": Program(
            "benchmark_model", _litert, _read_litert, by_seconds=True, gpu=True, answer=_answer_litert, one_output=True
        ),
        "executorch": Program(
            "executor_runner", _executorch, _read_executorch, answer=_answer_executorch,
            written=lambda output, count: [f"{output}-{i}.bin" for i in range(count)],
        ),
        "ncnn": Program(
            "benchncnn", _ncnn, _read_ncnn, names_threads=True,
            limit="benchncnn times the graph with weights of its own",
        ),
    }
)  # fmt: skip


def program_of(target: str, precision: str) -> Program:
    """Raises UsageError where nothing of the target runs on Android."""
    if target not in PROGRAMS:
        raise UsageError(
            f"a bundle of {target} {precision} has no program on Android; those of {', '.join(PROGRAMS)} have one"
        )
    return PROGRAMS[target]
