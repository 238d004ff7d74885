"""The rows of DualToken-ViT's ablation tables, each as a variant with options, beside what the paper prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from dualtoken_deploy.models.count import count_macs, count_params
from dualtoken_deploy.models.registry import build, make_config


@dataclass(frozen=True)
class Ablation:
    """One row: `table` and `row` as the paper names them, parameters in millions, FLOPs (MACs) in billions."""

    table: int
    row: str
    variant: str
    options: dict[str, Any] = field(default_factory=dict)
    paper_params_m: float = 11.9
    paper_macs_g: float = 1.05


ABLATIONS = (
    Ablation(6, "Normal", "s", {"token_method": "normal", "global_tokens": 8}, 13.0, 0.99),
    Ablation(6, "Normal*", "s", {"token_method": "normal-star", "global_tokens": 8}, 13.4, 0.98),
    Ablation(6, "Position-aware", "s"),
    Ablation(7, "0", "s", {"global_tokens": 0}, 10.8, 0.99),
    Ablation(7, "3x3", "s", {"global_tokens": 3}, 11.9, 0.93),
    Ablation(7, "4x4", "s", {"global_tokens": 4}, 11.9, 0.95),
    Ablation(7, "5x5", "s", {"global_tokens": 5}, 11.9, 0.98),
    Ablation(7, "6x6", "s", {"global_tokens": 6}, 11.9, 1.01),
    Ablation(7, "7x7", "s"),
    Ablation(7, "8x8", "s", {"global_tokens": 8}, 11.9, 1.10),
    Ablation(8, "Window Self-attention", "s-mix", {"local_attention": "window"}, 10.8, 0.92),
    Ablation(8, "Conv Encoder", "s-mix", {}, 11.4, 1.04),
    Ablation(9, "one-step", "s-mix", {"downsampling": "onestep"}, 11.3, 1.01),
    Ablation(9, "step-wise", "s-mix", {}, 11.4, 1.04),
)


def describe_ablations() -> list[dict[str, Any]]:
    """Every row with its counted parameters and MACs at 224x224, and the paper's figures."""
    rows = []
    for ablation in ABLATIONS:
        with torch.device("meta"):  # shapes alone
            model = build(make_config(ablation.variant, **ablation.options)).eval()
        rows.append(
            {
                "table": ablation.table,
                "row": ablation.row,
                "variant": ablation.variant,
                "options": ablation.options,
                "params": count_params(model),
                "macs": count_macs(model, (224, 224)),
                "paper_params_m": ablation.paper_params_m,
                "paper_macs_g": ablation.paper_macs_g,
            }
        )
    return rows
