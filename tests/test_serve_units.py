"""Settings, sources, the gate and the batcher, without a server; a worker here is an object of the test."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from uvicorn.server import ServerState

from dualtoken_deploy.errors import DualTokenError, InputError, MissingError, UsageError
from dualtoken_deploy.serve import decoding, logs
from dualtoken_deploy.serve.admission import Arriving, Gate, key_fits
from dualtoken_deploy.serve.batcher import Batcher
from dualtoken_deploy.serve.child import ChildDied
from dualtoken_deploy.serve.connection import bounded_protocol
from dualtoken_deploy.serve.errors import ModelFailed, Overloaded, TooSlow, Unavailable
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.multipart import picture_of
from dualtoken_deploy.serve.ray import check_reachable
from dualtoken_deploy.serve.repository import Repository, _version_order
from dualtoken_deploy.serve.settings import Settings, Source, parse_sources, read_api_key

Array = np.ndarray[Any, Any]


@pytest.mark.parametrize(
    ("text", "name", "version", "path"),
    [
        ("bundles/s-openvino-fp32", "s-openvino-fp32", "1", "bundles/s-openvino-fp32"),
        ("cat=b", "cat", "1", "b"),
        ("cat:2=b/c", "cat", "2", "b/c"),
        ("cat:v1.0=b=c", "cat", "v1.0", "b=c"),
    ],
)
def test_a_source_has_a_name_a_version_and_a_path(text: str, name: str, version: str, path: str) -> None:
    assert Source.parse(text) == Source(name, version, Path(path))


@pytest.mark.parametrize("text", ["a b=x", "=x", ":2=x", "a/b=x", "a:b:c=x", "..=x", f"{'a' * 200}=x"])
def test_a_name_that_would_not_survive_a_path_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="no model name"):
        parse_sources([text])


def test_the_newest_version_is_the_highest_number() -> None:
    assert sorted(["10", "9", "beta", "2"], key=_version_order) == ["2", "9", "10", "beta"]


@pytest.mark.parametrize(
    ("options", "fixed", "request_rows", "merge_rows"),
    [
        ({}, 1, 1, 1),
        ({}, 4, 4, 4),
        ({"max_batch": 16}, 1, 1, 1),
        ({}, None, 8, 1),  # measured: a CPU gains nothing from a batch
        ({"device": "cuda"}, None, 8, 8),
        ({"max_batch": 16}, None, 16, 16),
    ],
)
def test_batches_are_off_on_a_cpu_unless_asked_for(
    options: dict[str, Any], fixed: int | None, request_rows: int, merge_rows: int
) -> None:
    found = Settings(**options)
    assert (found.request_rows(fixed), found.merge_rows(fixed)) == (request_rows, merge_rows)


@pytest.mark.parametrize(
    ("host", "options", "count"),
    [
        ("127.0.0.1", {}, 0),
        ("::1", {}, 0),
        ("localhost", {}, 0),
        ("0.0.0.0", {}, 2),
        ("example.org", {"api_key": "k" * 16}, 1),
        ("::", {"api_key": "k" * 16, "tls_cert": Path("c"), "tls_key": Path("k")}, 0),
    ],
)
def test_what_leaves_the_machine_unguarded_is_warned_of(host: str, options: dict[str, Any], count: int) -> None:
    assert len(Settings(host=host, **options).warnings()) == count


@pytest.mark.parametrize(
    "content",
    ["", "short", "with\x01control-characters", "schlüssel-mit-umlaut", "0123456789abcdef\x0crest-of-it"],
)
def test_an_api_key_that_is_no_secret(content: str, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(content)
    with pytest.raises(InputError, match="16 printable ASCII"):
        read_api_key(tmp_path / "key")


def test_a_key_is_not_printed_with_the_settings() -> None:
    assert "hunter2" not in repr(Settings(api_key="hunter2-hunter2-"))


def test_a_key_fits_itself_alone() -> None:
    assert key_fits(None, None, None)
    assert key_fits("secret-secret-12", "bearer secret-secret-12", None)
    assert not key_fits("secret-secret-12", "Bearer secret-secret-1\udcff", None)
    assert not key_fits("secret-secret-12", "Bearer x", "secret-secret-12"), "a wrong key beside a right one"


@pytest.mark.parametrize(("given", "kept"), [("a-b.c", True), ("", False), ("a b", False), ("x" * 129, False)])
def test_request_ids(given: str, kept: bool) -> None:
    assert (logs.request_id(given) == given) is kept


def test_a_form_gives_its_first_file() -> None:
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % part
        for part in ((b"a", b"", b"text"), (b"b", b'; filename="x"', b"\r\n--b1\x00"), (b"c", b'; filename="y"', b"2"))
    )
    assert picture_of(parts + b"--b--\r\n", "multipart/form-data; boundary=b") == b"\r\n--b1\x00"


def test_a_gate_counts_and_closes() -> None:
    async def go() -> None:
        gate = Gate("m", 1)
        with gate.enter():
            assert (gate.inside, gate.at_work) == (1, 0)
            with gate.place():
                with pytest.raises(Overloaded, match="m has 1 requests"), gate.enter():
                    pass
                with pytest.raises(Overloaded, match="m has 1 requests"), gate.place():
                    pass
                assert gate.at_work == 1
            gate.close()
            with gate.place():  # it was let in before
                pass
        await asyncio.wait_for(gate.drained(), 1)
        with pytest.raises(Unavailable), gate.enter():
            pass

    asyncio.run(go())


def test_a_gate_that_is_cut_turns_those_inside_away() -> None:
    async def go() -> None:
        gate, refused = Gate("m", 2), []

        async def wait_for_ever() -> None:
            try:
                with gate.enter():
                    await asyncio.Event().wait()
            except Unavailable as error:
                refused.append(str(error))

        tasks = [asyncio.create_task(wait_for_ever()) for _ in range(2)]
        await asyncio.sleep(0)
        assert gate.inside == 2
        gate.cut()
        await asyncio.wait_for(gate.drained(), 1)
        await asyncio.gather(*tasks)  # none is left cancelled
        assert refused == ["m shut down before this request was answered; ask another server"] * 2

    asyncio.run(go())


def test_the_slowest_of_the_connection_with_the_most_leaves_first() -> None:
    """And a newcomer of another connection never pays for it."""

    async def go() -> None:
        arriving, left = Arriving(4, 1000), list[str]()

        async def body(name: str, owner: str, count: int) -> None:
            try:
                with arriving.one(owner) as one:
                    one.grow(count)
                    await asyncio.Event().wait()
            except (TooSlow, Overloaded):
                left.append(name)

        async def start(*bodies: tuple[str, str, int]) -> None:
            tasks.extend([asyncio.create_task(body(*one)) for one in bodies])
            for _ in range(3):
                await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        await start(("fast", "greedy", 500), ("slow", "greedy", 1), ("middle", "greedy", 200), ("other", "honest", 0))
        await start(("newcomer", "third", 5))
        assert left == ["slow"], "not that of the honest one, which is slower"
        await start(("large", "fourth", 400))
        assert left == ["slow", "middle"]
        assert arriving.bytes == 905
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (arriving.count, arriving.bytes) == (0, 0)

    asyncio.run(go())


def test_large_bodies_leave_room_for_small_ones() -> None:
    """Small ones that come slowly are neither refused nor sent away, however many large ones come fast."""

    async def go() -> None:
        mib = 2**20
        arriving, left = Arriving(100, 64 * mib), list[str]()

        async def body(name: str, count: int) -> None:
            try:
                with arriving.one() as one:
                    one.grow(count)
                    one.whole = name == "whole"
                    await asyncio.Event().wait()
            except (TooSlow, Overloaded):
                left.append(name)

        async def start(name: str, count: int, number: int) -> None:
            tasks.extend([asyncio.create_task(body(name, count)) for _ in range(number)])
            for _ in range(3):
                await asyncio.sleep(0)

        tasks: list[asyncio.Task[None]] = []
        await start("whole", 15 * mib, 3)  # they wait for a decoder
        await start("large", 15 * mib, 20)
        await start("small", mib // 8, 40)
        await start("large", 15 * mib, 20)
        assert left == ["large"] * 40
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (arriving.count, arriving.bytes) == (0, 0)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("request_", "status", "most"),
    [
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 30_000, b"400", 1100),
        (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * 30_000 + b"\r\n", b"431", 300),
    ],
    ids=["chunks", "headers"],
)
def test_the_parser_stops_where_a_request_is_refused(request_: bytes, status: bytes, most: int) -> None:
    """All of it is in one read: what comes behind the refusal is not looked at."""
    seen, said = [0], bytearray()

    class Link(asyncio.Transport):
        closing = False

        def write(self, data: Any) -> None:
            said.extend(data)

        def get_extra_info(self, name: str, default: Any = None) -> Any:
            return link if name == "socket" else default

        def is_closing(self) -> bool:
            return self.closing

        def close(self) -> None:
            self.closing = True

        def abort(self) -> None:
            self.closing = True

    async def wait(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.Event().wait()

    async def go() -> None:
        bounded: Any = bounded_protocol(Settings(), lambda _: None)

        class Counted(bounded):  # type: ignore[misc]
            def on_body(self, body: bytes) -> None:
                seen[0] += 1
                super().on_body(body)

            def on_header(self, name: bytes, value: bytes) -> None:
                seen[0] += 1
                super().on_header(name, value)

        config = uvicorn.Config(wait, log_config=None)
        config.load()
        made = Counted(config, ServerState(), {})
        made.connection_made(Link())
        made.data_received(request_)
        assert said.startswith(b"HTTP/1.1 " + status)
        assert said.count(b"HTTP/1.1") == 1
        assert seen[0] <= most
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    with socket.socket() as link:
        asyncio.run(go())


def test_answers_that_nobody_reads_have_their_bytes_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three connections that hold 30 MiB each, the first that stopped to read leaves; one alone may hold more."""
    left: list[int] = []

    class Unread(asyncio.Transport):
        def __init__(self, number: int, size: int) -> None:
            super().__init__({"socket": socket.socket()})
            self.number, self.size = number, size

        def get_write_buffer_size(self) -> int:
            return self.size

        def abort(self) -> None:
            left.append(self.number)

        def is_closing(self) -> bool:
            return self.number in left

    async def nobody(_scope: Any, _receive: Any, _send: Any) -> None:
        raise AssertionError("nothing is asked")

    async def go() -> None:
        kind: Any = bounded_protocol(Settings(), lambda _: None)
        state = ServerState()

        def stall(number: int, size: int) -> Any:
            made = kind(uvicorn.Config(nobody, log_config=None), state, {})
            made.connection_made(Unread(number, size))
            made.pause_writing()
            return made

        alone = stall(0, 100 * 2**20)
        assert left == []
        alone.resume_writing()
        for number in (1, 2, 3):
            stall(number, 30 * 2**20)
        assert left == [1]

    asyncio.run(go())


