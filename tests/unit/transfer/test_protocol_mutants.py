"""The protocol broken in one place, and the invariant that notices it: what the model cannot see would be found here."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from rollout_core.transfer.protocol import line, receiver, sender
from support.exploration import Explorer
from support.network import Broken, Machines, Network, Size

SMALL, ONE = Size(buckets=2), Size(slots=1, buckets=1)
TOGETHER = Size(buckets=2, rendezvous=True)
TWO = Size(receivers=2, slots=1, buckets=1)

#: (what is broken, module, text, other text, the invariant that notices, of which size, with how many faults)
MUTANTS = [
    # T1
    (
        "freed by one receiver",
        sender,
        "and not any(filled.index in peer",
        "and not all(filled.index in peer",
        "t1_no_slot_is_written_while_it_is_read",
        Size(receivers=2, slots=1, buckets=2),
        0,
    ),
    (
        "freed before it is pushed",
        sender,
        "if state.slots[filled.slot].pushed and not",
        "if not",
        "t1_no_slot_is_written_while_it_is_read",
        TOGETHER,
        0,
    ),
    (
        "freed before it is loaded",
        receiver,
        "self.actions.append(Pull(",
        "self._post(Free(filled.index)); self.actions.append(Pull(",
        "t1_no_slot_is_written_while_it_is_read",
        Size(slots=1, buckets=2),
        0,
    ),
    # T4
    (
        "announced before it is pushed",
        sender,
        "        if state.hello.rendezvous:\n",
        "        if True:\n",
        "t4_a_reader_sees_what_was_announced",
        SMALL,
        0,
    ),
    (
        "loaded before it is pulled",
        receiver,
        "state.loaded in state.here",
        "state.loaded < state.announced",
        "t4_a_reader_sees_what_was_announced",
        SMALL,
        0,
    ),
    (
        "loaded in the order of arrival",
        receiver,
        "state.loaded in state.here",
        "state.loaded < state.pulled",
        "t4_a_reader_sees_what_was_announced",
        SMALL,
        0,
    ),
    # B7
    (
        "begun with one welcome",
        sender,
        'all(peer.standing == "streaming"',
        'any(peer.standing == "streaming"',
        "b7_nothing_moves_before_all_agree",
        TWO,
        0,
    ),
    # T5
    (
        "committed when one is ready",
        sender,
        'all(peer.standing == "ready"',
        'any(peer.standing == "ready"',
        "t5_version_only_after_all_was_loaded_and_committed",
        TWO,
        0,
    ),
    (
        "applied without a commit",
        receiver,
        "self._post(Ready())",
        'self._post(Ready()); self._enter("applying"); self.actions.append(Apply(1))',
        "t5_version_only_after_all_was_loaded_and_committed",
        SMALL,
        0,
    ),
    (
        "applied after giving up",
        receiver,
        'case Commit() if state.phase == "ready"',
        'case Commit() if state.phase in ("ready", "aborting")',
        "t5_success_is_true",
        ONE,
        1,
    ),
    (
        "prepared before all is loaded",
        receiver,
        "if state.loaded == state.buckets",
        "if state.buckets is not None",
        "t5_version_only_after_all_was_loaded_and_committed",
        SMALL,
        0,
    ),
    (
        "success though a receiver was lost",
        sender,
        "            self._blame(cause)\n        else:",
        "            pass\n        else:",
        "t5_success_is_true",
        ONE,
        1,
    ),
    (
        "success at a receiver that failed",
        receiver,
        "Done(self.state.cause, reusable and",
        "Done(None, reusable and",
        "t5_success_is_true",
        ONE,
        1,
    ),
    (
        "failed while applying",
        receiver,
        'if self.state.phase == "applying":\n            return\n        where',
        "where",
        "t5_a_failed_update_leaves_old_weights",
        Size(slots=1, buckets=1, staged=True),
        1,
    ),
    # T2
    (
        "no beats of the sender",
        sender,
        "            if not peer.is_final and self.now >= peer.line.posted + state.beat:",
        "            if False:",
        "t2_no_spinning",
        ONE,
        1,
    ),
    ("beats too seldom", line, "BEATS: Final = 5", "BEATS: Final = 1", "a_failure_is_told", ONE, 1),
    ("beats too often", line, "BEATS: Final = 5", "BEATS: Final = 50", "t2_beats_are_bounded", ONE, 1),
    ("silence borne too long", line, "SILENCE: Final = 0.75", "SILENCE: Final = 1.75", "t2_ends_in_time", ONE, 1),
    ("silence not noticed", receiver, "if self.now >= state.line.heard + state.silence:", "if False:", "t2_no_spinning", ONE, 1),
    ("signs of life behind a hole", line, "heard = now if due else self.heard", "heard = now", "t2_ends_in_time", ONE, 1),
    ("waking up for nothing", receiver, 'case "applying":', 'case "applied":', "t2_no_spinning", ONE, 1),
    (
        "nobody to wait for, and waiting",
        sender,
        '        if (self.state.phase == "committing"',
        '        elif (self.state.phase == "committing"',
        "t2_no_time_is_lost",
        Size(receivers=0),
        0,
    ),
    ("a deadlock", receiver, "self._post(Ready())", "pass", "t2_no_time_is_lost", ONE, 0),
    (
        "no patience for an examination",
        receiver,
        "line=replace(state.line, heard=self.now)",
        "line=state.line",
        "a_failure_is_told",
        Size(slots=1, buckets=1, timeouts=(100.0, 10.0)),
        1,
    ),
    # What can be used again.
    (
        "no drain",
        sender,
        'self.state.phase == "aborting" and not (live or self._is_pushing() or state.packing is not None)',
        'self.state.phase == "aborting"',
        "a_failure_leaves_the_ways_usable",
        ONE,
        1,
    ),
    (
        "reusable while a receiver is at work",
        sender,
        "self._fail(self._from(place, cause))",
        'self._set(place, replace(peer, standing="aborted")); self._fail(self._from(place, cause))',
        "reusable_means_quiet",
        ONE,
        1,
    ),
    ("reusable while pushing", sender, "quiet = not self._is_pushing() and", "quiet =", "reusable_means_quiet", ONE, 2),
    ("reusable while packing", sender, " and self.state.packing is None\n", "\n", "reusable_means_quiet", ONE, 2),
    (
        "reusable while loading",
        receiver,
        "if state.drain_to is None or state.loading:",
        "if state.drain_to is None:",
        "reusable_means_quiet",
        ONE,
        1,
    ),
    ("reusable while pulling", receiver, "else state.pulled >= state.announced", "else True", "reusable_means_quiet", ONE, 1),
    (
        "reusable while a collective is half done",
        receiver,
        "state.pulled >= state.drain_to if moving",
        "True if moving",
        "reusable_means_quiet",
        TOGETHER,
        1,
    ),
    ("reusable without the sender", receiver, "reusable and not self.state.line.cut", "reusable", "reusable_means_quiet", ONE, 1),
    ("reusable without a receiver", sender, " and not peer.line.cut for", " for", "reusable_means_quiet", TWO, 1),
    # What is said.
    (
        "out of order",
        line,
        "early[number] = body",
        "return replace(self, heard=now, next_in=number + 1), (body,)",
        "t2_ends_in_time",
        ONE,
        1,
    ),
    (
        "deaf to an abort",
        receiver,
        "case Abort(cause, announced):",
        'case Abort(cause, announced) if state.phase != "ready":',
        "a_failure_is_told",
        ONE,
        1,
    ),
    (
        "a failure kept to itself",
        receiver,
        "            self._post(Aborted(cause))\n            self._finish",
        "            self._finish",
        "a_failure_is_told",
        ONE,
        1,
    ),
    (
        "announced in the order of the moves",
        sender,
        "if other.index == self.state.announced and",
        "if other.index >= self.state.announced and",
        "success_without_faults",
        SMALL,
        0,
    ),
    (
        "the end before the last bucket",
        sender,
        "if self.state.exhausted and not self._is_pushing():",
        "if self.state.exhausted:",
        "success_without_faults",
        SMALL,
        0,
    ),
]


def mutated(module, text, other, monkeypatch):
    """``Machines`` of the protocol with one text replaced by another in one of its modules."""
    changed = {}
    for part in (line, sender, receiver):
        source = Path(part.__file__).read_text()
        if part is module:
            assert source.count(text) == 1, f"{text!r} is {source.count(text)} times in {part.__name__}"
            source = source.replace(text, other)
        made = ModuleType(part.__name__)
        made.__file__ = part.__file__
        monkeypatch.setitem(sys.modules, part.__name__, made)  # where the parts find each other, and dataclasses their types
        exec(compile(source, f"mutated {part.__name__}", "exec"), made.__dict__)
        changed[part] = made
    return Machines(changed[sender], changed[receiver])


@pytest.mark.parametrize(
    ("module", "text", "other", "invariant", "size", "faults"), [pytest.param(*rest, id=name) for name, *rest in MUTANTS]
)
def test_a_broken_protocol_is_noticed(module, text, other, invariant, size, faults, monkeypatch):
    machines = mutated(module, text, other, monkeypatch)
    with pytest.raises(Broken) as raised:
        Explorer(Network(size, machines), faults).run()
    assert raised.value.invariant == invariant, f"expected {invariant}; it is\n{raised.value}"


@pytest.mark.parametrize("size", sorted({size for *_, size, _ in MUTANTS}, key=str), ids=str)
def test_an_unbroken_protocol_is_not(size, monkeypatch):
    """Through the same loading of modules; with faults by the exploration."""
    Explorer(Network(size, mutated(None, "", "", monkeypatch)), 0 if size.receivers == 2 else 1).run()


def test_every_invariant_of_an_exploration_has_a_mutant():
    missing = {invariant.__name__ for invariant in Explorer.invariants} - {mutant[4] for mutant in MUTANTS}
    assert not missing
