"""What a program has asked of a worker, and what each completion may be: the model that a play holds a worker against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeAlias

from rollout_core.testing.packers import name_of
from rollout_core.testing.registry import Violation
from rollout_core.workers.contract import STATUSES

#: The next tokens by weights of a number, after these ids, so many.
Greedy: TypeAlias = Callable[[int, Sequence[int], int], list[int]]


@dataclass(eq=False)
class Sent:
    """A request: one sample of a prompt. ``most``: tokens that it can have by now, None for any number; ``least``: that it has."""

    number: int
    name: str  # its request id
    prompt: list[int]
    place: tuple[int, int]  # of its prompt and its sample, in its call
    length: int
    ends: frozenset[int]  # ids that end it
    future: Future[Any]
    since: int  # the update after which it was submitted
    budget: int  # with what it was resumed from
    most: int | None = 0
    least: int = 0
    bounds: list[tuple[int, int]] = field(default_factory=list)  # (update, tokens): of it and those before at most so many
    may_fail: bool = False
    was_aborted: bool = False  # as the worker said
    ended: Any = None  # its completion, as it was first seen

    def __str__(self) -> str:
        return f"request {self.number} ({self.name.partition('-')[2] or 'no id'})"


class Model:
    """The weights that a program has sent, by their versions, and what they say of a completion."""

    def __init__(self, greedy: Greedy) -> None:
        self._greedy = greedy
        self._weights: dict[int, int] = {}  # version -> number of its weights
        self._updates: list[int] = []  # versions, in their order

    @property
    def update(self) -> int:
        """The number of the last update; 0 at the start of the program."""
        return len(self._updates) - 1

    def note(self, version: int, weights: int) -> None:
        """Weights of this number have come as this version."""
        self._weights[version] = weights
        self._updates.append(version)

    def label(self, version: Any) -> str:
        """A version in words that do not depend on what came before the program."""
        if version in self._weights:
            place = self._updates.index(version)
            return f"that of update {place}" if place else "that of the start"
        near = self._updates[-1] if self._updates else 0
        return f"{version - near:+d} from the last" if isinstance(version, int) else repr(version)

    def expected(self, version: int, ids: Sequence[int], count: int) -> list[int]:
        """The next tokens by the weights of a version. ``Violation`` if there were none."""
        if version not in self._weights:
            raise Violation(f"the version is {self.label(version)}, and no update has brought it")
        return self._greedy(self._weights[version], ids, count)

    def check(self, sent: Sent, done: Any) -> None:
        """``Violation`` for a completion that this request cannot have."""
        for name in ("token_ids", "status", "versions", "prompt_index", "sample_index"):
            if not hasattr(done, name):
                raise Violation(f"{sent} ended with {name_of(done)}, which has no {name}")
        if done.status not in STATUSES:
            raise Violation(f"{sent} has status {done.status!r}; it is one of {', '.join(STATUSES)}")
        if (done.prompt_index, done.sample_index) != sent.place:
            raise Violation(f"{sent} is prompt {sent.place[0]} sample {sent.place[1]} of its call, and says {done.place}")
        if getattr(done, "request_id", sent.name) != sent.name:
            raise Violation(f"{sent} ended with request id {done.request_id!r}")
        tokens, versions = list(done.token_ids), list(done.versions)
        if len(versions) != len(tokens):
            raise Violation(f"{sent} has {len(tokens)} tokens, and versions of {len(versions)}")
        self._check_count(sent, tokens)
        self._check_tokens(sent, tokens, versions)
        self._check_bounds(sent, versions)
        self._check_status(sent, done, tokens)

    def _check_count(self, sent: Sent, tokens: list[int]) -> None:
        used = sent.budget - sent.length
        if len(tokens) > sent.length:
            words = f" after the {used} that it was resumed from, of a budget of {sent.budget}" if used else ""
            raise Violation(f"{sent} was to have {sent.length} tokens at most{words}, and has {len(tokens)}")
        if sent.most is not None and len(tokens) > sent.most:
            raise Violation(f"{sent} has {len(tokens)} tokens, and no more than {sent.most} steps were made")
        if len(tokens) < sent.least:
            raise Violation(f"{sent} has no tokens, and was the first in a step")

    def _check_tokens(self, sent: Sent, tokens: list[int], versions: list[int]) -> None:
        """Each stretch of one version is what its weights give, from all before it."""
        place = 0
        for version, stretch in groupby(versions):
            count = len(list(stretch))
            if version not in self._weights:
                raise Violation(f"{sent}: token {place} is of a version that never was: {self.label(version)}")
            expected = self._greedy(self._weights[version], [*sent.prompt, *tokens[:place]], count)
            found = tokens[place : place + count]
            if found != expected:
                at = next(i for i, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
                raise Violation(
                    f"{sent}: token {place + at} is {found[at]}, and the weights of its version, {self.label(version)}, give "
                    f"{expected[at]}"
                )
            place += count

    def _check_bounds(self, sent: Sent, versions: list[int]) -> None:
        updates = [self._updates.index(version) for version in versions]
        if updates != sorted(updates):
            raise Violation(f"{sent}: tokens of update {updates}, which do not rise")
        if updates and updates[0] < sent.since:
            raise Violation(f"{sent} was submitted after update {sent.since}, and has a token of update {updates[0]}")
        for update, most in sent.bounds:
            count = sum(one <= update for one in updates)
            if count > most:
                raise Violation(
                    f"{sent} had at most {most} tokens when update {update + 1} came, and says that {count} are of older weights"
                )

    def _check_status(self, sent: Sent, done: Any, tokens: list[int]) -> None:
        ends = [place for place, token in enumerate(tokens) if token in sent.ends]
        if ends and ends[0] < len(tokens) - 1:
            raise Violation(f"{sent} goes on after an EOS or stop id: {tokens}")
        if done.status == "failed":
            if not sent.may_fail:
                raise Violation(f"{sent} has status 'failed': {getattr(done, 'error', '') or 'it does not say why'}")
            return
        expected = "stop" if ends else "length" if len(tokens) == sent.length else "aborted"
        if done.status != expected:
            full = f"{len(tokens)} of {sent.length} tokens{', the last an EOS or stop id' if ends else ''}"
            raise Violation(f"{sent} has {full}, and status {done.status!r}, not {expected!r}")
