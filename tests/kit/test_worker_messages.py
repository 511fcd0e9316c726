"""What the play says where no mutant leads to it: each word of the model is one that can fail."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace

import msgspec
import pytest

from rollout_core.testing import Violation
from rollout_core.testing.fake_engine import FakeWorker
from rollout_core.testing.worker_cases import Step, WorkerCase
from rollout_core.testing.worker_play import play
from rollout_core.testing.workers import WorkerUnderTest

SUBMIT = Step(do="submit", prompts=(0,), id=0, length=3)
RUN = Step(do="run")
SHOWN = ("token_ids", "status", "weight_version", "versions", "prompt_index", "sample_index", "place", "request_id", "error")


class Shows(FakeWorker):
    """Its completions are no ``Completion``, and may say anything."""

    def change(self, done):
        return {}

    def submit(self, *arguments, **options):
        return [self.other(future) for future in super().submit(*arguments, **options)]

    def other(self, future):
        made = Future()

        def settle(ended):
            shown = {name: getattr(ended.result(), name) for name in SHOWN}
            made.set_result(SimpleNamespace(**{**shown, **self.change(ended.result())}))

        future.add_done_callback(settle)
        return made


def shows(change):
    return type("Shows", (Shows,), {"change": staticmethod(change)})


COMPLETIONS = {
    "status": (lambda done: {"status": "abort"}, "request 0 (r0) has status 'abort'; it is one of stop, length, aborted, failed"),
    "place": (
        lambda done: {"prompt_index": 1, "place": "prompt 1"},
        "request 0 (r0) is prompt 0 sample 0 of its call, and says prompt 1",
    ),
    "id": (lambda done: {"request_id": "other"}, "request 0 (r0) ended with request id 'other'"),
    "versions": (lambda done: {"versions": done.versions[1:]}, "request 0 (r0) has 3 tokens, and versions of 2"),
    "unknown version": (
        lambda done: {"versions": (7, 7, 7)},
        "request 0 (r0): token 0 is of a version that never was: +6 from the last",
    ),
    "failed": (
        lambda done: {"status": "failed", "error": "no reason"},
        "request 0 (r0) has status 'failed': no reason",
    ),
    "aborted": (
        lambda done: {"status": "aborted", "token_ids": done.token_ids[:2], "versions": done.versions[:2]},
        "request 0 (r0) has status 'aborted', and no abort ended it",
    ),
    "too short": (
        lambda done: {"token_ids": done.token_ids[:2], "versions": done.versions[:2]},
        "request 0 (r0) has 2 of 3 tokens, and status 'length', not 'aborted'",
    ),
    "token": (
        lambda done: {"token_ids": (*done.token_ids[:2], done.token_ids[2] + 1)},
        "request 0 (r0): token 2 is {next}, and the weights of its version, that of the start, give {token}",
    ),
}


def played(worker, *steps):
    """What the play says."""
    subject = WorkerUnderTest(worker, timeout=2.0)
    try:
        with pytest.raises(Violation) as raised:
            play(subject, WorkerCase(steps=steps))
        token = subject.greedy(0, subject.prompts[0], 3)[2]
        return str(raised.value), token
    finally:
        subject.close()


@pytest.mark.parametrize("case", COMPLETIONS)
def test_w4_a_completion_that_is_none(case):
    change, message = COMPLETIONS[case]
    text, token = played(shows(change), SUBMIT, RUN)
    assert text == message.format(token=token, next=token + 1)


def test_w4_what_has_no_versions_is_no_completion():
    class Bare(Shows):
        def other(self, future):
            made = Future()
            future.add_done_callback(lambda ended: made.set_result(SimpleNamespace(token_ids=(1,), status="length")))
            return made

    assert played(Bare, SUBMIT, RUN)[0] == "request 0 (r0) ended with a SimpleNamespace, which has no versions"


def test_w4_a_completion_that_changes_after_its_end():
    class Twice(Future):
        """A request that ends twice: asked again, it says something else."""

        asked = 0

        def result(self, timeout=None):
            self.asked += 1
            found = super().result(timeout)
            return found if self.asked == 1 else SimpleNamespace(**{**vars(found), "status": "stop"})

    class EndsTwice(Shows):
        def other(self, future):
            made = Twice()
            super().other(future).add_done_callback(lambda ended: made.set_result(ended.result()))
            return made

    assert played(EndsTwice, SUBMIT, RUN)[0] == "request 0 (r0) has another completion than when it ended"


def test_w5_versions_that_fall():
    class Falls(Shows):
        def change(self, done):
            return {"versions": tuple(reversed(done.versions))} if len(set(done.versions)) > 1 else {}

    steps = (SUBMIT, Step(do="step"), Step(do="sync", weights=0), RUN)
    assert played(Falls, *steps)[0] == "request 0 (r0): tokens of update [1, 1, 0], which do not rise"


def test_w5_a_token_of_weights_from_before_the_submit():
    class Old(Shows):
        def change(self, done):
            return {"versions": tuple(version - 1 for version in done.versions)}

    text, _ = played(Old, Step(do="sync", weights=0), SUBMIT, RUN)
    assert text == "request 0 (r0) was submitted after update 1, and has a token of update 0"


def test_w4_tokens_after_a_stop_id():
    class GoesOn(FakeWorker):
        def submit(self, prompts, params, **options):
            return super().submit(prompts, msgspec.structs.replace(params, stop_token_ids=(), ignore_eos=True), **options)

    text, _ = played(GoesOn, Step(do="submit", prompts=(0,), id=0, length=3, stop=1), RUN)
    assert text.startswith("request 0 (r0) goes on after an EOS or stop id: [")


ANSWERS = {
    "futures": (
        {"submit": lambda self, *arguments, **options: FakeWorker.submit(self, *arguments, **options)[1:]},
        "submit gave 0 futures for 1 prompts of 1 samples",
    ),
    "a set": ({"abort": lambda self, ids=None: set()}, "abort gave set(), not a list of different ids"),
    "twice": ({"abort": lambda self, ids=None: ["a", "a"]}, "abort gave ['a', 'a'], not a list of different ids"),
    "late": ({"abort": lambda self, ids=None: ["a"]}, "all requests have ended, and abort() says that it ended ['a']"),
    "version": ({"version": property(lambda self: "1")}, "version is '1', not a whole number"),
    "hangs": ({"pause": lambda self: Future().result()}, "the worker: pause had not returned after 2 s"),
    "raises": (
        {"resume": lambda self: {}["planted"]},
        "the worker: resume raised KeyError: 'planted' (in <lambda>, test_worker_messages.py:",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_w4_an_answer_that_is_none(case):
    methods, message = ANSWERS[case]
    text, _ = played(type("Answers", (FakeWorker,), methods), SUBMIT, RUN)
    assert text.startswith(message)


def test_t5_a_report_of_another_version():
    class Reports(FakeWorker):
        def sync_weights(self, source, **options):
            report = super().sync_weights(source, **options)
            return SimpleNamespace(version=report.version + 1)

    text, _ = played(Reports, Step(do="sync", weights=0))
    assert text == (
        "an update: the version was that of the start before it, +1 from the last after it, and the report says +2 from the last"
    )


def test_t5_an_error_of_its_own_for_the_sources():
    class Wraps(FakeWorker):
        def sync_weights(self, source, **options):
            try:
                return super().sync_weights(source, **options)
            except ArithmeticError as error:
                raise RuntimeError("it did not work") from error

    text, _ = played(Wraps, Step(do="fail"))
    assert text.startswith(
        "an update whose source raised ArithmeticError('planted by preflight') raised RuntimeError: it did not work"
    )
