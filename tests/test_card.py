"""README.md and bom.cdx.json: what the manifest says, in the forms of the Hugging Face Hub and of CycloneDX."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.blocks import Calibration, Evaluated, Figures, HeldOutSet, Licenses, Speed
from dualtoken_deploy.bundle.licenses import parse_licenses
from dualtoken_deploy.bundle.manifest import COMPILED, Manifest
from dualtoken_deploy.bundle.store import BOM, CARD, DOCUMENTS, MANIFEST, sha256, write_manifest
from dualtoken_deploy.cli import main
from dualtoken_deploy.errors import BundleError, UsageError
from dualtoken_deploy.prove.card import HUB_LICENSES, front_matter, hub_license
from dualtoken_deploy.prove.describe import documents
from dualtoken_deploy.prove.relabel import relabel
from tests.commands import fails, prints

HELD = Calibration(
    name="/data/pictures",
    images=40,
    sha256="0" * 64,
    method="minmax",
    quantizer="qdq",
    held_out=HeldOutSet("digits", 360),
    metric="top1",
    max_drop=0.5,
    drop=0.28,
    in_float=("stem.conv1",),
)
SCORED = Evaluated(data="digits", images=360, scores={"top1": 0.975, "top5": 1.0}, date="2026-11-30", cpu="a CPU")


def bom_of(folder: Path) -> dict[str, Any]:
    """The document, which fits the schema of CycloneDX 1.7 as its own library ships it."""
    schema = pytest.importorskip("cyclonedx.schema", reason="the extra [dev] is not installed")
    from cyclonedx.validation.json import JsonStrictValidator

    text = (folder / BOM).read_text(encoding="utf-8")
    assert JsonStrictValidator(schema.SchemaVersion.V1_7).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    assert '"url"' not in text  # which the validator here could not judge: the extra for IRIs is not installed
    return found


def card_of(folder: Path) -> Any:
    """The card, read and checked by the Hub's own library; nothing is asked of a network."""
    hub = pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
    return hub.ModelCard.load(folder / CARD, ignore_metadata_errors=False)


def described(folder: Path, **changes: Any) -> Manifest:
    """The bundle in the folder with another manifest, and its documents."""
    manifest = replace(Bundle.open(folder).manifest, **changes)
    kept = {name: digest for name, digest in manifest.files.items() if name not in DOCUMENTS}
    return write_manifest(folder, replace(manifest, files=kept), documents)


def test_every_export_has_both_and_their_hashes(small_bundle: Callable[..., Path]) -> None:
    folder = small_bundle()
    bundle = Bundle.open(folder)
    assert {n: bundle.manifest.files[n] for n in DOCUMENTS} == {n: sha256(folder / n) for n in DOCUMENTS}
    assert bundle.size_bytes == (folder / "model.onnx").stat().st_size  # no app ships them
    bom, card = bom_of(folder), card_of(folder)
    files = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"}
    assert files == {n: d for n, d in bundle.manifest.files.items() if n not in DOCUMENTS}
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "dualtoken-deploy"
    assert {"onnxruntime", "onnx", "fp32"} <= set(card.data.tags)
    assert card.data.license is None  # random weights are nobody's
    assert "The weights are random (seed 0): its answers mean nothing." in card.text


def test_figures_are_those_of_the_manifest(own_bundle: Path) -> None:
    """Each, to the last digit, in both."""
    manifest = described(own_bundle, calibration=HELD, evaluated=(SCORED,))
    bom, card = bom_of(own_bundle), card_of(own_bundle)
    golden, photographs = manifest.measured.golden, manifest.measured.photographs
    assert golden is not None
    assert photographs is not None
    wanted = {
        ("sqnr_db", golden.sqnr_db), ("sqnr_db", photographs.sqnr_db), ("drop", 0.28), ("top1", 0.975), ("top5", 1.0),
        ("top1_agreement", photographs.top1_agreement), ("max_abs_error", photographs.max_abs_error),
    }  # fmt: skip
    metrics = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert wanted <= {(m["type"], float(m["value"])) for m in metrics}
    assert wanted <= {(e.metric_name, e.metric_value) for e in card.data.eval_results}
    accuracy = next(e for e in card.data.eval_results if e.metric_name == "top1")
    assert (accuracy.metric_type, accuracy.dataset_type, accuracy.dataset_name) == (
        "accuracy",
        "digits",
        "360 of digits",
    )
    (top1,) = (m for m in metrics if m["type"] == "top1")
    bounds = top1["confidenceInterval"]
    stats = pytest.importorskip("scipy.stats")
    interval = stats.binomtest(351, 360).proportion_ci(0.95, method="wilson")
    assert float(bounds["lowerBound"]) == pytest.approx(interval.low, abs=1e-6)
    assert float(bounds["upperBound"]) == pytest.approx(interval.high, abs=1e-6)
    assert f"97.50 % ({100 * interval.low:.2f} to {100 * interval.high:.2f})" in card.text
    assert "stem.conv1" in card.text


