"""A .pte as what it is: which operators a delegate took, and what XNNPACK's graph inside it is made of."""

from __future__ import annotations

import contextlib
import json
import math
import re
import struct
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.errors import BundleError, DualTokenError, first_line, missing_extra
from dualtoken_deploy.targets.coreml.mil.vendor import quiet

IDENTIFIER = b"ET12"
HEADER = b"eh00"  # with it a .pte says how long it is
XNNPACK = "XnnpackBackend"
GRAPH = b"XH00"  # of what the delegate is given
ALIGNMENT = 16  # of the parts in it
PRODUCTS = ("XNNFullyConnected", "XNNConv2d", "XNNDepthwiseConv2d", "XNNBatchMatrixMultiply")
_BARE = re.compile(r"(?<=: )(-?inf|nan)\b")  # as flatc writes what JSON has no word for: a ReLU's upper end
_NUMBERS = {"inf": "Infinity", "-inf": "-Infinity", "nan": "NaN"}
_DTYPES = {"fp32": "float32", "fp16": "float16", "qint8": "int8", "quint8": "uint8", "qcint8": "int8", "qcint4": "int4",
           "qdint8": "int8", "qpint8": "int8", "qint32": "int32", "qcint32": "int32", "qbint4": "int4"}  # fmt: skip


@dataclass(frozen=True)
class Node:
    """One operator of XNNPACK's graph. `dtype`: in which it computes; `macs`: of a product."""

    kind: str
    dtype: str
    macs: int = 0


@dataclass(frozen=True)
class Contents:
    """`outside`: what the plain kernels compute, in their order; `delegates`: what each piece is made of, and in `ids`
    whose it is, by ExecuTorch's names."""

    outside: tuple[str, ...]
    delegates: tuple[tuple[Node, ...], ...]
    ids: tuple[str, ...] = ()

    @property
    def nodes(self) -> list[Node]:
        return [node for graph in self.delegates for node in graph]

    @property
    def products(self) -> list[Node]:
        return [node for node in self.nodes if node.kind in PRODUCTS]


def check_file(path: Path) -> None:
    """Raises BundleError on anything but a whole .pte of this version: the runtime ends the process on some."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error}); copy the whole bundle") from error
    found = data[4:8]
    if found[:2] == IDENTIFIER[:2] and found != IDENTIFIER:
        raise BundleError(
            f"{path} is of version {found.decode(errors='replace')}, this program reads {IDENTIFIER.decode()}; update "
            "ExecuTorch"
        )
    if found != IDENTIFIER:
        raise BundleError(f"{path} is no .pte (no {IDENTIFIER.decode()} at its start); export the bundle again")
    whole = 0
    if data[8:12] == HEADER and len(data) >= 40:
        program, base, size = struct.unpack_from("<QQQ", data, 16)
        whole = max(program, base + size)
    if not 0 < whole <= len(data):
        raise BundleError(f"{path} is cut short ({len(data)} of {whole} bytes); copy the bundle anew")


def read(path: Path) -> Contents:
    """What a file for XNNPACK holds. Raises MissingError without the extra, BundleError on a file that is not whole."""
    with whole(path):
        program = load(path).program
        (plan,) = program.execution_plan
        blobs = [program.backend_delegate_data[d.processed.index].data for d in plan.delegates if d.id == XNNPACK]
        return Contents(outside_of(plan), tuple(tuple(_nodes(bytes(blob))) for blob in blobs), ids_of(plan))


def ids_in(path: Path) -> tuple[str, ...]:
    """Whose each piece of a file is. Raises MissingError, BundleError."""
    with whole(path):
        (plan,) = load(path).program.execution_plan
        return ids_of(plan)


def outside_of(plan: Any) -> tuple[str, ...]:
    """What a method leaves to the plain kernels, in their order."""
    steps = [step.instr_args for chain in plan.chains for step in chain.instructions]
    called = [plan.operators[step.op_index] for step in steps if hasattr(step, "op_index")]
    return tuple(f"{operator.name}.{operator.overload}" for operator in called)


def ids_of(plan: Any) -> tuple[str, ...]:
    """Whose each piece of a method is."""
    return tuple(str(delegate.id) for delegate in plan.delegates)


def load(path: Path) -> Any:
    """A .pte as ExecuTorch's own serializer reads and writes it. Raises MissingError, BundleError."""
    check_file(path)
    try:
        with quiet():
            from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as error:
        raise missing_extra("executorch", "reading a .pte") from error
    return deserialize_pte_binary(path.read_bytes())


