"""What a bundle is and what really runs when it is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle import Bundle, Manifest
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.runtimes import Execution, engine_of, load_runner

# Kinds that hold a model's matrix products, by the names that the runtimes give to what they execute.
PRODUCT_KINDS = frozenset(
    {
        *("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "Attention", "MultiHeadAttention"),
        *("linear", "conv", "matmul", "scaled_dot_product_attention"),  # MIL's
        *("batch_matmul", "conv2d"),  # Core AI's
        *("FullyConnected", "Convolution", "GroupConvolution", "ScaledDotProductAttention", "Linear", "Conv2d"),
    }
)


@dataclass(frozen=True)
class Inspection:
    """`executed_precision`: for each executed operator kind the dtype that most of its instances run in here."""

    manifest: Manifest
    verified: bool
    operators: Mapping[str, int]
    executed_precision: Mapping[str, str]
    engine: str | None = None  # what stood in for the target's own runtime, if anything did

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.to_json(),
            "verified": self.verified,
            "operators": dict(self.operators),
            "executed_precision": dict(self.executed_precision),
            "engine": self.engine,
            "int8_mac_share": 0.0,  # no quantized target exists yet: nothing here can run in int8
        }


def inspect_bundle(bundle: Bundle | str | Path, device: str | None = None) -> Inspection:
    """Verifies every hash, loads the bundle and reads what executes. Raises BundleError, MissingError."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.verify()
    with load_runner(opened, device) as runner:
        execution, engine = runner.execution(), engine_of(runner)
    return Inspection(opened.manifest, True, execution.operators, kind_precision(execution), engine)


def kind_precision(execution: Execution) -> dict[str, str]:
    """The most frequent dtype of each kind."""
    return {kind: dtypes[0] for kind, dtypes in execution.precision.items()}


def product_precision(kinds: Mapping[str, str]) -> str:
    """The dtypes in which the matrix products run, joined with "+" where they are not all one."""
    return "+".join(sorted({dtype for kind, dtype in kinds.items() if kind in PRODUCT_KINDS})) or "unknown"


def _bare(dtype: str) -> str:
    """The dtype without the remark on who executed it: "float16 (reference)" is float16."""
    return dtype.partition(" (")[0]


def check_promise(inspection: Inspection) -> None:
    """Raises ToleranceError where the matrix products run in another dtype than the manifest says."""
    promised, found = (
        product_precision({kind: _bare(dtype) for kind, dtype in kinds.items()})
        for kinds in (inspection.manifest.executed_precision, inspection.executed_precision)
    )
    if promised != found:
        raise ToleranceError(
            f"matrix products run in {found} here, the manifest promises {promised}; export on this kind of machine"
        )
