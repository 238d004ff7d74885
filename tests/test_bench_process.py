"""The bench's workers: their protocol, what becomes of one that fails, and that none outlives the bench."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dualtoken_deploy.bench import process as bench_process
from dualtoken_deploy.bench.process import Job, Limits, Series, Worker, measure
from dualtoken_deploy.errors import ConversionError, MissingError


def job(name: str) -> Job:
    return Job(name, "limit", None, ((1, 8, 8, 8, 1),), 1, 1, None)


def fake(body: str) -> tuple[str, ...]:
    """A worker that answers with what `body` leaves in `answer`; it knows the `request` and its `count` from 0."""
    loop = """
    import json, os, sys, time
    LOADED = {"cold_start_ms": 1.0, "first_inference_ms": 1.0}
    ROUND = {"laps_ns": [1000] * 5, "async_images_per_s": None, "peak_rss_mib": 1.0}
    for count, line in enumerate(sys.stdin):
        request = json.loads(line)
        answer = LOADED if request["do"] == "load" else ROUND
    """
    code = (
        textwrap.dedent(loop)
        + textwrap.indent(textwrap.dedent(body), "    ")
        + "\n    print(json.dumps(answer), flush=True)\n"
    )
    return (sys.executable, "-c", code)


def run_fakes(*bodies: str, rounds: int = 3, limits: Limits = bench_process.LIMITS) -> dict[str, Series]:
    names = [chr(ord("a") + i) for i in range(len(bodies))]
    commands = {name: fake(body) for name, body in zip(names, bodies, strict=True)}
    return measure([job(name) for name in names], rounds, 0.0, commands=commands, limits=limits)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("if count == 2: os.kill(os.getpid(), 9)", r"^b: its bench worker was killed by SIGKILL; is there enough"),
        ("if count == 2: os.abort()", r"^b: its bench worker was killed by SIGABRT"),
        ("if count: sys.exit('out of luck')", r"^b: its bench worker ended with code 1 \(its last line: out of luck\)"),
        ("if count: print('hello', flush=True)", r"^b: its bench worker answered b'hello', which is no JSON"),
        ("if count: answer = {'error': {'type': 'E', 'message': 'E: no'}}", r"^b: E: no"),
        ("if count: answer = {'error': {'type': 'missing_extra', 'message': 'no'}}", r"^b: no"),
        ("if count: os.write(2, b'asleep'); time.sleep(60)", r"^b: no answer .* 0\.5 s.*asleep"),
    ],
    ids=["killed", "aborted", "exited", "garbage", "vendor", "not a class", "hung"],
)  # fmt: skip
def test_a_worker_that_fails_is_one_error_and_ends_the_others(body: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        run_fakes("pass", body, limits=Limits(load_s=20.0, round_s=0.4))
    assert "\n" not in str(caught.value)
    assert children(os.getpid()) == []


def test_an_error_of_ours_keeps_its_class() -> None:
    with pytest.raises(MissingError, match=r"^a: gone$"):
        run_fakes("answer = {'error': {'type': 'MissingError', 'message': 'gone'}}")


def test_a_worker_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_process, "QUIT_S", 0.2)
    code = fake("pass")[2] + "time.sleep(60)\n"  # after the end of stdin
    start = time.monotonic()
    measure([job("a")], 1, 0.0, commands={"a": (sys.executable, "-c", code)})
    assert time.monotonic() - start < 20
    assert children(os.getpid()) == []


def test_rounds_are_interleaved_and_one_worker_runs_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "log"
    body = f"""
    start = time.monotonic(); time.sleep(0.02)
    with open({str(log)!r}, "a") as out: print(os.getpid(), request["do"], start, time.monotonic(), file=out)
    """
    found = run_fakes(body, body, body, rounds=6)
    entries = [line.split() for line in log.read_text(encoding="utf-8").splitlines()]
    turns = [(float(start), float(end)) for _, _, start, end in entries]
    assert all(end <= start for (_, end), (start, _) in pairwise(turns))
    order = [pid for pid, do, *_ in entries if do == "round"]
    rounds = [tuple(order[i : i + 3]) for i in range(0, 18, 3)]
    assert all(len(set(r)) == 3 for r in rounds)
    assert len(set(rounds)) > 1, "the order never changed"
    assert [len(s.rounds_ns) for s in found.values()] == [6, 6, 6]


def test_threads_are_set_for_every_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with Worker("w", 3, fake("answer = dict(os.environ)")) as worker:
        environment = worker.ask({"do": "load"}, 20.0)
    assert {environment[name] for name in bench_process.THREAD_VARIABLES} == {"3"}


def test_noise_on_stdout_does_not_break_the_protocol() -> None:
    code = """
    import os, subprocess, sys
    from dualtoken_deploy.bench import worker as bench_worker
    quiet = bench_worker.product_operands
    def noisy(*args):
        print("a library says hello", flush=True)
        os.write(1, b'{"cold_start_ms": "from C"}\\n')
        subprocess.run(["echo", "and so does a child"])
        assert sys.stdin.read() == ""  # and it cannot eat the requests
        assert os.read(0, 1) == b""
        return quiet(*args)
    bench_worker.product_operands = noisy
    sys.exit(bench_worker.main())
    """
    found = measure([job("n")], 2, 0.01, commands={"n": (sys.executable, "-c", textwrap.dedent(code))})["n"]
    assert found.cold_start_ms >= 0
    assert len(found.rounds_ns) == 2


def test_a_file_in_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numpy.py").write_text("raise SystemExit('the wrong numpy')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # a relative entry there would be the user's own wish
    assert measure([job("w")], 1, 0.01)["w"].rounds_ns


def test_peak_memory_leaves_out_what_the_parent_held() -> None:
    ballast = np.ones(50_000_000)  # 381 MiB, which getrusage would count as the worker's
    (found,) = measure([job("w")], 1, 0.01).values()
    assert ballast.nbytes / 2**20 > 350
    assert 5 < found.peak_rss_mib < 350


# Nothing is left running


def children(parent: int) -> list[int]:
    """Processes, zombies left out, whose parent is `parent`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pids: Sequence[int]) -> list[int]:
    def state(pid: int) -> str:
        try:
            return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return "Z"

    return [pid for pid in pids if state(pid) != "Z"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_no_worker_outlives_the_bench(number: signal.Signals) -> None:
    code = """
    import sys
    from dualtoken_deploy.bench.process import Job, measure
    jobs = [Job(name, "limit", None, ((1, 8, 8, 8, 1),), 1, 1, None) for name in ("a", "b")]
    seconds = float(sys.argv[1])
    try:
        measure(jobs, 3, seconds, lambda text: print(text, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
    """
    # Ctrl-C must end a round of a minute; after SIGKILL nobody is there to do so, and the round ends by itself first.
    command = [sys.executable, "-c", textwrap.dedent(code), "60" if number == signal.SIGINT else "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        while not parent.stdout.readline().startswith("round"):
            assert parent.poll() is None
        workers = children(parent.pid)
        assert len(workers) == 2
        parent.send_signal(number)
        _, errors = parent.communicate(timeout=10)
    assert errors == ""
    assert parent.returncode == (130 if number == signal.SIGINT else -9)
    end = time.monotonic() + 8
    while alive(workers) and time.monotonic() < end:
        time.sleep(0.05)
    assert alive(workers) == []
