"""The registry of checks: one for packers, trackers, workers and carriers. An id says which subject, which clause and what: every
check has one that never changes its meaning, such as ``packer/B3-alignment``."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import msgspec
from hypothesis.strategies import SearchStrategy

SubjectKind: TypeAlias = Literal["packer", "tracker", "worker", "carrier"]
#: Sets of checks, oldest first. A level never changes once released: later checks come with a later level.
LEVELS: Final = ("2026.1",)

_ID: Final = re.compile(r"(packer|tracker|worker|carrier)/([BTXMW]\d+)-([a-z0-9]+(?:-[a-z0-9]+)*)")
_CHECKS: Final[dict[str, Check]] = {}


class Violation(AssertionError):
    """A clause does not hold; the message says where, the model beside what came."""


class Skipped(Exception):
    """A check cannot be judged on this subject; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check. ``run(subject, case)`` raises ``Violation``; any other exception is reported as one.

    ``needs``: capabilities without which it is skipped. ``cases``: from the subject's capabilities the strategy of cases, which are
    of ``case_type``. ``script``: the end of a reproduction script, in terms of the subject and the case. ``twins``: run each case
    in two new processes with different hash seeds and compare what ``run`` returns. ``cost``: a check that takes so many times as
    long as others is tried on so many times fewer cases.
    """

    id: str
    title: str
    run: Callable[[Any, Any], Any]
    cases: Callable[[frozenset[str]], SearchStrategy[Any]]
    case_type: type[msgspec.Struct]
    needs: frozenset[str] = frozenset()
    level: str = LEVELS[0]
    script: str = ""
    twins: bool = False
    cost: int = 1

    @property
    def subject(self) -> str:
        return self.id.partition("/")[0]

    @property
    def kind(self) -> SubjectKind:
        return cast(SubjectKind, self.subject)

    @property
    def clause(self) -> str:
        return self.id.partition("/")[2].partition("-")[0]


def register(check: Check) -> Check:
    """Add a check. ``ValueError`` for an id that is taken or cites no clause, or an unknown level."""
    if not _ID.fullmatch(check.id):
        raise ValueError(f"check id {check.id!r} is not subject/clause-words, for example packer/B3-alignment")
    if check.id in _CHECKS:
        raise ValueError(f"check id {check.id!r} is taken by {_CHECKS[check.id].title!r}")
    if check.level not in LEVELS:
        raise ValueError(f"check {check.id} has level {check.level!r}; it is one of {', '.join(LEVELS)}")
    _CHECKS[check.id] = check
    return check


def get_check(id: str) -> Check:
    """The check of this id, or ``ValueError`` naming the nearest."""
    try:
        return _CHECKS[id]
    except KeyError:
        raise ValueError(_unknown(id, _CHECKS)) from None


def select_checks(subject: SubjectKind, *, level: str = LEVELS[-1], only: Iterable[str] = ()) -> list[Check]:
    """The checks of a subject up to a level, in the order of their clauses. ``only``: ids, or what ids begin with or cite, such as
    ``packer/B3-alignment``, ``packer/B1``, ``B1`` or ``B13-replay``. ``ValueError`` for one that selects nothing."""
    if subject not in get_args(SubjectKind):
        raise ValueError(f"subject is {subject!r}; it is one of {', '.join(get_args(SubjectKind))}")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; it is one of {', '.join(LEVELS)}")
    known = LEVELS[: LEVELS.index(level) + 1]
    checks = sorted((c for c in _CHECKS.values() if c.subject == subject and c.level in known), key=_order)
    if isinstance(only, str):
        only = [only]
    wanted = list(only)
    for word in wanted:
        if not any(_selects(word, check) for check in checks):
            raise ValueError(_unknown(word, [check.id for check in checks]))
    return [check for check in checks if not wanted or any(_selects(word, check) for word in wanted)]


def _order(check: Check) -> tuple[str, int]:
    return check.clause[0], int(check.clause[1:])  # sorted() is stable: within a clause they keep the order of registering


def _selects(word: str, check: Check) -> bool:
    local = check.id.partition("/")[2]
    names = (check.id, local, check.clause, f"{check.subject}/{check.clause}")
    return word.lower() in (name.lower() for name in names)


def _unknown(id: str, known: Collection[str]) -> str:
    import difflib

    near = difflib.get_close_matches(id, known, n=1, cutoff=0.4)
    return f"there is no check {id!r}; " + (f"did you mean {near[0]!r}?" if near else "`rollout-core check --list` shows all")
