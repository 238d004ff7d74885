"""What Vulkan is given in a .pte: a list of operators by their names in PyTorch, here executed by PyTorch.

A reference and not Vulkan: where values lie in a GPU's memory is left out. Every value is rounded to the dtype that the
graph declares for it; what is computed in one operator is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualtoken_deploy.targets.coreml.mil.vendor import quiet
from dualtoken_deploy.targets.executorch.program import Node, decompile, not_executed

HEADER = 30  # bytes, of which the places of the graph and of its constants are read
MAGIC = b"VH00"
NAMED = 2**64 - 1  # as the place of constants that lie in the file's named data
PREPACK = "et_vk.prepack.default"  # lays a constant out, once, when the graph is loaded
DTYPES = {"BOOL": torch.bool, "UINT8": torch.uint8, "INT8": torch.int8, "INT32": torch.int32, "INT64": torch.int64,
          "FLOAT16": torch.float16, "FLOAT32": torch.float32, "FLOAT64": torch.float64}  # fmt: skip
_LISTS = ("IntList", "DoubleList", "BoolList")
_SCALARS = {"Int": "int_val", "Bool": "bool_val", "String": "string_val"}
SPACES = ("aten", "dim_order_ops", "et_vk")
WORDS = frozenset({"approximate", "rounding_mode"})  # of gelu and div
LARGEST = torch.finfo(torch.float32).max


class VulkanGraph:
    """One piece. Raises ValueError on what is no such graph, BundleError on what is not executed here."""

    def __init__(self, blob: bytes, named: Mapping[str, bytes]) -> None:
        with quiet():
            import executorch.backends.vulkan.custom_ops_lib  # noqa: F401  # its operators, by PyTorch
            import executorch.backends.vulkan.serialization as serialization

        if blob[4:8] != MAGIC:
            raise ValueError(f"Vulkan's part begins with {blob[4:8]!r}")
        start, size, constants = (int.from_bytes(blob[at : at + 4], "little") for at in (10, 14, 18))
        schema = Path(next(iter(serialization.__path__))) / "schema.fbs"
        graph = decompile(blob[start : start + size], schema, "--raw-binary")
        self._values = [(value["value_type"], value["value"]) for value in graph["values"]]
        self._inputs, self._outputs = graph["input_ids"], graph["output_ids"]
        self._known: dict[int, Tensor] = {}
        for number, (kind, value) in enumerate(self._values):
            if kind == "VkTensor" and value["constant_id"] >= 0:
                place = graph["constants"][value["constant_id"]]
                at = constants + place["offset"]
                inside = place["offset"] != NAMED
                data = blob[at : at + place["length"]] if inside else named[place["named_key"]]
                self._known[number] = _tensor(data, value)
        self._steps = []
        for call in graph["chain"]:
            *given, made = call["args"]
            if call["name"] == PREPACK:
                self._known[made] = self._known[given[0]]
                continue
            self._steps.append((call["name"], operator(call["name"]), given, made))

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What runs for each input."""
        return tuple(Node(name, dtype_name(DTYPES[self._declared(made)])) for name, _, _, made in self._steps)

    @property
    def outputs(self) -> int:
        return len(self._outputs)

    def _declared(self, made: int) -> str:
        kind, value = self._values[made]
        if kind == "ValueList":
            return self._declared(value["items"][0])
        return str(value["datatype"])

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        """The piece's outputs for its inputs, both in its own order."""
        found = dict(self._known)
        for number, tensor in zip(self._inputs, given, strict=True):
            found[number] = self._held(number, tensor)
        for _, call, arguments, made in self._steps:
            places: list[Any] = []
            by_name: dict[str, Any] = {}
            for argument, number in zip(call._schema.arguments, arguments, strict=True):
                value = _widened(self._argument(number, found))
                if isinstance(value, float) and str(argument.type) in ("int", "Optional[int]"):
                    value = int(value)  # equal numbers are stored once, 0 as the 0.0 that came before it
                if not argument.kwarg_only:
                    places.append(value)
                elif value is not None:  # dtypes are not kept: that of the result is
                    by_name[argument.name] = value
            results = call(*places, **by_name)
            many = self._values[made][0] == "ValueList"
            numbers = self._values[made][1]["items"] if many else [made]
            for number, result in zip(numbers, results if many else [results], strict=True):
                found[number] = self._held(number, result)
        return [found[number] for number in self._outputs]

    def _argument(self, number: int, found: Mapping[int, Tensor]) -> Any:
        kind, value = self._values[number]
        if kind == "VkTensor":
            return found[number]
        if kind == "ValueList":
            return [self._argument(item, found) for item in value["items"]]
        if kind in _LISTS:
            return list(value["items"])
        if kind == "Null":
            return None
        if kind == "Double":  # float32 on the GPU: the upper end of a ReLU is the largest float64
            double = float(value["double_val"])
            return double if abs(double) <= LARGEST else math.copysign(math.inf, double)
        if kind in _SCALARS:
            return value[_SCALARS[kind]]
        raise not_executed(f"a {kind}, a size that is known only when it runs")

    def _held(self, number: int, value: Tensor) -> Tensor:
        """A value in the dtype that is declared for it. Raises ValueError where its shape is another."""
        kind, declared = self._values[number]
        if kind != "VkTensor" or list(value.shape) != list(declared["dims"]):
            raise ValueError(f"value {number} of Vulkan's part is {list(value.shape)}, declared {declared.get('dims')}")
        return value.to(DTYPES[declared["datatype"]])


def dtype_name(dtype: torch.dtype) -> str:
    """As numpy calls it."""
    return str(dtype).removeprefix("torch.")


def operator(name: str) -> Any:
    """`aten.add.Tensor` as PyTorch has it. Raises BundleError where it does not, or where it takes words other than
    those of arithmetic: PyTorch has operators that open files, and the name is a stranger's."""
    try:
        space, packet, overload = name.split(".")
        found = getattr(getattr(getattr(torch.ops, space), packet), overload)
        words = {argument.name for argument in found._schema.arguments if "str" in str(argument.type)}
    except (AttributeError, ValueError, RuntimeError) as error:
        raise not_executed(f"the operator {name}") from error
    if space not in SPACES or not words <= WORDS:
        raise not_executed(f"the operator {name}")
    return found


def _tensor(data: bytes, declared: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[declared["datatype"]], declared["dims"]
    count = math.prod(shape)
    return torch.frombuffer(bytearray(data), dtype=dtype, count=count).reshape(shape) if count else torch.empty(shape)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float16:
        return value.float()
    if isinstance(value, list):
        return [_widened(item) for item in value]
    return value
