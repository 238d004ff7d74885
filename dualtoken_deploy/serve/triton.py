"""Lays a bundle out as a model of a Triton Inference Server's repository. The layout is tested, a Triton is not run.

<repository>/<name>/config.pbtxt, labels.txt
<repository>/<name>/<version>/model.onnx | model.xml + model.bin | model.plan
Source: Triton's model_repository.md and model_configuration.md, and the README of its openvino_backend for HINT_BF16.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from dualtoken_deploy.bundle.store import LABELS, Bundle
from dualtoken_deploy.errors import OutputError, UsageError
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.staging import staged_folder, swap
from dualtoken_deploy.targets.table import TARGETS, get_target
from dualtoken_deploy.tasks.table import get_task

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ROWS_OF_A_DYNAMIC_BATCH = 8


TYPES: Mapping[str, str] = MappingProxyType(  # of model_config.proto
    {
        "bool": "TYPE_BOOL",
        "uint8": "TYPE_UINT8",
        "int8": "TYPE_INT8",
        "int16": "TYPE_INT16",
        "int32": "TYPE_INT32",
        "int64": "TYPE_INT64",
        "float16": "TYPE_FP16",
        "float32": "TYPE_FP32",
        "float64": "TYPE_FP64",
    }
)


def lay_out(bundle: Bundle, repository: Path, version: int = 1, force: bool = False) -> Path:
    """Copies a bundle's artifact into a Triton repository; returns the model's folder.

    Raises UsageError for a target that no Triton backend takes, a name that Triton would not, or a model that is there
    already (unless `force`), OutputError where the repository cannot be written.
    """
    _, files = check_target(bundle.manifest.target)
    if not NAME.fullmatch(bundle.name):
        raise UsageError(f"{bundle.name!r} is no name for a Triton model; rename the bundle's folder")
    final = repository / bundle.name
    if final.exists() and not force:
        raise UsageError(f"{final} exists; give --force to replace it")
    try:
        repository.mkdir(parents=True, exist_ok=True)
        with staged_folder(final) as folder:
            (folder / str(version)).mkdir()
            for ours, theirs in files.items():
                shutil.copyfile(bundle.path / ours, folder / str(version) / theirs)
            shutil.copyfile(bundle.path / LABELS, folder / LABELS)
            (folder / "config.pbtxt").write_text(config(bundle), encoding="utf-8")
            swap(folder, final)
    except OSError as error:
        raise OutputError(f"cannot write the Triton repository {repository} ({error.strerror or error})") from error
    return final


def check_target(target: str) -> tuple[str, Mapping[str, str]]:
    """Triton's backend for a target, and under which names it wants the files: {ours: Triton's}.

    Raises UsageError that lists the targets that have one.
    """
    found = get_target(target).triton
    if found is None:
        offered = ", ".join(name for name, row in TARGETS.items() if row.triton is not None)
        raise UsageError(f"no Triton backend takes {target} bundles; valid targets: {offered}")
    return found


def config(bundle: Bundle) -> str:
    """The config.pbtxt. A fixed batch is one of the dimensions, and Triton batches nothing; an open one it merges, if
    every output has it too."""
    manifest = bundle.manifest
    tensors = (manifest.input.tensor, *manifest.outputs)
    open_batch = all(spec.shape and isinstance(spec.shape[0], str) for spec in tensors)
    lines = [
        f"name: {_quoted(bundle.name)}",
        f"backend: {_quoted(check_target(manifest.target)[0])}",
        f"max_batch_size: {ROWS_OF_A_DYNAMIC_BATCH if open_batch else 0}",
        *_tensor("input", manifest.input.tensor, open_batch),
    ]
    for spec in manifest.outputs:
        labels = spec.layout == "NC" and get_task(manifest.task).classes
        lines += _tensor("output", spec, open_batch, f"  label_filename: {_quoted(LABELS)}" if labels else None)
    lines += ["dynamic_batching {", "}"] if open_batch else []
    for key in get_target(manifest.target).triton_switches.get(manifest.precision, ()):
        lines += ["parameters {", f"  key: {_quoted(key)}", '  value { string_value: "YES" }', "}"]
    return "\n".join(lines) + "\n"


def _tensor(kind: str, spec: TensorSpec, open_batch: bool, more: str | None = None) -> list[str]:
    dims = spec.shape[1:] if open_batch else spec.shape
    sizes = ", ".join(str(d if isinstance(d, int) else -1) for d in dims)
    inside = [f"  name: {_quoted(spec.name)}", f"  data_type: {TYPES[spec.dtype]}", f"  dims: [ {sizes} ]"]
    return [f"{kind} {{", *inside, *([more] if more else []), "}"]


def _quoted(text: str) -> str:
    return json.dumps(text)
