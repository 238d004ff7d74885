"""Makes the protobuf modules of the gRPC side anew: python benchmarks/generate_oip.py (needs grpcio-tools)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "dualtoken_deploy/serve/oip"


def main() -> None:
    outputs = (f"--{kind}_out=." for kind in ("python", "pyi"))
    proto = f"{FOLDER}/open_inference.proto"
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, proto], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
