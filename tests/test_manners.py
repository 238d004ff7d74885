"""How the command line behaves beside what it computes: streams, JSON of errors, progress, help, labels, the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dualtoken_deploy import __version__
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.cli import main
from dualtoken_deploy.cli.main import COMMANDS
from dualtoken_deploy.cli.progress import Lines, Pace
from dualtoken_deploy.cli.shape import EXAMPLES
from dualtoken_deploy.errors import ConversionError, UsageError, install_command
from dualtoken_deploy.files import cache_folder
from dualtoken_deploy.models import registry
from dualtoken_deploy.models.count import count_macs, count_params
from dualtoken_deploy.pipeline.build import BuildResult
from dualtoken_deploy.pipeline.check import ExportResult
from dualtoken_deploy.pipeline.plan import Plan, default_name
from dualtoken_deploy.pipeline.several import Exported, Failed
from dualtoken_deploy.prove.relabel import relabel
from dualtoken_deploy.targets.runner import counted
from dualtoken_deploy.train.loop import TrainResult
from dualtoken_deploy.use.report import fitted, table
from tests.commands import SCHEMAS, check_schema, fails, prints

PROGRAM = [sys.executable, "-m", "dualtoken_deploy"]


def run(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        [*PROGRAM, *map(str, arguments)], **({"capture_output": True, "text": True, "check": False} | more)
    )


# streams


def test_a_full_disk_behind_stdout_is_one_line(own_bundle: Path, photograph: Path) -> None:
    for more in ((), ("--json",)):
        with Path("/dev/full").open("w") as full:
            done = run("predict", own_bundle, photograph, *more, stdout=full, capture_output=False, stderr=-1)
        assert done.returncode == 4
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "No space left" in line


def test_what_third_parties_print_is_kept_back(tmp_path: Path) -> None:
    """Past Python, on the descriptors themselves, as native libraries do; -v shows it, and so does their crash."""
    code = (
        "import os, sys, warnings\n"
        "from dualtoken_deploy.cli import main as module\n"
        "from dualtoken_deploy.cli.progress import progress, say\n"
        "import dualtoken_deploy.models.listing as listing\n"
        "real = listing.shipped\n"
        "def shipped(kind):\n"
        "    os.write(1, b'ODIE\\n'); os.write(2, b'native\\n'); print('spoke'); warnings.warn('old', FutureWarning)\n"
        "    say('our own line')\n"
        "    if '--crash' in sys.argv: raise ValueError('theirs')\n"
        "    return real(kind)\n"
        "listing.shipped = shipped\n"
        "from dualtoken_deploy.cli.main import main\n"
        "main([a for a in sys.argv[1:] if a != '--crash'])\n"
    )

    def said(*arguments: str) -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        return done.stdout, done.stderr

    out, err = said("models", "--json")
    assert json.loads(out)
    assert "our own line" in err
    for text in ("ODIE", "native", "spoke", "FutureWarning"):
        assert text not in out + err
    out, err = said("models", "-v")
    assert all(text in out + err for text in ("ODIE", "native", "spoke", "FutureWarning"))
    out, err = said("models", "--crash")
    assert all(text in err for text in ("ODIE", "native", "ValueError: theirs"))


def test_quiet_leaves_progress_and_notes_out(own_bundle: Path) -> None:
    assert "validating" in run("validate", own_bundle).stderr
    for words in (("-q", "validate", own_bundle), ("validate", own_bundle, "--quiet")):
        done = run(*words)
        assert (done.returncode, done.stderr) == (0, "")
        assert own_bundle.name in done.stdout.replace("\n", "")


def test_nohup_is_kept() -> None:
    code = (
        "import signal\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from dualtoken_deploy.cli import main; main(['cache', '--json'])\n"
        "assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_terminal_that_goes_ends_a_command_tidily(own_bundle: Path) -> None:
    command = [*PROGRAM, "export", "--variant", "t-mix", "--target", "onnx", "--force", "--output", str(own_bundle)]
    # a shell under nohup hands on that the signal is ignored, which the command respects
    default = partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    assert process.stderr is not None
    for line in process.stderr:
        if "tracing" in line:
            break
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert [p.name for p in own_bundle.parent.iterdir()] == [own_bundle.name]


# errors as JSON


def test_an_error_is_a_json_document_where_one_was_asked_for(
    tmp_path: Path, own_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def document(*arguments: str | Path) -> tuple[object, Any]:
        with pytest.raises(SystemExit) as caught:
            main([*map(str, arguments), "--json"])
        return caught.value.code, json.loads(capsys.readouterr().out)

    for arguments, code in (
        (("inspect", tmp_path / "none"), 4),
        (("export", "--target", "caffe", "--variant", "s"), 2),
        (("inspect",), 2),
        (("models", "--nothing"), 2),
    ):
        found, said = document(*arguments)
        assert found == said["error"]["code"] == code
        assert said["error"]["message"]
    found, said = document("validate", own_bundle, "--min-sqnr", "500")
    check_schema("validate", said)
    assert found == said["error"]["code"] == 5
    assert said["results"][0]["sqnr_db"] > 100
    assert "sqnr_db" in said["error"]["message"]


def test_schemas_are_schemas_and_take_what_commands_give() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    files = sorted(SCHEMAS.glob("*.json"))
    assert {file.name.partition(".")[0] for file in files} == set(EXAMPLES) - {"serve", "visualize"}
    for file in files:
        jsonschema.Draft202012Validator.check_schema(json.loads(file.read_text()))
    made = ("b", "classify", "onnxruntime", "fp32", "float32", 120.0, 1.0, 5.0, 1.0, ())
    failed = Failed("b", "coreml", "fp32", ConversionError("no"))
    built = BuildResult("b", "10.3", "Orin", "float16", 60.0, 5.0, 1.0)
    trained = TrainResult("r", "w", 1, "top1", 0.5, 0.6, 1, 2.0)
    for command, document in (
        ("export", Exported(*made).to_json()),
        ("export", [Exported(*made).to_json(), failed.to_json()]),
        ("build", built.to_json()),
        ("train", trained.to_json()),
        ("train", {"error": {"code": 2, "message": "no"}}),
    ):
        check_schema(command, json.loads(json.dumps(document)))
    with pytest.raises(jsonschema.ValidationError):
        check_schema("train", {"run": "r"})
    with pytest.raises(jsonschema.ValidationError):
        check_schema("predict", [{"image": "a", "task": "classify", "size": [1, 2]}])


# progress


def test_a_pace_says_what_is_left() -> None:
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert pace.add("evaluating 0/200")
    now[0] = 10.0
    assert not pace.add("evaluating 50/200")
    assert pace.left() == ", about 30 s left"
    now[0] = 30.0
    assert not pace.add("evaluating 60/200")
    assert pace.left() == ", about 70 s left"
    assert pace.add("round 1 of 5: a")
    assert pace.left() == ""
    assert pace.add("tracing")
    assert pace.left() == ""
    for part in (1, 2, 3):  # a part of an epoch is no count, and training says by itself what is left
        now[0] += 10.0
        pace.add(f"epoch 0.{part}5 of 12: loss 7.1, about 22 min left")
        assert pace.left() == ""


def test_a_count_that_falls_begins_again() -> None:
    """Held-out pictures are run for each assignment of a search: the last one's time is no part of the next one's."""
    now = [0.0]
    pace = Pace(lambda: now[0])
    pace.add("pictures: 1/100")
    now[0] = 99.0
    pace.add("pictures: 100/100")
    assert pace.add("pictures: 1/100")
    now[0] = 108.0
    assert not pace.add("pictures: 10/100")
    assert pace.left() == ", about 2 min left"  # 9 took 9 s, 90 are left


def test_lines_come_every_ten_seconds_and_at_each_step() -> None:
    now, lines = [0.0], list[str]()
    tell = Lines(lines.append, lambda: now[0])
    for image in range(300):
        now[0] += 0.1
        tell(f"calibrating: image {image + 1} of 300")
    tell("checking the saved files")
    assert lines[0] == "calibrating: image 1 of 300"
    assert lines[-1] == "checking the saved files"
    assert len(lines) == 4
    assert lines[1].endswith("about 20 s left")


def test_counts_that_take_turns_are_a_line_each() -> None:
    now, lines = [0.0], list[str]()
    tell = Lines(lines.append, lambda: now[0])
    for number in range(200):
        now[0] += 0.1
        tell(f"trying stem in float, 24 dB predicted; held-out pictures: {number}/200")
        tell(f"running the files on held-out images: {number}/200")
    assert len(lines) == 3  # each once, and one in ten seconds
    tell("running the files on held-out images: 0/200")
    assert lines[-1] == "running the files on held-out images: 0/200"


def test_inputs_are_counted_as_they_are_taken() -> None:
    said: list[str] = []
    taken = counted([np.zeros(1), np.ones(1)], said.append, "running eager on photographs")
    next(taken)
    assert said == ["running eager on photographs: 0/2"]
    assert len(list(taken)) == 1
    pace = Pace(lambda: 0.0)
    pace.add(said[-1])
    assert pace.share == 0.5


# help


def test_every_command_has_an_example_and_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    names = {command.__name__ for commands in COMMANDS.values() for command in commands}
    assert names == set(EXAMPLES)
    for name in sorted(names):
        main([name, "-h"])
        shown = " ".join(capsys.readouterr().out.split())
        assert "Example" in shown
        assert EXAMPLES[name][0].split()[2 if len(EXAMPLES[name][0].split()) > 2 else 1] in shown
    main(["--version"])
    assert capsys.readouterr().out == f"dualtoken-deploy {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str) -> None:
    other = {"_TYPER_COMPLETE_ARGS": "dualtoken eva"}
    words = {"COMP_WORDS": "dualtoken eva", "COMP_CWORD": "1"} if shell == "bash" else other
    asked = {"_DUALTOKEN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args", **words}
    program = "from dualtoken_deploy.cli import main; import sys; sys.argv = ['dualtoken']; main()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert "evaluate" in done.stdout
    assert "export" not in done.stdout


# tables


def test_a_table_fits_its_console_or_folds() -> None:
    import io

    from rich.console import Console

    def drawn(width: int) -> str:
        console = Console(file=io.StringIO(), width=width)
        columns = ("bundle", "lost", *(f"figure{i}" for i in range(9)))
        rows = [(f"bundles/a-name-that-is-long-{i}", "-", *(f"{j}.1234567" for j in range(9))) for i in range(2)]
        console.print(fitted(table(columns, rows, left=1), console))
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]

    for width in (80, 200):
        text = drawn(width)
        assert max(map(len, text.splitlines())) <= width
        assert "lost" not in text  # empty in every row
        assert "8.1234567" in text
        assert "a-name-that-is-long-1" in text.replace("\n", "")


def test_a_target_that_fails_is_a_row_and_the_others_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One cannot take a dynamic size, which is said before anything is built; one fails while it is made."""
    from dualtoken_deploy.pipeline import several

    def make(plan: Plan, tell: Callable[[str], None]) -> ExportResult:
        tell("tracing")
        if plan.target.name == "openvino":
            raise ConversionError("the converter broke")
        return ExportResult(str(plan.output), "classify", plan.target.name, "fp32", "float32", 120.0, 1.0, 5.0, 1.0, ())

    monkeypatch.setattr(several, "make", make)
    targets = [part for name in ("onnx", "coreml", "openvino") for part in ("--target", name)]
    command = ["export", "--variant", "tiny-mix", "--image-size", "dynamic", *targets, "--output", str(tmp_path)]
    with pytest.raises(SystemExit) as caught:
        main([*command, "--json"])
    out, err = capsys.readouterr()
    rows = json.loads(out)
    check_schema("export", rows)
    assert caught.value.code == 6
    assert [row.get("state") for row in rows] == ["complete", "failed", "failed"]
    assert [row["error"]["code"] for row in rows[1:]] == [2, 6]
    assert err.index("coreml is left out: coreml takes no dynamic image size") < err.index("onnxruntime: tracing")
    with pytest.raises(SystemExit):
        main(command)
    shown = " ".join(capsys.readouterr().out.split())
    assert "failed: the converter broke" in shown
    assert "120.0" in shown
    code, line = fails(capsys, *command, "--fail-fast")
    assert (code, "takes no dynamic" in line) == (2, True)


