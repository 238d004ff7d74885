"""What a bundle is and what really runs when it is loaded here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.targets.load import Execution, engine_of, load_runner
from dualtoken_deploy.targets.table import get_target, product_kinds

SHARE_SLACK = 0.005  # of the MACs: kernels differ a little between versions of a runtime


@dataclass(frozen=True)
class Inspection:
    """`executed_precision`: for each executed operator kind the dtype that most of its instances run in here."""

    manifest: Manifest
    verified: bool
    operators: Mapping[str, int]
    executed_precision: Mapping[str, str]
    int8_mac_share: float = 0.0
    float_products: tuple[str, ...] = ()  # of an INT8 bundle, the products that do not run in it here
    float32_share: float | None = None
    notes: tuple[str, ...] = ()
    engine: str | None = None  # what stood in for the target's own runtime, if anything did

    def to_json(self) -> dict[str, Any]:
        return {
            "manifest": self.manifest.to_json(),
            "verified": self.verified,
            "operators": dict(self.operators),
            "executed_precision": dict(self.executed_precision),
            "int8_mac_share": self.int8_mac_share,
            "float_products": list(self.float_products),
            "notes": list(self.notes),
            "engine": self.engine,
        }


def inspect_bundle(bundle: Bundle | str | Path, device: str | None = None) -> Inspection:
    """Verifies every hash, loads the bundle and reads what executes. Raises BundleError, MissingError."""
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    opened.verify()
    with load_runner(opened, device) as runner:
        execution, engine = runner.execution(), engine_of(runner)
    share, others = int8_share(opened.manifest, execution)
    return Inspection(
        opened.manifest, True, execution.operators, kind_precision(execution), share, others,
        execution.float32_share, execution.notes, engine,
    )  # fmt: skip


def int8_share(manifest: Manifest, execution: Execution) -> tuple[float, tuple[str, ...]]:
    """Share of an INT8 bundle's MACs that execute in integers, and the products that do not; 0 for other bundles."""
    macs = _in_integers(manifest)
    if not macs:
        return 0.0, ()
    integers = {name for name, dtype in execution.nodes.items() if dtype in ("int8", "uint8")}
    done = sum(count for name, count in macs.items() if name in integers)
    return done / sum(macs.values()), tuple(name for name in macs if name not in integers)


def _in_integers(manifest: Manifest) -> Mapping[str, int]:
    """MACs by product of a bundle whose products were to run in integers; none of others."""
    if manifest.calibration is None or not get_target(manifest.target).precision(manifest.precision).integers:
        return {}
    return manifest.calibration.macs or {}


def kind_precision(execution: Execution) -> dict[str, str]:
    """The most frequent dtype of each kind."""
    return {kind: dtypes[0] for kind, dtypes in execution.precision.items()}


def product_precision(kinds: Mapping[str, str]) -> str:
    """The dtypes in which the matrix products run, joined with "+" where they are not all one."""
    return "+".join(sorted({dtype for kind, dtype in kinds.items() if kind in product_kinds()})) or "unknown"


def _bare(dtype: str) -> str:
    """The dtype without the remark on who executed it: "float16 (reference)" is float16."""
    return dtype.partition(" (")[0]


def check_promise(inspection: Inspection) -> None:
    """Raises ToleranceError where the matrix products run in another dtype than the manifest says."""
    if _in_integers(inspection.manifest):
        _check_int8(inspection)
        _check_float32(inspection)
        return
    promised, found = (
        product_precision({kind: _bare(dtype) for kind, dtype in kinds.items()})
        for kinds in (inspection.manifest.executed_precision, inspection.executed_precision)
    )
    if promised != found:
        raise ToleranceError(
            f"matrix products run in {found} here, the manifest promises {promised}; export on this kind of machine"
        )
    _check_float32(inspection)


def _check_float32(inspection: Inspection) -> None:
    build = inspection.manifest.build
    if build is not None and build.float32_share_allowed is not None:
        check_share(inspection.manifest.precision, inspection.float32_share, build.float32_share_allowed)


def _check_int8(inspection: Inspection) -> None:
    promised = inspection.manifest.measured.int8_mac_share
    if inspection.int8_mac_share < promised - SHARE_SLACK:
        missing = ", ".join(inspection.float_products[:3])
        raise ToleranceError(
            f"{100 * inspection.int8_mac_share:.1f} % of the MACs run in INT8 here, the manifest promises "
            f"{100 * promised:.1f} % (in float: {missing}, ...); export on this kind of machine"
        )


def check_share(precision: str, found: float | None, allowed: float) -> None:
    """Raises ToleranceError where more of the product layers run in float32 than a narrower precision may have."""
    if found is None:
        raise ToleranceError(f"the runtime names no layer with matrix products, so {precision} cannot be confirmed")
    if found > allowed:
        raise ToleranceError(
            f"{found:.0%} of the layers with matrix products run in float32, {precision} allows {allowed:.0%}; build "
            "anew with: dualtoken build BUNDLE --rebuild"
        )
