"""Makes the pictures of docs/pictures.md from the bundles of `make demo`, the weights that ship and one more export.

python benchmarks/docs_pictures.py
"""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from dualtoken_deploy import Detector, export
from dualtoken_deploy.bundle.blocks import Calibration
from dualtoken_deploy.bundle.decode import decode
from dualtoken_deploy.data.annotated import OBJECTS, open_annotated
from dualtoken_deploy.data.folders import open_dataset
from dualtoken_deploy.use.compare import compare
from dualtoken_deploy.use.compare import draw as draw_comparison
from dualtoken_deploy.use.diagnose import diagnose
from dualtoken_deploy.use.diagnose import draw as draw_diagnosis
from dualtoken_deploy.use.evaluate import evaluate
from dualtoken_deploy.use.plots import confusion_title, plot_confusion, plot_curves, plot_search
from dualtoken_deploy.use.visualize import visualize

SEARCHED = Path(__file__).resolve().parent / "results" / "int8-search-digits.json"
TRAINED = SEARCHED.with_name("tokenizer-shapes-12-epochs.csv")
IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
FP32, INT8 = (Path("bundles") / f"t-mix-digits-onnxruntime-{precision}" for precision in ("fp32", "int8"))
FOUND = Path("bundles") / "retinanet-t-mix-scenes-detect-onnxruntime-fp32"
NAMED = Path("bundles") / "efficientnet-lite0-onnxruntime-fp32"
PAGE = IMAGES.parent / "serve-page.png"
SCALE = 4  # scenes are small


def search() -> None:
    """The search that benchmarks/int8_search.py kept, on the machine that it names."""
    kept = json.loads(SEARCHED.read_text(encoding="utf-8"))
    machine = kept["machine"]
    calibration = decode(kept, Calibration, str(SEARCHED))
    if calibration.search is not None:
        said = f"benchmarks/int8_search.py; {machine['cpu']}, {machine['cores']} cores; {calibration.quantizer}"
        plot_search(calibration, calibration.search, IMAGES / "search.svg", said)


def comparison() -> None:
    found = compare([FP32, INT8], "digits", rounds=5, seconds=0.3, threads=1)
    for name in ("compare.svg", "compare-dark.svg"):
        draw_comparison(found, IMAGES / name, f"dualtoken compare BUNDLES --data digits --picture {name}")


def drift() -> None:
    draw_diagnosis(diagnose(INT8), IMAGES / "drift.svg", "dualtoken diagnose BUNDLE --picture drift.svg")


def confusion() -> None:
    judged = evaluate(FP32, "digits")
    title = confusion_title(FP32.name, judged.data, judged.images, judged.scores["top1"])
    said = "dualtoken evaluate BUNDLE --data digits --confusion confusion.svg"
    plot_confusion(np.array(judged.confusion), judged.labels, IMAGES / "confusion.svg", title, said)


def curves() -> None:
    """A run that was kept: a tokenizer on `shapes`, on the machine that the caption names."""
    with TRAINED.open(encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    said = "dualtoken train --task tokenize --variant dualtoken-tokenizer-s --data shapes --image-size 64 --epochs 12"
    plot_curves(rows, IMAGES / "curves.svg", ("probe_top1",), f"{said}; Intel Xeon (AMX), 2 virtual cores")


def tokens() -> None:
    photograph = next(path for path in open_dataset("photographs").images if path.name == "coffee.png")
    visualize("shapes", photograph, IMAGES / "tokens.png", "dualtoken visualize shapes coffee.png --output tokens.png")


def found() -> None:
    """What a detector finds in a held-out scene, drawn over it at SCALE times its size."""
    if not FOUND.is_dir():
        export(None, "onnxruntime", weights="scenes-detect", head="retinanet", output=FOUND)
    scene = open_annotated("scenes", OBJECTS, "val")[3].image
    sides = (scene.shape[1] * SCALE, scene.shape[0] * SCALE)
    large = np.array(Image.fromarray(scene).resize(sides, Image.Resampling.BICUBIC))
    with Detector(FOUND) as detect:
        Image.fromarray(detect.draw(large, detect(large))).save(IMAGES / "found.png")


def page() -> None:
    """The server's page after a photograph was chosen, in headless Chromium (apt-get install chromium)."""
    from tests.serving import serving
    from tests.test_serve_browser import Browser

    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "log", f"lite0={NAMED}") as server:
        browser = Browser(Path(folder) / "profile")
        try:
            browser.send("Page.navigate", url=server.addresses["http"])
            browser.until("document.getElementById('model').options.length === 1")
            browser.send("Page.setInterceptFileChooserDialog", enabled=True)
            browser.key("Tab")
            browser.key("Tab")
            browser.key("Enter", "\r")
            chooser = browser.event("Page.fileChooserOpened")
            photograph = str(IMAGES / "coffee.jpg")
            browser.send("DOM.setFileInputFiles", files=[photograph], backendNodeId=chooser["backendNodeId"])
            browser.until("document.querySelectorAll('#classes li').length === 5")
            shot = base64.b64decode(browser.send("Page.captureScreenshot", format="png")["data"])
        finally:
            browser.close()
    with Image.open(io.BytesIO(shot)) as picture:
        picture.convert("RGB").quantize(256).save(PAGE, optimize=True)


PICTURES = {
    "search": search,
    "compare": comparison,
    "drift": drift,
    "confusion": confusion,
    "curves": curves,
    "tokens": tokens,
    "found": found,
    "page": page,
}


if __name__ == "__main__":
    for name in sys.argv[1:] or PICTURES:
        PICTURES[name]()
        print(name)
