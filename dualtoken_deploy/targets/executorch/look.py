"""The values inside a .pte: the saved file with them as further outputs of its delegates, run by ExecuTorch as ever.

XNNPACK's graph in the file says no names. Its operators come in the order of the program that was lowered, so the
values of one kind of operator have the names of those operations there, where both have as many.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.deploy.traced import TRACED_RULES
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import UsageError
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.executorch import program
from dualtoken_deploy.targets.executorch.backends import XNNPACK, backend_of
from dualtoken_deploy.targets.executorch.runner import METHOD, MODEL, open_runtime
from dualtoken_deploy.targets.inner import Insides, Look, Tell
from dualtoken_deploy.targets.mobile.inner import (
    as_saved,
    batch_of,
    first_of,
    float_source,
    kinds_of,
    mobile_insides,
)

# torch's operations and XNNPACK's of the same work
SAME: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("linear", "addmm", "mm"), ("XNNFullyConnected",)),
    (("conv2d", "convolution"), ("XNNConv2d", "XNNDepthwiseConv2d")),
    (("bmm", "matmul"), ("XNNBatchMatrixMultiply",)),
    (("add",), ("XNNAdd",)),
    (("sub",), ("XNNSubtract",)),
    (("mul",), ("XNNMultiply",)),
    (("div",), ("XNNDiv",)),
    (("gelu",), ("XNNGelu",)),
    (("softmax", "_softmax"), ("XNNSoftmax",)),
    (("sigmoid",), ("XNNSigmoid",)),
    (("tanh",), ("XNNTanh",)),
    (("exp",), ("XNNExp",)),
    (("sqrt",), ("XNNSquareRoot",)),
    (("rsqrt",), ("XNNReciprocalSquareRoot",)),
    (("avg_pool2d",), ("XNNAvgPooling2d",)),
    (("max_pool2d",), ("XNNMaxPooling2d",)),
)
OUTPUT_FLAG = 2  # of XNNPACK's external outputs
DTYPES = {"xnn_datatype_fp32": "FLOAT", "xnn_datatype_qint8": "CHAR"}
BYTES = {"FLOAT": 4, "CHAR": 1}
OFFSETS = 64  # bytes between where tensors may begin


@dataclass(frozen=True)
class Place:
    """Where a value lies: which delegate, its number there, its shape as saved, and its dtype by ExecuTorch's names;
    `scale` and `zero` of integers."""

    delegate: int
    number: int
    shape: tuple[int, ...]
    dtype: str
    scale: float = 1.0
    zero: int = 0


def executorch_insides(bundle: Bundle, inputs: Array, tell: Tell) -> Insides:
    """As mobile_insides, of those values that the file has; maps with their channels last where it has them so.

    Raises UsageError on a bundle for another backend than XNNPACK.
    """
    backend = backend_of(bundle.manifest)
    if backend.name != XNNPACK:
        raise UsageError(
            f"diagnose looks into XNNPACK's graphs, and {bundle.path} is lowered to {backend.title}; export the model "
            f"with --backend {XNNPACK} to look into it"
        )
    inside = mobile_insides(bundle, TRACED_RULES, inputs, tell, PRODUCT_RULES)
    with program.whole(bundle.path / MODEL):
        places = find(inside.kinds, graphs_of(program.load(bundle.path / MODEL)))
    shapes = {name: place.shape for name, place in places.items()}
    values = {name: as_saved(value, shapes.get(name), inside.kinds[name]) for name, value in inside.values.items()}
    return replace(inside, values=values)


def probe_executorch(bundle: Bundle, names: Sequence[str], inputs: Array) -> dict[str, Array]:
    """Those of the named values that the bundle's model.pte computes, for inputs given one at a time; integers as the
    numbers that they stand for."""
    source = float_source(bundle.manifest, tuple(TRACED_RULES), lambda _: None, PRODUCT_RULES)
    with program.whole(bundle.path / MODEL):
        pte = program.load(bundle.path / MODEL)
        graphs = graphs_of(pte)
        places = find(kinds_of(source), graphs)
        wanted = {name: places[name] for name in names if name in places}
        given_out = len(pte.program.execution_plan[0].outputs)
        give_out(pte, graphs, wanted.values())
        with tempfile.TemporaryDirectory(prefix="dualtoken-executorch.") as folder:
            path = Path(folder) / MODEL
            write(pte, path)
            runs = [
                [first_of(bundle, value) for value in run[given_out:]]
                for run in execute(path, (batch_of(bundle, image) for image in inputs))
            ]
    return {
        name: (np.concatenate([run[k] for run in runs]).astype(np.float32) - place.zero) * np.float32(place.scale)
        for k, (name, place) in enumerate(wanted.items())
    }


def graphs_of(pte: Any) -> dict[int, dict[str, Any]]:
    """{number of a delegate of the method: XNNPACK's graph in it}."""
    (plan,) = pte.program.execution_plan
    data = pte.program.backend_delegate_data
    return {
        number: program.open_graph(bytes(data[delegate.processed.index].data))
        for number, delegate in enumerate(plan.delegates)
        if delegate.id == program.XNNPACK
    }


def find(kinds: Mapping[str, str], graphs: Mapping[int, Mapping[str, Any]]) -> dict[str, Place]:
    """The places of the values of a program, `kinds` as of kinds_of. None of a kind that the file has more or fewer
    operators of: one could not be told from another."""
    found: dict[str, Place] = {}
    for operations, operators in SAME:
        names = [name for name, kind in kinds.items() if kind in operations]
        places = list(_outputs(graphs, operators))
        if len(names) == len(places):
            found |= {name: place for name, place in zip(names, places, strict=True) if place.dtype}
    return {name: found[name] for name in kinds if name in found}


def _outputs(graphs: Mapping[int, Mapping[str, Any]], operators: tuple[str, ...]) -> Iterator[Place]:
    for delegate, graph in graphs.items():
        values = {program.tensor_of(value)["id_out"]: value for value in _values(graph)}
        for node in graph["xnodes"]:
            if node["xnode_union_type"] not in operators:
                continue
            number = node["xnode_union"]["output_id"]
            value = values[number]
            tensor, scales = program.tensor_of(value), value.get("quant_params", {})
            shape, dtype = tuple(map(int, tensor["dims"])), DTYPES.get(tensor["datatype"], "")
            yield Place(delegate, number, shape, dtype, scales.get("scale", 1.0), scales.get("zero_point", 0))


def _values(graph: Mapping[str, Any]) -> list[Any]:
    return [value["xvalue_union"] for value in graph["xvalues"]]


def give_out(pte: Any, graphs: Mapping[int, dict[str, Any]], places: Iterable[Place]) -> None:
    """Makes values outputs of their delegates and of the method, behind those that it has, in the order given."""
    from executorch.exir import schema
    from executorch.exir.scalar_type import ScalarType

    (plan,) = pte.program.execution_plan
    calls = {
        step.instr_args.delegate_index: step.instr_args
        for chain in plan.chains for step in chain.instructions if hasattr(step.instr_args, "delegate_index")
    }  # fmt: skip
    tensors = {
        number: {tensor["id_out"]: tensor for tensor in map(program.tensor_of, _values(graph))}
        for number, graph in graphs.items()
    }
    for place in places:
        graph, call = graphs[place.delegate], calls[place.delegate]
        tensor: Any = tensors[place.delegate][place.number]
        if tensor["flags"] & OUTPUT_FLAG:
            plan.outputs.append(call.args[tensor["external_id"]])
            continue
        tensor["flags"] |= OUTPUT_FLAG
        tensor["external_id"] = graph["num_externs"]
        graph["num_externs"] += 1
        graph["output_ids"].append(place.number)
        at = -(-plan.non_const_buffer_sizes[1] // OFFSETS) * OFFSETS
        plan.non_const_buffer_sizes[1] = at + math.prod(place.shape) * BYTES[place.dtype]
        own = schema.Tensor(
            scalar_type=ScalarType[place.dtype], storage_offset=0, sizes=list(place.shape),
            dim_order=list(range(len(place.shape))), requires_grad=False, layout=0, data_buffer_idx=0,
            allocation_info=schema.AllocationDetails(1, at & 0xFFFFFFFF, at >> 32),
            shape_dynamism=schema.TensorShapeDynamism.STATIC,
        )  # fmt: skip
        call.args.append(len(plan.values))
        plan.outputs.append(len(plan.values))
        plan.values.append(schema.EValue(own))
    for number, graph in graphs.items():
        data = pte.program.backend_delegate_data[plan.delegates[number].processed.index]
        data.data = program.replace_graph(bytes(data.data), graph)


def write(pte: Any, path: Path) -> None:
    from executorch.exir._serialize._program import serialize_pte_binary

    path.write_bytes(bytes(serialize_pte_binary(pte, extract_delegate_segments=True)))


def execute(path: Path, pictures: Iterable[Array]) -> Iterator[list[Array]]:
    """Everything that a file gives for each input."""
    import torch

    loaded = open_runtime().load_program(path)
    method = loaded.load_method(METHOD)
    for picture in pictures:
        yield [out.numpy().copy() for out in method.execute([torch.from_numpy(np.ascontiguousarray(picture))])]


LOOK = Look(executorch_insides, probe_executorch)
