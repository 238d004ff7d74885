"""ExecuTorch: a .pte lowered to XNNPACK as one delegate."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from dualtoken_deploy.deploy.traced import TRACED_RULES, Program
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.executorch.program import Contents, read
from dualtoken_deploy.targets.executorch.runner import MODEL, NAMES
from dualtoken_deploy.targets.mobile.noise import PRODUCTS
from dualtoken_deploy.targets.mobile.torch_program import Source, check_fixed, make_source
from dualtoken_deploy.targets.request import Artifact, Request, Tell, quiet


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.pte. Raises UsageError on an opset or a dynamic batch, ConversionError where ExecuTorch fails."""
    source = trace(model, request, tell)
    tell("lowering to XNNPACK")
    lower(source.program, folder / MODEL)
    return describe(folder / MODEL, source)


def trace(model: nn.Module, request: Request, tell: Tell) -> Source:
    """The program that is lowered: products by three axes at most, means as products."""
    check_fixed(request, "ExecuTorch")
    return make_source(model, request, TRACED_RULES, tell, PRODUCT_RULES)


def lower(program: Program, path: Path) -> None:
    """Writes a program, whatever XNNPACK does not take left to the plain kernels. Raises ConversionError."""
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), forgetful():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower

            lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
            path.write_bytes(lowered.buffer)
    except Exception as error:  # its passes raise what they raise
        raise ConversionError(f"ExecuTorch cannot lower the model: {first_line(error)}") from error


@contextlib.contextmanager
def forgetful() -> Iterator[None]:
    """Without the history of each node that torch keeps for debugging: every pass copies all of it anew, so that a
    third of the lowering went into it."""
    from torch.fx import traceback

    whole: Any = traceback.NodeSource

    class Brief(whole):  # type: ignore[misc]
        def __init__(self, node: Any, pass_name: str = "", action: Any = None) -> None:
            super().__init__(None, pass_name, action)

    traceback.NodeSource = Brief  # type: ignore[misc]
    try:
        yield
    finally:
        traceback.NodeSource = whole  # type: ignore[misc]


def describe(path: Path, source: Source) -> Artifact:
    """What was made, read from the file. Raises ConversionError where its products are not the model's."""
    found = read(path)
    kinds = Counter(node.kind for node in found.nodes) + Counter(found.outside)
    structure = {
        "operators": len(found.nodes) + len(found.outside),
        "delegates": len(found.delegates),
        "outside": len(found.outside),
    }
    return Artifact(
        source.rules,
        {"pte": dict(kinds.most_common()), "structure": structure, NAMES: name_products(found, source)},
    )


def name_products(found: Contents, source: Source) -> dict[str, int]:
    """MACs of the file's products by the model's names; both are in the order of the program.

    None where a part of them is left to plain kernels, so that one cannot be told from another.
    """
    wanted = [node.name for node in source.program.graph.nodes if node.target in PRODUCTS]
    products = found.products
    if len(wanted) != len(products):
        return {}
    return {source.names[name]: node.macs for name, node in zip(wanted, products, strict=True)}
