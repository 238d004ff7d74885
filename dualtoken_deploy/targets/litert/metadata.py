"""TFLite metadata as Android Studio and the task libraries read it: what to feed, what comes out, the labels' file.

A second FlatBuffer (TFLite Support's metadata_schema.fbs, identifier M001) in a buffer of the model, named by an entry
TFLITE_METADATA; the labels lie behind the model in a zip. No library that still installs writes it, so the few tables
that are needed are written here; the numbers below are places of fields in the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dualtoken_deploy import __version__
from dualtoken_deploy.bundle.manifest import CLASSIFY
from dualtoken_deploy.spec import InputContract, TensorSpec
from dualtoken_deploy.targets.coreml.package import AUTHOR, LICENSE, OUTPUTS, input_text
from dualtoken_deploy.targets.litert.flat import schema
from dualtoken_deploy.targets.request import Request

ENTRY = b"TFLITE_METADATA"
IDENTIFIER = b"M001"
LABELS = "labels.txt"
PARSER = "1.0.0"  # the oldest reader that knows every field below
AXIS_LABELS = 2  # AssociatedFileType.TENSOR_AXIS_LABELS
IMAGE = 2  # ContentProperties.ImageProperties
RGB = 1  # ColorSpaceType.RGB
NORMALIZATION = 1  # ProcessUnitOptions.NormalizationOptions


def add_metadata(model: Any, request: Request) -> dict[str, bytes]:
    """Puts the metadata into a model; returns the files that go behind it."""
    tfl = schema()
    labels = request.labels if request.task == CLASSIFY else ()
    buffer = tfl.BufferT()
    buffer.data = _array(model_metadata(request, bool(labels)))
    model.buffers.append(buffer)
    entry = tfl.MetadataT()
    entry.name, entry.buffer = ENTRY, len(model.buffers) - 1
    model.metadata = [m for m in model.metadata or [] if m.name != ENTRY] + [entry]
    model.description = description(request.metadata).encode()
    return {LABELS: "".join(f"{label}\n" for label in labels).encode()} if labels else {}


def description(metadata: Mapping[str, str]) -> str:
    """One line on what the model is."""
    what = metadata.get("head", "image classification")
    return f"{metadata['variant']}, {what}; {metadata['precision']}; weights: {metadata['weights']}"


def model_metadata(request: Request, labelled: bool) -> bytes:
    """The FlatBuffer: ModelMetadata with one SubGraphMetadata."""
    import flatbuffers

    b = flatbuffers.Builder(4096)
    inputs = [_input(b, request.contract)]
    outputs = [_output(b, spec, OUTPUTS.get(request.task, {}), labelled) for spec in request.outputs]
    graph = _table(b, 7, {2: _vector(b, inputs), 3: _vector(b, outputs)})
    texts = {
        0: request.metadata["variant"],
        1: description(request.metadata),
        2: __version__,
        4: AUTHOR,
        5: LICENSE,
        7: PARSER,
    }
    fields = {place: b.CreateString(text) for place, text in texts.items()}
    b.Finish(_table(b, 8, {**fields, 3: _vector(b, [graph])}), file_identifier=IDENTIFIER)
    return bytes(b.Output())


def _input(b: Any, contract: InputContract) -> int:
    """TensorMetadata: a picture that the graph normalises (so mean 0, std 1), or numbers and how to make them."""
    fields = {0: b.CreateString(contract.tensor.name), 1: b.CreateString(input_text(contract))}
    if contract.kind == "image":
        b.StartObject(2)  # ImageProperties
        b.PrependInt8Slot(0, RGB, 0)
        picture = b.EndObject()
        b.StartObject(3)  # Content
        b.PrependUint8Slot(0, IMAGE, 0)
        b.PrependUOffsetTRelativeSlot(1, picture, 0)
        fields[3] = b.EndObject()
        means, stds = [0.0], [1.0]
    else:
        means, stds = [255 * m for m in contract.mean], [255 * s for s in contract.std]
    options = _table(b, 2, {0: _floats(b, means), 1: _floats(b, stds)})
    b.StartObject(2)  # ProcessUnit
    b.PrependUint8Slot(0, NORMALIZATION, 0)
    b.PrependUOffsetTRelativeSlot(1, options, 0)
    fields[4] = _vector(b, [b.EndObject()])
    top, low = ([255.0], [0.0]) if contract.kind == "image" else ([4.0], [-4.0])
    fields[5] = _table(b, 2, {0: _floats(b, top), 1: _floats(b, low)})
    return _table(b, 7, fields)


def _output(b: Any, spec: TensorSpec, texts: Mapping[str, str], labelled: bool) -> int:
    fields = {0: b.CreateString(spec.name), 1: b.CreateString(texts.get(spec.name, spec.layout))}
    if labelled:
        name, text = (
            b.CreateString(LABELS),
            b.CreateString("Names of the classes, one a line, in their order"),
        )
        b.StartObject(4)  # AssociatedFile
        b.PrependUOffsetTRelativeSlot(0, name, 0)
        b.PrependUOffsetTRelativeSlot(1, text, 0)
        b.PrependInt8Slot(2, AXIS_LABELS, 0)
        fields[6] = _vector(b, [b.EndObject()])
    return _table(b, 7, fields)


def _table(b: Any, size: int, fields: Mapping[int, int]) -> int:
    """A table of `size` places whose fields are all offsets."""
    b.StartObject(size)
    for place, offset in fields.items():
        b.PrependUOffsetTRelativeSlot(place, offset, 0)
    made: int = b.EndObject()
    return made


def _vector(b: Any, offsets: Sequence[int]) -> int:
    b.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        b.PrependUOffsetTRelative(offset)
    made: int = b.EndVector()
    return made


def _floats(b: Any, values: Sequence[float]) -> int:
    b.StartVector(4, len(values), 4)
    for value in reversed(values):
        b.PrependFloat32(value)
    made: int = b.EndVector()
    return made


def _array(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)
