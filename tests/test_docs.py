"""Documentation: the site builds strictly, every command on a page parses, the cheap ones run, quoted errors exist."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from dualtoken_deploy import __version__
from dualtoken_deploy.models.listing import shipped
from tests.commands import prints
from tests.test_messages import PACKAGE, VALUE, parse, texts

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(dualtoken [a-z]+ [^`]+)`")


MENTION = "mention: "  # of a command in a sentence, which need not be whole


def commands(page: Path) -> list[str]:
    """Every dualtoken command of a page, in its fences and in its sentences."""
    text = page.read_text(encoding="utf-8")
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            bare = line.split("  #")[0].removeprefix("- run: ").strip().removeprefix(".venv/bin/")
            found += [part.strip() for part in bare.split("&&") if part.strip().startswith("dualtoken ")]
    found += [MENTION + match for match in INLINE.findall(FENCE.sub("", text)) if " | " not in match]
    return found


EVERY = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_have_commands() -> None:
    assert len(EVERY) > 100


@pytest.mark.parametrize(("page", "command"), EVERY, ids=lambda value: str(value)[-60:])
def test_a_command_on_a_page_parses(page: Path, command: str) -> None:
    words = re.sub(r"\[([^\]]*)\]", r"\1", command.split(" > ")[0]).removeprefix("dualtoken ")
    if "..." in words:
        return  # said to be left out
    try:
        parse(words.removeprefix(MENTION + "dualtoken "))
    except Exception as error:
        if not (command.startswith(MENTION) and "Missing parameter" in str(error)):
            raise


def test_a_command_that_does_not_parse_is_seen() -> None:
    with pytest.raises(Exception, match=r"(?i)no such option"):
        parse("compare --against eager")


@pytest.mark.parametrize("command", ["models", "models --heads", "targets", "doctor", "cache"])
def test_cheap_commands_of_the_pages_run(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prints(capsys, *shlex.split(command), "--json")


def test_commands_that_follow_the_demo_name_its_bundles() -> None:
    """The folders under "Use" are those that the demo makes, or that a command before them makes."""
    demo = (ROOT / "benchmarks" / "demo.py").read_text(encoding="utf-8")
    made = {"efficientnet-lite0-onnxruntime-fp32", "t-mix-digits-onnxruntime-fp32", "t-mix-digits-onnxruntime-int8"}
    assert "efficientnet-lite0-{target}-fp32" in demo  # of onnxruntime and openvino
    assert "t-mix-digits-onnxruntime-{precision}" in demo
    later = {"s-tensorrt-fp16", "make-onnxruntime-fp32"}
    for name in re.findall(r"bundles/([a-z0-9-]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert name in made | later, name


# README


def test_readme_is_a_front_door() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)", text) + re.findall(r'src="([^"]+)"', text):
        assert (ROOT / link).exists(), link


def test_the_picture_is_what_its_command_draws() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import readme_picture as module  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    assert module.FILE.read_text(encoding="utf-8") == module.draw()
    from PIL import ImageFont

    pieces = module.words()
    boxes = []
    for piece in pieces:
        half = ImageFont.load_default(piece.size).getlength(piece.text) / 2
        boxes.append((piece.x - half, piece.y - piece.size, piece.x + half, piece.y))
        at = min(range(len(module.STAGES)), key=lambda i: abs(module.left_of(i) + module.BOX / 2 - piece.x))
        assert boxes[-1][0] >= module.left_of(at), piece.text
        assert boxes[-1][2] <= module.left_of(at) + module.BOX, piece.text
    for (one, first), (two, second) in itertools.combinations(zip(boxes, pieces, strict=True), 2):
        apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
        assert apart, (first.text, second.text)


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "examples").rglob("*.md"))], ids=lambda p: p.name)
def test_no_page_installs_from_an_index_that_has_it_not(page: Path) -> None:
    """The exact wheel of `make wheel` instead."""
    text = page.read_text(encoding="utf-8")
    assert "pip install 'dualtoken-deploy" not in text
    assert "pip install dualtoken-deploy" not in text
    for wheel in re.findall(r"dualtoken_deploy-[0-9a-z.]+-py3-none-any\.whl", text):
        assert wheel == f"dualtoken_deploy-{__version__}-py3-none-any.whl"


# the site


def test_glossary_has_the_words_that_readme_leans_on() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    for word in ("SQNR", "MAC", "gated", "golden", "eager", "INT8", "bundle", "top-1"):
        assert re.search(rf"^\| {word}", text, re.MULTILINE), word


@lru_cache(maxsize=1)
def _messages() -> str:
    found = [t for p in PACKAGE.rglob("*.py") for t in texts(ast.parse(p.read_text(encoding="utf-8")))]
    return "\n".join(re.sub(r"\s+", " ", text) for text in found)


def quoted_errors() -> list[str]:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^\*\*`([^`]+)`\*\*", text, re.MULTILINE)


def test_twenty_errors_are_explained() -> None:
    assert len(quoted_errors()) >= 20


@pytest.mark.parametrize("quoted", quoted_errors())
def test_an_explained_error_is_one_of_the_program(quoted: str) -> None:
    """Its parts between the gaps stand in that order in one message."""
    parts = [re.escape(part.strip(" ,;")) for part in quoted.split("…") if len(part.strip(" ,;")) > 2]
    parts = [
        part.replace(re.escape("[openvino]"), ".*").replace("dualtoken\\ export", "dualtoken export") for part in parts
    ]
    pattern = re.compile(".*".join(part.replace("\\ ", " ") for part in parts))
    assert pattern.search(_messages()), pattern.pattern
    assert VALUE not in quoted


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the site needs the extra [docs]")
def test_counts_on_the_page_of_the_families_are_those_that_are_listed() -> None:
    """Rows of its first tables: `variant`, parameters, the paper's, ..., MACs."""
    text = (ROOT / "docs/models-family.md").read_text(encoding="utf-8")
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`[a-z0-9-]+`", cells[0]) and re.fullmatch(r"\d+\.\d{3}", cells[1]):
            macs = [cell for cell in cells[2:] if re.fullmatch(r"\d+\.\d{3}", cell)]
            found[cells[0].strip("`")] = (cells[1], *macs)
    rows = {r["variant"]: (f"{r['params'] / 1e6:.3f}", f"{r['macs'] / 1e9:.3f}") for r in shipped("variants")}
    systems = {name for name in rows if name.startswith(("lightvit", "dualformer", "vim2"))}
    assert {name: found.get(name) for name in systems} == {name: rows[name] for name in systems}


