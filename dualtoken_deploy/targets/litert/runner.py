"""Runs a .tflite with LiteRT's own interpreter, products by XNNPACK: what an app on Android runs on its CPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import BundleError, MissingError, first_line, missing_extra
from dualtoken_deploy.spec import TensorSpec
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.runner import Array, Bordered, Declared, Execution, RunnerOptions, check_declared

MODEL = "model.tflite"
DELEGATE = "DELEGATE"
INTEGERS = ("INT8", "INT4", "UINT8")
PRODUCTS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
OUTSIDE = "outside XNNPACK"


def load(bundle: Bundle, options: RunnerOptions) -> LiteRtRunner:
    """A runner for `model.tflite`. Raises MissingError (no extra, another device than the CPU), BundleError."""
    if options.device is not None and options.device.lower() != "cpu":
        raise MissingError(
            f"LiteRT runs here on the CPU alone, not on {options.device!r}; leave --device out (a phone's GPU and NPU: "
            "docs/android.md)"
        )
    specs = (bundle.manifest.input.tensor,), bundle.manifest.outputs
    return LiteRtRunner(bundle.path / MODEL, *specs, options.threads)


class LiteRtRunner(Bordered):
    """One interpreter with XNNPACK's delegate, which it takes by itself."""

    def __init__(
        self, path: Path, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], threads: int | None = None
    ) -> None:
        self._inputs, self._outputs, self._path = inputs, outputs, path
        model = flat.read(path)  # before the interpreter, which ends the process on some damaged files
        foreign = sorted({op.kind for op in flat.operators(model) if op.kind.startswith(("CUSTOM", "operator"))})
        if foreign:
            raise BundleError(f"{path} has {', '.join(foreign)}, which LiteRT here does not know; export it again")
        self._interpreter: Any = open_interpreter(path, threads)
        given = _indices(self._interpreter.get_input_details(), "input", inputs, path)
        found = _indices(self._interpreter.get_output_details(), "output", outputs, path)
        self._feeds, self._results = dict(zip(inputs, given, strict=True)), dict(zip(outputs, found, strict=True))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interpreter = None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        for spec, index in self._feeds.items():
            self._interpreter.set_tensor(index, np.ascontiguousarray(feeds[spec.name]))
        self._interpreter.invoke()
        return {spec.name: self._interpreter.get_tensor(index) for spec, index in self._results.items()}  # copies

    def execution(self) -> Execution:
        """Operators by kind with the dtype that they compute in; those that no delegate took say so in it.

        Which nodes the delegate took is read from the prepared interpreter, their types from the file. An operator with
        8-bit weights over float values computes in integers in XNNPACK, which rounds the values as it goes.
        """
        model = flat.read(self._path)
        taken, pieces = delegated(self._interpreter._get_ops_details())
        ops = list(flat.operators(model))
        kinds: Counter[str] = Counter()
        dtypes: dict[str, Counter[str]] = {}
        nodes: dict[str, str] = {}
        behind = {i: op for op in ops if op.kind == "DEQUANTIZE" for i in op.outputs}
        for place, op in enumerate(ops):
            if op.kind == "DEQUANTIZE" and flat.is_constant(model, op.inputs[0]):
                continue  # a stored weight that is widened once, at the start
            dtype = _dtype(model, op, behind) + ("" if place in taken else f" {OUTSIDE}")
            kinds[op.kind] += 1
            dtypes.setdefault(op.kind, Counter())[dtype] += 1
            name = flat.tensor_name(model, op.outputs[0])
            nodes.setdefault(name.removesuffix(flat.WIDENED) if op.kind in PRODUCTS else name, dtype)
        precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
        outside = Counter(op.kind for place, op in enumerate(ops) if place not in taken)
        notes = [f"XNNPACK takes {len(taken)} of {len(ops)} operators, in {pieces} pieces"]
        if outside:
            notes.append(f"outside it: {', '.join(f'{n} {kind}' for kind, n in outside.most_common())}")
        return Execution(dict(sorted(kinds.items())), precision, nodes, notes=tuple(notes))


def delegated(details: list[dict[str, Any]]) -> tuple[set[int], int]:
    """Which of the file's operators a delegate took, by their place, and how many delegate nodes there are.

    The interpreter keeps the file's nodes and adds the delegate's: a delegate's are those between its inputs and its
    outputs.
    """
    own = [d for d in details if d["op_name"] != DELEGATE]
    pieces = [d for d in details if d["op_name"] == DELEGATE]
    maker = {int(i): place for place, d in enumerate(own) for i in d["outputs"]}
    taken: set[int] = set()
    for piece in pieces:
        border = {int(i) for i in piece["inputs"]}
        waiting = [int(i) for i in piece["outputs"]]
        while waiting:
            place = maker.get(waiting.pop())
            if place is not None and place not in taken:
                taken.add(place)
                waiting += [int(i) for i in own[place]["inputs"] if int(i) >= 0 and int(i) not in border]
    return taken, len(pieces)


def _dtype(model: Any, op: flat.Operator, behind: Mapping[int, flat.Operator]) -> str:
    """The dtype that an operator computes in."""
    tensors, names = model.subgraphs[0].tensors, flat.type_names()
    types = [names[tensors[i].type] for i in op.inputs if i >= 0]
    if op.kind in PRODUCTS and len(types) > 1:
        if types[1] in INTEGERS and op.inputs[1] not in behind:
            return types[1].lower()
        stored = names[tensors[behind[op.inputs[1]].inputs[0]].type] if op.inputs[1] in behind else ""
        return f"{types[0].lower()} ({stored.lower()} weights)" if stored in INTEGERS else types[0].lower()
    return types[0].lower() if types else "none"


def open_interpreter(path: Path, threads: int | None, keep_all: bool = False) -> Any:
    """A prepared interpreter; `keep_all`: one that no delegate serves and that keeps every value of a run.

    Raises MissingError without the extra, BundleError where it refuses the file.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError as error:
        raise missing_extra("litert", "running a LiteRT bundle") from error
    try:
        kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if keep_all else OpResolverType.AUTO
        interpreter = Interpreter(
            model_path=str(path), num_threads=threads, experimental_op_resolver_type=kernels,
            experimental_preserve_all_tensors=keep_all,
        )  # fmt: skip
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise BundleError(f"LiteRT cannot load {path}: {first_line(error)}; copy the bundle anew") from error
    return interpreter


def _indices(details: Iterable[Mapping[str, Any]], what: str, specs: tuple[TensorSpec, ...], path: Path) -> list[int]:
    """Where the interpreter keeps the manifest's tensors. Raises BundleError where the file has others."""
    found = {d["name"]: d for d in details}
    declared = {n: Declared(np.dtype(d["dtype"]).name, tuple(int(s) for s in d["shape"])) for n, d in found.items()}
    check_declared(path, what, specs, declared)
    return [int(found[spec.name]["index"]) for spec in specs]
