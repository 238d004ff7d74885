"""golden_json.py BUNDLE > golden.json: golden input and logits of a bundle with image input, for the self-test."""

from __future__ import annotations

import base64
import json
import sys

import numpy as np

from dualtoken_deploy import Bundle


def golden_json(bundle: Bundle) -> dict[str, object]:
    """The first golden picture as base64 RGBA bytes, its logits, and the SQNR that the manifest asks for in dB."""
    if bundle.manifest.input.kind != "image":
        raise SystemExit("the Swift example takes pictures; export the bundle with --input image")
    picture = bundle.golden["input"][0]  # (H, W, 3) uint8
    rgba = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], axis=2)
    return {
        "width": picture.shape[1],
        "height": picture.shape[0],
        "rgbaBase64": base64.b64encode(rgba.tobytes()).decode("ascii"),
        "logits": [float(v) for v in bundle.golden["logits"][0]],
        "minimumSqnrDb": bundle.manifest.tolerance.sqnr_db,
    }


if __name__ == "__main__":
    json.dump(golden_json(Bundle.open(sys.argv[1])), sys.stdout)
