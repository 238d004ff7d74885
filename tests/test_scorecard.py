"""The scorecard: every cell there is is in it, a cell is measured once, and the page is the file's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scorecard import (
    MODELS,
    PAGE,
    README,
    RESULTS,
    Ask,
    Card,
    asked_for,
    export_words,
    fill,
    keys,
    latency,
    measure,
)
from benchmarks.scorecard_page import page, summary
from benchmarks.scorecard_process import Answer, GivenUpError, Own, Shared
from dualtoken_deploy.models.registry import VARIANTS
from dualtoken_deploy.targets.table import TARGETS
from tests.commands import SCHEMAS


def check(data: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMAS / "results" / "scorecard.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(data, schema)


def test_the_committed_file_has_every_cell_and_the_page_is_made_of_it() -> None:
    data = json.loads(RESULTS.read_text())
    check(data)
    have = [(cell["model"], cell["target"], cell["precision"]) for cell in data["cells"]]
    every = [(model, t.name, p) for model in MODELS for t in TARGETS.values() for p in t.precisions]
    assert have == every
    assert set(VARIANTS) - {"tiny-mix", "tiny-lightvit", "tiny-dualformer", "tiny-vim2"} <= set(MODELS)
    assert {cell["machine"] for cell in data["cells"] if "machine" in cell} <= set(data["machines"])
    assert PAGE.read_text() == page(data)
    assert summary(data) in README.read_text().splitlines()


class Program:
    """Answers in place of `dualtoken`, and what it was asked; every command takes ten seconds."""

    kind = "own"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.fails = self.ends = ""

    def used(self) -> float:
        return 10.0 * len(self.asked)

    def __call__(self, words: Sequence[str]) -> Answer:
        self.asked.append(" ".join(words))
        if self.ends and self.ends in self.asked[-1]:
            raise GivenUpError("not done in 300 s of CPU")
        if self.fails and self.fails in self.asked[-1]:
            return 6, {}, "a converter <failed> | here"
        if words[0] == "export":
            folder = Path(words[words.index("--output") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            size = [64, 64] if "int8" in words else [224, 224]
            (folder / "manifest.json").write_text(json.dumps({"input": {"size": size}}))
            state = "prepared" if "tensorrt" in words else "complete"
            return 0, {"state": state, "sqnr_db": 42.5, "top1_agreement": 1.0, "size_mib": 4.0,
                       "executed_precision": "float32", "int8_mac_share": 0.5}, ""  # fmt: skip
        if words[0] == "inspect":
            engine = "the reference runner" if "coreml" in words[1] else None
            return 0, {"engine": engine, "executed_precision": {"Conv": "float32"}}, ""
        if words[0] == "evaluate":
            images = 40 if "--limit" in words else 360
            return 0, {"task": "classify", "images": images, "top1": 0.9 if "/" in words[1] else 0.95, "top5": 1.0}, ""
        bundles = [word for word in words if "/" in word]
        ratio = {"median": 2.0, "low": 1.9, "high": 2.1}
        return 0, {"contestants": [{"bundle": b, "p50_ms": 3.0, "ratio": ratio} for b in bundles]}, ""


def test_a_cell_is_measured_once_and_what_was_refused_says_why(tmp_path: Path) -> None:
    program, file = Program(), tmp_path / "card.json"
    ask = ["t-mix-digits onnxruntime int8", "t-mix-digits coreml fp32", "t-mix-digits tensorrt fp16", "s openvino fp32"]
    program.fails = "--variant s --target openvino"
    fill(Card(file), Ask(tuple(ask)), tmp_path, program)
    data = json.loads(file.read_text())
    check(data)
    found = {f"{c['model']} {c['target']} {c['precision']}": c for c in data["cells"] if c["state"] != "not measured"}
    assert set(found) == set(ask)
    int8, coreml, tensorrt, refused = (found[name] for name in ask)
    assert int8["commands"][0].endswith("--force --calibration digits --max-drop 0.5 --no-race")
    assert (int8["int8_mac_share"], coreml["int8_mac_share"]) == (0.5, None)
    assert (int8["executed_where"], coreml["executed_where"]) == (
        "ONNX Runtime, CPU", "Core ML: the reference runner"
    )  # fmt: skip
    assert coreml["commands"][-1].endswith("--limit 40")
    assert tensorrt["state"] == "prepared"
    assert tensorrt["executed_where"] == "prepared: its file ran in ONNX Runtime, no engine was executed"
    assert (refused["exit"], refused["why"]) == (6, "a converter <failed> | here")
    assert data["eager"]["t-mix-digits"]["value"] == 0.95
    before = len(program.asked)
    fill(Card(file), Ask(tuple(ask)), tmp_path, program)
    assert len(program.asked) == before  # they are there
    fill(Card(file), Ask((ask[0],), again=True), tmp_path, program)
    assert [text.split()[0] for text in program.asked[before:]] == ["export", "inspect", "evaluate"]

    latency("t-mix-digits", Card(file), tmp_path, 3, 0.2, program)
    bench = program.asked[-1]
    assert "coreml" not in bench  # a reference execution has no time of the device's
    assert "tensorrt" not in bench
    data = json.loads(file.read_text())
    check(data)
    shown = page(data)
    line = next(text for text in shown.splitlines() if text.startswith("| onnxruntime | int8 |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    figures = ["top1 90.00 % of 360", "5.00", "42.5", "50.0 %", "4.00", "3.00", "2.00x (1.90-2.10)"]
    assert cells[:11] == ["onnxruntime", "int8", "ONNX Runtime, CPU", "float32", *figures]
    other = next(text for text in shown.splitlines() if text.startswith("| coreml | fp32 |"))
    assert "top1 90.00 % of 40 | - |" in other  # eager was asked about others as well
    assert r"refused, exit 6: a converter &lt;failed> \| here" in shown
    every = len(data["cells"])
    assert f"{every} cells, of which 3 were measured" in shown
    assert f"1 refused, and **{every - 4} not measured**" in shown

    fill(Card(file), Ask(("t-mix-digits onnxruntime fp16",)), tmp_path, program)
    latency("t-mix-digits", Card(file), tmp_path, 3, 0.2, program)
    assert "onnxruntime-fp16" in program.asked[-1]
    assert "onnxruntime-int8" not in program.asked[-1]  # of a smaller picture, which is other work


def test_a_run_that_is_ended_keeps_what_it_has(tmp_path: Path) -> None:
    """By --minutes of CPU; and by an error in the middle, whose cell alone is lost."""
    program, file = Program(), tmp_path / "card.json"
    fill(Card(file), Ask(("s onnxruntime",), minutes=0.3), tmp_path, program)
    assert [text.split()[6] for text in program.asked if text.startswith("export")] == ["fp32"]

    class Broken(Program):
        def __call__(self, words: Sequence[str]) -> Answer:
            if "--precision int8" in " ".join(words):
                raise KeyboardInterrupt
            return super().__call__(words)

    with pytest.raises(KeyboardInterrupt):
        fill(Card(file), Ask(("s onnxruntime",)), tmp_path, Broken())
    states = {
        c["precision"]: c["state"] for c in Card(file).cells() if (c["model"], c["target"]) == ("s", "onnxruntime")
    }
    assert states == {"fp32": "measured", "fp16": "measured", "int8": "not measured"}


def test_a_cell_that_is_given_up_says_why_and_is_not_begun_again(tmp_path: Path) -> None:
    program, file = Program(), tmp_path / "card.json"
    program.ends = "--precision int8"
    fill(Card(file), Ask(("s onnxruntime",)), tmp_path, program)
    data = json.loads(file.read_text())
    check(data)
    assert "| onnxruntime | int8 | not measured: not done in 300 s of CPU |" in page(data)
    before = len(program.asked)
    fill(Card(file), Ask(("s onnxruntime",)), tmp_path, program)
    assert len(program.asked) == before


def test_cells_come_in_the_order_asked_for_and_of_cost() -> None:
    order = [" ".join((key[0].name, *key[1:])) for key in asked_for(("s openvino", "t-mix-digits", "t fp32"))]
    assert order[:4] == ["s openvino fp32", "s openvino fp16", "s openvino bf16", "s openvino int8"]
    place = {name: n for n, name in enumerate(order)}
    floats = place["t-mix-digits openvino bf16"], place["t-mix-digits coreai fp16"]
    assert 4 <= floats[0] < floats[1] < place["t-mix-digits onnxruntime int8"] < place["t onnxruntime fp32"]
    assert len(asked_for(())) == len(list(keys()))


@pytest.mark.parametrize(
    ("model", "precision", "words"),
    [("t", "fp32", ""), ("t-mix-digits", "fp32", ""), ("vim2-t", "fp32", "--image-size 64"),
     ("t", "int8", "--image-size 64 --calibration photographs --metric sqnr --max-drop 10 --no-race"),
     ("t-mix-digits", "int8", "--calibration digits --max-drop 0.5 --no-race")],
)  # fmt: skip
def test_random_weights_are_judged_by_sqnr_and_trained_ones_by_what_they_lose(
    model: str, precision: str, words: str
) -> None:
    said = " ".join(export_words(MODELS[model], "openvino", precision, Path("b")))
    assert said.partition("--force")[2].strip() == words


@pytest.mark.timeout(900)
def test_a_shared_process_answers_what_commands_of_their_own_do(tmp_path: Path) -> None:
    """One cell both ways, and an error; and a cell that takes too long ends its process, not the run."""
    shared, own = Shared(tmp_path / "kept"), Own()
    try:
        wrong = ["export", "--variant", "t-mox", "--target", "onnxruntime", "--output", str(tmp_path / "wrong")]
        assert shared(wrong) == own(wrong)
        tsm2 = replace(MODELS["tsm2-lorenz"], data=None)  # export and inspect
        cells = [measure(tsm2, "onnxruntime", "fp32", tmp_path / "bundles", run) for run in (own, shared)]
        assert [(cell.pop("process"), cell.pop("cpu_s") > 0) for cell in cells] == [("own", True), ("shared", True)]
        for cell in cells:
            del cell["versions"]  # a commit may be made meanwhile
        assert cells[0] == cells[1]
        assert cells[0]["state"] == "measured"
        shared.limit_s = 0.01
        shared.begin()
        with pytest.raises(GivenUpError, match="CPU"):
            shared(["export", *MODELS["s"].words, "--target", "openvino", "--output", str(tmp_path / "long")])
        shared.limit_s = None
        shared.begin()
        assert shared(["targets"])[0] == 0
    finally:
        shared.fresh()
