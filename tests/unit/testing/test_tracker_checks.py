"""The checks of trackers: that they find one bug each, with which counterexample and in which words."""

from __future__ import annotations

import re

import pytest

from rollout_core.testing import TRACKER_CAPABILITIES, SubjectError, check_tracker, recheck, replay
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.registry import select_checks
from rollout_core.testing.report import Report
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.trackers import TrackerUnderTest, looks_like_a_tracker, tracker_capabilities
from rollout_core.testing.worlds import make_world

FAST = {"isolate": False, "max_examples": 60}


class ZeroForMissing(ConversationTracker):
    def logprobs(self, state):
        return [0.0 if value is None else value for value in state.logprobs]


class DecodesSampled(ConversationTracker):
    def append_sampled(self, state, ids, logprobs, finish):
        tokenizer = self.renderer.tokenizer
        return super().append_sampled(state, tokenizer.encode(tokenizer.decode(ids)), None, finish)


class OneAtATime:
    """Changes its state in place, message by message: what comes before a bad one stays."""

    def __init__(self, processor):
        self.inner = ConversationTracker(processor)

    def start(self, messages):
        return [self.inner.start(messages)]

    def extend(self, state, messages):
        if not messages:
            raise ValueError("no messages")
        for message in messages:
            state[0] = self.inner.extend(state[0], [message])

    def append_sampled(self, state, ids, logprobs, finish):
        state[0] = self.inner.append_sampled(state[0], ids, logprobs, finish)

    def input_ids(self, state):
        return state[0].input_ids


class Rerenders:
    """What trainers do: keep messages, and process everything anew when asked."""

    def __init__(self, processor):
        self.processor = processor

    def start(self, messages):
        return list(messages)

    def extend(self, state, messages):
        return [*state, *messages]

    def append_sampled(self, state, ids, logprobs, finish):
        return [*state, {"role": "assistant", "content": self.processor.decode(ids).replace("<|im_end|>", "")}]

    def input_ids(self, state):
        parts = [part for message in state if isinstance(message["content"], list) for part in message["content"]]
        media = {f"{name}s": [part[name] for part in parts if part["type"] == name] or None for name in ("image", "video")}
        return self.processor(text=[self.processor.apply_chat_template(state)], **media)["input_ids"]


class ProcessesAgain(ConversationTracker):
    def extend(self, state, messages):
        for item in state.items:
            self.renderer.processor(text=["<|image_pad|>"], images=[item.payload.media.to_pil()])
        return super().extend(state, messages)


class EncodesHistory(ConversationTracker):
    def extend(self, state, messages):
        self.renderer.tokenizer(self.renderer.tokenizer.decode(state.input_ids))
        return super().extend(state, messages)


BUGS = [
    (
        ZeroForMissing,
        "M12-logprobs",
        "the logprob of token 0 differs (model: [None, None, None, None], actual: [0.0, 0.0, 0.0, 0.0])",
        "world chatml+rows; start [user 'a']; sample 'a', logprobs all",
    ),
    (
        DecodesSampled,
        "M1-verbatim",
        "after step 1 sampled ids are not what was sampled: ",
        "world chatml+rows; start [user 'a']; sample '12', spelled",
    ),
    (
        OneAtATime,
        "M10-message",
        "a good message, then one without role was refused, and has changed the conversation: input_ids (before: ",
        "world chatml+rows; a good message, then one without role; start [user 'a']",
    ),
    (
        Rerenders,
        "M16-work",
        "after step 1 (sample) 2 items were processed; 1 were added",
        "world chatml+rows; start [user 'a' <2x2>]; sample 'a'",
    ),
    (
        Rerenders,
        "M2-cut-turn",
        "the template gives 22 ids, the tracker 37; the first difference is at 21: 'a' [97], the tracker has '<|im_end|>",
        "world chatml+rows; start [user 'a']; sample 'a', without its end, length; sample 'a', without its end, length",
    ),
    (ProcessesAgain, "M16-work", "items were processed; ", ""),
    (EncodesHistory, "M16-proportional", "turns 2 to 4 encoded up to ", ""),
]


@pytest.mark.parametrize(("tracker", "id", "text", "words"), BUGS, ids=[f"{bug[0].__name__}-{bug[1]}" for bug in BUGS])
def test_a_bug_is_found_and_told(tracker, id, text, words):
    only = {"worlds": ["chatml+rows"]} if tracker in (ProcessesAgain, Rerenders) else {}
    result = check_tracker(tracker, only=[id], **only, **FAST)[f"tracker/{id}"]
    assert result.status == "fail"
    assert text in result.text
    assert words in result.words


