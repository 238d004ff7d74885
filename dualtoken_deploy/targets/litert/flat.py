"""A .tflite as what it is, a FlatBuffer of TensorFlow Lite's schema: read with bounds, changed, written again."""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import BundleError, missing_extra
from dualtoken_deploy.spec import TensorSpec

IDENTIFIER = b"TFL3"
SCHEMA = 3  # the version of TensorFlow Lite's schema that there has been since 2017
ALIGNED = 16  # bytes; what the schema asks of the data of a buffer
_NAMED = re.compile(r"(?<![^;/])d_([^;]+);")  # how the converter writes the module stack that export.py gave a node


@dataclass(frozen=True)
class Operator:
    """One operator of the main graph. `inputs`, `outputs`: indices of tensors, -1 for an input that is left out."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


def schema() -> Any:
    """TensorFlow Lite's schema as ai-edge-litert has it. Raises MissingError without the extra."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise missing_extra("litert", "reading a .tflite") from error
    return schema_py_generated


def read(path: Path) -> Any:
    """The model of a file, as the schema's object. Raises BundleError on anything but a whole one of version 3."""
    tfl = schema()
    try:
        data = path.read_bytes()
        if data[4:8] != IDENTIFIER:
            raise BundleError(f"{path} is no .tflite (no {IDENTIFIER.decode()} at its start); export the bundle again")
        model = tfl.ModelT.InitFromObj(tfl.Model.GetRootAs(data))
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}); copy the whole bundle") from error
    except BundleError:
        raise
    except Exception as error:  # flatbuffers reads past the end in many ways: struct.error, IndexError, TypeError, ...
        raise BundleError(f"{path} is cut short or damaged ({type(error).__name__}); copy the bundle anew") from error
    if model.version != SCHEMA:
        raise BundleError(
            f"{path} has version {model.version} of TensorFlow Lite's schema, this program reads {SCHEMA}; update it"
        )
    if not model.subgraphs:
        raise BundleError(f"{path} has no graph; export the bundle again")
    return model


def write(model: Any, path: Path, files: Mapping[str, bytes] | None = None) -> None:
    """Writes a model, buffers aligned; `files` go behind it as an uncompressed zip, as TFLite metadata wants them."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):  # type: ignore[misc, unused-ignore]
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803
            wide = elemSize == 1 and numElems >= ALIGNED
            return super().StartVector(elemSize, numElems, ALIGNED if wide else alignment)

    builder = Aligned(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    data = bytes(builder.Output())
    if files:
        packed = io.BytesIO()
        packed.write(data)
        with zipfile.ZipFile(packed, "a", zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(zipfile.ZipInfo(name), content)  # ZipInfo's own date: the same bytes every day
        data = packed.getvalue()
    path.write_bytes(data)


def operators(model: Any) -> Iterator[Operator]:
    """Those of the main graph, in the order that they run; a custom one is called CUSTOM and its name."""
    kinds = kinds_of(model)
    for op in model.subgraphs[0].operators:
        outputs = tuple(int(i) for i in op.outputs)
        inputs = () if op.inputs is None else tuple(int(i) for i in op.inputs)
        yield Operator(kinds[op.opcodeIndex], inputs, outputs, op.builtinOptions)


def kinds_of(model: Any) -> list[str]:
    """The operators' names by their code's index."""
    tfl = schema()
    names = {v: k for k, v in vars(tfl.BuiltinOperator).items() if isinstance(v, int)}
    found = []
    for code in model.operatorCodes:
        number = max(code.builtinCode, code.deprecatedBuiltinCode)  # the latter has but seven bits
        custom = f" {code.customCode.decode(errors='replace')}" if code.customCode else ""
        found.append(names.get(number, f"operator {number}") + custom)
    return found


def tensor_name(model: Any, index: int) -> str:
    name: bytes = model.subgraphs[0].tensors[index].name or b""
    return name.decode(errors="replace")


def is_constant(model: Any, index: int) -> bool:
    """Whether a tensor of the main graph has its value in the file."""
    data = model.buffers[model.subgraphs[0].tensors[index].buffer].data
    return data is not None and len(data) > 0


def name_values(model: Any, traced: Sequence[str], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    """Gives the graph's values the model's own names, as ONNX graphs here have them, and its signature the contract's.

    The value that a traced operation ends in has the operation's name, those on the way there the TFLite operator as
    well (`stage1.block1.local.pw1/FULLY_CONNECTED`), constants that one operator reads the name of what it makes.
    `traced`: the names of all operations in their order; an operator that stands for several has that of the last.
    """
    order = {name: place for place, name in enumerate(traced)}
    graph = model.subgraphs[0]
    ends = {int(index): spec.name for index, spec in zip(graph.outputs, outputs, strict=True)}
    bases = [
        (op, ends.get(op.outputs[0]) or _traced_name(tensor_name(model, op.outputs[0]), order))
        for op in operators(model)
    ]
    last = {base: place for place, (_, base) in enumerate(bases)}
    taken: Counter[str] = Counter(spec.name for spec in inputs)
    readers = Counter(i for op, _ in bases for i in op.inputs)
    for place, (op, base) in enumerate(bases):
        name = base if last[base] == place else f"{base}/{op.kind}"
        taken[name] += 1
        name += f"_{taken[name]}" if taken[name] > 1 else ""
        for number, index in enumerate(op.outputs):
            graph.tensors[index].name = (name if number == 0 else f"{name}.{number}").encode()
        for number, index in enumerate(op.inputs):
            if index >= 0 and readers[index] == 1 and is_constant(model, index):
                graph.tensors[index].name = f"{name}.{('input', 'weight', 'bias')[min(number, 2)]}".encode()
    tfl = schema()
    signature = model.signatureDefs[0]
    for maps, indices, specs in (
        (signature.inputs, graph.inputs, inputs), (signature.outputs, graph.outputs, outputs),
    ):  # fmt: skip
        for entry, index, spec in zip(maps, indices, specs, strict=True):
            graph.tensors[index].name = entry.name = spec.name.encode()
            entry.tensorIndex = int(index)
    assert isinstance(signature, tfl.SignatureDefT)  # noqa: S101 (an export of another converter fails here, not later)


def _traced_name(converted: str, order: Mapping[str, int]) -> str:
    names = [name.replace(":", ".") for name in _NAMED.findall(converted)]
    known = [name for name in names if name in order]
    return max(known, key=order.__getitem__) if known else converted.partition(";")[0] or "constant"
