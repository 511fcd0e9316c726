"""The loop that serves an engine to its worker: what waits for what."""

import socket
import threading
from types import SimpleNamespace

import pytest

from rollout_core.transfer.channel import Channel
from rollout_core.workers.engine import Update
from rollout_core.workers.link.messages import Answered, Asked, Close, Receive, Received
from rollout_core.workers.link.serving import Serving


@pytest.fixture
def served():
    """An engine of which the first update does not end before it is let, and the worker's end of the channel."""
    begun, let, log = threading.Event(), threading.Event(), []

    def update(update):
        log.append(("begins", update.version))
        begun.set()
        if update.version == 1:
            assert let.wait(20)
        log.append(("ends", update.version))
        return 0.0

    engine = SimpleNamespace(is_read_in_update=True, is_busy=False, update=update)
    ours, theirs = socket.socketpair()
    channel, end = Channel(ours.detach(), Answered), Channel(theirs.detach(), Asked)
    serving = threading.Thread(target=Serving(end, engine).run, daemon=True)
    serving.start()
    yield SimpleNamespace(channel=channel, begun=begun, let=let, log=log)
    let.set()
    channel.send(Asked(99, Close()), 10)
    serving.join(20)
    assert not serving.is_alive()
    channel.close()
    end.close()


def test_an_update_waits_for_the_one_before(served):
    """A worker that tries again by another carrier may be quicker than the end of what it gave up."""
    for number in (1, 2):
        served.channel.send(Asked(number, Receive(Update("somewhere", number, 5.0))), 10)
    assert served.begun.wait(20)
    served.let.set()
    answers = [served.channel.receive(20) for _ in range(2)]
    assert [(answer.number, type(answer.answer)) for answer in answers] == [(1, Received), (2, Received)]
    assert served.log == [("begins", 1), ("ends", 1), ("begins", 2), ("ends", 2)]