def test_the_bill_names_code_calibration_and_what_made_it(own_bundle: Path) -> None:
    said = Licenses(weights="CC-BY-NC-4.0", code="MIT OR Apache-2.0")
    manifest = described(own_bundle, calibration=HELD, licenses=said, state=COMPILED)
    bom = bom_of(own_bundle)
    model, by_ref = bom["metadata"]["component"], {c["bom-ref"]: c for c in bom["components"]}
    assert model["licenses"][0]["expression"] == "CC-BY-NC-4.0"
    assert by_ref["code"]["licenses"][0]["expression"] == "MIT OR Apache-2.0"
    assert by_ref["calibration"]["name"] == "pictures"  # not where it lay on somebody's disk
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": "calibration"}]
    assert set(bom["dependencies"][0]["dependsOn"]) == set(by_ref)
    made = {c["name"]: c["version"] for c in bom["formulation"][0]["components"]}
    assert made == dict(manifest.versions)
    assert any("no device has run it" in text for text in model["modelCard"]["considerations"]["technicalLimitations"])
    assert card_of(own_bundle).data.license == "cc-by-nc-4.0"


def test_another_manifest_has_another_serial_number(own_bundle: Path) -> None:
    first = bom_of(own_bundle)["serialNumber"]
    described(own_bundle)
    assert bom_of(own_bundle)["serialNumber"] == first
    described(own_bundle, evaluated=(SCORED,))
    assert bom_of(own_bundle)["serialNumber"] != first


def test_text_that_yaml_reads_otherwise_comes_back_as_it_is(own_bundle: Path) -> None:
    """No, 1e-05, a colon, a line separator of YAML 1.1, an emoji: each is read back by PyYAML as it was."""
    yaml = pytest.importorskip("yaml")
    names = ('no: "x" # y', "a\u2028b\x85c\x7f", "\U0001f600", "%", "- x", "\\n'")
    scored = tuple(replace(SCORED, data=name, scores={"top1": 1e-05}) for name in names)
    manifest = described(own_bundle, evaluated=scored, licenses=Licenses(weights="LicenseRef-Ours"))
    front = re.match(r"---\n(.*?)\n---\n", (own_bundle / CARD).read_text(encoding="utf-8"), re.DOTALL)
    assert front is not None
    assert yaml.safe_load(front[1]) == front_matter(manifest)
    results = card_of(own_bundle).data.eval_results
    assert [e.dataset_type for e in results if e.metric_name == "top1"] == list(names)
    assert {e.metric_value for e in results if e.metric_name == "top1"} == {1e-05}


@pytest.mark.parametrize(
    ("given", "known", "weights", "code"),
    [
        (["mit"], None, "MIT", "MIT"),
        (["MIT"], Licenses(code="Apache-2.0"), "MIT", "Apache-2.0"),
        (["code=MIT", "weights=cc-by-4.0"], Licenses(code="Apache-2.0"), "CC-BY-4.0", "MIT"),
        (["code=GPL-2.0-only with Classpath-exception-2.0"], None, None,
         "GPL-2.0-only WITH Classpath-exception-2.0"),
        ([], Licenses(weights="MIT"), "MIT", None),
    ],
)  # fmt: skip
def test_licences(given: list[str], known: Licenses | None, weights: str | None, code: str | None) -> None:
    assert parse_licenses(given, known) == Licenses(weights=weights, code=code)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["Apache"], "is no SPDX expression"),
        (["MIT AND"], "is no SPDX expression"),
        (["data=MIT"], "neither weights nor code"),
        (["MIT", "ISC"], "given twice for weights and code"),
        (["code=MIT", "code=ISC"], "given twice for code"),
    ],
)
def test_what_is_no_licence(given: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_licenses(given)


def test_a_wrong_licence_is_said_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = fails(
        capsys, "export", "--variant", "tiny-mix", "--target", "onnxruntime", "--license", "nobodys", "--output",
        tmp_path / "b",
    )  # fmt: skip
    assert code == 2
    assert "'nobodys' is no SPDX expression" in line
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("expression", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("GPL-3.0-or-later", {"license": "gpl-3.0"}),
        ("MIT OR Apache-2.0", {"license": "other", "license_name": "MIT OR Apache-2.0"}),
        ("LicenseRef-Ours", {"license": "other", "license_name": "LicenseRef-Ours"}),
        (None, {}),
    ],
)
def test_the_hub_has_its_own_words_for_licences(expression: str | None, front: dict[str, str]) -> None:
    assert hub_license(Licenses(weights=expression)) == front


