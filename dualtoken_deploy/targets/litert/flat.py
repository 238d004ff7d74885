"""A .tflite as what it is, a FlatBuffer of TensorFlow Lite's schema: read with bounds, changed, written again."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.errors import BundleError, missing_extra

IDENTIFIER = b"TFL3"
SCHEMA = 3  # the version of TensorFlow Lite's schema that there has been since 2017
WIDENED = "/int8"  # ends the name of a product's value whose dequantized form has the product's own
ALIGNED = 16  # bytes; what the schema asks of the data of a buffer
WEIGHTED = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D")  # products with weights


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
        for buffer in model.buffers:  # ai-edge-quantizer puts them behind the FlatBuffer
            if buffer.offset > 1:
                buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
                buffer.offset = buffer.size = 0
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


def type_names() -> dict[int, str]:
    """Names of the schema's dtypes by their number."""
    return {v: k for k, v in vars(schema().TensorType).items() if isinstance(v, int)}


def shape(model: Any, index: int) -> list[int]:
    """The shape of a tensor of the main graph; a scalar has none."""
    sizes = model.subgraphs[0].tensors[index].shape
    return [] if sizes is None else [int(size) for size in sizes]


def is_constant(model: Any, index: int) -> bool:
    """Whether a tensor of the main graph has its value in the file."""
    data = model.buffers[model.subgraphs[0].tensors[index].buffer].data
    return data is not None and len(data) > 0
