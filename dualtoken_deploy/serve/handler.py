"""What the server does with a request, whichever transport brought it: numpy and bytes in, plain values out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple
from pathlib import PurePath
from typing import Any

import numpy as np

from dualtoken_deploy import __version__
from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.serve import messages, protocol
from dualtoken_deploy.serve.admission import Arriving, Gate
from dualtoken_deploy.serve.answers import Question, answers, packed
from dualtoken_deploy.serve.batcher import Answer
from dualtoken_deploy.serve.decoding import Decoders
from dualtoken_deploy.serve.errors import BadRequest
from dualtoken_deploy.serve.metrics import Metrics
from dualtoken_deploy.serve.repository import Model, Repository
from dualtoken_deploy.serve.settings import Settings
from dualtoken_deploy.spec import PICTURES
from dualtoken_deploy.tasks.base import Ask, Size

SERVER_NAME = "dualtoken"
MAX_TOP = 1000
PARSE_ON_LOOP_BYTES = 64 * 1024  # JSON or protobuf below this is parsed faster than a decoder is woken
ARRIVING_BYTES = 64 * 2**20  # of bodies in memory, or four of the largest where those are more
ARRIVING_AT_LEAST = 8
ARRIVING_FOR_EACH_PLACE = 4  # bodies that may be on their way
CALLS_FOR_EACH_CONNECTION, MOST_CALLS = 8, 4096  # of gRPC, from their start until their answer is read; 25 KB each


def most_calls(connections: int) -> int:
    """Of gRPC at once: half of what all connections may have, so that many of them that take no answer are left alone
    until their time is over. To make room among them again and again costs more than they do."""
    return min(MOST_CALLS, CALLS_FOR_EACH_CONNECTION * connections)


class Handler:
    """The one handler of both transports."""

    def __init__(self, repository: Repository, settings: Settings, metrics: Metrics) -> None:
        self.repository, self.settings, self.metrics = repository, settings, metrics
        self._gate: Gate | None = None
        self._draining = False
        self._arriving, self._messages = Arriving(1, ARRIVING_BYTES), Arriving(1, ARRIVING_BYTES)
        self.calls = Arriving(most_calls(settings.connections), ARRIVING_BYTES)
        self.unwanted: set[str] = set()  # peers of gRPC that do not take their answers
        self.decoders = Decoders(settings, metrics)
        self._large_outputs = asyncio.Semaphore(settings.workers + settings.decoders)  # in memory, of all models

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

    @property
    def arriving(self) -> Arriving:
        """The bodies of all transports, bounded by what the models that are loaded can use."""
        models = self.repository.models
        largest = max([int(self.settings.max_image_mib * 2**20), *(model.body_limit for model in models)])
        connections = max(ARRIVING_AT_LEAST, self.settings.connections // 2)  # the other half is for all else
        self._arriving.most = min(connections, ARRIVING_FOR_EACH_PLACE * (self.gate.limit + 1))
        self._arriving.most_bytes = max(ARRIVING_BYTES, 4 * largest)
        return self._arriving

    @property
    def messages(self) -> Arriving:
        """Those of gRPC, whose bytes are not seen before the last one is there: their number is bounded by the largest
        that any may have."""
        largest = max((model.message_limit for model in self.repository.models), default=1)
        bodies = self.arriving
        self._messages.most_bytes = bodies.most_bytes
        self._messages.most = min(bodies.most, max(ARRIVING_AT_LEAST, bodies.most_bytes // largest))
        return self._messages

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

    def model_listing(self, model: Model) -> dict[str, Any]:
        """The same, with what is ours: which version, its task, and whether the weights are random."""
        return {**self.model_metadata(model), "version": model.version, "task": model.task.name, **_weights(model)}

    @contextmanager
    def enter(self, model: Model) -> Iterator[None]:
        """Lets a request of a model in to be read. Raises Overloaded, or Unavailable while draining."""
        with self.gate.enter(), model.gate.enter():
            yield

    @contextmanager
    def place(self, model: Model) -> Iterator[None]:
        """A place for a request that is whole. A model whose worker is being replaced takes requests."""
        with self.gate.place(), model.gate.place():
            yield

    async def parse(self, model: Model, body: bytes, header_length: int | None) -> protocol.InferRequest:
        """A request body against the model's contract; long JSON in a decoder."""
        if (header_length or len(body)) <= PARSE_ON_LOOP_BYTES:
            return protocol.parse_request(body, header_length, model.spec, model.rows)
        return await self._parse_in_decoder({"kind": "request", "header": header_length}, model, body)

    async def parse_message(self, model: Model, raw: bytes, structured_bytes: int) -> protocol.InferRequest:
        """A protobuf message against the model's contract; one with long typed contents in a decoder."""
        if structured_bytes <= PARSE_ON_LOOP_BYTES:
            return messages.read(raw, model.spec, model.rows)
        return await self._parse_in_decoder({"kind": "message"}, model, raw)

    async def infer(self, model: Model, request: protocol.InferRequest) -> Answer:
        """Runs a parsed request. Raises BadRequest for an unknown output, before anything is run."""
        names = {spec.name for spec in model.outputs}
        for want in request.outputs or ():
            if want.name not in names:
                raise BadRequest(f"unknown output {want.name[:60]!r}; this model has {', '.join(sorted(names))}")
        return await model.engine.run(request.inputs[model.spec.name])

    async def classify(
        self, model: Model, body: bytes, content_type: str, ask: Ask, overlay: bool = False
    ) -> dict[str, Any]:
        """What the model sees in a picture, or in the one in a form, by its task: the `ask.top` likeliest classes,
        objects of at least `ask.min_score`, areas, a vector; with `overlay` masks and areas as a picture, too.
        Raises BadRequest for what is no picture."""
        if not 1 <= ask.top <= MAX_TOP:
            raise BadRequest(f"top is {ask.top}; give 1 to {MAX_TOP}")
        if not 0 <= ask.min_score <= 1:
            raise BadRequest(f"min_score is {ask.min_score}; give 0 to 1")
        if model.contract.kind not in PICTURES:
            raise BadRequest(f"{model.name} takes {model.contract.kind}, no pictures; send tensors to its infer route")
        start = time.perf_counter()
        batch, size = await self._decode(body, content_type, model)
        decoded = time.perf_counter()
        question = Question(model.task.name, model.labels, model.contract.size, size, ask, overlay)
        answer, found, over = await self._run_and_read(model, batch, question)
        return {
            "model_name": model.name,
            "model_version": model.version,
            "task": model.task.name,
            **_weights(model),
            "bundle": _about(model),
            "size": list(size),
            "predictions": found,
            **({"overlay": over} if overlay else {}),
            "timing_ms": {
                "decode": _ms(decoded - start),
                "queue": _ms(answer.queue_seconds),
                "inference": _ms(answer.run_seconds),
                "total": _ms(time.perf_counter() - start),
            },
        }

    async def _run_and_read(
        self, model: Model, batch: Array, question: Question
    ) -> tuple[Answer, list[dict[str, Any]], str | None]:
        """Runs a picture and reads its outputs: small ones here, the others and what is to be drawn in a decoder, and
        only a few at a time."""
        if model.reads_quickly and not (question.overlay and model.task.paint):
            answer = await model.engine.run(batch)
            return answer, answers(_first(answer.outputs, len(batch)), question), None
        async with self._large_outputs:
            answer = await model.engine.run(batch)
            data, parts = packed(_first(answer.outputs, len(batch)))
            job = {
                "kind": "outputs", "parts": parts, "task": question.task, "labels": question.labels,
                "model_size": question.model_size, "picture": question.size, "ask": astuple(question.ask),
                "overlay": question.overlay,
            }  # fmt: skip
            found, _ = await self.decoders.run(job, data)
            return answer, found["answers"], found["overlay"]

    def start_drain(self) -> None:
        """Not ready from now on; admits nobody."""
        self._draining = True
        self.gate.close()
        self.metrics.ready.set(0)

    async def drained(self) -> None:
        """Returns when every admitted request is answered."""
        await self.gate.drained()

    async def close(self) -> None:
        await self.decoders.close()
        await self.repository.close()

    async def _decode(self, body: bytes, content_type: str, model: Model) -> tuple[Array, Size]:
        """A picture as a batch of the contract: (batch or 1, ...), repeated where the batch is fixed; and its size."""
        row, size = await self.decoders.picture(body, content_type, model.contract_json, _bytes(model, 1))
        # a view: the worker's memory gets the copies
        return np.broadcast_to(row, (model.contract.batch or 1, *row.shape)), size

    async def _parse_in_decoder(self, job: Mapping[str, Any], model: Model, data: bytes) -> protocol.InferRequest:
        contract = {"spec": asdict(model.spec), "rows": model.rows}
        found, array = await self.decoders.run({**job, **contract}, data, _bytes(model, model.rows))
        assert array is not None  # noqa: S101  # that is what these jobs end with
        wanted = found["outputs"]
        outputs = None if wanted is None else tuple(protocol.Wanted(*row) for row in wanted)
        return protocol.InferRequest(found["id"], {model.spec.name: array}, outputs, found["binary_default"])


def _bytes(model: Model, rows: int) -> int:
    return protocol.elements(model.spec, rows) * np.dtype(model.spec.dtype).itemsize


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


def _weights(model: Model) -> dict[str, str]:
    """Said wherever an answer of random weights is shown, and nowhere else."""
    return {"weights": RANDOM} if model.random else {}


def _first(outputs: Mapping[str, Array], rows: int) -> dict[str, Array]:
    """The outputs of the first of `rows` equal pictures; one that has no row for each of them is left as it is."""
    return {name: array[:1] if array.ndim and len(array) == rows else array for name, array in outputs.items()}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
