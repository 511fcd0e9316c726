"""Clause W8: a picture's data goes to the engine once, and a conversation is to the engine what it is to transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from typing import Final

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.preflight import vision_models, vision_reference
from rollout_core.preflight.checks.context import CheckFailed, Context, expect
from rollout_core.preflight.vision_reference import Message, Reference
from rollout_core.workers.contract import Completion, SamplingParams
from rollout_core.workers.media import MediaReport
from rollout_core.workers.worker import Worker

#: Pictures that are shown between, so that an engine which keeps few forgets some.
_OTHERS: Final = 16
#: How often the weights that see are changed twice as much, until the change can be told by the tokens.
_DOUBLINGS: Final = 6


def pictures_go_once(context: Context) -> str:
    """A conversation of three turns with five pictures, one of them twice: of each turn the new pictures' data is sent, where the
    worker says that its engine keeps them; the tokens are transformers' over all of it, also when the engine has dropped pictures,
    and by new weights after an update."""
    if not vision_models.sees(context.trainer):
        return "no pictures: the model takes none"
    worker = context.running()
    processor = vision_models.load_processor(context.folder)
    renderer = HFRenderer(processor)
    reference = Reference(context.trainer, processor, context.models.eos_token_ids(context.trainer))
    if worker.media_form == "none":
        return _refused(worker, Conversation.start(renderer, vision_reference.turns()[0]))
    _tell_order(context, reference)
    given = _Given(worker)
    tokens, tracked, messages = _three_turns(context, renderer, reference, given)
    sent, named, nbytes = given.report.sent, given.report.named, given.report.nbytes
    figure = f"{sent} pictures sent ({nbytes / 1e3:.0f} kB) and {named} named in 3 turns; {tokens} tokens equal"
    if worker.media_form == "pictures":
        figure += f"; {_forgotten(context, renderer, reference, given, tracked, messages)}"
    version = _see_anew(context, reference, given, tracked, messages)
    return f"{figure}; seen anew by version {version}"


def _refused(worker: Worker, conversation: Conversation) -> str:
    try:
        worker.generate([conversation], SamplingParams(response_length=1))
    except WorkerError:
        return "this worker takes no pictures, says so, and refuses them"
    raise CheckFailed("the worker says that it takes no pictures, and answered a conversation that shows some")


def _tell_order(context: Context, reference: Reference) -> None:
    """Weights by which the tokens tell that two pictures changed places: with others, swapped pictures would look right."""
    right, exchanged = (_all(reference, vision_reference.turns(exchanged=exchanged)) for exchanged in (False, True))

    def tells() -> bool:
        length = context.response_length
        return reference.greedy(right, length) != reference.greedy(exchanged, length)

    if tells():
        return
    told = _changed_until(context, tells, seed=2)
    context.running().sync_weights(context.trainer, capacity=context.capacity)
    expect(told, "the order of pictures changes no token, so two that changed places would look right")


def _changed_until(context: Context, holds: Callable[[], bool], seed: int) -> bool:
    """Change what sees, more and more, until this holds. The worker has not got these weights then."""
    seeing = vision_models.seeing_weights(context.trainer)
    computed = context.running().takes_computed
    for doubling in range(_DOUBLINGS):
        scale = context.perturbation * 2**doubling
        context.models.perturb(context.trainer, scale, seed=seed, computed=computed, only=seeing)
        if holds():
            return True
    return False


def _all(reference: Reference, turns: Sequence[Sequence[Message]]) -> dict[str, object]:
    messages: list[Message] = list(turns[0])
    for turn in turns[1:]:
        messages = vision_reference.answered(messages, turn)
    return reference.inputs(messages)


def _three_turns(
    context: Context, renderer: HFRenderer, reference: Reference, given: _Given
) -> tuple[int, Conversation, list[Message]]:
    """How many tokens were equal; the conversation, by the tracker and as messages."""
    first, *later = vision_reference.turns()
    tracked, messages = Conversation.start(renderer, first), list(first)
    count = len(_answer(context, reference, given, tracked, messages, "turn 1"))
    for number, turn in enumerate(later, 2):
        # What was said is given, not sampled: so the tokenizer writes it alike, in a part and in the whole.
        tracked = tracked.append_sampled(reference.answer(messages), finish="length").extend(turn)
        messages = vision_reference.answered(messages, turn)
        count += len(_answer(context, reference, given, tracked, messages, f"turn {number}"))
    return count, tracked, messages


def _answer(
    context: Context, reference: Reference, given: _Given, tracked: Conversation, messages: Sequence[Message], where: str
) -> tuple[int, ...]:
    """What the worker says to a conversation, found right, and of what it was sent."""
    inputs = reference.inputs(messages)
    prompt = tracked.with_generation_prompt()
    _expect_equal(prompt.input_ids.tolist(), inputs["input_ids"][0].tolist(), f"{where}: the conversation's ids")
    completion = _generate(given.worker, tracked, context.response_length, where)
    expected = reference.greedy(inputs, context.response_length)
    shown = [item.uuid() for item in prompt.items]
    _expect_equal(completion.token_ids, expected, f"{where}: the response to {len(shown)} pictures")
    version = given.worker.version
    expect(completion.versions == (version,) * len(expected), f"{where}: versions {completion.versions}, the worker's is {version}")
    given.check(shown, where)
    return completion.token_ids


def _generate(worker: Worker, conversation: Conversation, length: int, where: str) -> Completion:
    try:
        return worker.generate([conversation], SamplingParams(response_length=length))[0]
    except WorkerError as error:
        failed = CheckFailed(f"{where}: {error}")
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error


def _expect_equal(found: Sequence[int], expected: Sequence[int], what: str) -> None:
    if list(found) != list(expected):
        pairs = enumerate(zip_longest(found, expected))
        at, (mine, theirs) = next((at, pair) for at, pair in pairs if pair[0] != pair[1])
        words = ["nothing" if one is None else str(one) for one in (mine, theirs)]
        raise CheckFailed(
            f"{what} differ at {at}: {words[0]}, and {words[1]} by transformers over all of it at once ({len(found)} and "
            f"{len(expected)} ids)"
        )


def _forgotten(
    context: Context,
    renderer: HFRenderer,
    reference: Reference,
    given: _Given,
    tracked: Conversation,
    messages: Sequence[Message],
) -> str:
    """Show others, and the conversation again: what an engine dropped for them is sent once more."""
    for other in vision_reference.others(_OTHERS):
        conversation = Conversation.start(renderer, other)
        where = "a conversation with other pictures"
        _generate(given.worker, conversation, 1, where)
        given.check([item.uuid() for item in conversation.items], where)
    before = given.report.misses
    _answer(context, reference, given, tracked, messages, f"turn 3 again, after {_OTHERS} other pictures")
    missed = given.report.misses - before
    return f"{missed} that the engine dropped sent again" if missed else f"none dropped for {_OTHERS} others"


def _see_anew(context: Context, reference: Reference, given: _Given, tracked: Conversation, messages: Sequence[Message]) -> int:
    """An update of what sees, and the conversation again: nothing that the old weights saw is built on. Returns the version."""
    inputs = reference.inputs(messages)
    before = reference.greedy(inputs, context.response_length)
    told = _changed_until(context, lambda: reference.greedy(inputs, context.response_length) != before, seed=3)
    version = given.worker.sync_weights(context.trainer, capacity=context.capacity).version
    expect(told, "other weights that see change no token, so pictures seen by the old ones would look right")
    _answer(context, reference, given, tracked, messages, f"turn 3 by version {version}")
    return version


class _Given:
    """What a worker reports that its engine was given of pictures, held against what it declares."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._known: set[str] = set()
        self._start = worker.media_report()
        self._last = self._start

    @property
    def report(self) -> MediaReport:
        """Since this was made, as of the last ``check``."""
        return _less(self._last, self._start)

    def check(self, shown: Iterable[str], where: str) -> None:
        """One request showed these pictures, by their identities. If the engine missed some, all of them came once more."""
        shown, report = list(shown), self.worker.media_report()
        change = _less(report, self._last)
        self._last = report
        new = len(set(shown) - self._known)
        self._known.update(shown)
        sent, named = len(shown), 0
        if self.worker.media_form == "pictures":
            sent, named = new, len(shown) - new
            if change.misses:
                sent, named = sent + len(set(shown)), named + len(shown) - len(set(shown))
        expect(
            (change.sent, change.named) == (sent, named),
            f"{where} shows {len(shown)} pictures, {new} of them new: {change.sent} were sent and {change.named} named, expected "
            f"{sent} and {named} of a worker whose form is {self.worker.media_form!r} ({change.misses} missed by the engine)",
        )


def _less(report: MediaReport, before: MediaReport) -> MediaReport:
    names = ("sent", "named", "misses", "nbytes")
    return MediaReport(**{name: getattr(report, name) - getattr(before, name) for name in names})