def test_bundles_are_named_by_weights_and_size() -> None:
    from dualtoken_deploy.models.own_sources import variant_source

    def named(*arguments: object, precision: str = "int8") -> str:
        return default_name(variant_source("t-mix", *arguments), "onnxruntime", precision)  # type: ignore[arg-type]

    assert named("digits") == "t-mix-digits-onnxruntime-int8"
    assert named(precision="fp32") == "t-mix-onnxruntime-fp32"
    asked = {"backend": "vulkan"}
    assert default_name(variant_source("t-mix"), "executorch", "fp16", asked) == "t-mix-executorch-vulkan-fp16"
    assert default_name(variant_source("t-mix"), "executorch", "fp16", {"backend": None}) == "t-mix-executorch-fp16"
    assert named(None, (256, 320)) == "t-mix-256x320-onnxruntime-int8"


# labels


def test_a_bundle_is_relabelled(own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    names.write_text("".join(f"thing {i}\n" for i in range(10)))
    before = Bundle.open(own_bundle)
    result = prints(capsys, "label", own_bundle, names, "--json")
    assert (result["classes"], result["changed"], result["signed"]) == (10, 10, False)
    after = Bundle.open(own_bundle)
    assert after.labels[3] == "thing 3"
    changed = {name for name in after.manifest.files if after.manifest.files[name] != before.manifest.files[name]}
    assert changed == {"labels.txt", "README.md", "bom.cdx.json"}
    assert sorted(p.name for p in own_bundle.parent.iterdir() if p != names) == [own_bundle.name]
    (own_bundle / "model.sig").write_text("a signature")
    main(["label", str(own_bundle), str(names)])
    assert "signature" in capsys.readouterr().err
    names.write_text("one\ntwo\n")
    code, line = fails(capsys, "label", own_bundle, names)
    assert (code, "2 names" in line, Bundle.open(own_bundle).labels[3]) == (4, True, "thing 3")


def test_a_target_with_names_inside_is_not_relabelled(own_bundle: Path) -> None:
    names, opened = [f"thing {i}" for i in range(10)], Bundle.open(own_bundle)
    for target in ("coreml", "litert"):
        with pytest.raises(UsageError, match="holds the class names itself; export it anew with --labels"):
            relabel(Bundle(own_bundle, replace(opened.manifest, target=target)), names)
    assert relabel(opened, names).changed == 10


# this installation


def test_doctor_says_what_mends_each_gap(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == "openvino" else real(n, *a))
    found = prints(capsys, "doctor", "--json")
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["running openvino"]["state"] == "missing"
    assert checks["running openvino"]["mend"] == install_command("openvino")
    assert checks["running coreml"]["state"] == ("device" if sys.platform == "darwin" else "reference")
    assert checks["running onnxruntime"]["state"] == "works"
    assert found["machine"]["cores"] >= 1
    rows = {row["target"]: row for row in prints(capsys, "targets", "--json")}
    assert rows["openvino"]["runs_as"] == "no"
    assert rows["coreml"]["runs_as"] == "reference"
    assert rows["onnxruntime"]["runs_as"] == "device"


@pytest.mark.parametrize(
    ("url", "command"),
    [
        ({"url": "file://{}", "dir_info": {"editable": True}}, "pip install -e '{}[export,openvino]'"),
        ({"url": "file://{}", "dir_info": {}}, "pip install '{}[export,openvino]'"),
        (
            {"url": "file:///gone/dualtoken_deploy-1-py3-none-any.whl"},
            "pip install 'dualtoken_deploy-1-py3-none-any.whl[export,openvino]'",
        ),
        ({"url": "file:///gone/checkout", "dir_info": {}}, "pip install 'dualtoken-deploy[export,openvino]'"),
        (None, "pip install 'dualtoken-deploy[export,openvino]'"),
    ],
)
def test_the_install_command_is_that_of_where_it_came_from(
    url: dict[str, Any] | None, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEP 610's direct_url.json: a checkout, a folder, a wheel that is gone, a folder that is gone, an index."""

    class Distribution:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return None if url is None else json.dumps(url).replace("{}", str(tmp_path), 1)

    egg_info = type("EggInfo", (), {"read_text": lambda self, name: None})()
    monkeypatch.setattr("importlib.metadata.distributions", lambda name: iter([egg_info, Distribution()]))
    assert install_command("export", "openvino", "export") == command.replace("{}", str(tmp_path))


def test_models_are_listed_without_torch(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'torch' else real(n, *a)\n"
        "from dualtoken_deploy.cli import main; main(['models', '--json', *sys.argv[1:]])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {row["variant"]: row for row in json.loads(done.stdout)}
    real = {name: variant for name, variant in registry.VARIANTS.items() if not name.startswith("tiny-")}
    assert set(real) <= set(rows), "python -m dualtoken_deploy.models.listing"
    for name, variant in real.items():
        assert rows[name]["paper_macs_g"] == variant.paper_macs_g
        assert rows[name]["options"] == json.loads(json.dumps(registry.options_of(variant.config)))
    for name, variant in real.items():  # heads and ablations are held against theirs where they are counted anyway
        with torch.device("meta"):
            model = registry.build(variant.config).eval()
        assert rows[name]["params"] == count_params(model)
        if name not in ("vim2-s", "vim2-b"):  # whose scans take seconds to count
            assert rows[name]["macs"] == count_macs(model, (224, 224))


def test_the_cache_is_shown_and_cleared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DUALTOKEN_CACHE", str(tmp_path / "cache"))
    assert prints(capsys, "cache", "--json")["entries"] == []
    (cache_folder() / "search").mkdir(parents=True)
    (cache_folder() / "search" / "a.json").write_bytes(b"x" * 1000)
    (entry,) = prints(capsys, "cache", "--json")["entries"]
    assert (entry["name"], entry["bytes"]) == ("search", 1000)
    prints(capsys, "cache", "--clear", "--json")
    assert list(cache_folder().iterdir()) == []


# what was taken without a word


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-drop", "1"), "--max-drop without --calibration"),
        (("--search-seconds", "9", "--quantizer", "qdq"), "--quantizer, --search-seconds without --calibration"),
        (("--option", "num_classes=3"), "give --classes"),
        (("--option", "depth=3"), "valid options"),
    ],
)
def test_options_that_change_nothing_are_refused(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = fails(capsys, "export", "--variant", "t-mix", "--target", "onnx", *options)
    assert (code, message in line) == (2, True), line
    assert "num_classes," not in line


def test_a_file_of_a_bundle_is_answered_with_its_folder(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(capsys, "inspect", own_bundle / "model.onnx")
    assert (code, f"give its folder, {own_bundle}" in line) == (4, True)


def test_golden_says_of_how_many_images(
    own_bundle: Path, tmp_path: Path, photograph: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (bare,) = prints(capsys, "validate", own_bundle, "--json")["results"]
    assert (bare["reference"], bare["images"], bare["likeness_images"]) == ("golden", 1, 1)
    (eager,) = prints(capsys, "validate", own_bundle, "--reference", "eager", "--json")["results"]
    assert (eager["reference"], eager["images"]) == ("eager", 1)
    assert eager["sqnr_db"] > 100
    scored = ("validate", own_bundle, "--reference", "golden", "--data", "digits", "--limit", "7")
    (stored,) = prints(capsys, *scored, "--json")["results"]
    assert (stored["images"], stored["likeness_images"], stored["sqnr_db"]) == (7, 1, bare["sqnr_db"])
    assert stored["top1"] is not None
    main([str(word) for word in scored])
    assert "1 stored; scores of 7" in " ".join(capsys.readouterr().out.split())
    code, line = fails(capsys, "validate", own_bundle, "--reference", "golden", "--data", "photographs")
    assert (code, "nothing would be measured" in line) == (2, True)
