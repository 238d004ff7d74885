"""Converts a saved torch program to a .tflite, in the converter's environment: this file knows nothing of ours.

python worker.py PROGRAM.pt2 OUTPUT.tflite
"""

from __future__ import annotations

import os
import sys


def main(program: str, output: str) -> None:
    """The program's nodes say by their module stack what the values in the file are to be called."""
    # one TFLite operator for one of torch's; otherwise many go by way of JAX, in which the averaged axis of a mean is
    # lost and put back by a reshape each time
    os.environ["LITERT_TORCH_FULL_TFL_DECOMPS"] = "1"
    import litert_torch
    import torch

    saved = torch.export.load(program)
    arguments, _ = saved.example_inputs
    litert_torch.convert(saved.module(), arguments).export(output)


if __name__ == "__main__":
    main(*sys.argv[1:3])
