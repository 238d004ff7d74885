"""What the server does with a request, whichever transport brought it: numpy and bytes in, plain values out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np

from dualtoken_deploy import __version__
from dualtoken_deploy.data.images import load_image, preprocess
from dualtoken_deploy.errors import ImageError
from dualtoken_deploy.numerics import Array, softmax
from dualtoken_deploy.serve import protocol
from dualtoken_deploy.serve.admission import Gate
from dualtoken_deploy.serve.batcher import Answer
from dualtoken_deploy.serve.errors import BadRequest, ModelFailed
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.repository import Model, Repository
from dualtoken_deploy.serve.settings import Settings

T = TypeVar("T")
SERVER_NAME = "dualtoken"
MAX_TOP = 1000
PARSE_ON_LOOP_BYTES = 64 * 1024  # JSON below this is parsed faster than a thread is woken


class Handler:
    """The one handler of both transports."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self.repository, self.settings, self.metrics = repository, settings, metrics
        self._gate: Gate | None = None
        self._draining = False
        self._pool = ThreadPoolExecutor(settings.decode_threads, "decode")

    @property
    def ready(self) -> bool:
        """Whether every model that is loaded can answer, and the server takes requests."""
        models = self.repository.models
        return not self._draining and bool(models) and all(model.ready for model in models)

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def gate(self) -> Gate:
        """The server's own: as many as all models together take. gRPC asks it before it knows the model."""
        limit = sum(model.gate.limit for model in self.repository.models)
        if self._gate is None:
            self._gate = Gate("the server", limit)
        self._gate.limit = limit
        return self._gate

    def server_metadata(self) -> dict[str, Any]:
        extensions = ["binary_tensor_data", "classification"]
        if self.settings.admin:
            extensions.append("model_repository")
        return {"name": SERVER_NAME, "version": __version__, "extensions": extensions}

    def model_metadata(self, model: Model) -> dict[str, Any]:
        """The contract in the protocol's words."""
        manifest = model.bundle.manifest
        return {
            "name": model.name,
            "versions": self.repository.versions(model.name),
            "platform": f"dualtoken_{manifest.target}",
            "inputs": [_tensor(model.spec)],
            "outputs": [_tensor(spec) for spec in model.outputs],
        }

    @contextmanager
    def admit(self, model: Model) -> Iterator[None]:
        """A place for one request of a model. Raises Overloaded, or Unavailable while draining."""
        with self.gate.admit(), self.admit_model(model):
            yield

    @contextmanager
    def admit_model(self, model: Model) -> Iterator[None]:
        """A place at a model, for one who has the server's. A model whose worker is being replaced takes requests."""
        with model.gate.admit():
            yield

    async def parse(self, model: Model, body: bytes, header_length: int | None) -> protocol.InferRequest:
        """A request body against the model's contract; long JSON in the decode pool."""
        arguments = body, header_length, model.spec, model.rows
        if (header_length or len(body)) <= PARSE_ON_LOOP_BYTES:
            return protocol.parse_request(*arguments)
        return await self._in_pool(protocol.parse_request, *arguments)

    async def infer(self, model: Model, request: protocol.InferRequest) -> Answer:
        """Runs a parsed request. Raises BadRequest for an unknown output, before anything is run."""
        names = {spec.name for spec in model.outputs}
        for want in request.outputs or ():
            if want.name not in names:
                raise BadRequest(f"unknown output {want.name[:60]!r}; this model has {', '.join(sorted(names))}")
        return await model.engine.run(request.inputs[model.spec.name])

    async def classify(self, model: Model, picture: bytes, top: int) -> dict[str, Any]:
        """The `top` most likely classes of a picture's bytes. Raises BadRequest for what is no picture."""
        if not 1 <= top <= MAX_TOP:
            raise BadRequest(f"top is {top}; give 1 to {MAX_TOP}")
        start = time.perf_counter()
        batch = await self._in_pool(self._decode, picture, model)
        decoded = time.perf_counter()
        answer = await model.engine.run(batch)
        logits = answer.outputs[model.outputs[0].name]
        if logits.ndim != 2:
            raise BadRequest(f"model {model.name} does not classify: its output has shape {list(logits.shape)}")
        return {
            "model_name": model.name,
            "model_version": model.version,
            "bundle": _about(model),
            "predictions": _predictions(logits[0], model.labels, top),
            "timing_ms": {
                "decode": _ms(decoded - start),
                "queue": _ms(answer.queue_seconds),
                "inference": _ms(answer.run_seconds),
                "total": _ms(time.perf_counter() - start),
            },
        }

    def start_drain(self) -> None:
        """Not ready from now on; admits nobody."""
        self._draining = True
        self.gate.close()
        self.metrics.ready.set(0)

    async def drained(self) -> None:
        """Returns when every admitted request is answered."""
        await self.gate.drained()

    async def close(self) -> None:
        await self.repository.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, picture: bytes, model: Model) -> Array:
        """A picture as a batch of the contract: (batch or 1, ...), the picture repeated where the batch is fixed."""
        try:
            image = load_image(picture, int(self.settings.max_megapixels * 1_000_000))
            row = preprocess(image, model.contract)
        except ImageError as error:
            raise BadRequest(str(error)) from error
        except MemoryError as error:
            raise BadRequest("the picture needs more memory than there is") from error
        return np.broadcast_to(
            row, (model.contract.batch or 1, *row.shape)
        )  # a view: the worker's memory gets the copies

    async def _in_pool(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)


def _tensor(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "datatype": protocol.datatype(spec), "shape": protocol.metadata_shape(spec)}


def _about(model: Model) -> Mapping[str, Any]:
    """Which bundle answered."""
    manifest = model.bundle.manifest
    weights = PurePath(manifest.weights.source).name  # the folders above it are nobody's business
    return {
        "variant": manifest.variant,
        "target": manifest.target,
        "precision": manifest.precision,
        "weights": weights,
    }


def _predictions(logits: Array, labels: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    """(classes,) logits as the likeliest classes. Raises ModelFailed where they are not finite."""
    if not np.isfinite(logits).all():
        raise ModelFailed("the model's logits are not finite")
    shares = softmax(logits.astype(np.float64))
    best = np.argsort(-shares, kind="stable")[:top]
    return [{"index": int(i), "label": labels[i], "probability": float(shares[i])} for i in best]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
