"""Which bundles are served under which names; loads, swaps and unloads them without dropping a request.

What can be loaded was named when the server started: no path ever comes from a request.
"""

from __future__ import annotations

import asyncio
import stat
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.bundle.store import MANIFEST, Bundle
from dualtoken_deploy.errors import BundleError, DualTokenError, MissingError, UsageError, install_command
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import logs
from dualtoken_deploy.serve.admission import Gate
from dualtoken_deploy.serve.answers import reads_quickly
from dualtoken_deploy.serve.batcher import Answer, Batcher
from dualtoken_deploy.serve.errors import NotFound
from dualtoken_deploy.serve.messages import message_limit
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.pool import Launch
from dualtoken_deploy.serve.protocol import DATATYPES, body_limit, elements
from dualtoken_deploy.serve.settings import Settings, Source
from dualtoken_deploy.serve.signed import open_bundle
from dualtoken_deploy.targets.load import check_native
from dualtoken_deploy.targets.table import get_target
from dualtoken_deploy.tasks.table import get_task

Stamp = tuple[tuple[str, int, int, int], ...] | None
LOST_SECONDS = 2.0  # between looks at a model that lost its worker, where changes are not looked for
RETRY_SECONDS_MOST = 60.0
MAX_FILES = 4096  # a Core ML package has a few dozen


@dataclass(frozen=True)
class _Failure:
    """What could not be loaded: its stamp, how often in a row, and when it is tried again."""

    stamp: Stamp
    tries: int
    again: float


class Engine(Protocol):
    """What runs a model's rows: a Batcher here, a deployment handle on Ray."""

    @property
    def ready(self) -> bool: ...

    @property
    def reason(self) -> str | None: ...

    async def wait_ready(self) -> None: ...

    async def run(self, array: Array) -> Answer: ...

    async def close(self) -> None: ...


