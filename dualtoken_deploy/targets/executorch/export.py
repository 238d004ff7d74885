"""ExecuTorch: a .pte lowered to XNNPACK as one delegate."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from torch import nn

from dualtoken_deploy.deploy.traced import TRACED_RULES, Program
from dualtoken_deploy.deploy.traced_products import PRODUCT_RULES
from dualtoken_deploy.errors import ConversionError, first_line
from dualtoken_deploy.quantize.latest import Latest, fingerprint
from dualtoken_deploy.targets.executorch.backends import (
    BACKENDS,
    SETTING,
    XNNPACK,
    Backend,
    check_backend,
    check_promise,
    find_backend,
)
from dualtoken_deploy.targets.executorch.contents import by_name
from dualtoken_deploy.targets.executorch.partition import PARTITIONERS
from dualtoken_deploy.targets.executorch.products import every_product
from dualtoken_deploy.targets.executorch.program import Contents, read
from dualtoken_deploy.targets.executorch.reference import ReferenceProgram
from dualtoken_deploy.targets.executorch.runner import MODEL, NAMES
from dualtoken_deploy.targets.mobile.torch_program import Source, check_fixed, make_source
from dualtoken_deploy.targets.request import Artifact, Request, Tell, quiet


def export(model: nn.Module, request: Request, folder: Path, tell: Tell) -> Artifact:
    """Writes model.pte. Raises UsageError on an opset or a dynamic batch, ConversionError where ExecuTorch fails."""
    source, backend = trace(model, request, tell), find_backend(request.settings.get(SETTING))
    tell(f"lowering to {backend.title}")
    lower(source.program, folder / MODEL, backend, request.precision)
    return describe(folder / MODEL, source, backend)


def check(precision: str, opset: int | None, settings: Mapping[str, str]) -> None:  # noqa: ARG001
    """What a backend cannot do, before anything is traced. Raises UsageError, MissingError."""
    check_backend(find_backend(settings.get(SETTING)), precision)


def trace(model: nn.Module, request: Request, tell: Tell) -> Source:
    """The program that is lowered, by the rules of its backend. That of the last model is kept: INT8, and another
    precision of the same backend, begin with the same one."""
    check_fixed(request, "ExecuTorch")
    rules = RULES[find_backend(request.settings.get(SETTING)).name]
    known = fingerprint(model, request.contract, request.outputs, request.task, *rules)
    plain = replace(request, precision="fp32")
    return _SOURCE.get(
        known, lambda: make_source(model, plain, rules[0], tell, {n: PRODUCT_RULES[n] for n in rules[1]})
    )


_SOURCE: Latest[Source] = Latest()
# By backend the rules of deploy/traced.py and of deploy/traced_products.py. Core ML and Vulkan have norms of their own,
# Core ML means too; coremltools 9.0 fails on a product whose bias is a number, as the sums behind means become.
_NORMS_STAY = tuple(name for name in TRACED_RULES if name != "plain_norm")
RULES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        XNNPACK: (tuple(TRACED_RULES), tuple(PRODUCT_RULES)),
        "coreml": (_NORMS_STAY, ()),
        "vulkan": (_NORMS_STAY, tuple(PRODUCT_RULES)),
    }
)


def lower(program: Program, path: Path, backend: Backend = BACKENDS[XNNPACK], precision: str = "fp32") -> None:
    """Writes a program, whatever the backend does not take left to the plain kernels. Raises ConversionError."""
    try:
        with quiet(), contextlib.redirect_stderr(io.StringIO()), PARTITIONERS[backend.name](precision) as partitioner:
            from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

            # each pass would run the whole program again to check it; export checks the file against eager
            unchecked = EdgeCompileConfig(_check_ir_validity=False)
            edge = to_edge_transform_and_lower(program, partitioner=[partitioner], compile_config=unchecked)
            path.write_bytes(edge.to_executorch().buffer)
    except Exception as error:  # its passes raise what they raise
        raise ConversionError(f"ExecuTorch cannot lower the model: {first_line(error)}") from error


def describe(path: Path, source: Source, backend: Backend) -> Artifact:
    """What was made, read from the file. Raises ToleranceError where the backend took none of it."""
    found = read(path) if backend.stand_in is None else ReferenceProgram(path).contents
    if backend.stand_in is not None:
        check_promise(path, found.ids, backend)
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
    """MACs of the file's products by the model's names, but of those that cannot be told from one another."""
    return {name: node.macs for name, node in by_name(every_product(source), found.products).items()}
