"""Operators taken from a .tflite, on graphs made here by hand: LiteRT's interpreter says that nothing else changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dualtoken_deploy.errors import ConversionError
from dualtoken_deploy.targets.litert import flat
from dualtoken_deploy.targets.litert.changes import part_weights
from dualtoken_deploy.targets.litert.compress import to_half
from dualtoken_deploy.targets.litert.fewer import space_to_depth, split_slices, stay_channels_last, take_away
from dualtoken_deploy.targets.litert.runner import open_interpreter
from dualtoken_deploy.targets.litert.structure import gpu_refusals, structure
from dualtoken_deploy.targets.litert.ways import equal_constants, keep_batch, keep_maps, one_batch

tfl = flat.schema()
Options = tuple[str, dict[str, Any]]


class Made:
    """A model of one graph, operator by operator; values are their indices."""

    def __init__(self, *sizes: int) -> None:
        self.model, self.graph = tfl.ModelT(), tfl.SubGraphT()
        self.model.version, self.model.subgraphs, self.model.operatorCodes = 3, [self.graph], []
        self.model.buffers, self.graph.tensors, self.graph.operators = [tfl.BufferT()], [], []
        self.model.signatureDefs = self.model.metadata = []
        self.random = np.random.default_rng(0)
        self.graph.inputs = np.array([self.tensor(list(sizes))], np.int32)

    def tensor(self, sizes: list[int], data: np.ndarray[Any, Any] | None = None) -> int:
        tensor, integers = tfl.TensorT(), data is not None and data.dtype == np.int32
        tensor.shape, tensor.name = np.array(sizes, np.int32), f"t{len(self.graph.tensors)}".encode()
        tensor.type, tensor.buffer = tfl.TensorType.INT32 if integers else tfl.TensorType.FLOAT32, 0
        if data is not None:
            buffer = tfl.BufferT()
            buffer.data = np.frombuffer(data.tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def weight(self, *sizes: int) -> int:
        return self.tensor(list(sizes), self.random.standard_normal(sizes).astype(np.float32))

    def integers(self, *values: int) -> int:
        return self.tensor([len(values)], np.array(values, np.int32))

    def add(self, kind: str, inputs: list[int], sizes: list[int], options: Options | None = None) -> int:
        code, op, out = tfl.OperatorCodeT(), tfl.OperatorT(), self.tensor(sizes)
        code.builtinCode = getattr(tfl.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)  # seven bits
        code.version = 1
        self.model.operatorCodes.append(code)
        op.opcodeIndex = len(self.model.operatorCodes) - 1
        op.inputs, op.outputs = np.array(inputs, np.int32), np.array([out], np.int32)
        name, fields = options or (PLAIN.get(kind, ""), {})
        if name:
            op.builtinOptions = getattr(tfl, f"{name}T")()
            op.builtinOptionsType = getattr(tfl.BuiltinOptions, name)
            for field, value in fields.items():
                setattr(op.builtinOptions, field, value)
        self.graph.operators.append(op)
        return out

    def linear(self, x: int, out: int, sizes: list[int], keep: bool = True) -> int:
        long = int(self.graph.tensors[x].shape[-1])
        options = ("FullyConnectedOptions", {"keepNumDims": keep})
        return self.add("FULLY_CONNECTED", [x, self.weight(out, long), self.weight(out)], sizes, options)

    def reshape(self, x: int, *sizes: int) -> int:
        options = ("ReshapeOptions", {"newShape": np.array(sizes, np.int32)})
        return self.add("RESHAPE", [x, self.integers(*sizes)], list(sizes), options)

    def mean(self, x: int, axis: int, sizes: list[int]) -> int:
        return self.add("MEAN", [x, self.integers(axis)], sizes, ("ReducerOptions", {"keepDims": True}))

    def pool(self, x: int, sizes: list[int]) -> int:
        fields = {"strideW": 2, "strideH": 2, "filterWidth": 2, "filterHeight": 2, "padding": tfl.Padding.VALID}
        return self.add("AVERAGE_POOL_2D", [x], sizes, ("Pool2DOptions", fields))

    def ends(self, *outputs: int) -> Any:
        self.graph.outputs = np.array(outputs, np.int32)
        return self.model


PLAIN = {"ADD": "AddOptions", "MUL": "MulOptions", "SUB": "SubOptions", "SLICE": "SliceOptions",
         "TRANSPOSE": "TransposeOptions"}  # fmt: skip


def parts() -> Made:
    """A third of four channels each, and a slice that is no part of a whole."""
    made = Made(6, 5, 4)
    cuts = [made.add("SLICE", [0, made.integers(s, 0, 0), made.integers(2, 5, 4)], [2, 5, 4]) for s in (0, 2, 4)]
    other = made.add("SLICE", [0, made.integers(0, 1, 0), made.integers(6, 2, 4)], [6, 2, 4])
    made.ends(*cuts, other)
    return made


def planes() -> Made:
    """A map gained and shifted a channel between two transposes; then one whose channels are mixed."""
    made = Made(1, 4, 6, 3)
    x = made.add("TRANSPOSE", [0, made.integers(0, 3, 1, 2)], [1, 3, 4, 6])
    x = made.add("MUL", [x, made.weight(3, 1, 1)], [1, 3, 4, 6])
    x = made.add("ADD", [x, made.weight(3, 1, 1)], [1, 3, 4, 6])
    x = made.add("TRANSPOSE", [x, made.integers(0, 2, 3, 1)], [1, 4, 6, 3])
    y = made.add("TRANSPOSE", [x, made.integers(0, 3, 1, 2)], [1, 3, 4, 6])
    y = made.add("MUL", [y, made.weight(3, 4, 6)], [1, 3, 4, 6])
    made.ends(made.pool(made.add("TRANSPOSE", [y, made.integers(0, 2, 3, 1)], [1, 4, 6, 3]), [1, 2, 3, 3]))
    return made


def tokens(batch: int) -> Made:
    """Map -> tokens: norm, linear, mean over the tokens, a sum with a constant -> map."""
    made, n = Made(batch, 4, 6, 8), 24
    x = made.reshape(made.linear(0, 8, [batch, 4, 6, 8]), batch, n, 8)
    centred = made.add("SUB", [x, made.mean(x, 2, [batch, n, 1])], [batch, n, 8])
    y = made.linear(centred, 12, [batch * n, 12], keep=False)
    y = made.reshape(y, batch, n, 12)
    whole = made.linear(made.mean(y, 1, [batch, 1, 12]), 12, [batch, 1, 12])
    y = made.add("MUL", [y, whole], [batch, n, 12])
    y = made.add("ADD", [y, made.weight(1, n, 12) if batch == 1 else made.weight(12)], [batch, n, 12])
    y = made.add("GELU", [y], [batch, n, 12], ("GeluOptions", {"approximate": False}))
    made.ends(made.pool(made.reshape(y, batch, 4, 6, 12), [batch, 2, 3, 12]))
    return made


def pinned() -> Made:
    """Tokens that a softmax of three axes reads too: their reshape stays."""
    made = Made(1, 4, 6, 8)
    x = made.reshape(made.linear(0, 8, [1, 4, 6, 8]), 1, 24, 8)
    soft = made.add("SOFTMAX", [x], [1, 24, 8], ("SoftmaxOptions", {"beta": 1.0}))
    made.ends(soft, made.pool(made.reshape(made.linear(x, 8, [1, 24, 8]), 1, 4, 6, 8), [1, 2, 3, 8]))
    return made


def mixed() -> Made:
    """Tokens mixed by a linear layer between transposes of two axes, then summed with tokens of three."""
    made = Made(1, 7, 8)
    x = made.linear(0, 10, [7, 10], keep=False)
    x = made.add("TRANSPOSE", [x, made.integers(1, 0)], [10, 7])
    x = made.add("ADD", [made.linear(x, 7, [10, 7]), made.weight(10, 7)], [10, 7])
    x = made.reshape(made.add("TRANSPOSE", [x, made.integers(1, 0)], [7, 10]), 1, 7, 10)
    other = made.linear(0, 10, [1, 7, 10])
    made.ends(made.linear(made.add("ADD", [x, other], [1, 7, 10]), 5, [1, 7, 5]))
    return made


def merged(batch: int, two: int = 2) -> Made:
    """Two by two pixels put side by side; or three by two, which no SPACE_TO_DEPTH does."""
    made = Made(batch, 24, 5)
    x = made.reshape(0, batch * 6 // two, two, 2, 10)
    x = made.add("TRANSPOSE", [x, made.integers(0, 2, 1, 3)], [batch * 6 // two, 2, two, 10])
    made.ends(made.linear(made.reshape(x, batch, 12 // two, 10 * two), 3, [batch, 12 // two, 3]))
    return made


def heads(rows: int = 0) -> Made:
    """Attention of two heads; with `rows` a constant of two axes in it, which would meet other axes."""
    made = Made(1, 5, 24)
    x = made.add("TRANSPOSE", [made.reshape(0, 5, 6, 4), made.integers(1, 0, 2)], [6, 5, 4])
    q, k, v = (made.add("SLICE", [x, made.integers(s, 0, 0), made.integers(2, 5, 4)], [2, 5, 4]) for s in (0, 2, 4))
    q = made.add("MUL", [q, made.weight(rows, 4) if rows else made.weight(4)], [2, 5, 4])
    scores = made.add("BATCH_MATMUL", [q, k], [2, 5, 5], ("BatchMatMulOptions", {"adjY": True}))
    soft = made.add("SOFTMAX", [scores], [2, 5, 5], ("SoftmaxOptions", {"beta": 1.0}))
    out = made.add("BATCH_MATMUL", [soft, v], [2, 5, 4], ("BatchMatMulOptions", {}))
    out = made.add("TRANSPOSE", [out, made.integers(1, 0, 2)], [5, 2, 4])
    made.ends(made.reshape(out, 1, 5, 8))
    split_slices(made.model)
    return made


def biased(*sizes: int) -> Made:
    """Scores of two windows and three heads, and a constant that is added to them."""
    made = Made(2, 3, 5, 5)
    made.ends(made.add("ADD", [0, made.weight(*sizes)], [2, 3, 5, 5]))
    return made


def codebook(twice: bool = True) -> Made:
    """The entry of a codebook of 64 that lies nearest, and with `twice` looked up in the same codebook."""
    made = Made(6, 32)
    book = made.weight(64, 32)
    scores = made.add("FULLY_CONNECTED", [0, book, -1], [6, 64], ("FullyConnectedOptions", {"keepNumDims": True}))
    best = made.add("ARG_MAX", [scores, made.integers(1)], [6], ("ArgMaxOptions", {"outputType": tfl.TensorType.INT32}))
    made.graph.tensors[best].type = tfl.TensorType.INT32
    made.ends(made.add("EMBEDDING_LOOKUP", [best, book if twice else made.weight(64, 32)], [6, 32]))
    return made


CASES: list[tuple[Callable[[Any], int], Callable[[], Made], int, int]] = [
    (split_slices, parts, 1, 2),
    (space_to_depth, lambda: merged(1), 1, 0),
    (space_to_depth, lambda: merged(2), 1, 0),
    (space_to_depth, lambda: merged(1, 3), 0, 0),
    (stay_channels_last, planes, 1, 2),
    (keep_maps, lambda: tokens(1), 3, 3),
    (keep_maps, lambda: tokens(2), 3, 3),
    (keep_maps, pinned, 0, 0),
    (keep_batch, mixed, 1, 1),
    (keep_batch, lambda: tokens(1), 0, 0),  # a map of four axes is on the way
    (one_batch, heads, 1, 0),
    (one_batch, lambda: heads(5), 0, 0),
    (keep_maps, lambda: biased(3, 5, 5), 0, 0),  # four axes already, and a constant of other rows
    (equal_constants, lambda: biased(3, 5, 5), 1, 0),
    (equal_constants, lambda: biased(5), 0, 0),
    (part_weights, codebook, 1, 0),
    (part_weights, lambda: codebook(twice=False), 0, 0),
]


@pytest.mark.parametrize(("change", "make", "times", "fewer"), CASES)
def test_what_is_computed_stays(
    tmp_path: Path, change: Callable[[Any], int], make: Callable[[], Made], times: int, fewer: int
) -> None:
    made = make()
    before = list(flat.operators(made.model))
    wanted = run(made.model, tmp_path / "before.tflite")
    assert change(made.model) == times
    assert len(list(flat.operators(made.model))) == len(before) - fewer
    for found, value in zip(run(made.model, tmp_path / "after.tflite"), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_a_gpu_takes_a_bias_of_equal_rank() -> None:
    made = biased(3, 5, 5)
    assert len(list(gpu_refusals(made.model))) == 1
    take_away(made.model)
    assert not list(gpu_refusals(made.model))


def test_every_value_has_the_batch_first(tmp_path: Path) -> None:
    for made, before in ((heads(), 10), (merged(1), 2)):
        assert structure(made.model)["other_batch"] == before
        take_away(made.model)
        found = structure(flat.read(saved(made, tmp_path)))
        assert found["other_batch"] == 0
        assert found["max_rank"] == 4
        assert found["off_gpu"] == 0


def run(model: Any, path: Path) -> list[np.ndarray[Any, Any]]:
    """Of the saved file, by the interpreter's own kernels, which hold each operator's shapes against its inputs'."""
    flat.write(model, path)
    interpreter = open_interpreter(path, None, keep_all=True)
    (given,) = interpreter.get_input_details()
    picture = np.random.default_rng(1).standard_normal(given["shape"]).astype(np.float32)
    interpreter.set_tensor(given["index"], picture)
    interpreter.invoke()
    return [interpreter.get_tensor(d["index"]) for d in interpreter.get_output_details()]


