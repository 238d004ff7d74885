"""Detectors and segmenters as files for phones: raw outputs, run by the runtimes that phones have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dualtoken_deploy import Bundle, export, load_runner
from dualtoken_deploy.data.scenes import CLASSES, CLUTTER
from dualtoken_deploy.numerics import compare
from dualtoken_deploy.quantize.gate import Int8Options
from dualtoken_deploy.tasks.table import TASKS
from dualtoken_deploy.use.inspect import check_promise, inspect_bundle


@pytest.mark.timeout(1500)  # LiteRT's converter may have to be made
@pytest.mark.parametrize(
    ("head", "target", "precision", "least_db"),
    # PSPNet on executorch and RetinaNet in int8 on litert were run by hand: half a minute of CPU each
    [("retinanet", "executorch", "fp32", 90)],
)  # fmt: skip
def test_raw_outputs_are_eagers(
    head: str, target: str, precision: str, least_db: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {**TASKS, **{name: replace(TASKS[name], held_out=4) for name in ("segment", "detect")}}
    monkeypatch.setattr("dualtoken_deploy.tasks.table.TASKS", few)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([*([CLUTTER] if head == "pspnet" else []), *CLASSES]))
    int8 = None if precision == "fp32" else Int8Options("scenes", 10, metric="sqnr", max_drop=25.0)
    folder = tmp_path / "bundle"
    export("tiny-mix", target, precision, head=head, image_size=64, width=16, labels=labels, output=folder, int8=int8)
    bundle = Bundle.open(folder)
    with load_runner(bundle) as runner:
        outputs = runner.run({bundle.manifest.input.tensor.name: bundle.golden["input"]})
    for spec in bundle.manifest.outputs:
        golden = bundle.golden[spec.name]
        assert outputs[spec.name].shape == spec.concrete()
        if golden.shape == spec.concrete():
            assert compare(golden, np.asarray(outputs[spec.name])).sqnr_db >= least_db, spec.name
    inspection = inspect_bundle(bundle)
    check_promise(inspection)
    if precision == "int8":
        assert inspection.int8_mac_share > 0.9