def test_the_tests_that_a_page_names_exist() -> None:
    """docs/hardening.md says which test guards what."""
    named = set(
        re.findall(r"`tests/(\w+\.py)::(test_\w+)`", (ROOT / "docs" / "hardening.md").read_text(encoding="utf-8"))
    )
    assert len(named) > 60
    for file in {file for file, _ in named}:
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert {name for where, name in named if where == file} <= there, file


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    def build(place: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(place)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = build(tmp_path / "site")
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "cli.html", "api.html", "troubleshooting.html", "glossary.html"} <= {p.name for p in pages}
    for page in pages:
        loaded = re.findall(
            r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]+)"', page.read_text(encoding="utf-8")
        )
        assert not [url for url in loaded if 'rel="canonical"' not in url], (page.name, loaded)
    text = (tmp_path / "site" / "cli.html").read_text(encoding="utf-8")
    assert "--search-seconds" in text
    assert "label" in text
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "warm_up" in api
    broken = ROOT / "docs" / "zz-broken-link.md"
    broken.write_text("[nowhere](no-such-page.md)\n", encoding="utf-8")
    try:
        assert build(tmp_path / "broken").returncode != 0
    finally:
        broken.unlink()


def test_a_program_that_uses_the_package_is_typed(tmp_path: Path) -> None:
    """py.typed: mypy sees the types of an editable install, and what does not fit them."""
    program = tmp_path / "app.py"
    program.write_text(
        "from dualtoken_deploy import Classifier\n"
        "classify = Classifier('b', top=3)\n"
        "label: str | None = classify('photo.jpg').label\n"
        "wrong: int = classify('photo.jpg').label\n"
    )
    # the settings and the cache of `make check`: what that has seen is not looked at again
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    command = [sys.executable, "-m", "mypy", *settings, str(program)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1, done.stdout
    assert 'app.py:4: error: Incompatible types in assignment (expression has type "str | None"' in errors[0]
