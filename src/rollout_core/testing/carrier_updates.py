"""Plays whole updates, with ``send`` and ``receive``, over a carrier under test, and compares what each end has after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import PlanMismatchError, RolloutCoreError, TransferError
from rollout_core.testing.carrier_cases import SENDER, CarrierCase, Step, end_name
from rollout_core.testing.carrier_play import Play, pattern
from rollout_core.testing.carriers import CarrierUnderTest
from rollout_core.testing.oracles import difference, picture
from rollout_core.testing.packers import Pairs, error_words
from rollout_core.testing.registry import Violation
from rollout_core.transfer import DirectWeights, StagedWeights, receive, send, send_stream
from rollout_core.transfer.targets import Target

#: Seconds that each end bears, and after which it must have returned in any case.
_TIMEOUT: Final = 1.5
_RETURNED: Final = 3.5
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.uint8)


class _SourceFailed(Exception):
    """What a source raises."""


class _Interrupt(BaseException):
    """As KeyboardInterrupt: the second of them comes out of ``receive`` at once."""


class Updates:
    """One carrier, and what the weights of each receiver should be."""

    def __init__(self, subject: CarrierUnderTest, case: CarrierCase) -> None:
        self._play = Play(subject, CarrierCase(case.receivers))
        self._case = case
        self._version = 0
        self._now = [self._weights(0) for _ in self._play.receivers]
        self._targets = [self._target(place) for place in self._play.receivers]
        self._broken = False

    def run(self) -> None:
        """``Violation`` where an update does not do what it should."""
        try:
            for step in self._case.steps:
                if not self._broken:
                    self._update(step)
        finally:
            self._play._abandon()

    def _update(self, step: Step) -> None:
        version = self._version + 1
        named = self._weights(version)
        fault = step.fault if step.to in self._play.receivers else ""
        fails = _SourceFailed("the source")
        at = step.at % len(named) if named else 0
        source = self._failing(named, at, fails) if fault == "source" else named
        sender = self._play.ends[SENDER].it
        options: dict[str, Any] = {"slots": self._case.slots, "timeout": _TIMEOUT}
        if step.stream:
            sending = partial(send_stream, source, sender, capacity=self._case.capacity, **options)
        else:
            plan = plan_buckets(specs_of(named), self._case.capacity)
            sending = partial(send, plan, source, sender, **options)
        calls = {place: self._receiving(place, fault if place == step.to else "", at) for place in self._play.receivers}
        futures = {place: self._play.ends[place].begin("receive", partial(_attempt, call)) for place, call in calls.items()}
        futures[SENDER] = self._play.ends[SENDER].begin("send", partial(_attempt, sending))
        done = {
            place: self._play.ends[place].end("send" if place == SENDER else "receive", future, _RETURNED)
            for place, future in sorted(futures.items())
        }
        if fault:
            self._require_failed(step, fault, fails, {place: error for place, (_, error) in done.items()})
        else:
            self._require_done(version, named, done)
        self._require_weights("failed" if fault else "went well")

    def _require_done(self, version: int, named: Pairs, done: dict[int, tuple[Any, BaseException | None]]) -> None:
        for place, (report, error) in done.items():
            if error is not None:
                raise Violation(f"an update without a fault failed at {end_name(place)}: {error_words(error)}")
            if report.version != version:
                raise Violation(f"update {version} was reported by {end_name(place)} as version {report.version}")
        self._version = version
        for place in self._play.receivers:
            self._now[place] = named
            if done[place][0].weights is not None:
                self._require_same(place, list(done[place][0].weights.items()), "went well")

    def _require_failed(self, step: Step, fault: str, fails: Exception, errors: dict[int, BaseException | None]) -> None:
        cause = f"{step}".partition(" ")[2]
        for place, error in errors.items():
            if error is None:
                raise Violation(f"{end_name(place)} reports success of an update {cause}")
        wanted: dict[int, type[BaseException]] = dict.fromkeys(errors, RolloutCoreError)
        if fault == "refuse":
            wanted[SENDER] = wanted[step.to] = PlanMismatchError
        elif fault == "dies":
            wanted[SENDER], wanted[step.to] = TransferError, _Interrupt
            self._broken = True
        else:
            wanted[SENDER] = _SourceFailed
        for place, kind in wanted.items():
            error = errors[place]
            assert error is not None
            if not isinstance(error, kind) or (kind is _SourceFailed and error is not fails):
                name = kind.__name__.removeprefix("_")
                raise Violation(f"{end_name(place)} raised {error_words(error)} in an update {cause}; {name} was due")

    def _require_weights(self, how: str) -> None:
        for place, target in enumerate(self._targets):
            it = self._play.ends[place].it
            if it.version != self._version:
                raise Violation(f"{end_name(place)}: version is {it.version} after an update that {how}; {self._version} was due")
            if target is None:
                continue
            if target.version != self._version:
                raise Violation(f"{end_name(place)}: the weights say version {target.version}; {self._version} was due")
            if target.unusable is None:
                self._require_same(place, list(target.tensors.items()), how)
            elif isinstance(target, StagedWeights) or how == "went well":
                raise Violation(f"{end_name(place)}: the weights are unusable after an update that {how}: {target.unusable}")
        it = self._play.ends[SENDER].it
        if it.version != self._version:
            raise Violation(f"the sender: version is {it.version} after an update that {how}; {self._version} was due")

    def _require_same(self, place: int, pairs: Pairs, how: str) -> None:
        problem = difference(picture(sorted(self._now[place])), picture(sorted(pairs)))
        if problem:
            raise Violation(f"{end_name(place)}, after an update that {how}: {problem}")

    def _weights(self, version: int) -> Pairs:
        """New tensors, with other bytes in every version."""
        pairs = []
        for number, size in enumerate(self._case.sizes):
            dtype = _DTYPES[number % len(_DTYPES)]
            data = bytearray(pattern(31 * version + number, size * dtype.itemsize))
            pairs.append((f"t{number}", torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)))
        return pairs

    def _target(self, place: int) -> DirectWeights | None:
        into = self._case.into[min(place, len(self._case.into) - 1)] if self._case.into else "staged"
        if into == "collected":
            return None
        own = {name: tensor.clone() for name, tensor in self._now[place]}
        return (StagedWeights if into == "staged" else DirectWeights)(own)

    def _failing(self, named: Pairs, at: int, error: Exception) -> Iterator[tuple[str, torch.Tensor]]:
        yield from named[:at]
        raise error

    def _receiving(self, place: int, fault: str, at: int) -> Callable[[], Any]:
        it, target = self._play.ends[place].it, self._targets[place]
        if fault == "refuse":
            other = plan_buckets(specs_of([("another", torch.zeros(3))]), 64)
            return partial(receive, it, target, plan=other, timeout=_TIMEOUT)
        if fault == "dies":
            dying = _Dying(target or StagedWeights(dict(self._now[place]), version=self._version), at)
            return partial(receive, it, dying, timeout=_TIMEOUT, observe=dying.observe)
        return partial(receive, it, target, timeout=_TIMEOUT)


class _Dying:
    """A target that is interrupted where it first loads (0), prepares (1) or begins (2), and again at the next step: then
    ``receive`` gives up at once and closes its end, as the end of its process would."""

    def __init__(self, target: Target, at: int) -> None:
        self._target = target
        self._at = (1, 2, 0)[at % 3]
        self._dead = False

    @property
    def version(self) -> int:
        return self._target.version

    def begin(self, plan: Any, version: int) -> None:
        self._target.begin(plan, version)
        self._live(0)

    def load(self, pairs: Pairs) -> None:
        self._live(1)
        self._target.load(pairs)

    def prepare(self) -> None:
        self._live(2)

    def commit(self, version: int) -> None:
        raise AssertionError("dead since prepare")

    def abort(self, version: int) -> None:
        self._target.abort(version)

    def observe(self, step: Any) -> None:
        if self._dead:
            raise _Interrupt

    def _live(self, place: int) -> None:
        if self._at <= place:
            self._dead = True
            raise _Interrupt


def _attempt(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What a call gives, and what it raises."""
    try:
        return call(), None
    except BaseException as error:
        return None, error
