"""Rewrites weights of when DualToken-ViT's token module had one LayerNorm: both of today's begin as the one.

    python benchmarks/convert_token_norms.py FILE.safetensors...

What a model computes does not change; the header in the file and the JSON beside it stay as they are. The loader does
the same with every older file, and says so each time; this was run once over the weights that ship.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dualtoken_deploy.models.published import split_token_norms
from dualtoken_deploy.train import checkpoint


def main(*files: str) -> None:
    for name in files:
        tensors, header = checkpoint.load_tensors(Path(name))
        both = split_token_norms(tensors)
        if len(both) == len(tensors):
            print(f"{name}: has both norms already")
            continue
        checkpoint.save_tensors(Path(name), both, header)
        print(f"{name}: {len(both) - len(tensors)} tensors more")


if __name__ == "__main__":
    main(*sys.argv[1:])