def test_a_script_shows_the_bug_and_passes_without_it(monkeypatch):
    import sys

    report = check_tracker(ZeroForMissing, only=["M12-logprobs"], **FAST)
    script = report["tracker/M12-logprobs"].script
    assert "state = tracker.start([{'role': 'user', 'content': 'a'}])\n" in script
    assert "state = tracker.append_sampled(state, [97, 392], [-0.125, -0.25], 'stop') or state\n" in script
    place = f"from {__name__} import ZeroForMissing"
    assert place in script
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__) or sys.modules[ZeroForMissing.__module__])
    with pytest.raises(AssertionError, match="the logprob of token 0 differs"):
        exec(compile(script, "script", "exec"), {"__name__": "__main__"})
    sound = script.replace(place, "from rollout_core.testing.own_tracker import ConversationTracker as ZeroForMissing")
    exec(compile(sound, "script", "exec"), {"__name__": "__main__"})


def test_a_report_is_replayed():
    report = check_tracker(ZeroForMissing, only=["M12-logprobs"], **FAST)
    saved = Report.from_json(report.to_json())
    assert replay(ZeroForMissing, saved, isolate=False).failed
    assert replay(ConversationTracker, saved, isolate=False).ok


def test_isolation_serves_trackers():
    report = check_tracker("rollout_core-tracker", only=["M12-mask"], max_examples=5, worlds=["chatml+rows"])
    assert report.ok
    assert report.target == "rollout_core-tracker"


def test_worlds_that_are_not_fit_are_told():
    report = check_tracker(ConversationTracker, only=["M3-names"], worlds="chatml+rows", **FAST)
    assert report["tracker/M3-names"].status == "skip"
    assert "none of the worlds that were asked for is one with: sums, no stable" in report["tracker/M3-names"].text + str(report)
    with pytest.raises(ValueError, match="there is no world 'nowhere'"):
        check_tracker(ConversationTracker, worlds=["nowhere"], **FAST)


def test_what_is_lacking_is_skipped_with_the_reason():
    report = check_tracker(Rerenders, only=["M6-compact"], **FAST)
    assert (
        report["tracker/M6-compact"].reason == "needs 'compact_ids': method compact_ids(state): ids with one placeholder per item"
    )


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (type("Empty", (), {"__init__": lambda self, processor: None}), "Empty has no method start; a tracker under test has"),
        (type("Without", (), {}), "Without cannot be called with a processor"),
        (3, "an int cannot be called with a processor; a tracker under test is a class or factory"),
        (type("Claims", (Rerenders,), {"capabilities": {"magic"}}), "capabilities has 'magic'; it may have prompt_ids, "),
        (type("Claims", (Rerenders,), {"capabilities": "forks"}), "capabilities is 'forks'; it is a set of names"),
        (
            type("Claims", (Rerenders,), {"capabilities": {"expand"}}),
            "capabilities has 'expand', and the tracker has not the methods",
        ),
    ],
)
def test_what_is_no_tracker_is_refused(thing, message):
    with pytest.raises(SubjectError, match="^" + re.escape(message)):
        check_tracker(thing, **FAST)


def test_a_factory_is_a_tracker_too():
    assert check_tracker(lambda processor: ConversationTracker(processor), only=["M12-mask"], **FAST).ok
    assert looks_like_a_tracker(ConversationTracker)
    assert looks_like_a_tracker(lambda processor: None)
    assert not looks_like_a_tracker(3)


def test_our_own_tracker_has_every_method_and_declares_what_it_does():
    lacking = set(TRACKER_CAPABILITIES) - tracker_capabilities(ConversationTracker)
    assert lacking == {"segments"}


def test_every_clause_of_conversations_has_a_check():
    checks = select_checks("tracker")
    assert {check.clause for check in checks} == {f"M{number}" for number in range(1, 18)}
    for check in checks:
        assert re.fullmatch(r"tracker/M\d+-[a-z-]+", check.id)
        assert check.title
        assert not check.title.endswith(".")
        assert check.script
        assert check.needs <= TRACKER_CAPABILITIES.keys()


def test_a_case_in_words():
    medium = MediumCase("video", 4, 2, 1, 3)
    steps = (Step("start", (MessageCase("user", ("a", medium)),)), Step("sample", text="b", spelling="spelled", logprobs="some"))
    case = TrackerCase(world="glm+bare", steps=(*steps, Step("cut", number=3)), at=(1,))
    assert str(case) == (
        "world glm+bare; start [user 'a' <3 frames of 4x2 no. 1>]; sample 'b', spelled, logprobs some; cut 3; at [1]"
    )


def test_results_are_put_into_one_form():
    import torch

    class Torch(Rerenders):
        def input_ids(self, state):
            return torch.tensor(super().input_ids(state))

        def position_ids(self, state):
            return torch.arange(9)

    calls = TrackerUnderTest(Torch).on(make_world("chatml+rows").processor)
    state = calls.start([{"role": "user", "content": "a"}])
    assert calls.input_ids(state)[-3:] == [97, 392, 10]
    assert calls.position_ids(state).shape == (1, 9)


def test_rechecking_takes_the_case_as_json():
    recheck(ConversationTracker, "tracker/M12-mask", '{"steps": [{"operation": "start", "messages": [{}]}]}')
