"""Raw files for the C++ examples: python raw.py BUNDLE OUT [PICTURE]

Writes OUT/image.rgb, the bundle's golden input or PICTURE as the bundle's contract wants it, and, for the former,
OUT/golden.f32, the eager logits for it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from dualtoken_deploy import Bundle
from dualtoken_deploy.data.images import load_batch


def main() -> None:
    bundle, out = Bundle.open(sys.argv[1]), Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 3:
        image = load_batch([sys.argv[3]], bundle.manifest.input)
    else:
        image = bundle.golden["input"]
        (out / "golden.f32").write_bytes(np.ascontiguousarray(bundle.golden["logits"], np.float32).tobytes())
    (out / "image.rgb").write_bytes(np.ascontiguousarray(image).tobytes())


if __name__ == "__main__":
    main()
