"""The table of targets, and that files and rows match."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path

import pytest

import dualtoken_deploy
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import InputError, MissingError, UsageError
from dualtoken_deploy.pipeline.plan import Plan
from dualtoken_deploy.targets.devices import Device
from dualtoken_deploy.targets.table import EXPORT_MODULES, TARGETS, get_target

PACKAGE = Path(dualtoken_deploy.__file__).parent
SHARED = {"apple", "mobile", "nvidia", "onnx"}  # what two targets share


def test_every_row_has_its_folder_and_every_folder_its_row() -> None:
    folders = {p.parent.name for p in (PACKAGE / "targets").glob("*/__init__.py")} - SHARED
    assert folders == {target.folder for target in TARGETS.values()}


@pytest.mark.parametrize("name", TARGETS)
def test_exporters_and_runners_have_their_entry(name: str) -> None:
    assert callable(TARGETS[name].part("export").export)
    assert callable(TARGETS[name].part("runner").load)


def test_aliases_lead_to_their_row_and_are_no_rows() -> None:
    assert get_target("onnx").name == "onnxruntime"
    for target in TARGETS.values():
        assert not set(target.aliases) & set(TARGETS)


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(UsageError, match="onnxruntime, openvino"):
        get_target("mnn")
    with pytest.raises(UsageError, match="fp32, fp16"):
        get_target("openvino").precision("int4")


def test_the_table_of_targets_shows_the_extra_to_install() -> None:
    """rich takes [extra] for markup and would swallow it."""
    from rich.console import Console

    from dualtoken_deploy.use.report import targets_tables

    row = {
        "target": "t",
        "precisions": ["fp32"],
        "can_export": True,
        "can_run": False,
        "runs_as": "no",
        "install": "pip install 'x[y]'",
    }
    drawn = io.StringIO()
    Console(width=200, file=drawn).print(targets_tables([{**row, "devices": []}]))
    assert "pip install 'x[y]'" in drawn.getvalue()


DEVICES = [(row.name, device) for row in TARGETS.values() for device in row.devices]


@pytest.mark.parametrize(("target", "device"), DEVICES, ids=[device.name for _, device in DEVICES])
def test_the_command_for_a_device_is_one_that_is_taken(
    target: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is typed as it is shown, up to where files would be made."""
    if missing := TARGETS[target].missing(TARGETS[target].export_modules):
        pytest.skip(f"export to {target} needs {', '.join(missing)}")
    plans: list[Plan] = []

    def make(plan: Plan, tell: object) -> None:
        plans.append(plan)
        raise InputError("far enough")

    monkeypatch.setattr("dualtoken_deploy.pipeline.several.make", make)
    export, *later = device.commands(target)
    program, *arguments = shlex.split(export)
    with pytest.raises(SystemExit):
        main(arguments)
    (plan,) = plans
    assert (program, plan.target.name, plan.precision.name) == ("dualtoken", target, device.precision)
    assert later == (["dualtoken build BUNDLE"] if target == "tensorrt" else [])
    page = (PACKAGE.parent / "docs" / "tensorrt.md").read_text()
    assert not target.startswith("tensorrt") or f"| {device.name} | `{target}` |" in page


def test_devices_are_listed_under_their_target(capsys: pytest.CaptureFixture[str]) -> None:
    main(["targets", "--json"])
    listed = {row["target"]: [d["device"] for d in row["devices"]] for row in json.loads(capsys.readouterr().out)}
    assert listed.keys() == TARGETS.keys()
    assert any("Jetson" in device for device in listed["tensorrt"])
    assert any("RTX PC" in device for device in listed["tensorrt-rtx"])
    main(["targets"])
    assert "dualtoken export --variant s --target tensorrt-rtx" in " ".join(capsys.readouterr().out.split())


def test_what_exporting_needs() -> None:
    """A target of the torch program needs no ONNX library, and one that is built on its device none of its own."""
    assert TARGETS["aotinductor"].export_modules == ("torch",)
    assert TARGETS["tensorrt"].export_modules == EXPORT_MODULES
    assert TARGETS["tensorrt-rtx"].export_modules == (*EXPORT_MODULES, "tensorrt_rtx_bindings")
    assert TARGETS["openvino"].export_modules == (*EXPORT_MODULES, "openvino")
    assert TARGETS["onnxruntime"].export_modules == EXPORT_MODULES


def test_all_is_every_portable_target_with_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualtoken_deploy.pipeline.plan import exportable_targets

    here = {name for name, row in TARGETS.items() if row.portable and not row.missing(row.export_modules)}
    for precision in {p for row in TARGETS.values() if row.portable for p in row.precisions}:
        assert set(exportable_targets(precision)) == {name for name in here if precision in TARGETS[name].precisions}
    assert exportable_targets("palettized4") == ["coreml"]
    with pytest.raises(UsageError, match="valid precisions: fp32, fp16"):
        exportable_targets("fp64")
    assert "coreml" not in exportable_targets("fp32", "mask-rcnn")
    with pytest.raises(UsageError, match="valid heads: retinanet, mask-rcnn"):
        exportable_targets("fp32", "yolo")
    with pytest.raises(UsageError, match="unknown precision 'palettized4'"):
        exportable_targets("palettized4", "mask-rcnn")
    monkeypatch.setattr("dualtoken_deploy.targets.table.Target.missing", lambda *_: ["it"])
    with pytest.raises(MissingError, match="palettized4 needs the extra"):
        exportable_targets("palettized4")
