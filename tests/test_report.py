"""Reports: what the page says is what was measured, nothing in it is fetched or run, and a browser shows it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dualtoken_deploy import Bundle
from dualtoken_deploy.bundle.blocks import Calibration, HeldOutSet, SearchResult, Step
from dualtoken_deploy.cli import main
from dualtoken_deploy.prove.contents import Subject, document
from dualtoken_deploy.prove.measure import Latency, Report, Setting, measure
from dualtoken_deploy.prove.render import html, markdown
from dualtoken_deploy.use.diagnose import Diagnosis, Drift
from tests.test_serve_browser import CHROMIUM, Browser

MakeBundle = Callable[..., Path]
HOSTILE = "<script>alert(1)</script> | `x` [a](http://evil.example) *b*"


@pytest.fixture(scope="module")
def subject(small_bundle: MakeBundle) -> Subject:
    """The small bundle with a search, a drift and a latency of given numbers."""
    bundle = Bundle.open(small_bundle())
    steps = (Step("all in INT8", (), 2.0, 12.0, 1.0), Step("stem in float", ("stem",), 0.25, 20.0, 0.93))
    found = SearchResult(("stem",), 0.25, 20.0, 0.93, True, scores=2, trace=steps)
    calibration = Calibration(
        name="digits", images=100, sha256="0" * 64, method="minmax", quantizer="qdq", max_drop=0.5, drop=0.25,
        held_out=HeldOutSet("digits", 360), metric="top1", in_float=("stem",), planned_int8_mac_share=0.93,
        search=found,
    )  # fmt: skip
    bundle = Bundle(bundle.path, replace(bundle.manifest, calibration=calibration, command=HOSTILE))
    layers = (Drift("stem.conv1", "Conv", 70.0, 1e-3, 3.5), Drift("head", "Gemm", 55.0, 1e-2, 15.0))
    drift = Diagnosis(str(bundle.path), "photographs", 4, 60.0, layers, (), "head", "head", 0)
    report = measure(Bundle.open(small_bundle()), Setting(rounds=0))
    latency = Latency("gemm", 1.25, 1.1, 1.4, 7.5)
    return Subject(bundle, replace(report, latency=latency, figures={**report.figures, "top1": 0.9861}), drift=drift)


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("meta", "path", "rect", "circle"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_says_what_was_measured_and_where_it_is_from(subject: Subject) -> None:
    page = Page(html(document([subject], "2026-11-30")))
    assert page.open == []
    report, manifest = subject.report, subject.bundle.manifest
    assert report is not None
    for said in (
        f"{report.figures['sqnr_db']:.1f} dB", "98.61 %", "7.50 ms", "1.25x (1.10-1.40)",  # now
        "head", "15.0 dB", "First past the threshold: head.",  # drift
        "0.25 points of top1 on 360 pictures of digits (allowed 0.5)", "93.0 %",  # the search
        "image: uint8 NHWC 1x64x64x3, RGB", "random, seed 0", manifest.weights.sha256, manifest.files["model.onnx"],
        str(report.machine["cpu"]), "Report of 2026-11-30", "its answers mean nothing",
    ):  # fmt: skip
        assert said in page.text, said
    executed = {kind for kind in report.executed if kind in page.text}
    assert executed == set(report.executed)


def test_nothing_in_it_is_fetched_or_run_whatever_a_manifest_says(subject: Subject) -> None:
    text = html(document([subject], "2026-11-30"))
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "a", "object"}
    assert HOSTILE in page.text
    for tag, attributes in page.tags:
        assert not {"href", "src", "onload", "style"} & attributes.keys(), tag
    assert "url(" not in text
    assert "@import" not in text


def test_charts_are_drawn_to_scale(subject: Subject) -> None:
    """The bar of 1.25 and its whiskers, in the scale of the line at 1."""
    text = html(document([subject], "2026-11-30"))
    left = 190
    one = float(re.findall(r'class="at" d="M([\d.]+) 26V', text)[0]) - left
    (width,) = re.findall(r'<rect class="bar" x="190" y="\d+" width="([\d.]+)"', text)
    assert float(width) / one == pytest.approx(1.25, rel=1e-2)
    low, high = re.findall(r'class="line" d="M([\d.]+) [\d.]+H([\d.]+)M', text)[0]
    assert [(float(x) - left) / one for x in (low, high)] == pytest.approx([1.1, 1.4], rel=1e-2)
    assert len(re.findall(r"<circle", text)) == 2 + 2  # layers, and steps of the search
    assert text.count('role="img" aria-label="') == 3


def test_markdown_has_the_same_figures_in_whole_tables(subject: Subject) -> None:
    text = markdown(document([subject], "2026-11-30"))
    assert "<script" not in text
    columns = None
    for line in text.splitlines():
        if not line.startswith("|"):
            columns = None
            continue
        count = len(re.findall(r"(?<!\\)\|", line))
        assert columns in (None, count), line
        columns = count
    assert "| top1 | 98.61 % |" in text
    assert r"\[a](http://evil.example)" in text


def test_several_bundles_stand_side_by_side(subject: Subject, small_bundle: MakeBundle) -> None:
    other = Bundle.open(small_bundle("onnxruntime", "fp16"))
    text = markdown(document([subject, Subject(other, None, "no runtime here")], "2026-11-30"))
    assert text.startswith("# 2 bundles")
    assert "## Side by side" in text
    assert f"{other.name} was not timed: no runtime here." in text
    assert f"## {other.name}: What executes" in text


def test_the_command_writes_both_and_says_what_it_could_not_measure(
    small_bundle: MakeBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="the extra [tensorrt-rtx] is not installed")
    compiled = small_bundle("tensorrt-rtx", "fp16")
    page, text = tmp_path / "r.html", tmp_path / "r.md"
    files = ("--html", str(page), "--markdown", str(text))
    main(["report", str(small_bundle()), str(compiled), *files, "--rounds", "0", "--json"])
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["reports"]
    assert second is None
    assert Report.read(_write(tmp_path / "first.json", first)).figures == first["figures"]
    assert f"note: {compiled} was not measured: " in printed.err
    assert f"wrote {page}" in printed.err
    assert f"{first['figures']['sqnr_db']:.1f} dB" in page.read_text()
    assert f"{first['figures']['sqnr_db']:.1f} dB" in text.read_text()


def test_without_a_file_it_is_markdown_on_stdout(small_bundle: MakeBundle, capsys: pytest.CaptureFixture[str]) -> None:
    main(["report", str(small_bundle()), "--rounds", "0"])
    assert capsys.readouterr().out.startswith("# tiny-mix for ONNX Runtime\n")


def _write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data))
    return path


# --- in a browser ---


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def test_a_browser_shows_it_in_light_and_dark_and_on_a_phone(
    browser: Browser, subject: Subject, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    page.write_text(html(document([subject], "2026-11-30")), encoding="utf-8")
    shots, colours = {}, {}
    for scheme in ("light", "dark"):
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.send("Emulation.setEmulatedMedia", features=media)
        browser.send("Page.navigate", url=page.as_uri())
        browser.until("document.querySelectorAll('svg').length === 3 && document.readyState === 'complete'")
        colours[scheme] = browser.js("getComputedStyle(document.body).backgroundColor")
        shots[scheme] = base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"])
        with Image.open(BytesIO(shots[scheme])) as picture:
            light = sum(picture.convert("L").resize((64, 64)).tobytes()) / 64**2
        assert (light > 128) == (scheme == "light")
    assert colours["light"] != colours["dark"]
    browser.send("Emulation.setDeviceMetricsOverride", width=360, height=740, deviceScaleFactor=2, mobile=True)
    browser.send("Page.navigate", url=page.as_uri())
    browser.until("document.readyState === 'complete' && innerWidth === 360")
    assert browser.js("document.documentElement.scrollWidth") <= 360  # wide tables scroll by themselves
    sizes = "[...document.querySelectorAll('p, td')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    assert min(browser.js(sizes)) >= 14
    # what a chart says is legible there too, and no first column is a ladder of letters
    heights = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    assert min(browser.js(heights)) >= 10
    assert min(browser.js("[...document.querySelectorAll('td:first-child')].map(e => e.clientWidth)")) >= 100
    fetched = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert {url for url in fetched if url.startswith("http")} == set()
    assert not [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
    entries = [e["params"]["entry"]["text"] for e in browser.events if e.get("method") == "Log.entryAdded"]
    assert entries == []
