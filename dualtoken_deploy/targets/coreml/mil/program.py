"""A Core ML package as plain data: the main function's operations, constants decoded from spec and weight file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.errors import BundleError
from dualtoken_deploy.targets.coreml.mil.vendor import model_proto
from dualtoken_deploy.targets.coreml.mil.weights import NUMPY_DTYPES, WeightFile, decode
from dualtoken_deploy.targets.runner import Array

Shape = tuple[int | None, ...]  # None: a size that the program leaves open
Value = Any  # an array, a str, or a list of str

_IMMEDIATE = ("floats", "ints", "bools", "strings", "longInts", "doubles", "bytes")


@dataclass(frozen=True)
class Type:
    """Declared type of a value: MIL dtype name ("FLOAT16", ...), shape; "LIST" and "DICTIONARY" have no shape."""

    dtype: str
    shape: Shape

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(NUMPY_DTYPES[self.dtype][0])


@dataclass(frozen=True)
class Operation:
    """One operation. `inputs` maps a parameter to the names it reads (several for a variadic one); `constants` holds
    the parameters that are bound to values in place."""

    kind: str
    name: str
    inputs: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, Value]
    outputs: tuple[tuple[str, Type], ...]


@dataclass(frozen=True)
class Program:
    """The main function: typed inputs, operations in order, names of the outputs, and the package's description."""

    opset: str
    inputs: Mapping[str, Type]
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]
    description: Any  # the protobuf message ModelDescription
    specification_version: int


def load_program(package: Path) -> Program:
    """Reads an .mlpackage folder. Raises BundleError where it is incomplete, damaged or no ML program."""
    spec_path = find_specification(package)
    model = model_proto("reading a Core ML package").Model()
    try:
        model.ParseFromString(spec_path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is another class in each of its implementations
        raise BundleError(f"{spec_path} is no Core ML specification ({error}); export the bundle again") from error
    if model.WhichOneof("Type") != "mlProgram":
        found = model.WhichOneof("Type") or "nothing"
        raise BundleError(f"{spec_path} holds {found} and no mlProgram; convert the model with convert_to='mlprogram'")
    if "main" not in model.mlProgram.functions:
        raise BundleError(f"{spec_path} has no function main; a multifunction package is not executed here")
    reader = _Reader(spec_path.parent)
    try:
        return reader.program(model)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise BundleError(f"{spec_path} cannot be read as a program ({type(error).__name__}: {error})") from error


def find_specification(package: Path) -> Path:
    """The root model's file inside an .mlpackage, by the package's own Manifest.json. Raises BundleError."""
    manifest = package / "Manifest.json"
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
        item = data["itemInfoEntries"][data["rootModelIdentifier"]]["path"]
        path = package / "Data" / str(item)
    except FileNotFoundError as error:
        raise BundleError(f"{package} has no Manifest.json, so it is no .mlpackage; copy the whole folder") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{manifest} cannot be read ({type(error).__name__}: {error}); copy it anew") from error
    if not path.is_file() or not path.resolve().is_relative_to(package.resolve()):
        raise BundleError(f"{package} lacks {item}, its model; copy the whole .mlpackage folder")
    return path


class _Reader:
    """Turns protobuf messages into the classes above; `folder` is what "@model_path" stands for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, WeightFile] = {}

    def program(self, model: Any) -> Program:
        function = model.mlProgram.functions["main"]
        if function.opset not in function.block_specializations:
            raise ValueError(f"no block for opset {function.opset!r}")
        block = function.block_specializations[function.opset]
        return Program(
            opset=function.opset,
            inputs={value.name: read_type(value.type) for value in function.inputs},
            operations=tuple(self._operation(op) for op in block.operations),
            outputs=tuple(block.outputs),
            description=model.description,
            specification_version=model.specificationVersion,
        )

    def _operation(self, op: Any) -> Operation:
        inputs: dict[str, tuple[str, ...]] = {}
        constants = {key: self._value(value) for key, value in op.attributes.items()}
        name = str(constants.pop("name", ""))
        for key, argument in op.inputs.items():
            bindings = argument.arguments
            if all(b.WhichOneof("binding") == "name" for b in bindings):
                inputs[key] = tuple(b.name for b in bindings)
            elif len(bindings) == 1:
                constants[key] = self._value(bindings[0].value)
            else:
                constants[key] = tuple(self._value(b.value) for b in bindings)
        outputs = tuple((value.name, read_type(value.type)) for value in op.outputs)
        return Operation(op.type, name or (outputs[0][0] if outputs else op.type), inputs, constants, outputs)

    def _value(self, value: Any) -> Value:
        kind = value.type.WhichOneof("type")
        if kind == "listType":
            return [self._value(item) for item in value.immediateValue.list.values]
        if kind != "tensorType":
            raise ValueError(f"a constant of {kind} is not executed here")
        declared = read_type(value.type)
        shape = tuple(int(size or 0) for size in declared.shape)
        if value.WhichOneof("value") == "blobFileValue":
            blob = value.blobFileValue
            return self._file(blob.fileName).read(blob.offset, declared.dtype, shape)
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if declared.dtype == "STRING":
            texts = list(tensor.strings.values)
            return texts[0] if not shape and len(texts) == 1 else texts
        if field == "bytes":
            return decode(tensor.bytes.values, declared.dtype, shape)
        values = list(getattr(tensor, field).values) if field in _IMMEDIATE else []
        count = int(np.prod(shape, dtype=np.int64))
        if len(values) == 1 and count > 1:
            values *= count
        return np.array(values, declared.numpy).reshape(shape)

    def _file(self, name: str) -> WeightFile:
        if name not in self._files:
            relative = name.removeprefix("@model_path/")
            path = self._folder / relative
            if not path.resolve().is_relative_to(self._folder.resolve()):
                raise ValueError(f"weight file {name!r} lies outside of the package")
            self._files[name] = WeightFile(path)
        return self._files[name]


def read_type(message: Any) -> Type:
    """A ValueType message as a Type."""
    kind = message.WhichOneof("type")
    if kind == "listType":
        return Type("LIST", ())
    if kind == "dictionaryType":
        return Type("DICTIONARY", ())
    if kind != "tensorType":
        raise ValueError(f"values of {kind} are not executed here")
    tensor = message.tensorType
    shape: Shape = tuple(
        int(d.constant.size) if d.WhichOneof("dimension") == "constant" else None for d in tensor.dimensions
    )
    names = tensor.DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    return Type(str(names[tensor.dataType].name), shape)


def as_array(value: Value) -> Array:
    """A constant as an array; TypeError for text."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{type(value).__name__} where a tensor belongs")
    return value
