"""The registry: ids, selection, and that it serves more kinds of subject than packers."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import strategies as st

import rollout_core.testing.checks
from rollout_core.testing import registry, search
from rollout_core.testing.isolation import Here, run_case
from rollout_core.testing.packers import CAPABILITIES
from rollout_core.testing.registry import Check, Violation, get_check, register, select_checks

SPEC_CLAUSES = {f"B{number}" for number in range(1, 17)}


def check(id, **options):
    fields = {"title": "t", "run": lambda s, c: None, "cases": lambda c: st.none(), "case_type": msgspec.Struct, **options}
    return Check(id=id, **fields)


@pytest.fixture
def empty(monkeypatch):
    monkeypatch.setattr(registry, "_CHECKS", {})


def test_every_clause_of_buckets_has_a_check():
    assert {c.clause for c in select_checks("packer")} == SPEC_CLAUSES


def test_every_check_says_what_it_is():
    for c in select_checks("packer"):
        assert re.fullmatch(r"packer/B\d+-[a-z-]+", c.id)
        assert c.subject == "packer"
        assert c.title
        assert not c.title.endswith(".")
        assert c.script
        assert c.needs <= CAPABILITIES.keys()


def test_a_level_never_changes():
    """Checks may come with a later level; this list is what 2026.1 is, for ever."""
    names = """
        B1-order B1-dtypes B1-bits B1-zero-size B1-scalars B1-strided B1-offset B1-conj B1-neg B1-shared
        B1-parameter B1-large B1-split B1-many
        B2-capacity B2-oversize B3-alignment B3-views B4-disjoint B4-bounds B4-cover B4-padding B5-capacity
        B6-repeat B6-environment B6-hash-order B7-same B7-different B8-sources B8-complete B8-independent B8-retained B8-rounds
        B9-names B9-duplicate B10-arrive B10-once B11-together B11-too-large B11-incomplete
        B12-empty B12-truncated B12-missing B12-repeated B12-reordered B12-after-end
        B13-flipped-bit B13-swapped-values B13-swapped-slots B13-moved B13-replay
        B14-cut B14-trailing B14-changed B14-pickle B15-lookahead B15-rounds
        B16-iterator B16-mapping B16-module B16-async B16-async-error B16-error B16-close
    """
    assert [c.id.removeprefix("packer/") for c in select_checks("packer", level="2026.1")] == names.split()


def test_a_level_of_trackers_never_changes():
    names = """
        M1-prefix M1-verbatim M1-machine M2-template M2-splice M2-separator M2-cut-turn M2-history M2-prompt
        M3-changed M3-names M4-rows M4-spans M5-sampled-placeholder M5-literal-placeholder M6-compact
        M6-round-trip M6-twice M7-payload M7-joins M7-whole M7-coupled M7-unknown-key M8-recompute M8-after-item
        M8-text M9-order M9-repeated M9-delta M10-message M10-picture M10-template M10-sampled M11-items
        M11-openers M11-payload M11-arrays M11-error M11-messages M12-lengths M12-mask M12-logprobs
        M13-separates M13-settings M13-spoiled M14-forms M14-orientation M15-isolated M15-shared M15-serialise
        M15-rolled-back M16-work M16-ten-turns M16-proportional M17-together M17-tools
    """
    assert [c.id.removeprefix("tracker/") for c in select_checks("tracker", level="2026.1")] == names.split()


def test_a_level_of_carriers_never_changes():
    names = """
        T1-slots T1-again T1-lent T1-closed T2-post T2-poll T2-wakes T2-close-wakes T2-closed T2-post-closed
        T2-own-close T2-close-twice T2-others T2-mid-move T2-memory T2-ticket T3-descriptors T3-threads T3-memory
        T4-messages T4-bytes T4-receivers T4-apart T5-updates T5-source T5-refused T5-dies
    """
    assert [c.id.removeprefix("carrier/") for c in select_checks("carrier", level="2026.1")] == names.split()


def test_a_level_of_workers_never_changes():
    names = """
        T3-left-behind T5-damage T5-half T5-updates W1-greedy-parity W2-start W2-read-back W3-batch W4-aborts W4-ends
        W4-schedules W4-racing W4-ids W4-resumed W4-programs W4-killed W5-under-requests W5-updates W5-resumed W6-memory
    """
    assert [c.id.removeprefix("worker/") for c in select_checks("worker", level="2026.1")] == names.split()


@pytest.mark.parametrize(
    ("word", "count"),
    [
        ("packer/B3-alignment", 1),
        ("B3-alignment", 1),
        ("B3", 2),
        ("packer/B3", 2),
        ("B1", 14),
        ("B13-replay", 1),
        ("b13-REPLAY", 1),
    ],
)
def test_a_word_selects_by_id_or_clause(word, count):
    assert len(select_checks("packer", only=[word])) == count


def test_a_later_level_has_the_earlier_ones_checks(empty, monkeypatch):
    monkeypatch.setattr(registry, "LEVELS", ("2026.1", "2026.2"))
    old, new = register(check("packer/B1-old")), register(check("packer/B1-new", level="2026.2"))
    assert select_checks("packer", level="2026.1") == [old]
    assert select_checks("packer", level="2026.2") == [old, new]


@pytest.mark.parametrize(
    ("id", "options", "message"),
    [
        ("packer/alignment", {}, "check id 'packer/alignment' is not subject/clause-words, for example packer/B3-alignment"),
        ("sender/B3-alignment", {}, "check id 'sender/B3-alignment' is not subject/clause-words"),
        ("packer/B3-Alignment", {}, "check id 'packer/B3-Alignment' is not subject/clause-words"),
        ("packer/B1-taken", {}, "check id 'packer/B1-taken' is taken by 't'"),
        ("packer/B1-late", {"level": "2099.1"}, "check packer/B1-late has level '2099.1'; it is one of 2026.1"),
    ],
)
def test_a_wrong_check_is_refused(empty, id, options, message):
    register(check("packer/B1-taken"))
    with pytest.raises(ValueError) as raised:
        register(check(id, **options))
    assert str(raised.value).startswith(message)


def test_an_unknown_check_or_subject_is_an_error():
    with pytest.raises(ValueError, match=r"there is no check 'packer/B3-alinement'; did you mean 'packer/B3-alignment'\?"):
        get_check("packer/B3-alinement")
    with pytest.raises(ValueError, match="subject is 'sender'; it is one of packer, tracker, worker, carrier"):
        select_checks("sender")


def test_it_serves_trackers_too(empty):
    """A kind of subject of its own: its case, its check, the same search, executor and ids."""

    class TurnCase(msgspec.Struct, frozen=True):
        turns: list[int]

    class Tracker:
        capabilities = frozenset({"forks"})
        phase = None

        def length(self, turns):
            return sum(turns[:2])  # the bug: a third turn is not counted

    def run(tracker, case):
        if tracker.length(case.turns) != sum(case.turns):
            raise Violation(f"length of {case.turns} (model: {sum(case.turns)}, actual: {tracker.length(case.turns)})")

    turns = st.lists(st.integers(0, 9)).map(TurnCase)
    declared = register(check("tracker/M12-arrays", run=run, cases=lambda capabilities: turns, case_type=TurnCase))
    assert select_checks("tracker") == [declared]
    assert select_checks("packer") == []
    executor = Here(lambda phase: Tracker())
    finding = search.search(
        declared.cases(frozenset()), lambda case: executor.run(declared, case, 1.0), max_examples=200, random_seed=0
    )
    assert msgspec.json.decode(finding.case, type=TurnCase).turns == [0, 0, 1]
    assert finding.outcome.text == "length of [0, 0, 1] (model: 1, actual: 0)"


def test_an_error_in_a_check_itself_is_told_as_such():
    def run(subject, case):
        raise ZeroDivisionError("in the check")

    class Empty(msgspec.Struct):
        pass

    outcome = run_case(None, check("packer/B1-x", run=run, case_type=Empty), b"{}")
    assert outcome.result == "violation"
    assert outcome.text.startswith("the check met ZeroDivisionError: in the check (in ")


def test_all_modules_of_checks_are_registered():
    assert len(rollout_core.testing.checks.__all__) == 25
