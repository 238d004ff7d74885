"""Recipes: one file, the same plans as the command line; done steps are skipped by hash, and a typo has its line."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.store import SIGNATURE
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import InputError, UsageError
from dualtoken_deploy.recipe import steps
from dualtoken_deploy.recipe.file import TABLES, read_recipe
from dualtoken_deploy.targets.litert import environment as environment_of_litert
from tests import made_twice
from tests.commands import SCHEMAS, fails, prints
from tests.small import SMALL

RECIPE = """
output = "out"

[model]
variant = "tiny-mix"
image_size = 64
classes = 10

[[export]]
targets = ["onnxruntime"]
precisions = ["fp32", "fp16"]

[gates]
sqnr_db = 40

[verify]
baselines = "ci"
rounds = 0

[report]
html = "report.html"
rounds = 0
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch, small_bundle: Callable[..., Path]) -> list[str]:
    """Names of what is exported; each is the session's bundle of that precision under the plan's name."""
    made: list[str] = []

    def make(plan: Any, tell: Any) -> Any:
        import shutil
        from types import SimpleNamespace

        assert (plan.source.name, plan.contract.size, plan.contract.batch) == ("tiny-mix", (64, 64), 1)
        made.append(plan.output.name)
        shutil.copytree(small_bundle(plan.target.name, plan.precision.name), plan.output, dirs_exist_ok=True)
        return SimpleNamespace(next_step=None, state="complete")

    monkeypatch.setattr(steps, "make", make)
    return made


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, str], list[Any]]:
    """Exit code, the state of each step, and the steps."""
    code = 0
    try:
        main(["run", *map(str, arguments), "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    found = json.loads(capsys.readouterr().out)["steps"]
    return code, {f"{s['step']} {s['bundle']}": s["state"] for s in found}, found


FP32, FP16 = "tiny-mix-64-onnxruntime-fp32", "tiny-mix-64-onnxruntime-fp16"
STEPS = [f"{step} {name}" for step in ("export", "gates", "verify") for name in (FP32, FP16)] + ["report all"]


def test_a_recipe_is_done_once_and_skipped_then(
    recipe: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    code, dry, _ = run(capsys, recipe, "--dry-run")
    assert (code, dry) == (0, dict.fromkeys(STEPS, "to do"))
    assert list(recipe.parent.iterdir()) == [recipe]  # nothing was touched
    code, states, _ = run(capsys, recipe)
    assert (code, states) == (0, dict.fromkeys(STEPS, "done"))
    assert exports == [FP32, FP16]
    assert {p.name for p in (recipe.parent / "ci").iterdir()} == {f"{FP32}.json", f"{FP16}.json"}
    assert FP16 in (recipe.parent / "report.html").read_text()
    code, states, rows = run(capsys, recipe)
    assert (code, states, exports) == (0, dict.fromkeys(STEPS, "skipped"), [FP32, FP16])
    assert all(row["seconds"] is not None for row in rows)  # of the run that did it
    _, dry, rows = run(capsys, recipe, "--dry-run")
    assert set(dry.values()) == {"done"}
    assert rows[0]["mib"] == pytest.approx(4 * 1.143e6 * 1.25 / 2**20 + 8, rel=0.01)  # T (mix), two blocks


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        (lambda text, _: text.replace("sqnr_db = 40", "sqnr_db = 41"), ["gates", "gates"]),
        (lambda text, _: text.replace('"fp32", "fp16"', '"fp32"'), ["report"]),
        (lambda text, _: text.replace("classes = 10", "classes = 10\nseed = 1"), None),
    ],
    ids=["a gate", "fewer bundles", "another seed"],
)
def test_what_changes_is_done_again_and_nothing_else(
    change: Callable[[str, Path], str],
    redone: list[str] | None,
    recipe: Path,
    exports: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(capsys, recipe)
    recipe.write_text(change(RECIPE, recipe))
    _, _, rows = run(capsys, recipe)
    again = [row["step"] for row in rows if row["state"] == "done"]
    assert again == (redone if redone is not None else [name.split()[0] for name in STEPS])


def test_a_changed_bundle_is_made_again(recipe: Path, exports: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, recipe)
    with (recipe.parent / "out" / FP16 / "model.onnx").open("ab") as file:
        file.write(b"x")
    _, states, _ = run(capsys, recipe)
    assert {name for name, state in states.items() if state == "done"} == {f"export {FP16}"}
    assert Bundle.open(recipe.parent / "out" / FP16)


def test_a_bundle_that_fails_takes_its_own_steps_along(
    recipe: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace("sqnr_db = 40", "sqnr_db = 90"))  # float16 does not reach that
    code, states, rows = run(capsys, recipe)
    assert code == 5
    assert (states[f"gates {FP32}"], states[f"gates {FP16}"]) == ("done", "failed")
    assert (states[f"verify {FP32}"], states[f"verify {FP16}"]) == ("done", "left out")
    assert states["report all"] == "done"
    (error,) = [row["error"] for row in rows if row["error"]]
    assert error["code"] == 5
    assert "sqnr_db" in error["message"]


def test_a_baseline_that_fell_fails_the_recipe(
    recipe: Path, exports: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, recipe)
    baseline = recipe.parent / "ci" / f"{FP16}.json"
    data = json.loads(baseline.read_text())
    data["figures"]["sqnr_db"] += 5
    baseline.write_text(json.dumps(data))
    code, states, _ = run(capsys, recipe)
    assert (code, states[f"verify {FP16}"], states[f"verify {FP32}"]) == (5, "failed", "skipped")


def test_a_recipe_signs(recipe: Path, exports: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("model_signing", reason="the extra [sign] is not installed")
    from tests.test_signature import make_keys

    private, public = make_keys(recipe.parent, "a")
    recipe.write_text(f'{RECIPE}\n[sign]\nkey = "{private.name}"\n')
    code, states, _ = run(capsys, recipe)
    assert (code, states[f"sign {FP16}"]) == (0, "done")
    main(["verify", str(recipe.parent / "out" / FP16), "--signature", str(public)])
    assert (recipe.parent / "out" / FP32 / SIGNATURE).is_file()
    capsys.readouterr()
    assert set(run(capsys, recipe)[1].values()) == {"skipped"}


def test_the_command_line_and_a_recipe_make_one_plan(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field, but for what each was called with and where it writes."""
    plans: list[Any] = []

    def make(plan: Any, *_: Any) -> None:
        plans.append(plan)
        raise InputError("far enough")

    monkeypatch.setattr("dualtoken_deploy.pipeline.several.make", make)
    arguments = ["--variant", SMALL["variant"], "--image-size", "64", "--classes", "10", "--precision", "fp16"]
    with pytest.raises(SystemExit):
        main(["export", "--target", "onnxruntime", *map(str, arguments)])
    kitchen = steps.Kitchen(read_recipe(recipe), recipe.parent)
    (typed,), written = plans, kitchen.plans[1]
    for name in ("task", "target", "precision", "contract", "opset", "settings", "device", "int8"):
        assert getattr(typed, name) == getattr(written, name), name
    assert typed.source.described == written.source.described
    assert typed.source.weights == written.source.weights


# --- bad input ---


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECIPE.replace("precisions", "precision"), "line 11: [export] has no 'precision'; did you mean precisions?"),
        (RECIPE.replace("variant", "varient"), "line 5: [model] has no 'varient'; did you mean variant?"),
        (RECIPE.replace("[gates]", "[gate]"), "line 13: a recipe has no 'gate'; did you mean gates? Valid: model"),
        (RECIPE.replace("image_size = 64", "image_size = 6.5"), "line 6: image_size: expected `int | str | null`"),
        (RECIPE.replace('["onnxruntime"]', '"onnxruntime"'), "line 10: targets: expected `array`, got `str`"),
        (RECIPE.replace("[model]", "[model"), "is no TOML"),
        ("[model]\nvariant = 't'\n", "missing required field `export`"),
    ],
)  # fmt: skip
def test_a_typo_is_named_with_its_line_and_what_is_valid(
    text: str, words: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(text)
    code, line = fails(capsys, "run", recipe)
    assert code == 4
    assert words in line


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (("onnxruntime", "caffe"), 2, "unknown target 'caffe'"),
        (('"fp16"', '"fp12"'), 2, "unknown precision 'fp12'"),
        (("tiny-mix", "xl"), 2, "valid variants"),
        (('"fp16"', '"fp32"'), 4, f"makes {FP32} twice"),
        (('"fp16"', '"int8"'), 2, "needs a calibration set"),
    ],
)
def test_what_cannot_be_planned_is_said_before_anything_is_made(
    change: tuple[str, str], code: int, words: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace(*change))
    found, line = fails(capsys, "run", recipe)
    assert found == code
    assert words in line
    assert list(recipe.parent.iterdir()) == [recipe]


def test_a_record_that_is_none_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "out").mkdir()
    (recipe.parent / "out" / steps.RECORD).write_text("[]")
    code, line = fails(capsys, "run", recipe, "--dry-run")
    assert code == 4
    assert "delete it, and every step is done anew" in line


def test_the_schema_has_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--schema"])
    schema = json.loads(capsys.readouterr().out)
    tables = {kind.__name__: set(kind.__struct_fields__) for kind in TABLES.values()}
    assert {name: set(schema["$defs"][name]["properties"]) for name in tables} == tables
    assert all(schema["$defs"][name]["additionalProperties"] is False for name in tables)
    published = SCHEMAS / "files" / "recipe.schema.json"  # dualtoken run --schema > it
    assert json.loads(published.read_text(encoding="utf-8")) == schema


# --- making a bundle again ---


def test_two_processes_make_the_same_bytes(
    small_bundle: Callable[..., Path], litert_converter: Path, tmp_path: Path
) -> None:
    """Models of every format, golden, labels and manifest: nothing of when or where, nor of the order of sets.

    One is a process of the tests, whose strings have random hashes; the other has a fixed seed and traces for itself.
    """
    import sys

    here, there = tmp_path / "here", tmp_path / "there"
    environment = {"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "1", "DUALTOKEN_ALLOW_NATIVE": "1", "HOME": str(tmp_path)}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of golden outputs are of as many parts
    environment |= {environment_of_litert.VARIABLE: str(litert_converter)}
    command = [sys.executable, "-m", "tests.made_twice", str(there)]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    made_twice.make_net(here)
    for target in made_twice.targets().keys() & made_twice.WITH_OWN_MODEL:
        shutil.copytree(small_bundle(target), here / target)
    first, second = (
        {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
        for made in (here, there)
    )
    assert len(first) == sum(made_twice.targets().values())
    assert [name for name in {**first, **second} if first.get(name) != second.get(name)] == []


def test_a_bundle_is_made_again_and_another_byte_is_named(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["reproduce", str(own_bundle), "--output", str(tmp_path / "again"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is True
    assert found["files"].keys() == {"model.onnx", "golden.npz", "labels.txt"}
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (own_bundle / "model.onnx").read_bytes()

    from dualtoken_deploy.bundle.store import write_bundle

    bundle = Bundle.open(own_bundle)
    labels = ("another", *bundle.labels[1:])
    golden = {name: value + (name == "logits") for name, value in bundle.golden.items()}
    write_bundle(own_bundle, bundle.manifest, golden, labels)
    code, line = fails(capsys, "reproduce", own_bundle)
    assert code == 5
    assert "golden.npz came out otherwise" in line  # the labels are the bundle's own, and are no result


def test_a_lock_gives_the_bundle_again_or_nothing(
    own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the manifest and the labels alone, as they might lie in a repository; the bundle is not there."""
    lock, again = tmp_path / "lock" / "manifest.json", tmp_path / "again"
    lock.parent.mkdir()
    for name in ("manifest.json", "labels.txt"):
        shutil.copy2(own_bundle / name, lock.parent / name)
    found = prints(capsys, "export", "--lock", lock, "--output", again, "--json")
    assert found["lock"]["same"] is True
    assert (found["bundle"], found["target"]) == (str(again), "onnxruntime")
    one, two = (json.loads((folder / "manifest.json").read_text()) for folder in (own_bundle, again))
    assert one["files"] == two["files"]
    assert one["command"] == two["command"]
    assert Bundle.open(again)
    code, line = fails(capsys, "export", "--lock", lock, "--output", again)
    assert (code, "exists; give --force" in line) == (2, True)

    changed = json.loads(lock.read_text())
    changed["files"]["model.onnx"] = "0" * 64
    lock.write_text(json.dumps(changed))
    before = (again / "manifest.json").read_bytes()
    code, line = fails(capsys, "export", "--lock", lock, "--output", again, "--force")
    assert code == 5
    assert f"{lock} was made again, and model.onnx came out otherwise" in line
    assert (again / "manifest.json").read_bytes() == before  # what was there stays
    code, line = fails(capsys, "export", "--lock", lock, "--output", tmp_path / "none")
    assert code == 5
    assert not (tmp_path / "none").exists()


def test_what_a_lock_leaves_no_choice_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(
        capsys, "export", "--lock", "m.json", "--target", "openvino", "--input", "tensor", "--license", "MIT"
    )
    assert code == 2
    assert "leave --target, --input, --license out" in line
    code, line = fails(capsys, "export", "--variant", "t")
    assert (code, "give --target" in line) == (2, True)
    code, line = fails(capsys, "export", "--lock", tmp_path / "none.json")
    assert (code, "no such file" in line) == (4, True)
    (tmp_path / "text.json").write_text("text")
    code, line = fails(capsys, "export", "--lock", tmp_path / "text.json")
    assert (code, "is not JSON" in line) == (4, True)


def test_what_was_built_on_a_device_is_not_repeated(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dualtoken_deploy.bundle.store import write_bundle

    bundle = Bundle.open(own_bundle)
    (own_bundle / "engine.json").write_text("{}")
    write_bundle(own_bundle, bundle.manifest, bundle.golden, bundle.labels)
    code, line = fails(capsys, "reproduce", own_bundle)
    assert code == 2
    assert "built on a device" in line


def test_options_of_the_command_are_read_from_the_manifest() -> None:
    from dualtoken_deploy.cli.again import said as read
    from dualtoken_deploy.cli.making import export
    from dualtoken_deploy.recipe import reproduce

    def manifest(command: str) -> Any:
        return SimpleNamespace(asked=None, command=command)  # of before `asked`

    text = (
        "dualtoken export --variant t --target coreml --opset 21 --deployment-target iOS17 --layout plain "
        "--calibration digits --calibration-size 40 --max-drop 1"
    )
    said = read(manifest(text), export)
    assert (said.opset, said.settings["deployment_target"], said.settings["layout"]) == (21, "iOS17", "plain")
    assert said.int8 is not None
    assert (said.int8.calibration, said.int8.size, said.int8.max_drop, said.int8.method) == ("digits", 40, 1, "minmax")
    assert read(manifest("dualtoken_deploy.export(...)"), export) == reproduce.Said()
    with pytest.raises(UsageError, match="cannot be read"):
        read(manifest("dualtoken export --what 3"), export)
