"""A bundle's bill of materials: CycloneDX 1.7 in JSON, with a model card of what was measured.

Written here, since cyclonedx-python-lib 11.12 has no model cards; tests hold it against the schema that it ships. The
same bundle gives the same bytes: the serial number is made of the manifest, and there is no time in it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dualtoken_deploy.bundle.blocks import Calibration
from dualtoken_deploy.bundle.licenses import OURS
from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import DOCUMENTS, Bundle, sha256
from dualtoken_deploy.errors import PACKAGE
from dualtoken_deploy.prove.facts import Metric, limits, metrics, model_name, shape, title
from dualtoken_deploy.spec import TensorSpec

SCHEMA, VERSION = "http://cyclonedx.org/schema/bom-1.7.schema.json", "1.7"
MODEL, EXPORT, CODE, DATA = "model", "export", "code", "calibration"  # bom-refs
Json = dict[str, Any]


def bill(bundle: Bundle) -> bytes:
    """bom.cdx.json of a bundle whose files are there."""
    manifest = bundle.manifest
    files = list(_files(bundle))
    others = [*_code(manifest), *_calibration(manifest)]
    document: Json = {
        "$schema": SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": VERSION,
        "serialNumber": f"urn:uuid:{_serial(manifest)}",
        "version": 1,
        "metadata": {
            "lifecycles": [{"phase": "build"}],
            "tools": {"components": [_library(PACKAGE, manifest.versions.get(PACKAGE), "application")]},
            "component": _model(manifest),
        },
        "components": [*files, *others],
        "dependencies": [{"ref": MODEL, "dependsOn": [one["bom-ref"] for one in (*files, *others)]}],
        "formulation": [_formula(manifest)],
    }
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _serial(manifest: Manifest) -> uuid.UUID:
    """Of all that the document is made from."""
    said = manifest.to_json() | {"files": {k: v for k, v in manifest.files.items() if k not in DOCUMENTS}}
    text = json.dumps(said, sort_keys=True)
    return uuid.uuid5(uuid.NAMESPACE_URL, f"{PACKAGE}:{hashlib.sha256(text.encode(errors='replace')).hexdigest()}")


def _model(manifest: Manifest) -> Json:
    licenses = manifest.licenses
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": model_name(manifest),
        "version": manifest.weights.sha256[:12],  # of the weights: what makes it this one
        "description": f"{title(manifest)}.",
        **_licensed(None if licenses is None else licenses.weights),
        "modelCard": _card(manifest),
        "properties": _properties(
            {
                "target": manifest.target,
                "precision": manifest.precision,
                "state": manifest.state,
                "weights": manifest.weights.source,
                "weights:sha256": manifest.weights.sha256,
                **{f"executes:{kind}": dtype for kind, dtype in sorted(manifest.executed_precision.items())},
            }
        ),
    }


def _card(manifest: Manifest) -> Json:
    measured, contract = manifest.measured, manifest.input
    parameters: Json = {
        "task": manifest.task,
        "modelArchitecture": model_name(manifest),
        "inputs": [{"format": f"{_tensor(contract.tensor)}, {contract.color}"}],
        "outputs": [{"format": _tensor(spec)} for spec in manifest.outputs],
    }
    if manifest.calibration is not None:
        parameters["datasets"] = [{"ref": DATA}]
    sizes = {
        "parameters": measured.params,
        "macs": measured.macs,
        "input:resize": contract.resize,
        "input:baked": ", ".join(contract.baked) or "nothing",
        "input:mean": ", ".join(f"{value:g}" for value in contract.mean),
        "input:std": ", ".join(f"{value:g}" for value in contract.std),
    }
    return {
        "modelParameters": parameters,
        "quantitativeAnalysis": {"performanceMetrics": [_metric(one) for one in metrics(manifest)]},
        "considerations": {"technicalLimitations": list(limits(manifest))},
        "properties": _properties({name: str(value) for name, value in sizes.items() if value is not None}),
    }


def _tensor(spec: TensorSpec) -> str:
    return f"{spec.name}: {spec.dtype} {spec.layout} {shape(spec.shape)}"


def _metric(one: Metric) -> Json:
    found: Json = {"type": one.name, "value": repr(one.value), "slice": one.slice}
    if one.low is not None and one.high is not None:
        found["confidenceInterval"] = {"lowerBound": repr(one.low), "upperBound": repr(one.high)}
    return found


def _files(bundle: Bundle) -> Iterator[Json]:
    """Every file, those of a folder one by one."""
    for name, digest in bundle.manifest.files.items():
        path = bundle.path / name
        if name in DOCUMENTS:
            continue
        if not path.is_dir():
            yield _file(name, digest)
            continue
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            yield _file(file.relative_to(bundle.path).as_posix(), sha256(file))


def _file(name: str, digest: str) -> Json:
    return {
        "type": "file",
        "bom-ref": f"file:{name}",
        "name": name,
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }


def _code(manifest: Manifest) -> Iterator[Json]:
    """The network's own code, where it is known."""
    origin, licenses = manifest.origin, manifest.licenses
    if origin is None or origin.kind == "onnx":
        return
    ours = origin.kind in ("variant", "head")
    name = PACKAGE if ours else origin.reference or origin.name
    version = {"version": manifest.versions[PACKAGE]} if ours and PACKAGE in manifest.versions else {}
    hashes = {} if origin.sha256 is None else {"hashes": [{"alg": "SHA-256", "content": origin.sha256}]}
    yield {
        "type": "library",
        "bom-ref": CODE,
        "name": name,
        **version,
        "description": f"The code of {origin.name}.",
        **hashes,
        **_licensed(None if licenses is None else licenses.code),
    }


def _calibration(manifest: Manifest) -> Iterator[Json]:
    found: Calibration | None = manifest.calibration
    if found is not None:
        yield {
            "type": "data",
            "bom-ref": DATA,
            "name": Path(found.name).name or found.name,
            "description": f"{found.images} pictures that it was calibrated on ({found.method}, {found.quantizer}).",
            "data": [{"type": "dataset", "name": Path(found.name).name or found.name}],
            "properties": _properties({"pictures:sha256": found.sha256}),
        }


def _formula(manifest: Manifest) -> Json:
    """What made it: libraries, command, machine."""
    libraries = [_library(name, version) for name, version in manifest.versions.items()]
    said = {
        "command": manifest.command,
        "rules": ", ".join(manifest.rules) or "none",
        **{f"machine:{name}": str(value) for name, value in manifest.machine.items()},
    }
    return {"bom-ref": EXPORT, "components": libraries, "properties": _properties(said)}


def _library(name: str, version: str | None, kind: str = "library") -> Json:
    versioned = {} if version is None else {"version": version}
    if name == PACKAGE:  # which no index has
        return {"type": kind, "name": name, **versioned, **_licensed(OURS)}
    at = "" if version is None else f"@{quote(version, safe='')}"
    return {"type": kind, "name": name, **versioned, "purl": f"pkg:pypi/{name.lower()}{at}"}


def _licensed(expression: str | None) -> Json:
    return {} if expression is None else {"licenses": [{"expression": expression, "acknowledgement": "declared"}]}


def _properties(values: Mapping[str, str]) -> list[Json]:
    return [{"name": f"dualtoken:{name}", "value": value} for name, value in values.items()]
