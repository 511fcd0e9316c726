"""The list of mutants, each with the check that has to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from rollout_core.testing.reference import ReferencePacker

MUTANTS: Final[dict[str, Mutant]] = {}


@dataclass(frozen=True)
class Mutant:
    """``killed_by``: the id of the check that has to fail on it. ``seen_in``: who has shipped the bug, where somebody has."""

    packer: type[ReferencePacker]
    killed_by: str
    bug: str
    seen_in: str

    @property
    def name(self) -> str:
        return self.packer.__name__

    @property
    def target(self) -> str:
        return f"{self.packer.__module__}:{self.packer.__qualname__}"


def mutant(killed_by: str, seen_in: str = "") -> Callable[[type[ReferencePacker]], type[ReferencePacker]]:
    """Add a packer to the list; its docstring is the bug in words."""

    def add(packer: type[ReferencePacker]) -> type[ReferencePacker]:
        assert packer.__name__ not in MUTANTS
        MUTANTS[packer.__name__] = Mutant(packer, f"packer/{killed_by}", str(packer.__doc__).rstrip("."), seen_in)
        return packer

    return add
