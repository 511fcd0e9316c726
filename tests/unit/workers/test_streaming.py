"""The loop of engines that tell what they sample in streams."""

import asyncio

import pytest

from rollout_core.workers import SamplingParams
from rollout_core.workers.engine import Group, Request
from rollout_core.workers.limits import Limits
from rollout_core.workers.streaming import Piece, StreamingEngine

LENGTH = 1000


class Backlog(StreamingEngine):
    """Has everything at hand: none of its streams ever waits."""

    async def _stream(self, flight):
        for place in range(LENGTH):
            yield Piece([place], [-0.5], "aborted" if flight.name in self.ended else None)
            if flight.name in self.ended:
                return

    async def _end(self, names):
        self.ended |= set(names)

    def _abandon(self, version):
        raise NotImplementedError

    _update = _release = _resume = _abandon


class Waiting(Backlog):
    """Its streams say nothing before they are ended."""

    async def _stream(self, flight):
        while flight.name not in self.ended:
            await asyncio.sleep(0.01)
        yield Piece([], [], "aborted")


@pytest.fixture
def made():
    loop, engines = asyncio.new_event_loop(), []

    def made(kind, requests, **options):
        engine = kind(loop=loop, limits=Limits(LENGTH, 2 * LENGTH, ()), timeout=5.0, **options)
        engine.ended = set()
        engines.append(engine)
        params = SamplingParams(response_length=LENGTH, ignore_eos=True)
        engine.submit(Group(params, [Request(key=key, prompt=[1], place=0, sample=0) for key in range(requests)], requests))
        return engine

    yield made
    for engine in engines:
        engine.close()
    loop.close()


def test_w4_a_backlog_of_tokens_is_taken_in_turns(made):
    """Else nobody would hear of an abort before all of it was."""
    engine, found = made(Backlog, 3), []
    for _ in range(4):
        engine.wait([])
        engine.step(found.extend, lambda: None)
        assert len(found) < 60
    assert {one.key for one in found} == {0, 1, 2}
    engine.abort(None, found.extend)
    assert [one.status for one in found if one.status] == ["aborted"] * 3
    assert len(found) < 100


def test_w4_what_waits_its_turn_is_ended_without_the_others(made):
    engine, found = made(Waiting, 3, at_once=1), []
    engine._run(asyncio.sleep(0.05))
    engine.abort([1], found.extend)
    assert [(one.key, one.status) for one in found] == [(1, "aborted")]
    engine.run(0, found.extend)  # called back, whether they wait or not
    engine.run(None, found.extend)
    engine.abort(None, found.extend)
    assert [(one.key, one.status) for one in found] == [(1, "aborted"), (0, "aborted"), (2, "aborted")]
    assert all("-0-" in name for name in engine.ended), "the engine was told of what it never had"
