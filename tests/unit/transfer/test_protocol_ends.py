"""Each of the two machines alone: given paths, the words that a user reads, and a peer that says anything."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.transfer.protocol.line import Patience
from rollout_core.transfer.protocol.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Beat,
    Cause,
    Commit,
    Committed,
    End,
    Envelope,
    Filled,
    Free,
    Hello,
    Ready,
    Welcome,
)
from rollout_core.transfer.protocol.receiver import Receiver
from rollout_core.transfer.protocol.sender import Sender
from rollout_core.transfer.protocol.steps import (
    Applied,
    Apply,
    Begin,
    Came,
    Done,
    Examine,
    Examined,
    Failed,
    Gone,
    Load,
    Loaded,
    Pack,
    Packed,
    Post,
    Prepare,
    Prepared,
    Pull,
    Pulled,
    Push,
    Pushed,
    SourceEnded,
    Tick,
)

ATTEMPT = 9
HELLO = Hello(PROTOCOL, 4, b"plan", b"", 2, 8, False, b"ticket", 20.0)
BROKEN = Cause("OSError", "the disk is full", "Traceback ...")
INFINITE = float("inf")


def filled(index, slot=0, nbytes=8):
    return Filled(index, slot, nbytes, b"plan", "xxh3-128", None, b"")


class Driven:
    """A machine, and what it did at the last event. Messages are numbered by themselves."""

    def __init__(self, machine):
        self.machine, self.now, self.did = machine, 0.0, ()
        self.numbers = {}

    def tell(self, event):
        self.machine, self.did = self.machine.step(event, self.now)
        return self

    def hear(self, *bodies, peer=0, attempt=ATTEMPT):
        for body in bodies:
            number = self.numbers[peer] = self.numbers.get(peer, -1) + 1
            self.tell(Came(Envelope(attempt, number, body), peer))
        return self

    def at(self, now):
        self.now = now
        return self.tell(Tick())

    @property
    def said(self):
        return [(action.peer, action.envelope.body) for action in self.did if isinstance(action, Post)]

    @property
    def asked(self):
        return [action for action in self.did if not isinstance(action, Post)]

    @property
    def done(self):
        (done,) = (action for action in self.did if isinstance(action, Done))
        return done

    @property
    def cause(self):
        return self.machine.cause.message


def sender(receivers=1, hello=HELLO, timeout=20.0, until=200.0):
    return Driven(Sender.new(ATTEMPT, hello, Patience(timeout, until), receivers, 0.0)).tell(Begin())


def receiver(timeout=20.0, wait=30.0, deadline=200.0):
    return Driven(Receiver.new(timeout=timeout, wait=wait, deadline=deadline, now=0.0))


def streaming(buckets=0, hello=HELLO):
    """A receiver in an update, so many buckets announced."""
    driven = receiver().hear(hello).tell(Examined(3))
    return driven.hear(*(filled(index, index) for index in range(buckets)))


def ready(**kwargs):
    return receiver(**kwargs).hear(HELLO).tell(Examined(3)).hear(End(0)).tell(Prepared())


def committing(receivers=1):
    driven = sender(receivers)
    for peer in range(receivers):
        driven.hear(Welcome(3, 20.0), peer=peer)
    driven.tell(SourceEnded())
    for peer in range(receivers):
        driven.hear(Ready(), peer=peer)
    assert driven.said == [(peer, Commit()) for peer in range(receivers)]
    return driven


# ----------------------------------------------------------------------------------------------------------------- given paths


def test_a_sender_in_full():
    s = sender()
    assert s.said == [(0, HELLO)]
    assert s.hear(Welcome(3, 20.0)).asked == [Pack(0, 0)]
    assert s.tell(Packed(filled(0, 0))).asked == [Push(0, 0, 8), Pack(1, 1)]
    assert s.tell(Pushed(0)).said == [(0, filled(0, 0))]
    assert s.tell(Packed(filled(1, 1))).asked == [Push(1, 1, 8)]
    assert s.hear(Free(0)).asked == [Pack(2, 0)]
    assert s.tell(SourceEnded()).did == ()
    assert s.tell(Pushed(1)).said == [(0, filled(1, 1)), (0, End(2))]
    assert s.hear(Free(1)).did == ()
    assert s.hear(Ready()).said == [(0, Commit())]
    assert s.hear(Committed(4)).did == (Done(None, reusable=True),)
    assert s.machine.wake_at == INFINITE
    assert s.hear(Beat()).did == ()


def test_a_receiver_in_full():
    r = receiver()
    assert r.machine.wake_at == 30.0
    assert r.hear(HELLO).did == (Examine(HELLO),)
    assert r.tell(Examined(3)).said == [(0, Welcome(3, 20.0))]
    assert r.hear(filled(0, 0)).did == (Pull(0, 0, 8),)
    assert r.tell(Pulled(0)).did == (Load(filled(0, 0)),)
    assert r.tell(Loaded(0)).said == [(0, Free(0))]
    assert r.hear(End(1)).did == (Prepare(),)
    assert r.tell(Prepared()).said == [(0, Ready())]
    assert r.hear(Commit()).did == (Apply(4),)
    assert r.tell(Applied()).did == (Post(Envelope(ATTEMPT, 3, Committed(4))), Done(None, reusable=True))
    assert r.machine.wake_at == INFINITE


def test_nobody_to_send_to():
    s = sender(receivers=0)
    assert s.asked == [Pack(0, 0)]
    assert s.tell(SourceEnded()).done == Done(None, reusable=True)
    assert s.machine.beat == 4.0


def test_moves_may_be_over_in_any_order():
    s = sender().hear(Welcome(3, 20.0)).tell(Packed(filled(0, 0))).tell(Packed(filled(1, 1)))
    assert s.tell(Pushed(1)).did == ()
    assert s.tell(Pushed(0)).said == [(0, filled(0, 0)), (0, filled(1, 1))]
    r = streaming(2)
    assert r.tell(Pulled(1)).did == ()
    assert r.tell(Pulled(0)).asked == [Load(filled(0, 0))]
    assert r.asked[0].index == 0


def test_with_a_rendezvous_a_bucket_is_announced_before_it_is_moved():
    s = sender(hello=msgspec.structs.replace(HELLO, rendezvous=True)).hear(Welcome(3, 20.0))
    assert s.tell(Packed(filled(0, 0))).did == (Post(Envelope(ATTEMPT, 1, filled(0, 0))), Push(0, 0, 8), Pack(1, 1))


def test_a_digest_that_comes_with_the_end_of_a_move_is_announced():
    sealed = [msgspec.structs.replace(filled(place, place), digest=bytes([place]) * 16) for place in (0, 1)]
    s = sender().hear(Welcome(3, 20.0)).tell(Packed(filled(0, 0))).tell(Packed(filled(1, 1)))
    assert s.tell(Pushed(1, sealed[1].digest)).did == ()
    assert s.tell(Pushed(0, sealed[0].digest)).said == [(0, sealed[0]), (0, sealed[1])]
    assert s.hear(Free(0)).asked == [Pack(2, 0)]
    s = sender().hear(Welcome(3, 20.0)).tell(Packed(sealed[0]))
    assert s.tell(Pushed(0)).said == [(0, sealed[0])], "what it was packed with stays"
    s = sender().hear(Welcome(3, 20.0)).tell(Packed(filled(0, 0))).tell(Failed(BROKEN)).hear(Aborted())
    assert s.tell(Pushed(0, sealed[0].digest)).did == ()


def test_messages_may_come_before_the_hello_and_of_another_update():
    r = receiver()
    stale = Came(Envelope(ATTEMPT - 1, 1, Beat()))
    early = Came(Envelope(ATTEMPT, 1, Abort(BROKEN)))
    assert r.tell(stale).tell(early).did == ()
    assert r.tell(Came(Envelope(ATTEMPT, 0, HELLO))).said == [(0, Aborted())]
    assert r.cause == "the sender gave the update up: the disk is full"
    assert streaming(1).tell(stale).did == ()
    assert sender().tell(stale).did == ()


def test_messages_before_a_hello_are_bounded():
    r = receiver()
    for number in range(1, 400):
        r.tell(Came(Envelope(ATTEMPT, number, Beat())))
    assert len(r.machine.early) == 256


# --------------------------------------------------------------------------------------------------------------- giving it up


def test_a_failed_sender_waits_for_what_is_under_way():
    s = sender().hear(Welcome(3, 20.0)).tell(Packed(filled(0, 0)))
    assert s.tell(Failed(BROKEN)).said == [(0, Abort(BROKEN, 0))]
    assert s.hear(Aborted()).did == ()
    assert s.tell(Pushed(0)).did == ()
    assert s.tell(Packed(filled(1, 1))).done == Done(BROKEN, reusable=True)


def test_a_sender_waits_no_longer_than_its_drain():
    s = sender().hear(Welcome(3, 20.0)).tell(Failed(BROKEN)).hear(Aborted())
    assert s.machine.wake_at == 5.0
    assert s.at(5.0).done == Done(BROKEN, reusable=False)  # the pack is still under way


def test_what_is_said_before_an_abort_is_heard_does_not_count():
    s = sender().hear(Welcome(3, 20.0)).tell(Failed(BROKEN))
    assert s.hear(Ready(), Abort(Cause("OSError", "another"))).did == ()
    assert s.machine.cause == BROKEN


def test_a_failed_receiver_waits_for_the_sender():
    r = streaming(2).tell(Pulled(0))
    assert r.tell(Failed(BROKEN)).said == [(0, Abort(BROKEN))]
    assert r.hear(filled(2, 1), End(3)).did == ()
    r = streaming(2).tell(Pulled(0)).tell(Failed(BROKEN)).tell(Loaded(0))
    assert r.did == (), "nothing is freed any more"
    assert r.hear(Abort(BROKEN, 2)).did == (), "a pull is under way"
    assert r.tell(Pulled(1)).done == Done(BROKEN, reusable=True)
    assert r.said == [(0, Aborted())]


def test_what_is_announced_to_a_failed_receiver_is_moved_only_with_a_rendezvous():
    meeting = msgspec.structs.replace(HELLO, rendezvous=True)
    assert streaming(1).tell(Failed(BROKEN)).hear(filled(1, 1)).did == ()
    r = streaming(1, meeting).tell(Failed(BROKEN))
    assert r.hear(filled(1, 1)).did == (Pull(1, 1, 8),)
    assert r.hear(Abort(BROKEN, 2)).tell(Pulled(1)).did == ()
    assert r.tell(Pulled(0)).done == Done(BROKEN, reusable=True)


def test_a_receiver_waits_no_longer_than_its_drain():
    r = streaming().tell(Failed(BROKEN))
    assert r.at(4.9).said == [(0, Beat())]
    assert r.at(5.0).done == Done(BROKEN, reusable=False)


def test_a_receiver_that_gave_up_before_the_commit_keeps_to_it():
    r = ready().tell(Failed(BROKEN))
    assert r.hear(Commit()).did == (Post(Envelope(ATTEMPT, 3, Aborted())), Done(BROKEN, reusable=True))


def test_a_sender_that_committed_waits_for_a_receiver_that_gave_up():
    s = committing()
    assert s.hear(Abort(BROKEN)).did == ()
    assert s.hear(Aborted()).done == Done(Cause("OSError", "the receiver: the disk is full", BROKEN.trace), reusable=True)


def test_a_receiver_that_gave_up_without_a_word():
    assert committing().hear(Aborted()).done == Done(Cause("TransferError", "the receiver: gave the update up"), reusable=True)


def test_a_receiver_that_fails_to_apply_says_so():
    r = ready().hear(Commit()).tell(Failed(BROKEN))
    assert r.did == (Post(Envelope(ATTEMPT, 2, Aborted(BROKEN))), Done(BROKEN, reusable=True))
    s = committing(2).hear(Aborted(BROKEN), peer=1).hear(Committed(4), peer=0)
    assert s.done == Done(Cause("OSError", "receiver 1: the disk is full", BROKEN.trace), reusable=True)


def test_a_commit_counts_though_the_sender_is_lost():
    r = ready().hear(Commit()).hear(Abort(BROKEN)).tell(Gone("closed"))
    assert r.did == ()
    assert r.at(500.0).said == [(0, Beat())]
    assert r.machine.wake_at == 504.0
    assert r.tell(Applied()).done == Done(None, reusable=False)


def test_a_receiver_that_leaves_after_its_commit_cannot_be_used_again():
    s = committing(2).hear(Committed(4), peer=0)
    assert s.tell(Gone("closed", 0)).hear(Beat(), peer=0).did == ()
    assert s.hear(Committed(4), peer=1).done == Done(None, reusable=False)


def test_the_last_word_is_the_last():
    """Though what follows it came before."""
    s = committing()
    s.tell(Came(Envelope(ATTEMPT, 3, Aborted(BROKEN))))
    assert s.hear(Committed(4)).done == Done(None, reusable=True)


def test_interrupted_while_nothing_has_begun():
    assert receiver().tell(Failed(BROKEN)).done == Done(BROKEN, reusable=True)


def test_answers_that_come_too_late_are_dropped():
    r = streaming().tell(Failed(BROKEN))
    assert r.tell(Examined(3)).tell(Prepared()).tell(Applied()).did == ()


# -------------------------------------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("driven", "words"),
    [
        (lambda: sender().at(15.0), "the receiver: silent for 15 s; is it in receive()?"),
        (lambda: sender(2).hear(Welcome(3, 20.0), peer=1).at(15.0), "receiver 0: silent for 15 s; is it in receive()?"),
        (lambda: sender().hear(Welcome(3, 20.0)).at(15.0), "the receiver: silent for 15 s"),
        (
            lambda: sender().tell(Came(Envelope(ATTEMPT, 1, Beat()))).at(15.0),
            "the receiver: message 0 never came, and 1 after it did; silent for 15 s",
        ),
        (lambda: sender().tell(Gone("it closed its end")), "the receiver: it closed its end"),
        (
            lambda: committing().at(15.0),
            "the receiver: silent for 15 s; it was told to commit, and nobody can know here whether it did",
        ),
        (
            lambda: committing().tell(Gone("it closed its end")),
            "the receiver: it closed its end; it was told to commit, and nobody can know here whether it did",
        ),
        (
            lambda: sender(until=10.0).hear(Welcome(3, 20.0)).at(10.0),
            "the update was not complete at its deadline; it was streaming, with 0 buckets packed",
        ),
        (lambda: sender().hear(Welcome(3, 20.0), Free(3)), "the receiver said Free(index=3) when it was not its turn"),
        (lambda: committing().hear(Committed(5)), "the receiver said Committed(version=5) when it was not its turn"),
        (lambda: receiver().at(30.0), "no update began within 30 s"),
        (lambda: receiver().tell(Gone("it closed its end")), "the sender was lost before an update began: it closed its end"),
        (lambda: streaming().tell(Gone("closed")), "the sender was lost in the middle of an update: closed"),
        (lambda: ready().at(15.0), "the sender was lost after all was sent, and before it said to commit: silent for 15 s"),
        (
            lambda: streaming().tell(Came(Envelope(ATTEMPT, 2, Beat()))).at(15.0),
            "the sender was lost in the middle of an update: message 1 never came, and 1 after it did; silent for 15 s",
        ),
        (
            lambda: receiver(deadline=10.0).hear(HELLO).tell(Examined(3)).hear(filled(0)).at(10.0),
            "the update was not complete at its deadline; it was streaming, with 0 buckets loaded of 1 that were announced",
        ),
        (
            lambda: receiver().hear(msgspec.structs.replace(HELLO, protocol=PROTOCOL + 1)),
            f"the sender speaks protocol {PROTOCOL + 1}, this end {PROTOCOL}",
        ),
        (lambda: receiver().hear(HELLO, HELLO), "the sender said Hello when it was not its turn"),
        (lambda: streaming().hear(Commit()), "the sender said Commit when it was not its turn"),
        (lambda: streaming().hear(End(2)), "the sender said End when it was not its turn"),
        (
            lambda: streaming().hear(End(0), filled(0)),
            "the sender said bucket 0 (8 bytes) in slot 0 when it was not its turn",
        ),
        (lambda: streaming(1).hear(filled(1, 0)), "the sender filled bucket 1 (8 bytes) in slot 0 with buckets [0] in use"),
        (lambda: streaming().hear(filled(0, 2)), "the sender filled bucket 0 (8 bytes) in slot 2 with buckets [] in use"),
        (lambda: streaming().hear(filled(0, -1)), "the sender filled bucket 0 (8 bytes) in slot -1 with buckets [] in use"),
        (lambda: streaming().hear(filled(1)), "the sender filled bucket 1 (8 bytes) in slot 0 with buckets [] in use"),
        (lambda: streaming().hear(filled(0, 0, 9)), "the sender filled bucket 0 (9 bytes) in slot 0 with buckets [] in use"),
        (lambda: streaming().hear(Abort(BROKEN)), "the sender gave the update up: the disk is full"),
        (lambda: sender().hear(Abort(BROKEN)), "the receiver: the disk is full"),
    ],
)
def test_the_words(driven, words):
    assert driven().cause == words


def test_a_receiver_that_takes_the_sender_for_lost_tells_it():
    r = streaming().at(15.0)
    cause = Cause("TransferError", "the sender was lost in the middle of an update: silent for 15 s")
    assert r.did == (Post(Envelope(ATTEMPT, 1, Abort(cause))), Done(cause, reusable=False))


def test_all_are_told_why_but_those_that_are_gone():
    s = sender(3).tell(Gone("it closed its end", 1))
    cause = Cause("TransferError", "receiver 1: it closed its end")
    assert s.said == [(0, Abort(cause, 0)), (2, Abort(cause, 0))]


def test_who_is_missing_at_the_deadline_of_a_commit():
    s = committing(2)
    s.machine = msgspec.structs.replace(s.machine, patience=Patience(20.0, 10.0))
    s.hear(Committed(4), peer=0)
    assert s.at(10.0).done == Done(
        Cause(
            "TransferError",
            "receiver 1: not heard from before the deadline; it was told to commit, and nobody can know here whether it did",
        ),
        reusable=False,
    )


@pytest.mark.parametrize("driven", [sender().hear(Welcome(3, 20.0)), streaming()], ids=["sender", "receiver"])
def test_too_much_behind_a_message_that_never_came(driven):
    for number in range(10, 270):
        driven.tell(Came(Envelope(ATTEMPT, number, Beat())))
    other = "the receiver" if isinstance(driven.machine, Sender) else "the sender"
    next_in = 1
    assert driven.cause == f"{other}: message {next_in} never came, and 257 after it did"


@pytest.mark.parametrize(("driven", "event"), [(sender(), Loaded(0)), (receiver(), Begin())], ids=["sender", "receiver"])
def test_an_event_of_the_other_end_is_a_mistake_of_the_driver(driven, event):
    with pytest.raises(AssertionError, match="no event of a"):
        driven.tell(event)


# --------------------------------------------------------------------------------------------------------------------- the time


def test_the_shorter_timeout_says_how_often_to_speak():
    s = sender(timeout=100.0)
    assert s.machine.wake_at == 20.0
    s.hear(Welcome(3, 10.0))
    assert s.machine.wake_at == 2.0
    assert s.at(2.0).said == [(0, Beat())]
    r = receiver(timeout=100.0).hear(HELLO)
    assert r.machine.wake_at == 4.0
    assert r.at(4.0).said == [(0, Beat())]


def test_an_unread_message_is_no_silence():
    """After a long pause one receiver's message is read before the other's: only a Tick, after all were, says who was silent."""
    s = sender(2)
    s.now = 19.0
    assert s.hear(Welcome(3, 20.0), peer=0).machine.phase == "greeting"
    assert s.hear(Welcome(3, 20.0), peer=1).machine.phase == "streaming"
    assert s.at(19.0).machine.cause is None
    r = streaming(1)
    r.now = 19.0
    assert r.tell(Pulled(0)).machine.cause is None
    assert r.hear(Beat()).at(19.0).machine.cause is None


def test_before_the_welcome_the_sender_does_not_know_how_often_to_speak():
    r = receiver(timeout=10.0).hear(msgspec.structs.replace(HELLO, timeout=100.0))
    for now in range(2, 60, 2):
        assert r.at(float(now)).said == [(0, Beat())]
    assert r.tell(Examined(3)).said == [(0, Welcome(3, 10.0))]
    assert r.at(58.0 + 7.5).asked == [r.done]


@given(st.floats(0.0, 1e9), st.floats(1e-6, 1e6))
def test_a_tick_at_the_time_asked_for_is_not_in_vain(now, timeout):
    """Sums and differences of floats do not agree: an end would be woken again and again."""
    machine, _ = Sender.new(ATTEMPT, HELLO, Patience(timeout, now + 1e3 * timeout), 1, now).step(Begin(), now)
    for _ in range(4):
        at = machine.wake_at
        if at == INFINITE or at + timeout / 5 == at:  # it is over, or the clock cannot tell so short a time
            return
        machine, did = machine.step(Tick(), at)
        assert did, f"at {at} s something is done; nothing is"
        assert machine.wake_at > at


# -------------------------------------------------------------------------------------------------------- a peer that says anything

small = st.integers(-1, 3)
causes = st.builds(Cause, st.just("OSError"), st.just("broken"))
from_sender = st.one_of(
    st.just(HELLO),
    st.builds(filled, small, small, st.sampled_from([-1, 0, 8, 9])),
    st.builds(End, small),
    st.just(Commit()),
    st.builds(Abort, causes, small),
    st.just(Beat()),
)
from_receiver = st.one_of(
    st.builds(Welcome, small, st.sampled_from([1.0, 20.0])),
    st.builds(Free, small),
    st.just(Ready()),
    st.builds(Committed, st.integers(3, 5)),
    st.builds(Abort, causes),
    st.builds(Aborted, st.none() | causes),
    st.just(Beat()),
)
#: How an action is answered.
ANSWERS = {
    Pack: lambda action: Packed(filled(action.index, action.slot)) if action.index < 3 else SourceEnded(),
    Push: lambda action: Pushed(action.index),
    Examine: lambda action: Examined(3),
    Pull: lambda action: Pulled(action.index),
    Load: lambda action: Loaded(action.filled.index),
    Prepare: lambda action: Prepared(),
    Apply: lambda action: Applied(),
}


def survive(driven, words, peers):
    """Messages of any kind, in order, between the answers to what is asked for. At the end the other falls silent."""
    tasks = []
    for peer, body, which in words:
        driven.hear(body, peer=peer % peers)
        tasks += [action for action in driven.asked if not isinstance(action, Done)]
        if tasks and which is not None:
            driven.tell(ANSWERS[type(action := tasks.pop(which % len(tasks)))](action))
            tasks += [action for action in driven.asked if not isinstance(action, Done)]
    while driven.machine.wake_at < INFINITE and driven.machine.phase != "applying":
        driven.at(driven.machine.wake_at)
    assert driven.machine.phase in ("done", "applying")


answered = st.none() | st.integers(0, 9)


@given(st.lists(st.tuples(st.just(0), from_sender, answered), max_size=30))
def test_a_receiver_survives_any_sender(words):
    survive(receiver().hear(HELLO), words, 1)


@given(st.lists(st.tuples(st.integers(0, 1), from_receiver, answered), max_size=30), st.booleans())
def test_a_sender_survives_any_receiver(words, rendezvous):
    survive(sender(2, msgspec.structs.replace(HELLO, rendezvous=rendezvous)), words, 2)