@pytest.mark.parametrize(
    ("ahead", "leaves", "status"),
    [((0, 0), [], b"503"), ((0, 3), [1], b""), ((5, 3), [0], b""), ((1, 0), [0], b"")],
    ids=["each waits for one", "the second sent ahead", "the first sent more ahead", "one was enough"],
)
def test_who_sent_requests_ahead_makes_room(ahead: tuple[int, int], leaves: list[int], status: bytes) -> None:
    """Two connections are all that may be, and nothing is ever answered; `ahead`: sent behind the first of each."""
    left: list[int] = []
    said = b""

    class Link(asyncio.Transport):
        def __init__(self, number: int) -> None:
            super().__init__({"socket": links[number]})
            self.number = number

        def write(self, data: bytes | bytearray | memoryview) -> None:
            nonlocal said
            said += bytes(data)

        def is_closing(self) -> bool:
            return self.number in left

        def abort(self) -> None:
            left.append(self.number)

        def close(self) -> None: ...
        def pause_reading(self) -> None: ...
        def resume_reading(self) -> None: ...

    async def wait(_scope: Any, _receive: Any, _send: Any) -> None:
        await asyncio.Event().wait()

    async def go() -> None:
        kind: Any = bounded_protocol(Settings(connections=2), lambda _: None)
        config, state = uvicorn.Config(wait, log_config=None), ServerState()
        config.load()
        for number, more in enumerate((*ahead, 0)):
            made = kind(config, state, {})
            made.connection_made(Link(number))
            made.data_received(b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\n" * (1 + more))
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(socket.socket()) for _ in range(3)]
        asyncio.run(go())
    assert left == leaves
    assert said[9:12] == status


