"""Values inside a float model, whichever program they are read from."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

from dualtoken_deploy.bundle.manifest import Manifest
from dualtoken_deploy.bundle.store import Bundle
from dualtoken_deploy.numerics import Array
from dualtoken_deploy.targets.table import Target

Tell = Callable[[str], None]
Traced = TypeVar("Traced")


class Last(Generic[Traced]):
    """Remembers what was traced last: several bundles of one model are often diagnosed in a row, and one graph of a
    model, which holds its weights, is enough in memory."""

    def __init__(self) -> None:
        self._known: dict[str, Traced] = {}

    def get(self, manifest: Manifest, settings: Sequence[object], trace: Callable[[], Traced]) -> Traced:
        """What `trace` gave for this model, input and settings, traced anew where it was not the last."""
        key = json.dumps(
            [manifest.variant, dict(manifest.options), asdict(manifest.weights), manifest.input.to_json(), *settings]
        )
        if key not in self._known:
            self._known.clear()
            self._known[key] = trace()
        return self._known[key]


@dataclass(frozen=True)
class Insides:
    """`kinds`: the values that are compared, in the order that they are made, and the operations that make them.

    `values`: each of them for every input, joined along the first axis. `edges`: of every operation, what it reads and
    what it makes. `tokens` turns a value to the layout that eager has, (B, N, C) for tokens.
    """

    kinds: Mapping[str, str]
    values: Mapping[str, Array]
    edges: Sequence[tuple[Iterable[str], Iterable[str]]]
    tokens: Callable[[Array], Array]

    def sources(self, seen: set[str]) -> dict[str, set[str]]:
        """For each value those of `seen` that it is computed from, through values that are not in it."""
        found: dict[str, set[str]] = {}
        for read, made in self.edges:
            near: set[str] = set()
            for name in read:
                near |= {name} if name in seen else found.get(name, set())
            found.update(dict.fromkeys(made, near))
        return found


@dataclass(frozen=True)
class Look:
    """How to look into the bundles of a target: the float values, the bundle's own, and what computes the latter if
    that is not the target's runtime."""

    expected: Callable[[Bundle, Array, Tell], Insides]
    actual: Callable[[Bundle, Sequence[str], Array], dict[str, Array]]
    engine: str | None = None


def open_look(target: Target) -> Look:
    """The LOOK of a target's folder."""
    look: Look = importlib.import_module(f"dualtoken_deploy.targets.{target.folder}.look").LOOK
    return look
