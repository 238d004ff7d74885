"""What every export ends with: a manifest from what was made, and its completion by what the saved files did."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dualtoken_deploy.bundle.manifest import COMPLETE, PREPARED, Manifest
from dualtoken_deploy.bundle.store import Bundle, write_bundle
from dualtoken_deploy.errors import ToleranceError
from dualtoken_deploy.machine import describe_machine, library_versions
from dualtoken_deploy.models.base import ImageModel
from dualtoken_deploy.models.count import count_macs, count_params, matrix_products
from dualtoken_deploy.models.registry import weights_sha256
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.pipeline.int8 import check_executed
from dualtoken_deploy.spec import Tolerance
from dualtoken_deploy.targets.load import Execution
from dualtoken_deploy.targets.request import Artifact, Request
from dualtoken_deploy.targets.table import Target, get_target
from dualtoken_deploy.use.inspect import int8_share, kind_precision, product_precision

# float32 and float64 runs of DualFormer-T differ by about 1e-7 of a token's feature (133 dB and more).
TIE_MARGIN = 1e-6

LIBRARIES = (
    *("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime", "openvino", "nncf", "coremltools", "coreai-core"),
    *("coreai-torch", "ai-edge-litert", "ai-edge-quantizer", "numpy", "pillow", "dualtoken-deploy"),
)


@dataclass(frozen=True)
class ExportResult:
    """Where the bundle is and what was measured on its saved files. `warnings` are to be shown, never dropped.

    `state` "prepared": the bundle is whole but for a step that needs the device; `next_step` says which and why.
    """

    bundle: str
    target: str
    precision: str
    executed_precision: str
    sqnr_db: float
    top1_agreement: float
    size_mib: float
    seconds: float
    warnings: tuple[str, ...]
    state: str = COMPLETE
    next_step: str | None = None
    int8_mac_share: float = 0.0
    drop: float | None = None  # points of the metric that int8 loses on the held-out pictures

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def weights_source(
    weights: str | Path | None, seed: int, locate: Callable[[str | Path], Path] = Path
) -> dict[str, Any]:
    """Where a model's weights come from: the seed of random ones, a word of BUILT_IN_WEIGHTS, or a file.

    `locate`: from what the user gave to the file, where that may be a run's folder.
    """
    if weights is None:
        return {"source": "random", "seed": seed}
    return {"source": weights if weights in BUILT_IN_WEIGHTS else str(locate(weights).resolve())}


def draft_manifest(
    model: nn.Module,
    module: nn.Module,
    row: Target,
    request: Request,
    artifact: Artifact,
    source: Mapping[str, Any],
    tolerance: Tolerance,
    **own: Any,
) -> Manifest:
    """All of a manifest that is known before the saved files ran. `model` has the weights, `module` is what computes
    the outputs; `own`: fields that only some bundles have, and variant, options and command."""
    return Manifest(
        weights={**source, "sha256": weights_sha256(model)},
        target=row.name,
        precision=request.precision,
        executed_precision={},
        input=request.contract,
        outputs=request.outputs,
        tolerance=tolerance,
        measured={"params": count_params(model), "macs": count_macs(module, request.contract.size)},
        rules=artifact.rules,
        operators=artifact.operators,
        products=matrix_products(module, request.contract.size),
        versions=library_versions(LIBRARIES),
        machine=describe_machine(),
        state=PREPARED if row.built_by else COMPLETE,
        build=artifact.build,
        **own,
    )


@dataclass(frozen=True)
class Checked:
    """The saved files against eager, within tolerance: their likeness on golden and on photographs (plain numbers), and
    what executed. `agreement`: that of the photographs; `kept`: which of them were compared, None for all; `engine`:
    what stood in for the target's own runtime, if anything did."""

    golden: Mapping[str, Any]
    photographs: Mapping[str, Any]
    agreement: float
    kept: Array | None
    execution: Execution
    engine: str | None


def seal(
    folder: Path, draft: Manifest, what: str, checked: Checked, golden: Mapping[str, Array], labels: tuple[str, ...]
) -> ExportResult:
    """Writes manifest, golden and labels to the artifact. `what` names the model in errors.

    Raises ToleranceError where less runs in INT8 than the search planned with.
    """
    checker = get_target(draft.target).checked_by
    kinds = {} if checker else kind_precision(checked.execution)
    share, floats = int8_share(draft, checked.execution)
    planned = None if draft.calibration is None else draft.calibration.get("planned_int8_mac_share")
    if planned is not None and checker:  # another runtime's kernels say nothing of it; `build` measures it
        share = planned
    elif planned is not None:
        check_executed(planned, share, floats, f"{what} for {draft.target}")
    ties = {} if checked.kept is None else {"near_ties": {"margin": TIE_MARGIN, "images": int((~checked.kept).sum())}}
    manifest = replace(
        draft,
        executed_precision=kinds,
        measured={
            **draft.measured,
            "int8_mac_share": share,
            **ties,
            "golden": checked.golden,
            "photographs": checked.photographs,
            **({"checked_by": checker} if checker else {}),
            **({"engine": checked.engine} if checked.engine else {}),
        },
    )
    write_bundle(folder, manifest, golden, labels)
    return ExportResult(
        bundle=str(folder),
        target=draft.target,
        precision=draft.precision,
        executed_precision="not run" if checker else product_precision(kinds),
        sqnr_db=round(checked.photographs["sqnr_db"], 1),
        top1_agreement=checked.agreement,
        int8_mac_share=share,
        drop=None if draft.calibration is None else draft.calibration.get("drop"),
        size_mib=round(Bundle.open(folder).size_bytes / 2**20, 2),
        seconds=0.0,
        warnings=(f"{draft.target}: checked by {checked.engine}",) if checked.engine else (),
        state=manifest.state,
    )


def clear_of_ties(model: ImageModel, images: Array, precision: str) -> Array | None:
    """Which images stay TIE_MARGIN away from every point where the model jumps; None where it never does.

    Nearer, two exact float32 programs may round to different sides, and neither is wrong. In another precision hardly
    an image is clear of the ties, so there all are kept and the target's tolerance has to hold with the jumps.
    """
    import torch

    if precision != "fp32":
        return None
    parts = [model.smallest_margin(torch.from_numpy(image[None])) for image in images]
    margins = [float(part) for part in parts if part is not None]
    if len(margins) < len(parts):
        return None
    kept = np.array(margins) >= TIE_MARGIN
    if not kept.any():
        raise ToleranceError(
            f"all {len(kept)} photographs come within {TIE_MARGIN:g} of a tie: nothing can be compared"
        )
    return kept
