"""What Core ML is given in a .pte: an .mlpackage and the order of its inputs in one run of bytes; executed in numpy."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dualtoken_deploy.targets.coreml.mil import MilProgram, load_program
from dualtoken_deploy.targets.executorch.program import Node

LONGEST = 1 << 20  # bytes of the list of files


class CoreMLPiece:
    """One piece. Raises ValueError on what is no folder, BundleError on a package that is not executed here."""

    def __init__(self, blob: bytes, _named: Mapping[str, bytes]) -> None:
        with tempfile.TemporaryDirectory(prefix="dualtoken-executorch.") as folder:
            unpack(blob, Path(folder))
            (inside,) = Path(folder).iterdir()
            said = json.loads((inside / "metadata.json").read_text(encoding="utf-8"))
            self._program = MilProgram(load_program(inside / "model.mlpackage"))
        self._inputs, self._outputs = said["inputNames"], said["outputNames"]

    @property
    def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(op.kind, op.outputs[0][1].dtype.lower()) for op in self._program.steps)

    @property
    def outputs(self) -> int:
        return len(self._outputs)

    def run(self, given: Sequence[Tensor]) -> list[Tensor]:
        arrays = [tensor if tensor.dim() else tensor.reshape(1) for tensor in given]  # Core ML has no numbers as inputs
        feeds = {name: tensor.numpy() for name, tensor in zip(self._inputs, arrays, strict=True)}
        found = self._program.run(feeds)
        return [torch.from_numpy(np.ascontiguousarray(found[name])) for name in self._outputs]


def unpack(blob: bytes, folder: Path) -> None:
    """Writes the files of a piece. Their list stands behind them, written backwards, a folder after what is in it.

    ExecuTorch's own reader ends the process on a damaged one. Raises ValueError, KeyError.
    """
    text = blob[: -LONGEST - 1 : -1].decode("latin-1")
    nodes = json.JSONDecoder().raw_decode(text)[0]["nodes"]
    if sum(node["dataRegion"]["size"] for node in nodes) > len(blob):
        raise ValueError("the files of Core ML's part are larger than it is")
    left = set(range(len(nodes)))

    def write(number: int, path: Path) -> None:
        left.remove(number)  # each lies in one folder
        node = nodes[number]
        if not node["children"] and node["kind"] == 0:
            start, size = node["dataRegion"]["offset"], node["dataRegion"]["size"]
            if not 0 <= start <= start + size <= len(blob):
                raise ValueError(f"{node['name']} lies outside of Core ML's part")
            path.write_bytes(blob[start : start + size])
            return
        path.mkdir()
        for name, child in node["children"].items():
            if not 0 <= child < number or name in ("", ".", "..") or "/" in name or "\\" in name:
                raise ValueError(f"Core ML's part holds no file {name!r}")
            write(child, path / name)

    write(len(nodes) - 1, folder / "package")
