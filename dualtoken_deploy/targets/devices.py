"""A kind of device, as a row of a target: the way in for those who know their hardware, not our names."""

from __future__ import annotations

from dataclasses import dataclass

BUILD = "dualtoken build BUNDLE"


@dataclass(frozen=True)
class Device:
    """What somebody has. `precision` is a good first one, `options` are export's; `then`: commands that follow;
    `where` each of them runs."""

    name: str
    precision: str
    where: str
    options: str = ""
    then: tuple[str, ...] = ()

    def commands(self, target: str) -> tuple[str, ...]:
        """What to type, the model being S."""
        words = ("dualtoken export --variant s --target", target, "--precision", self.precision, self.options)
        return (" ".join(word for word in words if word), *self.then)
