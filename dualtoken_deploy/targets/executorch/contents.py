"""What executes of a .pte, from what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from dualtoken_deploy.targets.executorch.backends import Backend
from dualtoken_deploy.targets.executorch.program import Contents, Node
from dualtoken_deploy.targets.runner import Execution

REFERENCE = "reference"  # behind the dtypes of what a stand-in executes, and its name as a device
NAMELESS: Mapping[str, int] = MappingProxyType({})


def execution_of(found: Contents, backend: Backend, names: Mapping[str, int] = NAMELESS) -> Execution:
    """Operators by kind with the dtype that they compute in; those that are left to the plain kernels say so in it.
    `names`: MACs of the products by the model's names."""
    mark = f" ({REFERENCE})" if backend.stand_in else ""
    kinds: Counter[str] = Counter(node.kind for node in found.nodes)
    dtypes: dict[str, Counter[str]] = {}
    for node in found.nodes:
        dtypes.setdefault(node.kind, Counter())[node.dtype + mark] += 1
    for kind in found.outside:
        kinds[kind] += 1
        dtypes.setdefault(kind, Counter())[f"outside {backend.title}"] += 1
    precision = {kind: tuple(t for t, _ in counts.most_common()) for kind, counts in sorted(dtypes.items())}
    inside, pieces = len(found.nodes), len(found.delegates)
    notes = [f"{backend.title} takes {inside} of {inside + len(found.outside)} operators, in {pieces} pieces"]
    if found.outside:
        counts = Counter(found.outside)
        notes.append(f"outside it: {', '.join(f'{n} {kind}' for kind, n in counts.most_common())}")
    if backend.stand_in:
        notes.append(f"lowered to {backend.title}, not run by it: that takes {backend.where}")
    nodes = {name: node.dtype for name, node in by_name(names, found.products).items()}
    return Execution(dict(sorted(kinds.items())), precision, nodes, notes=tuple(notes))


def by_name(names: Mapping[str, int], products: Sequence[Node]) -> dict[str, Node]:
    """The products of a file, in its order, by the model's names, each with its MACs and in the order of the program.

    Branches that do not depend on each other may have changed places in the file, so the n-th name of so many MACs is
    the n-th product of as many. Where the file has more or fewer of them, as those left to plain kernels, none is
    vouched for.
    """
    asked, there = Counter(names.values()), Counter(node.macs for node in products)
    left = {
        macs: iter([node for node in products if node.macs == macs]) for macs in asked if asked[macs] == there[macs]
    }
    return {name: next(left[macs]) for name, macs in names.items() if macs in left}