def test_the_hubs_words_are_spdxs() -> None:
    """An independent list: SPDX's own, as `packaging` has it."""
    from packaging.licenses._spdx import LICENSES

    assert [name for name in HUB_LICENSES if name not in LICENSES] == []


def test_licences_of_this_package_are_known() -> None:
    from dualtoken_deploy.models.own_sources import known_licenses
    from dualtoken_deploy.models.source import Source
    from dualtoken_deploy.pipeline.export import Model, open_source

    assert open_source(Model("t-mix", "digits")).licenses == Licenses(weights="Apache-2.0", code="Apache-2.0")
    assert open_source(Model("t")).licenses == Licenses(code="Apache-2.0")
    assert open_source(Model("t", licenses=("weights=MIT",))).licenses == Licenses(weights="MIT", code="Apache-2.0")
    yours = Source.reference("torchvision.models:resnet18")
    assert known_licenses(yours) == Licenses()


# --- the command ---


def test_a_bundle_of_before_gains_them(own_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without documents and fields it opens as it did; `dualtoken card` writes them, and the model keeps its bytes."""
    data = json.loads((own_bundle / MANIFEST).read_text(encoding="utf-8"))
    for name in DOCUMENTS:
        del data["files"][name]
        (own_bundle / name).unlink()
    del data["licenses"], data["evaluated"]
    (own_bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    assert Bundle.open(own_bundle).manifest.licenses is None
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"n{i}" for i in range(10)) + "\n", encoding="utf-8")
    relabel(own_bundle, names)
    assert not any((own_bundle / name).exists() for name in DOCUMENTS)  # who had none gains none by a label
    before = sha256(own_bundle / "model.onnx")
    found = prints(capsys, "card", own_bundle, "--license", "weights=CC0-1.0", "--json")
    assert found["licenses"] == {"weights": "CC0-1.0", "code": None}
    bundle = Bundle.open(own_bundle)
    assert bundle.manifest.files["model.onnx"] == before
    assert card_of(own_bundle).data.license == "cc0-1.0"
    assert bom_of(own_bundle)["metadata"]["component"]["licenses"][0]["expression"] == "CC0-1.0"


def test_labels_keep_them_true(own_bundle: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"n{i}" for i in range(10)) + "\n", encoding="utf-8")
    old = bom_of(own_bundle)
    relabel(own_bundle, names)
    bundle = Bundle.open(own_bundle)
    hashes = {c["name"]: c["hashes"][0]["content"] for c in bom_of(own_bundle)["components"] if c["type"] == "file"}
    assert hashes["labels.txt"] == sha256(own_bundle / "labels.txt") == bundle.manifest.files["labels.txt"]
    assert hashes != {c["name"]: c["hashes"][0]["content"] for c in old["components"] if c["type"] == "file"}
    assert sha256(own_bundle / "labels.txt") in (own_bundle / CARD).read_text(encoding="utf-8")


def test_an_accuracy_is_measured_and_kept(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command evaluates the files as `dualtoken evaluate` does; a second set is added, the same set is replaced."""
    labels = own_bundle.parent / "digits.txt"
    labels.write_text("\n".join(map(str, range(10))) + "\n", encoding="utf-8")
    relabel(own_bundle, labels)
    main(["card", str(own_bundle), "--data", "digits", "--limit", "20"])
    main(["card", str(own_bundle), "--data", "digits", "--limit", "30"])
    capsys.readouterr()
    evaluated = prints(capsys, "evaluate", own_bundle, "--data", "digits", "--limit", "30", "--json")
    (one,) = Bundle.open(own_bundle).manifest.evaluated
    assert (one.images, one.scores["top1"]) == (30, evaluated["top1"])
    assert one.date in (own_bundle / CARD).read_text(encoding="utf-8")
    labels.write_text("\n".join(f"n{i}" for i in range(10)) + "\n", encoding="utf-8")
    relabel(own_bundle, labels)  # rewrites the card, and forgets nothing
    assert f"{100 * one.scores['top1']:.2f} %" in (own_bundle / CARD).read_text(encoding="utf-8")


def test_a_readme_of_somebody_else_stays(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_bundle / CARD).write_text("edited", encoding="utf-8")
    with pytest.raises(BundleError, match=r"README\.md is not the file"):
        Bundle.open(own_bundle)
    main(["card", str(own_bundle)])
    assert f"warning: {own_bundle / CARD} had been changed" in capsys.readouterr().err
    assert Bundle.open(own_bundle)
    data = json.loads((own_bundle / MANIFEST).read_text(encoding="utf-8"))
    del data["files"][CARD]
    (own_bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    (own_bundle / CARD).write_text("mine", encoding="utf-8")
    code, line = fails(capsys, "card", own_bundle)
    assert code == 2
    assert "move it away" in line
    assert (own_bundle / CARD).read_text(encoding="utf-8") == "mine"


def test_a_changed_model_gets_no_card(own_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (own_bundle / "model.onnx").open("ab") as out:
        out.write(b"x")
    code, line = fails(capsys, "card", own_bundle)
    assert code == 4
    assert "model.onnx is not the file that was exported" in line


def test_the_files_of_a_folder_are_named_one_by_one(own_bundle: Path) -> None:
    """As Core ML's package is one: a hash of a folder is ours alone, that of a file everybody can check."""
    package = own_bundle / "model.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Data" / "weight.bin").write_bytes(b"w")
    manifest = Bundle.open(own_bundle, verify=False).manifest
    bundle = Bundle(own_bundle, replace(manifest, files={**manifest.files, package.name: sha256(package)}))
    (own_bundle / BOM).write_bytes(documents(bundle)[BOM])
    found = {c["name"]: c["hashes"][0]["content"] for c in bom_of(own_bundle)["components"] if c["type"] == "file"}
    assert found["model.mlpackage/Data/weight.bin"] == sha256(package / "Data" / "weight.bin")
    assert package.name not in found


@pytest.mark.parametrize("head", ["retinanet", "pspnet"])
def test_other_tasks(head: str, dense_bundle: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(dense_bundle(head), tmp_path / "b")
    scored = Evaluated(data="scenes", images=8, scores={"ap": 0.41, "miou": 0.5}, date="2026-11-30")
    described(tmp_path / "b", evaluated=(scored,))
    bom, card = bom_of(tmp_path / "b"), card_of(tmp_path / "b")
    assert card.data.pipeline_tag == {"retinanet": "object-detection", "pspnet": "image-segmentation"}[head]
    assert bom["metadata"]["component"]["name"] == f"{head} on tiny-mix"


def test_the_speed_of_int8_beside_float(own_bundle: Path) -> None:
    speed = Speed(
        against="fp32 files", ratio=0.79, low=0.77, high=0.81, verdict="slower", p50_ms=12.41, against_p50_ms=9.86,
        threads=2, batch=1, rounds=3,
    )  # fmt: skip
    described(own_bundle, measured=replace(Bundle.open(own_bundle).manifest.measured, speed=speed))
    assert "| times the speed | 0.79 (0.77 to 0.81) | beside fp32 files" in card_of(own_bundle).text
    metrics = bom_of(own_bundle)["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    (found,) = (m for m in metrics if m["type"] == "speed_ratio")
    assert found["value"] == "0.79"
    assert found["confidenceInterval"] == {"lowerBound": "0.77", "upperBound": "0.81"}


def test_an_engine_that_was_built_has_its_own_figures(own_bundle: Path) -> None:
    manifest = Bundle.open(own_bundle).manifest
    engine = Figures(sqnr_db=51.25, max_abs_error=0.1, top1_agreement=1.0)
    described(own_bundle, measured=replace(manifest.measured, engine=engine))
    metrics = bom_of(own_bundle)["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert ("sqnr_db", "51.25") in {(m["type"], m["value"]) for m in metrics}
