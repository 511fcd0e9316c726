"""Plays a program on a worker, beside a model of what each request may have got, and how it may have ended."""

from __future__ import annotations

from typing import Any, Final

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import RolloutCoreError
from rollout_core.preflight.checks import Failing
from rollout_core.testing.packers import Raised, error_words
from rollout_core.testing.registry import Violation
from rollout_core.testing.worker_cases import NO_ID, Step, WorkerCase, id_name
from rollout_core.testing.worker_model import Model, Sent
from rollout_core.testing.workers import WorkerUnderTest
from rollout_core.workers.contract import SamplingParams

#: Tokens that show, at the end of a program, that the worker serves.
_LAST: Final = 3


class Play:
    """One program. ``run`` leaves the worker serving, or raises ``Violation``."""

    def __init__(self, subject: WorkerUnderTest, case: WorkerCase) -> None:
        self.subject = subject
        self.case = case
        self.sent: list[Sent] = []
        self.model = Model(subject.greedy)
        self.is_running = False
        self.is_broken = False  # an update has failed, and none has come since
        self.was_killed = False
        subject.programs += 1
        self.prefix = f"p{subject.programs}-"  # of request ids: no program meets those of another

    def run(self) -> None:
        """``Violation`` where the worker does something else than the model."""
        self.subject.hold(0)
        self.model.note(self._version(), 0)
        self._call("pause", self._it.pause)
        for step in self.case.steps:
            self.play(step)
        if not self.was_killed:
            self.finish()

    def play(self, step: Step) -> None:
        match step.do:
            case "submit":
                self.submit(step)
            case "resume from":
                self.resume_from(step)
            case "abort":
                self.abort(step)
            case "abort all":
                self.abort_all()
            case "pause":
                self.pause()
            case "step":
                self.step(step.steps)
            case "run":
                self.go()
                self.wait()
                self.pause()
            case "go":
                self.go()
            case "sync":
                self.sync(step.weights)
            case "fail":
                self.fail()
            case "free":
                self.free(step)
            case "kill":
                self.kill()

    def finish(self) -> None:
        """All end; nothing is under way; the worker serves."""
        if self.is_broken:
            self.sync(0)
        self.go()
        self.wait()
        left = self._aborted("abort", None)
        if left:
            raise Violation(f"all requests have ended, and abort() says that it ended {left!r}")
        self._require_same()
        self._serve()

    # Requests.

    def submit(self, step: Step) -> None:
        prompts = [self.subject.prompts[number % len(self.subject.prompts)] for number in step.prompts]
        names = [self._id(step.id + place) for place in range(len(prompts))] if step.id != NO_ID else None
        taken = {sent.name for sent in self._open()} & set(names or ())
        if taken and self.is_running:
            return  # whether it has ended yet is for nobody to say
        stops = (self.subject.greedy(0, prompts[0], step.stop)[-1],) if step.stop else ()
        params = SamplingParams(response_length=step.length, n=step.n, ignore_eos=not step.stop, stop_token_ids=stops)
        self._submit(prompts, params, names, taken, step.length)

    def resume_from(self, step: Step) -> None:
        """The rest of a request that was aborted, from what it has."""
        found = [sent for sent in self.sent if sent.was_aborted and not self._is_stopped(sent)]
        if not found:
            return
        old = found[step.at % len(found)]
        tokens = list(self._ended(old).token_ids)
        left = old.length - len(tokens)
        if left < 1:
            return
        stops = tuple(sorted(old.ends - self.subject.eos))
        params = SamplingParams(response_length=left, ignore_eos=not old.ends, stop_token_ids=stops)
        self._submit([[*old.prompt, *tokens]], params, None, set(), old.budget)

    def _is_stopped(self, sent: Sent) -> bool:
        tokens = self._ended(sent).token_ids
        return bool(tokens) and tokens[-1] in sent.ends

    def _submit(
        self, prompts: list[list[int]], params: SamplingParams, names: list[str] | None, taken: set[str], budget: int
    ) -> None:
        options = {} if names is None else {"request_ids": names}
        try:
            futures = self._call("submit", lambda: self._it.submit(prompts, params, **options))
        except Raised as raised:
            if isinstance(raised.error, RolloutCoreError) and (taken or self.is_broken):
                return
            raise
        if taken:
            raise Violation(f"request id {min(taken)!r} is under way, and another submit with it was not refused")
        if len(futures) != len(prompts) * params.n:
            raise Violation(f"submit gave {len(futures)} futures for {len(prompts)} prompts of {params.n} samples")
        for place, future in enumerate(futures):
            prompt, sample = divmod(place, params.n)
            sent = Sent(
                number=len(self.sent),
                name=names[prompt] if names else "",
                prompt=prompts[prompt],
                place=(prompt, sample),
                length=params.response_length,
                ends=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.subject.eos),
                future=future,
                since=self.model.update,
                budget=budget,
                most=None if self.is_running else 0,
                may_fail=self.is_broken,
            )
            self.sent.append(sent)

    def abort(self, step: Step) -> None:
        names = [self._id(number) for number in step.ids]
        named = [sent for sent in self._open() if sent.name in names]
        self._note_aborted(str(step), self._aborted("abort", names), named)

    def abort_all(self) -> None:
        named = self._open()
        self._note_aborted("abort all", self._aborted("abort", None), named)

    def _aborted(self, words: str, names: list[str] | None) -> list[str]:
        found = self._call(words, (lambda: self._it.abort()) if names is None else (lambda: self._it.abort(names)))
        if not isinstance(found, list) or any(not isinstance(name, str) for name in found) or len(set(found)) < len(found):
            raise Violation(f"abort gave {found!r:.80}, not a list of different ids")
        return found

    def _note_aborted(self, words: str, said: list[str], named: list[Sent]) -> None:
        """What abort said, of requests that had not ended before."""
        known = {sent.name for sent in named}
        for name in said:
            if name not in known:
                why = "had ended before" if any(sent.name == name for sent in self.sent) else "nobody submitted"
                raise Violation(f"{words}: it says that it ended {name!r}, which {why}")
        for sent in named:
            if not sent.future.done():
                raise Violation(f"{words}: it has returned, and {sent} has not ended")
            is_aborted = self._ended(sent).status == "aborted"
            if is_aborted and sent.name not in said:
                raise Violation(f"{words}: it ended {sent}, and says that it ended {said!r}")
            if not self.is_running and not is_aborted and not sent.may_fail:
                raise Violation(f"{words}: {sent} was under way, and has status {self._ended(sent).status!r}")
            sent.was_aborted = is_aborted
        for name in said:
            if not any(sent.was_aborted for sent in named if sent.name == name):
                statuses = [self._ended(sent).status for sent in named if sent.name == name]
                raise Violation(f"{words}: it says that it ended {name!r}, whose status is {statuses[0]!r}")

    # Running.

    def pause(self) -> None:
        self._call("pause", self._it.pause)
        self.is_running = False

    def step(self, steps: int) -> None:
        waiting = self._open()
        self._call(f"step({steps})", lambda: self._it.step(steps))
        self.is_running = False
        exact = self.subject.steps_exactly
        for sent in waiting:
            sent.most = sent.most + steps if exact and sent.most is not None else None
        if not self.is_broken:
            # Where steps are counted, an engine may serve one request after the other.
            for sent in waiting[:1] if exact else waiting:
                sent.least = max(sent.least, 1)

    def go(self) -> None:
        for sent in self._open():
            sent.most = None
        self._call("resume", self._it.resume)
        self.is_running = True

    def wait(self) -> None:
        for sent in self.sent:
            self._ended(sent)

    # Weights.

    def sync(self, weights: int) -> None:
        before = self._version()
        self._note_bounds()
        report = self.subject.sync(weights)
        after = self._version()
        if not before < after == report.version:
            old, new, said = (self.model.label(version) for version in (before, after, report.version))
            raise Violation(f"an update: the version was {old} before it, {new} after it, and the report says {said}")
        self.model.note(after, weights)
        self.is_broken = False

    def fail(self) -> None:
        """An update whose source fails at its last tensor."""
        before = self._version()
        weights, capacity = self.subject.weights(1), self.subject.context.capacity
        last = plan_buckets(specs_of(weights), capacity).buckets[-1].slots[-1]
        source = Failing(weights, last.name)
        self.subject.loses()
        for sent in self._open():
            sent.may_fail = True
        self.is_broken = True
        try:
            self._call("sync_weights", lambda: self._it.sync_weights(source, capacity=capacity))
        except Raised as raised:
            if raised.error is not source.error:
                raise Violation(f"an update whose source raised {source.error!r} raised {error_words(raised.error)}") from raised
        else:
            raise Violation(f"an update whose source raised {source.error!r} raised nothing")
        after = self._version()
        if after != before:
            raise Violation(f"an update failed, and the version went from {self.model.label(before)} to {self.model.label(after)}")

    def free(self, step: Step) -> None:
        """Requests that are under way wait for the weights that come."""
        self.pause()
        self._note_bounds()
        freed = [self._call("release_memory", self._it.release_memory) for _ in range(step.times)]
        if any(isinstance(nbytes, int) and nbytes > 0 for nbytes in freed[1:]):
            raise Violation(f"memory was released {step.times} times, which freed {freed} bytes: there is nothing to free twice")
        for _ in range(step.times):
            self._call("resume_memory", self._it.resume_memory)
        self.sync(step.weights)

    def _note_bounds(self) -> None:
        for sent in self._open():
            if sent.most is not None:
                sent.bounds.append((self.model.update, sent.most))

    def _version(self) -> int:
        version = self._call("version", lambda: self._it.version)
        if type(version) is not int:
            raise Violation(f"version is {version!r}, not a whole number")
        return version

    # The end of the engine.

    def kill(self) -> None:
        """All that is under way has failed then, and every call says so."""
        self.was_killed = True
        left = self._open()
        for sent in left:
            sent.may_fail = True
        self.subject.kill()
        try:
            for sent in left:
                if self._ended(sent).status != "failed" and not self.is_running:
                    raise Violation(f"the engine was killed, and {sent} that was under way has status {sent.ended.status!r}")
            params = SamplingParams(response_length=1)
            for words, call in (
                ("generate", lambda: self._it.generate(self.subject.prompts[:1], params)),
                ("submit", lambda: self._it.submit(self.subject.prompts[:1], params)),
            ):
                try:
                    self._call(words, call)
                except Raised as raised:
                    if not isinstance(raised.error, RolloutCoreError):
                        raise
                else:
                    raise Violation(f"the engine was killed, and {words} raised nothing")
            self._call("close", self._it.close)
        finally:
            self.subject.stop()

    # Completions.

    def _ended(self, sent: Sent) -> Any:
        """A request's completion, waited for, and held against the model the first time."""
        if sent.ended is None:
            sent.ended = self._result(sent)
            self.model.check(sent, sent.ended)
        return sent.ended

    def _result(self, sent: Sent) -> Any:
        try:
            return sent.future.result(self.subject.timeout)
        except TimeoutError:
            raise Violation(f"{sent} had not ended after {self.subject.timeout:g} s") from None
        except Exception as error:
            raise Raised(f"the future of {sent}", error) from error

    def _require_same(self) -> None:
        """What has ended stays as it was, and was ended by abort if its status says so."""
        for sent in self.sent:
            if sent.future.result(0) != sent.ended:
                raise Violation(f"{sent} has another completion than when it ended")
            if sent.ended.status == "aborted" and not sent.was_aborted:
                raise Violation(f"{sent} has status 'aborted', and no abort ended it")

    def _serve(self) -> None:
        """A new request is answered, by the newest weights."""
        version = self._version()
        params = SamplingParams(response_length=_LAST, ignore_eos=True)
        prompt = self.subject.prompts[-1]
        (done,) = self._call("generate", lambda: self._it.generate([prompt], params))
        expected = self.model.expected(version, prompt, _LAST)
        if list(done.token_ids) != expected or set(done.versions) != {version}:
            labels = ", ".join(sorted({self.model.label(one) for one in done.versions}))
            raise Violation(
                f"after it all generate gave {list(done.token_ids)} of {labels}; the newest weights, {self.model.label(version)}, "
                f"give {expected}"
            )

    # Calls.

    @property
    def _it(self) -> Any:
        return self.subject.it

    def _open(self) -> list[Sent]:
        """Requests that are not known to have ended, once those that have were looked at."""
        for sent in self.sent:
            if sent.future.done():
                self._ended(sent)
        return [sent for sent in self.sent if sent.ended is None]

    def _id(self, number: int) -> str:
        return self.prefix + id_name(number)

    def _call(self, words: str, call: Any) -> Any:
        return self.subject.call(words, call)


def play(subject: WorkerUnderTest, case: WorkerCase) -> None:
    """The program of a case, beside the model of it. A worker that does something else goes on only if it can be brought to
    serve."""
    program = Play(subject, case)
    try:
        program.run()
    except Violation as violation:
        subject.recover()
        raise Violation(str(violation).replace(program.prefix, "")) from violation
    except BaseException:
        subject.stop()
        raise