def test_a_split_is_one_that_a_gpu_takes(tmp_path: Path) -> None:
    made = parts()
    take_away(made.model)
    kinds = Counter(op.kind for op in flat.operators(made.model))
    assert kinds == {"SPLIT": 1, "SLICE": 1}
    names = [tensor.name for tensor in made.graph.tensors]
    assert len(set(names)) == len(names)  # ai-edge-quantizer asks for it
    assert not list(gpu_refusals(made.model))
    assert take_away(flat.read(saved(made, tmp_path))) == Counter()  # nothing is left to take


def test_a_codebook_is_stored_in_float16_where_it_is_searched_and_looked_up_in_float32(tmp_path: Path) -> None:
    """ai-edge-quantizer 0.10 fails on one tensor for both; where a later one does not, part_weights can go."""
    pytest.importorskip("ai_edge_quantizer")
    made = codebook()
    with pytest.raises(ConversionError, match="can only concatenate str"):
        to_half(saved(made, tmp_path))
    wanted = run(made.model, tmp_path / "before.tflite")
    part_weights(made.model)
    narrow = to_half(saved(made, tmp_path))
    assert "FLOAT16" in {flat.type_names()[tensor.type] for tensor in narrow.subgraphs[0].tensors}
    np.testing.assert_array_equal(run(narrow, tmp_path / "after.tflite")[0], wanted[0])


def saved(made: Made, folder: Path) -> Path:
    flat.write(made.model, folder / "model.tflite")
    return folder / "model.tflite"
