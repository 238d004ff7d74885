"""What executes of a .pte, from what is in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dualtoken_deploy.targets.executorch.backends import Backend
from dualtoken_deploy.targets.executorch.program import Contents
from dualtoken_deploy.targets.runner import Execution

REFERENCE = "reference"  # behind the dtypes of what a stand-in executes, and its name as a device


def execution_of(found: Contents, backend: Backend, names: Sequence[str] = ()) -> Execution:
    """Operators by kind with the dtype that they compute in; those that are left to the plain kernels say so in it.
    `names`: of the products, in the order that they run in, by the model's names."""
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
    products = found.products
    named = len(names) == len(products)  # else one cannot be told from another, and none is vouched for
    nodes = {name: p.dtype for name, p in zip(names, products, strict=True)} if named else {}
    return Execution(dict(sorted(kinds.items())), precision, nodes, notes=tuple(notes))
