"""Weights files of other makers and of earlier versions, under the names that our models have.

Source of LightViT's names: the authors' code, hunto/image_classification_sota, `lib/models/lightvit.py`. Both networks
have the same tensors, so that a file is renamed and nothing in it is computed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]

# What the authors call a thing, and what it is called here; with the stage's and block's numbers taken off.
_STEM = {
    **{f"stem.{3 * i}": f"stem.conv{i + 1}.conv" for i in range(4)},
    **{f"stem.{3 * i + 1}": f"stem.conv{i + 1}.norm" for i in range(4)},
    "proj": "stem.proj",
    "norm": "stem.norm",
}
_MERGE = {  # those of the image tokens and of the global tokens are one module there
    "norm": "merge{0}.norm",
    "reduction": "merge{0}.reduce",
    "res_proj": "merge{0}.residual",
    "norm2": "token_merge{0}.norm",
    "proj": "token_merge{0}.proj",
}
_BLOCK = {
    "norm1": "norm",
    "attn.qkv": "attention.qkv",
    "attn.kv_global": "attention.kv_global",
    "attn.proj": "attention.proj",
    "attn.relative_position_bias_table": "attention.position_bias",
    "norm2": "ffn.norm",
    "mlp.fc1": "ffn.fc1",
    "mlp.fc2": "ffn.fc2",
    **{f"mlp.attn.{n}": f"ffn.bidim.{n}" for n in ("norm", "global_reduce", "local_reduce")},
    **{f"mlp.attn.{n}": f"ffn.bidim.{n}" for n in ("channel_select", "spatial_select")},
}
_TOP = {"norm": "head.norm", "neck.0": "head.neck", "neck.1": "head.neck_norm", "head": "head.fc"}
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

# (global tokens, channels of stage 1) of the published networks
_VARIANTS = {(8, 64): "lightvit-t", (16, 96): "lightvit-s", (24, 128): "lightvit-b"}


def is_published_lightvit(state: State) -> bool:
    return "global_token" in state and "patch_embed.proj.weight" in state


def published_variant(state: State) -> tuple[str, int] | None:
    """(variant, classes) of a published LightViT; None: of another network, or of none of its three sizes."""
    if not is_published_lightvit(state) or "head.weight" not in state:
        return None
    name = _VARIANTS.get((state["global_token"].shape[-2], state["global_token"].shape[-1]))
    return None if name is None else (name, len(state["head.weight"]))


def rename_lightvit(state: State) -> dict[str, Tensor]:
    """A published LightViT's tensors under our names; keys that are none of its own stay as they are.

    `relative_position_index` is left out: it is no weight, and our model makes it.
    """
    return {_ours(k): t for k, t in state.items() if not k.endswith(".attn.relative_position_index")}


def _ours(key: str) -> str:
    if key == "global_token":
        return "global_tokens"
    module, _, tensor = key.rpartition(".")
    if tensor not in _TENSORS:
        module, tensor = key, ""
    found: str | None
    if match := re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", module):
        stage, place, rest = int(match[1]), int(match[2]), match[3]
        if stage and place == 0:  # the merge that leads into this stage
            found = _MERGE.get(rest)
            found = None if found is None else found.format(stage)
        else:
            found = _BLOCK.get(rest)
            number = place + 1 if stage == 0 else place
            found = None if found is None else f"stage{stage + 1}.block{number}.{found}"
    elif module.startswith("patch_embed."):
        found = _STEM.get(module.removeprefix("patch_embed."))
    else:
        found = _TOP.get(module)
    if found is None:
        return key
    return f"{found}.{tensor}" if tensor else found


def split_token_norms(state: State) -> dict[str, Tensor]:
    """DualToken-ViT's weights of when the token module had one LayerNorm where there are two now.

    Both begin as the one, so that the model computes what it did. Files that have both, or no global tokens, or another
    network, come back as they are.
    """
    if not any(k.endswith("global_tokens") for k in state):
        return dict(state)
    added = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(.*\.token)\.norm\.(weight|bias)", key)
        if match and (twin := f"{match[1]}.norm_g.{match[2]}") not in state:
            added[twin] = tensor.clone()
    return {**state, **added}


def join_token_norms(state: State) -> dict[str, Tensor]:
    """The other way: without the second norm where it is the first one's twin everywhere, else as it is."""
    twins = {k: k.replace(".token.norm_g.", ".token.norm.") for k in state if ".token.norm_g." in k}
    if not all(state[k].equal(state[twin]) for k, twin in twins.items()):
        return dict(state)
    return {k: t for k, t in state.items() if k not in twins}
