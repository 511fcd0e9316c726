"""The list of mutants, each with the check that has to find it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

from rollout_core.testing.registry import SubjectKind

MUTANTS: Final[dict[str, Mutant]] = {}
#: By kind, what mutants are made of.
SOUND: Final[dict[str, str]] = {
    "packer": "reference",
    "tracker": "rollout_core-tracker",
    "carrier": "reference-carrier",
    "worker": "fake-worker",
}

_Subject = TypeVar("_Subject", bound=type[Any])


@dataclass(frozen=True)
class Mutant:
    """``killed_by``: the id of the check that has to fail on it. ``seen_in``: who has shipped the bug, or under what it shows,
    where that is known. ``sound``: the short name of the subject without the bug."""

    kind: SubjectKind
    subject: type[Any]
    killed_by: str
    bug: str
    seen_in: str
    sound: str

    @property
    def name(self) -> str:
        return self.subject.__name__

    @property
    def target(self) -> str:
        return f"{self.subject.__module__}:{self.subject.__qualname__}"


def mutants_of(kind: SubjectKind) -> dict[str, Mutant]:
    """The mutants of a kind of subject, by name."""
    return {name: found for name, found in MUTANTS.items() if found.kind == kind}


def _mutant(kind: SubjectKind, killed_by: str, seen_in: str = "", *, sound: str = "") -> Callable[[_Subject], _Subject]:
    """Add a class to the list; its docstring is the bug in words."""

    def add(subject: _Subject) -> _Subject:
        name = subject.__name__
        assert name not in MUTANTS
        bug = " ".join(str(subject.__doc__).split()).rstrip(".")
        MUTANTS[name] = Mutant(kind, subject, f"{kind}/{killed_by}", bug, seen_in, sound or SOUND[kind])
        return subject

    return add


#: A packer with a bug, a tracker, a carrier and a worker with one: ``@mutant("B1-order", "who#1")``.
mutant: Final = partial(_mutant, "packer")
tracker_mutant: Final = partial(_mutant, "tracker")
carrier_mutant: Final = partial(_mutant, "carrier")
worker_mutant: Final = partial(_mutant, "worker")
