"""The OpenAPI document of the HTTP side, built from small pieces: what schemathesis tests the server against."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from dualtoken_deploy import __version__
from dualtoken_deploy.bundle.blocks import RANDOM
from dualtoken_deploy.serve.protocol import DATATYPES, MAX_ID, MAX_ITEMS
from dualtoken_deploy.serve.settings import Settings
from dualtoken_deploy.tasks.base import Task
from dualtoken_deploy.tasks.table import TASKS

Json = dict[str, Any]

WHY = {
    400: "the request does not fit the protocol or the model",
    401: "no API key, or a wrong one",
    403: "switched off here (start the server with --admin), or asked for by a name that is not the server's",
    404: "unknown model, version or path",
    408: "the body did not arrive in time",
    413: "the body is larger than this model's largest request",
    415: "the body is compressed",
    500: "the runtime failed",
    503: "the queue is full, the server drains, or the model is not ready",
}


def document(settings: Settings) -> Json:
    """OpenAPI 3.1. A key is asked for where the server has one."""
    paths: Json = {
        "/v2": {"get": _get("Name, version and extensions of the server", "ServerMetadata")},
        "/v2/health/live": {"get": _get("Whether the process answers", "Live", key=False)},
        "/v2/health/ready": {"get": _get("Whether requests are taken", "Ready", (503,), key=False)},
        "/v2/models": {"get": _get("The models that are loaded", "Models")},
        "/metrics": {"get": _operation("Metrics in the Prometheus format", {"200": _text("the metrics")}, False)},
    }
    for base, names in (
        ("/v2/models/{model}", ("model",)),
        ("/v2/models/{model}/versions/{version}", ("model", "version")),
    ):
        parameters = [_path_parameter(name) for name in names]
        paths[base] = {"get": _get("The model's inputs and outputs", "ModelMetadata", (404,), parameters)}
        paths[f"{base}/ready"] = {"get": _get("Whether the model can answer", "ModelReady", (404, 503), parameters)}
        paths[f"{base}/infer"] = {"post": _infer(parameters)}
        paths[f"{base}/classify"] = {"post": _classify(parameters)}
    paths["/v2/repository/index"] = {"post": _control("The models that could be loaded, and their state", "Index", [])}
    for verb in ("load", "unload"):
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {
            "post": _control(f"Has a model {verb}ed", "Nothing", [_path_parameter("model")])
        }
    found: Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "dualtoken serve",
            "version": __version__,
            "description": "The Open Inference Protocol (V2) with its binary tensors, and pictures to classes.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    if settings.api_key is not None:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found


def _operation(summary: str, responses: Json, key: bool = True) -> Json:
    return {"summary": summary, "responses": responses, **({} if key else {"security": []})}


def _get(
    summary: str, schema: str, codes: tuple[int, ...] = (), parameters: list[Json] | None = None, key: bool = True
) -> Json:
    responses = {"200": _content(schema, "found"), **_errors(((401,) if key else ()) + codes)}
    if schema in ("Ready", "ModelReady"):
        responses["503"] = _content(schema, "not ready")
    return _operation(summary, responses, key) | ({"parameters": parameters} if parameters else {})


def _infer(parameters: list[Json]) -> Json:
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "required": False,
        "description": "bytes of the JSON, where raw tensors follow it",
        "schema": {"type": "integer", "minimum": 1},
    }
    example = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [0, 127, 255]}]}
    ok = _content("InferResponse", "the outputs; binary where that was asked for")
    ok["content"]["application/octet-stream"] = {}
    return _operation("Runs a model on a tensor", {"200": ok, **_errors((400, 401, 404, 408, 413, 415, 500, 503))}) | {
        "parameters": [*parameters, header],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("InferRequest"), "example": example},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
    }


def _classify(parameters: list[Json]) -> Json:
    top = {
        "name": "top",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 1, "maximum": 1000, "default": 5},
    }
    score = {
        "name": "min_score",
        "in": "query",
        "required": False,
        "description": "of the objects that a detector answers with",
        "schema": {"type": "number", "minimum": 0, "maximum": 1, "default": 0.5},
    }
    overlay = {
        "name": "overlay",
        "in": "query",
        "required": False,
        "description": "masks and areas as a picture, too: a PNG as a data URI, or null where the task has none",
        "schema": {"type": "boolean", "default": False},
    }
    binary = {"schema": {"type": "string", "format": "binary"}}
    form = {"type": "object", "properties": {"image": {"type": "string", "format": "binary"}}, "required": ["image"]}
    responses = {
        "200": _content("Answers", "by the model's task: classes, objects, areas, a vector, tensors; best first"),
        **_errors((400, 401, 404, 408, 413, 415, 500, 503)),
    }
    return _operation("What the model sees in a picture", responses) | {
        "parameters": [*parameters, top, score, overlay],
        "requestBody": {
            "required": True,
            "content": {
                "image/jpeg": binary,
                "image/png": binary,
                "application/octet-stream": binary,
                "multipart/form-data": {"schema": form},
            },
        },
    }


def _control(summary: str, schema: str, parameters: list[Json]) -> Json:
    responses = {"200": _content(schema, "done"), **_errors((400, 401, 403, 404, 408, 413, 415, 503))}
    body = {"content": {"application/json": {"schema": {"type": "object"}}}}
    return _operation(summary, responses) | {"parameters": parameters, "requestBody": body}


def _path_parameter(name: str) -> Json:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _content(schema: str, description: str) -> Json:
    return {"description": description, "content": {"application/json": {"schema": _ref(schema)}}}


def _text(description: str) -> Json:
    return {"description": description, "content": {"text/plain": {"schema": {"type": "string"}}}}


def _errors(codes: tuple[int, ...]) -> Json:
    return {str(code): _content("Error", WHY[code]) for code in codes}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> Json:
    return {"type": "object", "properties": {**required, **(optional or {})}, "required": list(required)}


def _schemas() -> Json:
    text, flag, number = {"type": "string"}, {"type": "boolean"}, {"type": "number"}
    shape = {"type": "array", "items": {"type": "integer"}}
    kind = {"type": "string", "enum": [*DATATYPES.values(), "BYTES"]}
    parameters = {"type": "object"}
    data = {"type": "array"}
    task, random = {"type": "string", "enum": list(TASKS)}, {"const": RANDOM}
    tensor = _object({"name": text, "datatype": kind, "shape": shape}, {"parameters": parameters, "data": data})
    wanted = _object({"name": text}, {"parameters": parameters})
    model = {"name": text, "versions": _list(text), "platform": text}
    return {
        "Error": _object({"error": text}),
        "Nothing": {"type": "object"},
        "Live": _object({"live": flag}),
        "Ready": _object({"ready": flag}),
        "ModelReady": _object({"name": text, "ready": flag}),
        "ServerMetadata": _object({"name": text, "version": text, "extensions": _list(text)}),
        "ModelMetadata": _object({**model, "inputs": _list(_ref("Tensor")), "outputs": _list(_ref("Tensor"))}),
        "Models": _object({"models": _list({"allOf": [_ref("ModelMetadata"), _ref("Ours")]})}),
        "Ours": _object({"version": text, "task": task}, {"weights": random}),
        "Index": _list(_object({"name": text, "version": text, "state": text, "reason": text})),
        "Tensor": tensor,
        "InferRequest": _object(
            {"inputs": _list(_ref("Tensor")) | {"minItems": 1, "maxItems": 1}},
            {
                "id": {"type": "string", "maxLength": MAX_ID},
                "parameters": parameters,
                "outputs": _list(wanted) | {"maxItems": MAX_ITEMS},
            },
        ),
        "InferResponse": _object(
            {"model_name": text, "model_version": text, "outputs": _list(_ref("Tensor"))}, {"id": text}
        ),
        "Answers": _object(
            {
                "model_name": text,
                "model_version": text,
                "task": task,
                "bundle": {"type": "object"},
                "size": shape | {"description": "height and width of the picture"},
                "predictions": _list({"anyOf": [_ref(kind.__name__) for kind in map(_answers_of, TASKS.values())]}),
                "timing_ms": _object({"decode": number, "queue": number, "inference": number, "total": number}),
            },
            {"weights": random, "overlay": {"type": ["string", "null"]}},
        ),
        **{kind.__name__: _answer(kind) for kind in map(_answers_of, TASKS.values())},
    }


def _answers_of(task: Task) -> Any:
    """The dataclass that a task describes a picture with: its `describe` returns a tuple of them and what was found."""
    described, _found = get_args(get_type_hints(task.describe)["return"])
    return get_args(described)[0]


def _answer(kind: type) -> Json:
    """The schema of a task's answer, from the fields of its dataclass."""
    hints = get_type_hints(kind)
    required = {f.name: _schema(hints[f.name]) for f in fields(kind) if f.default is MISSING}
    return _object(required, {f.name: _schema(hints[f.name]) for f in fields(kind) if f.name not in required})


def _schema(kind: Any) -> Json:
    plain: dict[Any, Json] = {int: {"type": "integer"}, float: {"type": ["number", "null"]}, str: {"type": "string"}}
    if kind in plain:
        return plain[kind]
    if get_origin(kind) is tuple:
        return _list(_schema(get_args(kind)[0]))
    return {"anyOf": [_schema(part) if part is not NoneType else {"type": "null"} for part in get_args(kind)]}


def _list(items: Json) -> Json:
    return {"type": "array", "items": items}