@pytest.mark.parametrize("where", ["while it starts", "before it starts"])
def test_the_engine_of_a_load_that_failed_is_ended(where: str, own_bundle: Path) -> None:
    ended: list[str] = []

    class Engine:
        ready, reason = False, None

        async def wait_ready(self) -> None:
            raise Unavailable("its worker cannot start")

        async def close(self) -> None:
            ended.append(where)

    async def go() -> None:
        repository = Repository([Source("m", "1", own_bundle)], Settings(), Metrics())
        repository.make_engine = lambda *_: Engine()  # type: ignore[assignment]
        if where == "before it starts":
            manifest = own_bundle / "manifest.json"
            manifest.write_text(manifest.read_text().replace('"task": "classify"', '"task": "guess"'))
        with pytest.raises(DualTokenError, match="guess" if where == "before it starts" else "cannot start"):
            await repository.load_all()

    asyncio.run(go())
    assert ended == [where]


def test_a_log_that_nobody_reads_never_waits_and_counts_what_it_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "QUEUED_LINES", 4)
    source, sink = os.pipe()
    os.set_blocking(sink, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(sink, bytes(4096))  # full before it begins
    os.set_blocking(sink, True)
    writer = logs.Writer(sink)
    record = logging.LogRecord("n", logging.INFO, "p", 1, "event", None, None)

    def emit_all() -> None:
        for _ in range(20):
            writer.emit(record)

    logging_thread = threading.Thread(target=emit_all, daemon=True)
    logging_thread.start()
    logging_thread.join(20)
    assert not logging_thread.is_alive(), "it waits for who reads"
    assert 15 <= writer.dropped <= 16, "four are queued, and one may be on its way"
    os.close(source)  # ends the writer's own wait


class Watch:
    """An Observer that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.reasons: list[str] = []

    def queued(self, depth: int) -> None: ...

    def ran(self, rows: int, seconds: float) -> None:
        self.rows.append(rows)

    def waited(self, seconds: float) -> None: ...

    def workers(self, up: int) -> None: ...

    def replaced(self, reason: str) -> None:
        self.reasons.append(reason)


class Twice:
    """A worker whose model doubles; negative rows make its runtime fail, 99 kills it."""

    pid = 1

    def __init__(self) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def run(self, arrays: Sequence[Array]) -> tuple[dict[str, Array], float]:
        await asyncio.sleep(0.01)
        rows = np.concatenate(arrays)
        if (rows < 0).any():
            raise ModelFailed("negative")
        if (rows == 99).any():
            raise ChildDied("99")
        return {"y": rows * 2}, 0.01

    async def kill(self) -> None:
        if not self.exited.done():
            self.exited.set_result(-9)


def batching(
    body: Callable[[Batcher, Watch], Coroutine[Any, Any, None]],
    start: Callable[[Any], Awaitable[Any]] | None = None,
    **options: Any,
) -> None:
    async def good(_launch: Any) -> Any:
        return Twice()

    async def go() -> None:
        watch = Watch()
        values: dict[str, Any] = {"workers": 1, "merge_rows": 4, "delay_seconds": 0.0} | options
        batcher = Batcher(None, observer=watch, start=start or good, **values)  # type: ignore[arg-type]
        await asyncio.wait_for(body(batcher, watch), 10)
        await batcher.close()

    asyncio.run(go())


def row(*values: int) -> Array:
    return np.array(values)[:, None]


def test_what_waits_is_merged_up_to_the_limit_and_split_again() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        sizes = (1, 2, 3, 1, 4, 1)
        arrays = [row(*range(10 * i, 10 * i + n)) for i, n in enumerate(sizes)]
        answers = await asyncio.gather(*map(batcher.run, arrays))
        for array, answer in zip(arrays, answers, strict=True):
            np.testing.assert_array_equal(answer.outputs["y"], array * 2)
        assert watch.rows == [3, 4, 4, 1]  # 1+2, 3+1, 4, 1: in their order, none split

    batching(body)


def test_a_delay_lets_a_batch_fill() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        first = asyncio.create_task(batcher.run(row(1)))
        await asyncio.sleep(0.05)
        assert not first.done()
        await asyncio.gather(first, batcher.run(row(2, 3, 4)))
        alone = await batcher.run(row(5))
        assert alone.queue_seconds >= 0.3
        assert watch.rows == [4, 1]

    batching(body, delay_seconds=0.3)


def test_an_output_without_a_row_for_each_input_fails_those_that_shared_the_run() -> None:
    class Summed(Twice):
        async def run(self, arrays: Sequence[Array]) -> tuple[dict[str, Array], float]:
            outputs, seconds = await super().run(arrays)
            return {"sum": outputs["y"].sum()}, seconds

    async def start(_launch: Any) -> Any:
        return Summed()

    async def body(batcher: Batcher, watch: Watch) -> None:
        found = await asyncio.gather(*(batcher.run(row(i)) for i in (1, 2, 3)), return_exceptions=True)
        assert [type(one) for one in found] == [ModelFailed] * 3
        assert (await batcher.run(row(4))).outputs["sum"] == 8, "the worker lives"
        assert watch.reasons == []

    batching(body, start)


def test_a_failure_is_for_its_own_batch() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        results = await asyncio.gather(*(batcher.run(row(v)) for v in (1, -1, 3)), return_exceptions=True)
        assert [type(r).__name__ for r in results] == ["Answer", "ModelFailed", "Answer"]
        assert not watch.reasons

    batching(body, merge_rows=1)


def test_a_worker_that_died_is_started_anew() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        results = await asyncio.gather(*(batcher.run(row(v)) for v in (1, 99, 3)), return_exceptions=True)
        assert [type(r).__name__ for r in results] == ["Answer", "ModelFailed", "Answer"]
        assert watch.reasons == ["99"]

    batching(body, merge_rows=1)


def test_a_worker_that_cannot_start_again_refuses_what_waits() -> None:
    started = []

    async def once(_launch: Any) -> Any:
        started.append(1)
        if len(started) > 1:
            raise ChildDied("no memory", 3)
        return Twice()

    async def body(batcher: Batcher, watch: Watch) -> None:
        await batcher.wait_ready()
        results = await asyncio.gather(*(batcher.run(row(v)) for v in (99, 1)), return_exceptions=True)
        assert [type(r).__name__ for r in results] == ["ModelFailed", "Unavailable"]
        assert "no memory" in str(results[1])
        assert not batcher.ready
        with pytest.raises(Unavailable, match="no memory"):
            await batcher.run(row(1))
        with pytest.raises(Unavailable) as caught:
            await batcher.wait_ready()
        assert caught.value.exit_code == 3

    batching(body, start=once, merge_rows=1)


def test_a_request_that_is_given_up_is_not_run() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        first, second, third = (asyncio.create_task(batcher.run(row(v))) for v in (1, 2, 3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(first, third)
        assert sum(watch.rows) == 2

    batching(body, merge_rows=1)


def test_closing_refuses_what_waits() -> None:
    async def body(batcher: Batcher, watch: Watch) -> None:
        waiting = [asyncio.create_task(batcher.run(row(v))) for v in range(3)]
        await asyncio.sleep(0.005)
        await batcher.close()
        results = await asyncio.gather(*waiting, return_exceptions=True)
        assert {type(r) for r in results} == {Unavailable}

    batching(body, merge_rows=1)


def test_an_address_where_no_ray_listens_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        check_reachable(address)
    with pytest.raises(MissingError, match=f"no Ray at {address} .*; start one: ray start --head") as caught:
        check_reachable(address)
    assert caught.value.exit_code == 3
    for left_to_ray in ("auto", "local", "ray://127.0.0.1:1", "127.0.0.1:99999"):
        check_reachable(left_to_ray)


class Lanes:
    """Decoders that do nothing until they are let, and say who ran and how many at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, decoders: int) -> None:
        self.running: list[str] = []
        self.lowered = 0
        self.go_on = asyncio.Event()
        lanes = self

        class Fake:
            alive = True

            def lower(self) -> None:
                lanes.lowered += 1

            async def run(self, job: Any, data: bytes, _room: int) -> tuple[dict[str, Any], Array | None]:
                if job["kind"] == "picture" and job["quick_pixels"] < int(data[:9]):
                    return {"larger": True}, None
                lanes.running.append(job["type"])
                try:
                    if job["type"] == "large":
                        await lanes.go_on.wait()
                    return {"size": [1, 1]}, np.zeros(1)
                finally:
                    lanes.running.remove(job["type"])

            async def close(self) -> None:
                pass

        async def start(_: int) -> Any:
            return Fake()

        monkeypatch.setattr(decoding.Decoder, "start", start)
        self.decoders = decoding.Decoders(Settings(decoders=decoders), Metrics())

    def picture(self, kind: str, pixels: int) -> asyncio.Task[Any]:
        return asyncio.create_task(self.decoders.picture(b"%09d" % pixels, kind, {}, 1))


