"""What every target that traces a module shares: where the model lies in what is traced, and why tracing failed."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from dualtoken_deploy.deploy.forms import ImageInput
from dualtoken_deploy.models.named_outputs import NamedOutputs

INPUT, ROOT = "input", "model"  # names of what prepares the image, and of the model's own forward


class Around(nn.Module):
    """A module that a target puts around the model; `inside` is the model's name in it."""

    inside: ClassVar[str] = "model"


def own_path(module: nn.Module) -> str:
    """The path in a traced module at which the model itself lies: behind what prepares its picture, and inside of what
    names its outputs."""
    path = []
    while not isinstance(module, NamedOutputs):
        if isinstance(module, Around):
            path.append(module.inside)
        elif isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], ImageInput):
            path.append("1")
        else:
            return ".".join(path)
        module = module.get_submodule(path[-1])
    return ".".join([*path, "model"])


def path_below(path: str, inside: str) -> str:
    """A module's path in the model; INPUT where it is beside the model, ROOT where it is the model or around it."""
    if path == inside or not path or inside.startswith(f"{path}."):
        return ROOT
    if not inside:
        return path
    return path.removeprefix(f"{inside}.") if path.startswith(f"{inside}.") else INPUT
