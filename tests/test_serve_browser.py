"""The page in a real browser: headless Chromium, driven over its debugging pipe, offline but for our server."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dualtoken_deploy import predict
from dualtoken_deploy.tasks.draw import colour
from tests.serving import Server, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_SECONDS = 40


class Browser:
    """One page. Commands and events are JSON ended by a null byte, on the descriptors 3 and 4 of the browser."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        self._in, ours = os.pipe()
        theirs, self._out = os.pipe()
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                 "--disable-dev-shm-usage", "--window-size=900,1000", f"--user-data-dir={profile}")  # fmt: skip
        shell = f'exec "$0" "$@" 3<&{theirs} 4>&{ours}'  # the numbers that --remote-debugging-pipe means
        self._process = subprocess.Popen(
            ["bash", "-c", shell, CHROMIUM, *flags, "about:blank"],
            pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(ours)
        self._data, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "DOM", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def js(self, expression: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, expression: str) -> Any:
        """The value of an expression once it is true; what it reads may not be there yet."""
        careful = f"(() => {{ try {{ return {expression} }} catch {{ return null }} }})()"
        end = time.monotonic() + WAIT_SECONDS
        while not (value := self.js(careful)):
            assert time.monotonic() < end, (
                f"never true: {expression}; the page says: {self.js('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def key(self, name: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13}[name]
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def event(self, method: str) -> dict[str, Any]:
        """The next event of a kind."""
        while True:
            found = next((e for e in self.events if e.get("method") == method), None)
            if found is not None:
                self.events.remove(found)
                parameters: dict[str, Any] = found["params"]
                return parameters
            self.events.append(self._read())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._data:
            ready, _, _ = select.select([self._in], [], [], WAIT_SECONDS)
            part = os.read(self._in, 2**16) if ready else b""
            assert part, "the browser has gone or says nothing"
            self._data += part
        message, _, self._data = self._data.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@pytest.fixture(scope="module")
def server(small_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bundles = f"small={small_bundle()}", f"floats:2={small_bundle(input_kind='tensor')}"
    with serving(tmp_path_factory.mktemp("serve") / "log", *bundles) as running:
        yield running


@pytest.fixture(scope="module")
def dense_server(dense_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("dense") / "log", f"areas={dense_bundle('pspnet', argmax=True)}") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here; on Debian: apt-get install chromium")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


def requested(browser: Browser) -> set[str]:
    urls = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    return {url for url in urls if url.startswith("http")}


def labels(browser: Browser) -> list[str]:
    found: list[str] = browser.js(
        "[...document.querySelectorAll('#classes .name span:first-child')].map(e => e.textContent)"
    )
    return found


def test_a_photo_is_classified_by_keyboard_and_by_drop(
    server: Server, browser: Browser, small_bundle: Callable[..., Path], photograph: Path, tmp_path: Path
) -> None:
    browser.send("Page.navigate", url=server.addresses["http"])
    browser.until("document.getElementById('model').options.length === 2")
    assert browser.js("document.getElementById('state').textContent") == "2 models ready"

    # by keyboard alone: Tab to the model, Tab to the drop zone, Enter opens the chooser
    browser.send("Page.setInterceptFileChooserDialog", enabled=True)
    for expected in ("model", "drop"):
        browser.key("Tab")
        assert browser.js("document.activeElement.id") == expected
    browser.key("Enter", "\r")
    chooser = browser.event("Page.fileChooserOpened")
    browser.send("DOM.setFileInputFiles", files=[str(photograph)], backendNodeId=chooser["backendNodeId"])
    browser.until("document.querySelectorAll('#classes li').length === 5 && !document.getElementById('result').hidden")
    (want,) = predict(small_bundle(), [photograph], top=5)
    assert labels(browser) == [guess.label for guess in want.answers]
    shares = browser.js("[...document.querySelectorAll('#classes progress')].map(e => e.value)")
    np.testing.assert_allclose(shares, [guess.probability for guess in want.answers], atol=1e-5)
    facts = browser.js("document.getElementById('facts').innerText")
    assert "small:1" in facts
    assert "tiny-mix, onnxruntime, fp32" in facts
    assert "ms" in facts

    shot = base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"])
    (tmp_path / "page.png").write_bytes(shot)
    with Image.open(BytesIO(shot)) as picture:
        assert picture.width >= 600
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 1000, "the photograph is on the page"

    # dropped, and asked of the other model: what is no picture says so, in the page
    drop = "const d = new DataTransfer(); d.items.add(new File(['hello'], 'a.jpg')); document.getElementById('drop')"
    browser.js(f"{{{drop}.dispatchEvent(new DragEvent('drop', {{dataTransfer: d, cancelable: true}}))}}")
    browser.until("!document.getElementById('error').hidden")
    assert "not a JPEG" in browser.js("document.getElementById('error').textContent")
    assert browser.js("document.getElementById('result').hidden")

    browser.send("Page.navigate", url=f"{server.addresses['http']}/docs")
    browser.until("document.querySelectorAll('h3').length > 10")
    assert "POST /v2/models/{model}/infer" in browser.js("document.body.innerText")
    assert all(url.startswith(server.addresses["http"]) for url in requested(browser)), "something from elsewhere"
    assert not [e for e in browser.events if e.get("method") == "Runtime.exceptionThrown"]
    entries = [e["params"]["entry"] for e in browser.events if e.get("method") == "Log.entryAdded"]
    assert [e for e in entries if e["level"] == "error" and "400" not in e["text"]] == []


def test_areas_lie_over_a_photo_and_random_weights_and_waiting_are_said(
    dense_server: Server, browser: Browser, tmp_path: Path
) -> None:
    """A picture smaller than its place is shown larger, and what is drawn over it covers all of it."""
    Image.fromarray(np.random.default_rng(3).integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    browser.send("Page.navigate", url=dense_server.addresses["http"])
    browser.until("document.getElementById('model').value === 'areas:1'")
    assert browser.js("document.getElementById('random').checkVisibility()")
    assert "random weights" in browser.js("document.getElementById('random').textContent")
    browser.js(
        "window.busy = []; new MutationObserver(() => busy.push(document.getElementById('busy').checkVisibility()))"
        ".observe(document.getElementById('busy'), {attributes: true})"
    )
    data = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    browser.js(
        f"{{const bytes = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0)); const d = new DataTransfer();"
        "d.items.add(new File([bytes], 'a.png', {type: 'image/png'})); document.getElementById('drop')"
        ".dispatchEvent(new DragEvent('drop', {dataTransfer: d, cancelable: true}))}"
    )
    browser.until("document.getElementById('areas').naturalWidth > 0 && !document.getElementById('result').hidden")
    assert browser.until("busy.length === 2 && busy") == [True, False]
    photo, areas = (
        browser.js(f"(r => [r.x, r.y, r.width, r.height])(document.getElementById('{name}').getBoundingClientRect())")
        for name in ("photo", "areas")
    )
    assert photo == areas
    assert photo[2] >= 200
    painted = browser.js("[...document.querySelectorAll('.painted')].map(e => e.style.getPropertyValue('--class'))")
    found = dense_server.ask("POST", "/v2/models/areas/classify?top=5", (tmp_path / "a.png").read_bytes()).json
    assert painted == ["rgb({} {} {})".format(*colour(one["index"])) for one in found["predictions"]]