class Model:
    """A loaded bundle: its contract, its gate and the engine behind it."""

    def __init__(self, source: Source, bundle: Bundle, engine: Engine, settings: Settings, stamp: Stamp) -> None:
        self.source, self.bundle, self.engine, self.stamp = source, bundle, engine, stamp
        self.name, self.version, self.labels = source.name, source.version, bundle.labels
        self.contract, self.outputs = bundle.manifest.input, bundle.manifest.outputs
        self.spec, self.contract_json = self.contract.tensor, self.contract.to_json()
        self.rows = settings.request_rows(self.contract.batch)
        self.task = get_task(bundle.manifest.task)
        self.random = bundle.manifest.weights.source == RANDOM
        self.reads_quickly = reads_quickly(self.task, self.outputs)
        self.body_limit = body_limit(self.spec, self.rows)
        self.message_limit = message_limit(self.spec, self.rows)
        running = settings.workers * max(1, merge_rows(bundle, settings) // (self.contract.batch or 1))
        self.gate = Gate(f"model {source.name}:{source.version}", settings.queue + running)

    @property
    def ready(self) -> bool:
        return self.engine.ready and not self.gate.closed


def merge_rows(bundle: Bundle, settings: Settings) -> int:
    """Rows up to which requests are merged: 1, no merging, where an output has no row for each picture of an open
    batch, as a model of the user's may."""
    fixed = bundle.manifest.input.batch
    rows = all(spec.shape and isinstance(spec.shape[0], str) for spec in bundle.manifest.outputs)
    return settings.merge_rows(fixed) if fixed is not None or rows else 1


def local_engine(bundle: Bundle, source: Source, settings: Settings, metrics: Metrics) -> Engine:
    """Workers of this machine."""
    merged = merge_rows(bundle, settings)
    rows = max(settings.request_rows(bundle.manifest.input.batch), merged)
    launch = Launch.of(
        bundle, rows, device=settings.device, threads=settings.threads,
        start_seconds=settings.start_seconds, run_seconds=settings.run_seconds,
    )  # fmt: skip
    observer = metrics.observer(
        source.name, source.version, lambda model, why: logs.warning("worker lost", model=model, reason=why)
    )
    return Batcher(launch, settings.workers, merged, settings.max_delay_ms / 1000, observer)


class Repository:
    """Every model that this server knows. The event loop's alone."""

    def __init__(self, sources: Sequence[Source], settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._sources = {(source.name, source.version): source for source in sources}
        self._models: dict[tuple[str, str], Model] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._failures: dict[tuple[str, str], _Failure] = {}
        self._lock = asyncio.Lock()
        self.loaded = asyncio.Event()  # set at each load, for who follows what is served
        self.make_engine = local_engine

    @property
    def models(self) -> list[Model]:
        return list(self._models.values())

    @property
    def names(self) -> list[str]:
        return sorted({name for name, _ in self._sources})

    def versions(self, name: str) -> list[str]:
        """Loaded versions of a name, the newest last: numbers by value, and after them words by letter."""
        return sorted((v for n, v in self._models if n == name), key=_version_order)

    def find(self, name: str, version: str | None = None) -> Model:
        """The model of a name (or `name:version`), its newest version unless one is given. Raises NotFound."""
        if version is None or version == "":
            name, _, version = name.partition(":")
        versions = self.versions(name)
        chosen = version or (versions[-1] if versions else "")
        model = self._models.get((name, chosen))
        if model is None:
            raise NotFound(_unknown(name, version, versions, name in self.names))
        return model

    def index(self) -> list[dict[str, str]]:
        """Every model that could be loaded, and its state."""
        rows = []
        for (name, version), _ in sorted(self._sources.items()):
            model = self._models.get((name, version))
            state = "UNAVAILABLE" if model is None else "READY" if model.ready else "LOADING"
            why = self._reasons.get((name, version), "") if model is None else (model.engine.reason or "")
            rows.append({"name": name, "version": version, "state": state, "reason": why})
        return rows

    async def load_all(self) -> None:
        """Loads every bundle. Raises BundleError or MissingError on the first that cannot be served."""
        for source in self._sources.values():
            await self._load(source)

    async def load(self, name: str) -> None:
        """Loads, or loads anew, every version of a known name. Raises NotFound, BundleError."""
        for source in self._known(name):
            async with self._lock:
                await self._load(source)

    async def unload(self, name: str) -> None:
        """Takes every version of a name out of service; requests in hand are answered. Raises NotFound."""
        for source in self._known(name):
            model = self._models.pop((source.name, source.version), None)
            self._reasons[source.name, source.version] = "unloaded"
            if model is not None:
                self._retire(model)

    async def watch(self) -> None:
        """Loads a bundle anew when it changes on disk, and tries again until what lies there is whole.

        The old one answers meanwhile. Where its worker is gone it cannot come back, since its files are: then what is
        there is loaded even if changes are not looked for.
        """
        while True:
            await asyncio.sleep(self._settings.reload_seconds or LOST_SECONDS)
            for key in list(self._models):
                try:
                    await self._look(key)
                except Exception as error:  # noqa: BLE001  # whatever lies on a disk, the next look has to come
                    self._failed_to_load(key, None, error)

    async def _look(self, key: tuple[str, str]) -> None:
        """Loads one bundle anew if it is another than the one that is served, and due."""
        model = self._models.get(key)
        if model is None or (not self._settings.reload_seconds and model.engine.ready):
            return
        now, failed = time.monotonic(), self._failures.get(key)
        try:
            stamp = await asyncio.to_thread(stamp_of, model.source.path)
        except DualTokenError as error:
            if failed is None or now >= failed.again:
                self._failed_to_load(key, None, error)
            return
        if stamp is None or stamp == model.stamp or (failed and failed.stamp == stamp and now < failed.again):
            return
        try:
            async with self._lock:
                await self._load(model.source)
        except DualTokenError as error:
            self._failed_to_load(key, stamp, error)
        else:
            self._failures.pop(key, None)
            self._metrics.reloads.labels("loaded").inc()

    def _failed_to_load(self, key: tuple[str, str], stamp: Stamp, error: Exception) -> None:
        """Counted, logged, and tried again: at once where the files change, and after a while where they do not."""
        before = self._failures.get(key)
        tries = 1 if before is None or before.stamp != stamp else before.tries + 1
        wait = min(RETRY_SECONDS_MOST, max(self._settings.reload_seconds, LOST_SECONDS) * 2**tries)
        self._failures[key] = _Failure(stamp, tries, time.monotonic() + wait)
        self._metrics.reloads.labels("failed").inc()
        self._metrics.reload_failures.labels(*key).inc()
        model = self._models.get(key)
        state = "the old bundle still answers" if model is not None and model.engine.ready else "no worker is up"
        logs.warning(f"reload failed; {state}", model=":".join(key), reason=str(error), again_seconds=wait)

    async def close(self) -> None:
        """Ends every engine, those that retire included."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await asyncio.gather(*(model.engine.close() for model in self._models.values()))

    async def _load(self, source: Source) -> None:
        """Swaps a bundle in once its first worker is up; the one before is retired. Raises DualTokenError alone."""
        key = source.name, source.version
        try:
            model = await self._open(source)
        except DualTokenError as error:
            self._reasons[key] = str(error)
            raise
        except Exception as error:
            self._reasons[key] = f"{type(error).__name__}: {error}"
            raise BundleError(
                f"{source.path} cannot be served ({type(error).__name__}: {error}); export the bundle again"
            ) from error
        before = self._models.get(key)
        self._models[key] = model
        self._reasons.pop(key, None)
        self.loaded.set()
        logs.info("model loaded", model=":".join(key), target=model.bundle.manifest.target, again=before is not None)
        if before is not None:
            self._retire(before)

    async def _open(self, source: Source) -> Model:
        """A model whose first worker is up. On every other way out its engine is ended."""
        stamp = await asyncio.to_thread(stamp_of, source.path)
        bundle = await asyncio.to_thread(open_bundle, source.path, self._settings.signers)
        check_servable(bundle)
        engine = self.make_engine(bundle, source, self._settings, self._metrics)
        try:
            model = Model(source, bundle, engine, self._settings, stamp)
            await engine.wait_ready()
        except BaseException:
            await asyncio.shield(engine.close())
            raise
        return model

    def _known(self, name: str) -> list[Source]:
        found = [s for s in self._sources.values() if name in (s.name, f"{s.name}:{s.version}")]
        if not found:
            raise NotFound(_unknown(name, None, [], False))
        return found

    def _retire(self, model: Model) -> None:
        task = asyncio.create_task(self._finish(model))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _finish(self, model: Model) -> None:
        """Lets a model that is no longer found answer what it has, then ends its workers."""
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(model.gate.drained(), self._settings.drain_seconds)
        finally:
            await model.engine.close()


def check_servable(bundle: Bundle) -> None:
    """Raises BundleError or MissingError where a request could not be answered with this bundle here."""
    manifest = bundle.manifest
    target = get_target(manifest.target)
    if target.missing():
        raise MissingError(f"{bundle.path} needs the extra [{target.extra}]; run: {install_command(target.extra)}")
    check_native(bundle)
    for spec in (manifest.input.tensor, *manifest.outputs):
        if spec.dtype not in DATATYPES:
            raise BundleError(f"{bundle.path} has a tensor of {spec.dtype}, which the protocol has no name for")
    try:
        if elements(manifest.input.tensor, 1) < 1:
            raise BundleError(f"{bundle.path} has an input of shape {manifest.input.tensor.shape}, without values")
    except BundleError:
        raise
    except DualTokenError as error:
        raise UsageError(f"{bundle.path} cannot be served: {error}") from error


def stamp_of(path: Path) -> Stamp:
    """What changes when any file of a bundle is replaced or written again; None while its manifest is not there.

    Raises BundleError on what is neither a file nor a folder: to read a pipe would wait for its writer.
    """
    rows = []
    try:
        if not (path / MANIFEST).exists():
            return None
        for file in sorted(path.rglob("*")):
            found = file.stat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise BundleError(f"{file} is neither a file nor a folder; export the bundle again")
            rows.append((str(file.relative_to(path)), found.st_ino, found.st_mtime_ns, found.st_size))
            if len(rows) > MAX_FILES:
                raise BundleError(f"{path} has more than {MAX_FILES} files, which no bundle has")
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror or error}); copy the whole folder") from error
    return tuple(rows)


def _version_order(version: str) -> tuple[int, int, str]:
    return (0, int(version), "") if version.isdecimal() else (1, 0, version)


def _unknown(name: str, version: str | None, versions: Sequence[str], known: bool) -> str:
    shown = name if len(name) <= 60 else f"{name[:57]}..."
    if known and version and versions:
        return f"model {shown!r} has no version {version[:40]!r}; it has {', '.join(versions)}"
    if known:
        return f"model {shown!r} is not loaded"
    return f"unknown model {shown!r}"
