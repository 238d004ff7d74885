"""ExecuTorch: a .pte lowered to XNNPACK as one delegate."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from pathlib import Path

from torch import nn

from dualtoken_deploy.deploy.traced import TRACED_RULES, Program
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.targets.executorch.brief import brief
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
        with quiet(), contextlib.redirect_stderr(io.StringIO()), brief():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            # each pass would run the whole program again to check it; export checks the file against eager
            unchecked = EdgeCompileConfig(_check_ir_validity=False)
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()], compile_config=unchecked)
            path.write_bytes(edge.to_executorch().buffer)
    except Exception as error:  # its passes raise what they raise
        raise ConversionError(f"ExecuTorch cannot lower the model: {first_line(error)}") from error


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
