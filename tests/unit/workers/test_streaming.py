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


@pytest.fixture
def engine():
    loop = asyncio.new_event_loop()
    engine = Backlog(loop=loop, limits=Limits(LENGTH, 2 * LENGTH, ()), timeout=5.0)
    engine.ended = set()
    yield engine
    engine.close()
    loop.close()


def test_w4_a_backlog_of_tokens_is_taken_in_turns(engine):
    """Else nobody would hear of an abort before all of it was."""
    params = SamplingParams(response_length=LENGTH, ignore_eos=True)
    engine.submit(Group(params, [Request(key=key, prompt=[1], place=0, sample=0) for key in range(3)], 3))
    found = []
    for _ in range(4):
        engine.wait([])
        engine.step(found.extend, lambda: None)
        assert len(found) < 60
    assert {one.key for one in found} == {0, 1, 2}
    engine.abort(None, found.extend)
    assert [one.status for one in found if one.status] == ["aborted"] * 3
    assert len(found) < 100
