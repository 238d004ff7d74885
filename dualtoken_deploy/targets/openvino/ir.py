"""Files of an OpenVINO model, as small as they can be without changing what executes.

OpenVINO's own IR of a small INT8 model spends a third of its bytes on the description: shapes that only have to be
computed, the same few numbers as constants hundreds of times, and what the reader does not read.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

LARGEST = 4096  # elements: what is computed once for all; above are only weights
PLAIN = frozenset({"f32", "i64", "i32", "boolean"})
PAIR_NAMES = MappingProxyType({"_DequantizeLinear": "/dq", "_QuantizeLinear": "/q"})
_PORT = re.compile(rb'<port id="(\d+)"[^>]*?(?:/>|>.*?</port>)', re.DOTALL)


def save_ir(model: Any, folder: Path, half: bool = False) -> None:
    """Writes model.xml and model.bin; `half`: float weights in half the bytes. `model` itself is made smaller.

    Raises RuntimeError, as OpenVINO does.
    """
    import openvino as ov

    shrink(model)
    path = folder / "model.xml"
    ov.save_model(model, path, compress_to_fp16=half)
    path.write_bytes(squeeze(path.read_bytes()))


def shrink(model: Any) -> None:
    """Computes what is constant and shares equal constants, in place. Values keep their names but for constants and
    Q/DQ pairs."""
    _fold(model)
    _share(model)
    _rename(model)


def squeeze(xml: bytes) -> bytes:
    """The XML without indentation, and without types and shapes of layers' inputs, which are those of the outputs that
    they are connected to: the reader does not look at them."""
    xml = re.sub(rb">\s+<", b"><", xml)
    xml = re.sub(rb"<input>.*?</input>", lambda found: _PORT.sub(rb'<port id="\1"/>', found[0]), xml)
    return xml.replace(b" />", b"/>")


def _fold(model: Any) -> None:
    """Shapes that are known, and what comes from float or index constants alone: axes of a normalisation, scales that
    are only reshaped."""
    import openvino as ov

    for op in model.get_ordered_ops():
        sources = op.input_values()
        if not sources or op.get_output_size() != 1 or op.get_output_partial_shape(0).is_dynamic:
            continue
        known = op.get_type_name() == "ShapeOf" and sources[0].get_partial_shape().is_static
        if not known and not all(_is_plain(source.get_node()) for source in sources):
            continue
        value = ov.Tensor(op.get_element_type(), op.get_output_shape(0))
        if known:
            value.data[:] = sources[0].get_shape()
        elif value.size > LARGEST or not op.evaluate([value], [ov.Tensor(s.get_node().data) for s in sources]):
            continue
        _read_instead(op, ov.op.Constant(value.data))


def _share(model: Any) -> None:
    """One constant for all that are equal, and one conversion of each."""
    first: dict[tuple[Any, ...], Any] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.data.size <= LARGEST:
            key: tuple[Any, ...] = (_dtype(op), *op.get_output_shape(0), op.data.tobytes())
        elif op.get_type_name() == "Convert" and op.input_value(0).get_node().get_type_name() == "Constant":
            key = (_dtype(op), op.input_value(0).get_node().get_name())
        else:
            continue
        kept = first.setdefault(key, op)
        if kept is not op:
            _read_instead(op, kept)


def _rename(model: Any) -> None:
    """Numbers for what is neither a value nor a weight of the model, and short names for Q/DQ pairs."""
    for number, op in enumerate(model.get_ordered_ops()):
        kind, name = op.get_type_name(), op.get_friendly_name()
        constant, pair = kind == "Constant", name.endswith(tuple(PAIR_NAMES))
        if constant or pair:
            op.output(0).get_tensor().set_names(set())
        if (constant and not re.search(r"\.(weight|bias)(_quantized)?$", name)) or re.fullmatch(rf"{kind}_\d+", name):
            op.set_friendly_name(str(number))
        for long, short in PAIR_NAMES.items():
            if name.endswith(long):
                op.set_friendly_name(name.removesuffix(long) + short)


def _is_plain(op: Any) -> bool:
    """A constant of a type that nothing is gained from keeping as it is; int8 stays apart from its scale."""
    return op.get_type_name() == "Constant" and _dtype(op) in PLAIN and op.data.size <= LARGEST


def _dtype(op: Any) -> str:
    return str(op.get_element_type().to_string())


def _read_instead(old: Any, new: Any) -> None:
    for reader in old.output(0).get_target_inputs():
        reader.replace_source_output(new.output(0))
