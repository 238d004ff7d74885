"""Converts a saved torch program to Core AI in a process of its own: its compiler ends the process when it fails.

python -m dualtoken_deploy.targets.coreai.worker PROGRAM.pt2 OUTPUT.aimodel REQUEST.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(program: Path, output: Path, request: Path) -> None:
    """`request` holds "input" (a name), "outputs" (names), "author", "license", "description"."""
    import torch
    from coreai.runtime import AIModelAssetMetadata
    from coreai_torch import TorchConverter, get_decomp_table

    # importing the model's own operators is not needed: the form that is saved has none
    wanted = json.loads(request.read_text(encoding="utf-8"))
    decomposed = torch.export.load(program).run_decompositions(get_decomp_table())
    converter = TorchConverter().add_exported_program(
        decomposed, input_names=[wanted["input"]], output_names=wanted["outputs"]
    )
    metadata = AIModelAssetMetadata()
    metadata.author, metadata.license = wanted["author"], wanted["license"]
    metadata.model_description = wanted["description"]
    converter.to_coreai().save_asset(output, metadata)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
