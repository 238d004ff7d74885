"""Names of the model's own modules for the values of a traced program: `stage2_block3_token_broadcast_q`.

torch.export numbers its operations (`conv2d_11`) and notes which module each came from; coremltools keeps the numbers.
So the modules take their place before the conversion, and Xcode's performance report speaks of the model's layers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch

from dualtoken_deploy.targets.tracing import INPUT, ROOT, path_below

_STACK = "nn_module_stack"


def name_after_modules(program: torch.export.ExportedProgram, inside: str, outputs: Sequence[str]) -> dict[str, str]:
    """Renames the operations of the graph in place; returns {name in the graph: the model's name}, in their order.

    A module of one operation gives it its path, `stage1.block1.local.pw1`; in others the operation follows,
    `stage1.block1/add`, numbered from the second on. A MIL name has letters, digits and underscores alone, so in the
    graph dots and slashes are underscores. What makes an output has the output's name, of `outputs`, and keeps its own
    in the graph, where the converter renames it.
    `inside`: where in what was traced the model itself lies; what is beside it prepares the image (`input`).
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    specs = program.graph_signature.output_specs
    made = {str(spec.arg.name): name for spec, name in zip(specs, outputs, strict=True)}
    paths = [path_of(node, inside) for node in nodes]
    counts = Counter(paths)
    parents = {path[:at] for path in paths for at, letter in enumerate(path) if letter == "."}
    names: dict[str, str] = {}
    taken: Counter[str] = Counter()
    for node, path in zip(nodes, paths, strict=True):
        if node.name in made:
            names[node.name] = made[node.name]
            continue
        leaf = counts[path] == 1 and path not in parents and path not in (INPUT, ROOT)
        name = path if leaf else f"{path}/{operation(node)}"
        taken[name] += 1
        name += f"_{taken[name]}" if taken[name] > 1 else ""
        node._rename(re.sub(r"\W", "_", name))  # torch numbers it where another has the name
        names[node.name] = name
    return names


def operation(node: torch.fx.Node) -> str:
    """What a node does, as torch calls it: `conv2d`, `scaled_dot_product_attention`, `getitem`."""
    schema = getattr(node.target, "_schema", None)
    name: str = getattr(node.target, "__name__", str(node.target)) if schema is None else schema.name.split("::")[1]
    return name


def path_of(node: torch.fx.Node, inside: str) -> str:
    stack = node.meta.get(_STACK)
    return path_below("" if not stack else next(reversed(stack.values()))[0], inside)
