"""Makes the weights that ship with the package from a training run: float16, checked on the whole held-out part.

    python benchmarks/ship_weights.py RUN NAME COMMAND...

RUN: a run's folder. NAME: a word of BUILT_IN_WEIGHTS; those of dense tasks begin with the data's name and a dash.
COMMAND: the commands that made the run, for the JSON beside the weights.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from dualtoken_deploy.machine import describe_machine
from dualtoken_deploy.models.weights import BUILT_IN_WEIGHTS
from dualtoken_deploy.train import checkpoint
from dualtoken_deploy.use.evaluate import evaluate


def main(run: str, name: str, *commands: str) -> None:
    tensors, header = checkpoint.load_tensors(Path(run) / checkpoint.BEST)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "half.safetensors"
        checkpoint.save_weights(draft, tensors, header, half=True)
        found = evaluate(draft, name.partition("-")[0])
        figures = {**found.scores, **({} if found.confusion else {"per_class": found.per_class})}
        images = found.images
    machine = {key: describe_machine()[key] for key in ("cpu", "isa", "cores", "os", "python")}
    header |= {"commands": list(commands), "machine": machine, "float16": figures}
    header["config"].pop("init")  # a path of the machine it ran on; the commands say it
    target = BUILT_IN_WEIGHTS[name]
    target.parent.mkdir(exist_ok=True)
    checkpoint.save_weights(target, tensors, header, half=True)
    print(f"{target}: {figures} of {images} pictures, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