@pytest.mark.parametrize(("decoders", "at_once"), [(2, 1), (5, 2)])
def test_large_pictures_leave_half_of_the_decoders(
    decoders: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        lanes = Lanes(monkeypatch, decoders)
        large = [lanes.picture("large", 20_000_000) for _ in range(8)]
        for _ in range(3):
            for small in [lanes.picture("small", 250_000) for _ in range(6)]:
                await asyncio.wait_for(small, 5)
            assert lanes.running == ["large"] * at_once
        lanes.go_on.set()
        await asyncio.wait_for(asyncio.gather(*large), 5)
        assert lanes.lowered == at_once, "a decoder for small pictures keeps its priority"
        await lanes.decoders.close()

    asyncio.run(go())


def test_a_large_picture_that_is_given_up_leaves_its_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    async def go() -> None:
        lanes = Lanes(monkeypatch, 2)
        first, second, third = [lanes.picture("large", 20_000_000) for _ in range(3)]
        await asyncio.sleep(0.05)
        second.cancel()  # while it waits
        await asyncio.wait({second})
        lanes.go_on.set()
        await asyncio.wait_for(asyncio.gather(first, third), 5)
        assert second.cancelled()
        await asyncio.wait_for(lanes.picture("large", 20_000_000), 5)

    asyncio.run(go())