@contextlib.contextmanager
def whole(path: Path) -> Iterator[None]:
    """What flatc and its readers raise, which is anything, as a BundleError."""
    try:
        yield
    except DualTokenError:
        raise
    except Exception as error:
        raise BundleError(f"{path} is damaged ({first_line(error)}); copy the bundle anew") from error


def not_executed(what: str) -> BundleError:
    """For what a reference execution does not have."""
    return BundleError(f"the .pte has {what}, which is not executed here; run it where its backend is")


def _nodes(blob: bytes) -> Iterator[Node]:
    graph = open_graph(blob)
    tensors = [tensor_of(value["xvalue_union"]) for value in graph["xvalues"]]
    values = {tensor["id_out"]: tensor for tensor in tensors}
    for node in graph["xnodes"]:
        kind, fields = node["xnode_union_type"], node["xnode_union"]
        dims = {name: _dims(values[fields[name]]) for name in fields if name.endswith("_id") and fields[name] in values}
        yield Node(kind, _dtype(fields, values), _macs(kind, dims) if kind in PRODUCTS else 0)


def open_graph(blob: bytes) -> dict[str, Any]:
    """XNNPACK's graph of a delegate, by ExecuTorch's own schema."""
    start, size, *_ = _parts(blob)
    return decompile(blob[start : start + size], _schema())


def decompile(data: bytes, schema: Path, *more: str) -> dict[str, Any]:
    """A flatbuffer as plain data; `more`: options of flatc."""
    from executorch.exir._serialize._flatbuffer import _flatc_decompile

    with tempfile.TemporaryDirectory(prefix="dualtoken-executorch.") as folder:
        file = Path(folder) / "graph.bin"
        file.write_bytes(data)
        _flatc_decompile(folder, str(schema), str(file), list(more))
        text = file.with_suffix(".json").read_text(encoding="utf-8")
        found: dict[str, Any] = dict(json.loads(_BARE.sub(lambda m: _NUMBERS[m[0]], text)))
        return found


def replace_graph(blob: bytes, graph: Mapping[str, Any]) -> bytes:
    """A delegate with another graph over the same constants."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader
    from executorch.exir._serialize._flatbuffer import _flatc_compile

    _, _, constants, size = _parts(blob)
    with tempfile.TemporaryDirectory(prefix="dualtoken-executorch.") as folder:
        file = Path(folder) / "graph.json"
        file.write_text(json.dumps(graph), encoding="utf-8")
        _flatc_compile(folder, str(_schema()), str(file))
        made = file.with_suffix(".bin").read_bytes()
    start, end = _aligned(XNNHeader.EXPECTED_LENGTH), _aligned(len(made))
    header: bytes = XNNHeader(start, len(made), start + end, size).to_bytes()
    return header.ljust(start, b"\0") + made.ljust(end, b"\0") + blob[constants : constants + size]


def _parts(blob: bytes) -> tuple[int, int, int, int]:
    """Where a delegate's graph begins and its bytes, the same of its constants."""
    if blob[4:8] != GRAPH:
        raise ValueError(f"XNNPACK's part begins with {blob[4:8]!r}")
    start, size, constants = struct.unpack_from("<III", blob, 10)
    (count,) = struct.unpack_from("<Q", blob, 22)
    return start, size, constants, count


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _schema() -> Path:
    import executorch.backends.xnnpack.serialization as serialization

    return Path(next(iter(serialization.__path__))) / "schema.fbs"


def tensor_of(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A quantized value has its tensor inside."""
    inside: Mapping[str, Any] = value.get("tensor_value", value)
    return inside


def _dims(value: Mapping[str, Any]) -> list[int]:
    return [int(n) for n in value.get("dims", [])]


def _dtype(fields: Mapping[str, Any], values: Mapping[int, Mapping[str, Any]]) -> str:
    """Of what an operator reads first; integers that are made of floats as they come are integers."""
    first = next(fields[name] for name in ("input1_id", "input_id", "output_id") if name in fields)
    name = str(values[first].get("datatype", "")).removeprefix("xnn_datatype_")
    return _DTYPES.get(name, name)


def _macs(kind: str, dims: Mapping[str, list[int]]) -> int:
    out = math.prod(dims["output_id"])
    if kind == "XNNBatchMatrixMultiply":
        return out * dims["input1_id"][-1]
    weight = dims["filter_id"]
    if kind == "XNNDepthwiseConv2d":
        return out * math.prod(weight[1:3])  # (1, h, w, channels)
    return out * math.prod(weight[1:])  # (out, h, w, in), (out, in)
