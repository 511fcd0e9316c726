"""A worker's end of the channel to its engine: what is asked gets there, whatever comes."""

import threading
import time

import pytest

from rollout_core.errors import TransferError
from rollout_core.transfer.channel import PeerGone
from rollout_core.workers.engine import Progress
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.link.link import Link
from rollout_core.workers.link.messages import Abort


class Flood:
    """An engine that tells more than anybody takes in, until it is told to stop."""

    is_read_in_update = False
    version = 0
    is_busy = True
    stopped = threading.Event()

    def step(self, emit, between):
        if self.stopped.is_set():
            self.is_busy = False
            return
        emit([Progress(1, list(range(1000)), [-0.5] * 1000, 0)])  # the channel holds some of these
        time.sleep(0.02)  # longer than tokens wait to be told together
        between()

    def abort(self, keys, emit):
        self.stopped.set()
        self.is_busy = False

    def close(self):
        self.stopped.set()


def test_w4_an_abort_gets_to_an_engine_that_tells_more_than_is_taken_in():
    taken = []

    def hear(progress):
        taken.append(progress)
        if not Flood.stopped.is_set():
            time.sleep(0.1)

    link = Link(Spec(f"{__name__}:{Flood.__name__}", {}), process=False, start_timeout=10, timeout=10, hear=hear)
    try:
        while len(taken) < 5:
            time.sleep(0.01)
        answer = link.post(Abort(None))
        assert Flood.stopped.wait(5)
        answer.result(10)
    finally:
        Flood.stopped.set()
        link.close()


class Dying:
    """An engine that says how many requests ended, each in a message of its own, and is gone."""

    is_read_in_update = False
    version = 0
    is_busy = True

    def step(self, emit, between):
        for key in range(5):
            emit([Progress(key, [1], [-0.5], 0, "stop")])
        raise PeerGone("its own end")

    def close(self):
        pass


def test_w4_what_an_engine_said_before_its_end_is_heard_whatever_is_asked_meanwhile():
    heard, first, go_on = [], threading.Event(), threading.Event()

    def hear(progress):
        if isinstance(progress, str):
            return
        heard.extend(one.key for one in progress)
        first.set()
        go_on.wait(20)

    link = Link(Spec(f"{__name__}:{Dying.__name__}", {}), process=False, start_timeout=10, timeout=10, hear=hear)
    try:
        assert first.wait(10)
        assert link.host.wait(10)  # it has ended
        answer = link.post(Abort(None))
        go_on.set()
        with pytest.raises(TransferError):
            answer.result(10)
        assert heard == [0, 1, 2, 3, 4]
    finally:
        go_on.set()
        link.close()
