"""golden_json.py BUNDLE > golden.json: golden input and logits of a bundle with image input, for the self-test."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Sequence

import numpy as np

from dualtoken_deploy import Bundle
from dualtoken_deploy.errors import DualTokenError, UsageError


def golden_json(bundle: Bundle) -> dict[str, object]:
    """The first golden picture as base64 RGBA bytes, its logits, and the SQNR that the manifest asks for in dB.

    Raises UsageError on a bundle that takes no pictures.
    """
    if bundle.manifest.input.kind != "image":
        raise UsageError(f"{bundle.path} takes tensors, the Swift example pictures; export it with --input image")
    picture = bundle.golden["input"][0]  # (H, W, 3) uint8
    rgba = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], axis=2)
    return {
        "width": picture.shape[1],
        "height": picture.shape[0],
        "rgbaBase64": base64.b64encode(rgba.tobytes()).decode("ascii"),
        "logits": [float(v) for v in bundle.golden["logits"][0]],
        "minimumSqnrDb": float(bundle.manifest.tolerance.sqnr_db),
    }


def main(arguments: Sequence[str]) -> int:
    """The exit code, as the command line has it."""
    if len(arguments) != 1:
        print("usage: golden_json.py BUNDLE > golden.json", file=sys.stderr)
        return 2
    try:
        data = golden_json(Bundle.open(arguments[0]))
    except DualTokenError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    json.dump(data, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
