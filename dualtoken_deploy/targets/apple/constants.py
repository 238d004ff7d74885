"""What a traced program computes from its weights alone is computed once, here, with torch.

A converter's front end has fewer operations than a model needs to prepare its constants: position embeddings that are
interpolated, indices of relative positions, masks of ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, TensorArgument

_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def fold_constants(program: torch.export.ExportedProgram) -> int:
    """Replaces, in place, every value that depends on no input by a constant. Returns how many operations went.

    What is random, and what has no one tensor as its value, stays.
    """
    graph, known = program.graph, _given(program)
    folded: list[torch.fx.Node] = []
    for node in graph.nodes:
        if node.op == "call_function" and _is_foldable(node, known):
            args, kwargs = (torch.fx.map_arg(part, lambda n: known[n]) for part in (node.args, node.kwargs))
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor):
                known[node] = value
                folded.append(node)
    for node in folded:
        if any(user not in known for user in node.users):
            node.replace_all_uses_with(_lift(program, node, known[node]))
    for node in reversed(folded):
        if not node.users:
            graph.erase_node(node)
    graph.lint()
    program.graph_module.recompile()
    return len(folded)


def _given(program: torch.export.ExportedProgram) -> dict[torch.fx.Node, Tensor]:
    """The tensors of the program's weights, by the node that stands for each."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[torch.fx.Node, Tensor] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in _KINDS and spec.target is not None and not isinstance(spec.arg, ConstantArgument):
            held: Any = program.state_dict.get(spec.target, program.constants.get(spec.target))
            if isinstance(held, Tensor):
                found[nodes[spec.arg.name]] = held
    return found


def _is_foldable(node: torch.fx.Node, known: dict[torch.fx.Node, Tensor]) -> bool:
    random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    mutable = getattr(getattr(node.target, "_schema", None), "is_mutable", True)
    is_output = any(user.op == "output" for user in node.users)
    return not random and not mutable and not is_output and all(n in known for n in node.all_input_nodes)


def _lift(program: torch.export.ExportedProgram, node: torch.fx.Node, value: Tensor) -> torch.fx.Node:
    """A placeholder of the program for a constant, before those of its inputs."""
    specs = program.graph_signature.input_specs
    place = next(i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT)
    first = next(n for n in program.graph.nodes if n.op == "placeholder" and n.name == specs[place].arg.name)
    with program.graph.inserting_before(first):
        made: torch.fx.Node = program.graph.placeholder(f"c_{node.name}")
    made.meta["val"] = node.meta.get("val")
    target = f"folded_{made.name}"
    specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(made.name), target))
    program.constants[target] = value.detach().contiguous().clone()
    return made
