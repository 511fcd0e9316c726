"""Preflight: a sound worker passes, and each check catches the workers that are faulty in its way, in words that name the place."""

import copy
import io
import json
import os
import re
import socket
import subprocess
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner

from rollout_core.cli import app
from rollout_core.errors import WorkerError
from rollout_core.preflight import models
from rollout_core.preflight.checks import CHECKS, Check, CheckFailed, Context, weights
from rollout_core.preflight.command import table_of, verdict_of
from rollout_core.preflight.runner import Outcome, Report, run_checks
from rollout_core.transfer import receive
from rollout_core.transfer.carriers.memory import MemoryReceiver
from support.preflight import CAPACITY, Local, results, run
from support.tensors import from_bytes

PLAN, START, EQUAL, ARRIVE, GREEDY, SHAPES, PICTURES, ABORTS, CHANGE, FLIP, HALF, MEMORY, DEATH, LEFT = (
    check.id for check in CHECKS
)
NORM, INV_FREQ, EMBEDDING = "model.norm.weight", "model.rotary_emb.inv_freq", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preflight") / "model"
    models.make_small_model(folder)
    return folder


# Faulty workers. Their own readback is off, so that preflight has to find what is wrong.


class Sound(Local):
    pass


class DropsTheLastParameter(Local):
    def sync_weights(self, source, **options):
        old = self.read_tensor(NORM)
        report = super().sync_weights(source, **options)
        self.tensor(NORM).copy_(old)
        return report


class LeavesBuffers(Local):
    def sync_weights(self, source, **options):
        old = self.read_tensor(INV_FREQ)
        report = super().sync_weights(source, **options)
        self.tensor(INV_FREQ).copy_(old)
        return report


class SendsAStateDict(Local):
    """The same fault, made by sending too little."""

    def sync_weights(self, source, **options):
        return super().sync_weights(source.state_dict() if isinstance(source, torch.nn.Module) else source, **options)


class CastsThroughBfloat16(Local):
    def spoil(self):
        for tensor in self.engine.weights.tensors.values():
            tensor.copy_(tensor.bfloat16().float())


class OneBitIn(Local):
    def spoil(self):
        self.tensor(EMBEDDING).view(torch.int32)[250, 119] ^= 1


class CastsAndReadsBack(CastsThroughBfloat16):
    """The worker's own readback is on: sync_weights itself refuses."""

    readback = True

    def __init__(self, path):
        super().__init__(path)
        update = self.engine.update

        def spoiled(offered):
            loading = update(offered)
            self.spoil()
            return loading

        self.engine.update = spoiled


class StaleDigests(Local):
    first = None

    def tensor_digests(self):
        self.first = self.first or super().tensor_digests()
        return self.first


class ForgetsATensor(Local):
    def tensor_digests(self):
        return {name: digest for name, digest in super().tensor_digests().items() if name != NORM}


class NeverCounts(Local):
    version = 0


class CountsFailures(Local):
    failures = 0

    def sync_weights(self, source, **options):
        try:
            return super().sync_weights(source, **options)
        except BaseException:
            self.failures += 1
            raise

    @property
    def version(self):
        return self._version + self.failures


class SkipsVerification(Local):
    def __init__(self, path):
        super().__init__(path)

        def trusting(offered):
            with MemoryReceiver.connect(offered.address, timeout=5) as carrier:
                loading = receive(carrier, self.engine.weights, verify=False).loading
            self.engine._is_new = True
            return loading

        self.engine.update = trusting


class SkipsVerificationAndReadsBack(SkipsVerification):
    readback = True


class ForgetsThatItIsBroken(Local):
    def resume_memory(self):
        super().resume_memory()
        for tensor in self.engine.weights.tensors.values():  # new memory holds anything; this is what it mostly is
            tensor.fill_(torch.nan)

    def generate(self, prompts, params, **options):
        self.engine.weights.unusable = None
        return super().generate(prompts, params, **options)


class RefusesForAnotherReason(Local):
    def generate(self, prompts, params, **options):
        if self.engine.weights.unusable:
            raise WorkerError("come back later")
        return super().generate(prompts, params, **options)


class WrapsTheError(Local):
    def sync_weights(self, source, **options):
        try:
            return super().sync_weights(source, **options)
        except ArithmeticError as error:
            raise WorkerError("something went wrong") from error


class SwallowsTheError(Local):
    def sync_weights(self, source, **options):
        try:
            return super().sync_weights(source, **options)
        except ArithmeticError:
            return None


class GeneratesFromOldWeights(Local):
    def spoil_start(self):
        self.old = copy.deepcopy(self.engine.model)

    def generate(self, prompts, params, **options):
        new, self.engine.model = self.engine.model, self.old
        try:
            return super().generate(prompts, params, **options)
        finally:
            self.engine.model = new


class Completes(Local):
    """A worker whose completions are tampered with."""

    def generate(self, prompts, params, **options):
        return self.tamper(super().generate(prompts, params, **options), params)


class Reversed(Completes):
    def tamper(self, completions, params):
        return completions[::-1]


class SwapsTwoPrompts(Completes):
    """In order, by their labels; the tokens are another prompt's."""

    def tamper(self, completions, params):
        n = params.n
        swapped = [*completions[n : 2 * n], *completions[:n], *completions[2 * n :]]
        places = [(c.prompt_index, c.sample_index) for c in completions]
        return [
            msgspec.structs.replace(c, prompt_index=prompt, sample_index=sample)
            for c, (prompt, sample) in zip(swapped, places, strict=True)
        ]


class LosesOne(Completes):
    def tamper(self, completions, params):
        return completions[:-1]


class GoesOnAfterTheEnd(Completes):
    def tamper(self, completions, params):
        return [
            msgspec.structs.replace(c, token_ids=(*c.token_ids, 5), logprobs=(*c.logprobs, -1.0), token_versions=None)
            if c.status == "stop" and len(c.token_ids) < params.response_length
            else c
            for c in completions
        ]


class StopsEarly(Completes):
    def tamper(self, completions, params):
        return [
            msgspec.structs.replace(c, token_ids=c.token_ids[:3], logprobs=c.logprobs[:3], token_versions=None)
            if params.temperature and c.status == "length"
            else c
            for c in completions
        ]


class CallsEverythingLength(Completes):
    def tamper(self, completions, params):
        return [msgspec.structs.replace(c, status="length") for c in completions]


class ProbabilitiesForLogprobs(Completes):
    def tamper(self, completions, params):
        return [msgspec.structs.replace(c, logprobs=tuple(2.0**p for p in c.logprobs)) for c in completions]


class SaysTheOldVersion(Completes):
    def tamper(self, completions, params):
        return [msgspec.structs.replace(c, weight_version=max(0, c.weight_version - 1), token_versions=None) for c in completions]


class IgnoresTheSeed(Local):
    def generate(self, prompts, params, **options):
        return super().generate(prompts, msgspec.structs.replace(params, seed=None), **options)


class IgnoresEos(Local):
    def generate(self, prompts, params, **options):
        return super().generate(prompts, msgspec.structs.replace(params, ignore_eos=True), **options)


class IgnoresStopIds(Local):
    def generate(self, prompts, params, **options):
        return super().generate(prompts, msgspec.structs.replace(params, stop_token_ids=()), **options)


class SamplesAnewWithStopIds(Local):
    """What it returns holds in itself."""

    def generate(self, prompts, params, **options):
        params = msgspec.structs.replace(params, seed=8) if params.stop_token_ids else params
        return super().generate(prompts, params, **options)


class StartsWithOtherWeights(Local):
    def spoil_start(self):
        self.tensor(NORM)[3] += 1


class InBfloat16(Local):
    def __init__(self, path):
        super().__init__(path, dtype="bfloat16")


class CannotGenerate(Local):
    def generate(self, prompts, params, **options):
        raise ZeroDivisionError("planted")


class AbortSaysSoAndDoesNothing(Local):
    def abort(self, request_ids=None):
        return [one for one in request_ids or () if one.startswith("preflight-") and "unknown" not in one]


class AbortForgetsToSayWhich(Local):
    def abort(self, request_ids=None):
        super().abort(request_ids)
        return list(request_ids or ())


class AbortEndsAll(Local):
    def abort(self, request_ids=None):
        return super().abort(request_ids) and super().abort() and list(request_ids)[:1]


class Submits(Local):
    """A worker whose submitted requests end otherwise than the engine says."""

    def submit(self, *arguments, **options):
        return [self.other(future) for future in super().submit(*arguments, **options)]

    def other(self, future):
        made = Future()
        future.add_done_callback(lambda done: made.set_result(self.tamper(done.result())))
        return made


class MixesStatuses(Submits):
    def tamper(self, done):
        return msgspec.structs.replace(done, status="stop" if done.status == "aborted" else done.status)


class AbortLosesTheTokens(Submits):
    def tamper(self, done):
        lost = {"token_ids": (), "logprobs": (), "token_versions": ()}
        return msgspec.structs.replace(done, **lost) if done.status == "aborted" else done


class AbortMakesUpATokenMore(Submits):
    def tamper(self, done):
        if done.status != "aborted":
            return done
        more = {"token_ids": (*done.token_ids, 5), "logprobs": (*done.logprobs, -1.0)}
        return msgspec.structs.replace(done, **more, token_versions=None)


class GivesAllTokensTheNewVersion(Submits):
    def tamper(self, done):
        return msgspec.structs.replace(done, token_versions=None)


class GoesOnFromWhatOldWeightsComputed(Local):
    def spoil_start(self):
        update = self.engine.update

        def kept(offered):
            loading = update(offered)
            self.engine._is_new = False
            return loading

        self.engine.update = kept


class EndsRequestsInAnUpdate(Local):
    def sync_weights(self, source, **options):
        self.abort()
        return super().sync_weights(source, **options)


class LeavesAProcess(Local):
    def spoil_start(self):
        self.process = subprocess.Popen(["sleep", "30"])


class LeavesAZombie(Local):
    def spoil_start(self):
        self.process = subprocess.Popen(["true"])
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)


class LeavesSharedMemory(Local):
    def spoil_start(self):
        self.fd = os.memfd_create("left-behind")


class LeavesASocket(Local):
    def spoil_start(self):
        self.socket = socket.socket()


class FreesTwice(Local):
    def release_memory(self):
        super().release_memory()
        return 4096


class KeepsGoingWithoutWeights(Local):
    """Memory that comes back is taken for weights."""

    def resume_memory(self):
        super().resume_memory()
        self.engine.weights.unusable = None


class LosesItsWeightsInARelease(Local):
    """The update after a release does not reach one tensor."""

    released = False

    def release_memory(self):
        self.released = True
        return super().release_memory()

    def spoil(self):
        if self.released:
            self.tensor(NORM).zero_()


class DoesNotClose(Local):
    def close(self):
        raise ZeroDivisionError("planted in close")


SKIPPED = {GREEDY, PICTURES, ABORTS, CHANGE, FLIP, HALF, MEMORY, DEATH}  # what cannot be judged unless changed weights arrive
PROMPT_0 = r"prompt 0 \(1 tokens\): response token \d+ is \d+ from the worker and \d+ from the trainer's model"
#: For each fault the checks that fail, with their words, and those that could not be judged then.
FAULTS = {
    Sound: ({}, set()),
    DropsTheLastParameter: ({ARRIVE: f"1 of 41 tensors differ, first '{NORM}': 120 of 120 elements differ"}, SKIPPED),
    LeavesBuffers: ({ARRIVE: rf"first '{INV_FREQ}': 10 of 10 elements differ, first at \[0\]: sent"}, SKIPPED),
    SendsAStateDict: ({ARRIVE: f"2 of 41 tensors differ, first '{INV_FREQ}'"}, SKIPPED),
    CastsThroughBfloat16: (
        {ARRIVE: rf"41 of 41 tensors differ, first '{EMBEDDING}': .* \([0-9a-f]{{8}}\)$"},
        SKIPPED,
    ),
    OneBitIn: (
        {ARRIVE: rf"2 of 41 tensors differ, first '{EMBEDDING}': 1 of 30120 elements differ, first at \[250, 119\]"},
        SKIPPED,
    ),
    CastsAndReadsBack: ({ARRIVE: f"tensors read back .* first '{EMBEDDING}': sent", SHAPES: "weights are unusable"}, SKIPPED),
    StaleDigests: ({ARRIVE: f"first '{EMBEDDING}': its digest differed and its bytes do not"}, SKIPPED),
    ForgetsATensor: (
        {EQUAL: rf"the worker has no tensor \['{NORM}'\]", ARRIVE: rf"the worker has no tensor \['{NORM}'\] \(1 missing\)"},
        SKIPPED,
    ),
    NeverCounts: (
        {
            ARRIVE: "version was 0 before the sync; after it the report says 1 and the worker 0",
            SHAPES: "prompt 0 sample 0: .*version 1",
        },
        SKIPPED,
    ),
    CountsFailures: ({FLIP: "version went from 2 to 3 in an update that failed", HALF: r"version went from \d to \d in an"}, set()),
    SkipsVerification: ({FLIP: r"a flipped bit in bucket \[0\] was not noticed"}, set()),
    SkipsVerificationAndReadsBack: ({FLIP: r"bucket \[0\] got past the bucket's digest: 1 of 41 tensors .* first 'model"}, set()),
    ForgetsThatItIsBroken: (
        {HALF: r"generated with \d of 5 buckets of an update loaded", MEMORY: "refused to generate for another reason: .*NaN"},
        set(),
    ),
    RefusesForAnotherReason: (
        dict.fromkeys((HALF, MEMORY), "refused to generate for another reason: come back later"),
        set(),
    ),
    WrapsTheError: ({HALF: r"ArithmeticError\('planted by preflight'\), and what came out is WorkerError"}, set()),
    SwallowsTheError: ({HALF: "the source failed at 'model.*', and no error came out"}, set()),
    GeneratesFromOldWeights: ({GREEDY: PROMPT_0}, set()),
    Reversed: (
        {GREEDY: "completion 0 is of prompt 3 sample 0, expected prompt 0", SHAPES: "completion 0 is of prompt 3 sample 3"},
        set(),
    ),
    SwapsTwoPrompts: ({GREEDY: PROMPT_0}, set()),
    LosesOne: ({GREEDY: "3 completions for 4 prompts of 1 samples", SHAPES: "15 completions for 4 prompts of 4 samples"}, set()),
    GoesOnAfterTheEnd: ({SHAPES: r"prompt \d sample \d: tokens go on after an EOS or stop id"}, set()),
    StopsEarly: ({SHAPES: r"prompt \d sample \d: stopped at 3 tokens without an EOS"}, set()),
    CallsEverythingLength: ({SHAPES: r"prompt \d sample \d: status length with an EOS or stop id at \[\d+\]"}, set()),
    ProbabilitiesForLogprobs: ({SHAPES: r"prompt 0 sample 0: logprobs \("}, set()),
    SaysTheOldVersion: (
        {GREEDY: "prompt 0 sample 0: its tokens are of weight version 0, and the worker says 1", SHAPES: "of weight version 0"},
        set(),
    ),
    IgnoresTheSeed: ({SHAPES: "the same seed gave other samples"}, set()),
    IgnoresEos: ({SHAPES: r"prompt \d sample \d: tokens go on after an EOS"}, set()),
    IgnoresStopIds: ({SHAPES: r"prompt \d sample \d: tokens go on after an EOS or stop id"}, set()),
    SamplesAnewWithStopIds: ({SHAPES: r"prompt \d sample \d: with stop id \d+ it is \[.*\], expected \[.*\]"}, set()),
    StartsWithOtherWeights: ({EQUAL: rf"1 of 41 tensors differ, first '{NORM}': 1 of 120 elements differ, first at \[3\]"}, set()),
    InBfloat16: (
        {
            EQUAL: rf"first '{EMBEDDING}': torch.float32 \[251, 120\] sent, torch.bfloat16 \[251, 120\] found",
            ARRIVE: rf"'{EMBEDDING}' is f32\[251, 120\] in the update and bf16",
        },
        SKIPPED,
    ),
    CannotGenerate: (
        {
            GREEDY: "ZeroDivisionError: planted",
            SHAPES: "ZeroDivisionError: planted",
            HALF: "ZeroDivisionError",
            MEMORY: "ZeroDivisionError",
        },
        set(),
    ),
    AbortSaysSoAndDoesNothing: ({ABORTS: r"while it decodes, .* ended \['preflight-0', 'preflight-1'\]"}, set()),
    AbortForgetsToSayWhich: ({ABORTS: r"in the queue, and an unknown id, ended \['preflight-0', 'preflight-unknown'\]"}, set()),
    AbortEndsAll: ({ABORTS: r"while it decodes, .* again, ended \[\]|these requests have ended"}, set()),
    MixesStatuses: ({ABORTS: "prompt 0 sample 0: status stop, expected aborted"}, set()),
    AbortLosesTheTokens: ({ABORTS: "0 tokens came in 4 steps"}, set()),
    AbortMakesUpATokenMore: ({ABORTS: r"prompt \d sample 0: \[.*5\] is no prefix of"}, set()),
    GivesAllTokensTheNewVersion: ({CHANGE: r"prompt 0 sample 0: \[\] before|: \[.*\] after the change, expected"}, set()),
    GoesOnFromWhatOldWeightsComputed: ({CHANGE: r"prompt \d sample 0: \[.*\] after the change, expected"}, set()),
    EndsRequestsInAnUpdate: ({CHANGE: "prompt 0 sample 0: status aborted after the weights changed"}, set()),
    FreesTwice: ({MEMORY: "a second release says that it freed 4096 bytes"}, set()),
    KeepsGoingWithoutWeights: ({MEMORY: "generated after its memory was released|refused to generate for another reason"}, set()),
    LosesItsWeightsInARelease: ({MEMORY: "the same weights gave other tokens after a release"}, set()),
    LeavesAProcess: ({LEFT: r"left behind: process \d+ \(sleep 30, state [RS]\)"}, set()),
    LeavesAZombie: ({LEFT: r"left behind: process \d+ \(ended, not waited for, state Z\)"}, set()),
    LeavesSharedMemory: ({LEFT: r"left behind: file descriptor \d+ \(/memfd:left-behind \(deleted\)\)"}, set()),
    LeavesASocket: ({LEFT: r"left behind: file descriptor \d+ \(socket:\[\d+\]\)"}, set()),
    DoesNotClose: ({LEFT: "ZeroDivisionError: planted in close", "worker closes": "planted in close"}, set()),
}


@pytest.mark.parametrize("worker", FAULTS, ids=lambda worker: worker.__name__)
def test_a_fault_fails_its_checks_and_no_other(folder, worker):
    expected, skipped = FAULTS[worker]
    made = []

    def make(path):
        made.append(worker(path))
        return made[-1]

    outcomes = run(folder, make)
    try:
        assert results(outcomes, "fail") == set(expected), [(o.id, o.figure) for o in outcomes.values() if o.result == "fail"]
        assert results(outcomes, "skip") == skipped
        assert results(outcomes, "pass") == {check.id for check in CHECKS} - set(expected) - skipped
        for id_, words in expected.items():
            assert re.search(words, outcomes[id_].figure), outcomes[id_].figure
            assert outcomes[id_].trace.startswith("Traceback") == ("ZeroDivisionError" in outcomes[id_].figure)
        for id_ in skipped:
            assert outcomes[id_].figure == f"needs: {ARRIVE}"
    finally:
        left = made[0]
        if hasattr(left, "process"):
            left.process.kill()
            left.process.wait()
        if hasattr(left, "fd"):
            os.close(left.fd)
        if hasattr(left, "socket"):
            left.socket.close()


def right_padded(model, prompts, settings, recorder, criteria, more):
    """transformers is given the padding after each prompt."""
    width = max(map(len, prompts))
    ids = [list(prompt) + [settings.pad_token_id] * (width - len(prompt)) for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts]
    return decoded(model, ids, mask, width, settings, recorder, criteria)


def padding_attended_to(model, prompts, settings, recorder, criteria, more):
    width = max(map(len, prompts))
    ids = [[settings.pad_token_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return decoded(model, ids, [[1] * width] * len(prompts), width, settings, recorder, criteria)


def decoded(model, ids, mask, width, settings, recorder, criteria):
    output = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        generation_config=settings,
        logits_processor=transformers.LogitsProcessorList([recorder]),
        stopping_criteria=criteria,
    )
    recorder.settle(output)
    return output[:, width:].tolist()


@pytest.mark.parametrize("decode", [right_padded, padding_attended_to], ids=lambda function: function.__name__)
@pytest.mark.filterwarnings("ignore:.*right-padding.*")
def test_wrong_padding_is_found_by_the_tokens(folder, monkeypatch, decode):
    monkeypatch.setattr("rollout_core.workers.hf.generate.decode", decode)
    outcomes = run(folder, Sound)
    assert results(outcomes, "fail") == {GREEDY, ABORTS, CHANGE}
    assert re.search(r"prompt [01] \(\d tokens\): response token", outcomes[GREEDY].figure)


def test_a_worker_that_does_not_start_is_the_one_failure(folder):
    def refuse(path):
        raise WorkerError(f"no room for {path}")

    outcomes = run(folder, refuse)
    assert results(outcomes, "fail") == {START}
    assert results(outcomes, "pass") == {PLAN}
    assert outcomes[START].figure == f"no room for {folder}"


def test_a_folder_without_weights_is_the_one_failure(tmp_path):
    (tmp_path / "config.json").write_text("{")
    outcomes = run(tmp_path, lambda path: pytest.fail("there is nothing to start a worker with"))
    assert results(outcomes, "fail") == {PLAN}
    assert f"the model in {tmp_path} could not be loaded: " in outcomes[PLAN].figure
    assert not outcomes[PLAN].trace
    assert results(outcomes, "pass") == set()


def test_weights_that_change_no_token_prove_nothing(folder):
    """So small a change would let tokens of the old weights pass."""
    outcomes = run(folder, Sound, perturbation=1e-6)
    assert results(outcomes, "fail") == {GREEDY}
    assert "change the tokens of no prompt" in outcomes[GREEDY].figure


def test_an_update_that_changes_nothing_proves_nothing(folder):
    outcomes = run(folder, Sound, perturbation=0.0)
    assert results(outcomes, "fail") == {ARRIVE}
    assert f"41 tensors were changed by the trainer and not in the worker, first ['{EMBEDDING}']" in outcomes[ARRIVE].figure


def test_a_check_that_falls_over_is_a_failed_check_and_not_the_end(folder):
    closed = []

    class Closing(Sound):
        def close(self):
            closed.append(True)
            super().close()

    def fall(context):
        context.worker = Closing(context.folder)
        raise KeyError("fallen")

    def refuse(context):
        raise CheckFailed("words alone")

    def note(context):
        error = WorkerError("from the worker")
        error.add_note("in the worker process:\nits traceback")
        raise error

    listed = [
        Check("falls", "-", fall),
        Check("after it", "-", lambda context: "fine", "falls"),
        Check("refuses", "-", refuse),
        Check("notes", "-", note),
        Check("holds", "-", lambda context: "fine"),
    ]
    seen = []
    report = run_checks(
        Context(folder, Sound, CAPACITY),
        worker="w",
        model="m",
        checks=listed,
        progress=lambda check, outcome: seen.append((check.id, outcome and outcome.result)),
    )
    assert [(outcome.id, outcome.result, outcome.figure) for outcome in report.checks] == [
        ("falls", "fail", "KeyError: 'fallen'"),
        ("after it", "skip", "needs: falls"),
        ("refuses", "fail", "words alone"),
        ("notes", "fail", "from the worker"),
        ("holds", "pass", "fine"),
    ]
    traces = [outcome.trace for outcome in report.checks]
    assert "Traceback" in traces[0]
    assert 'raise KeyError("fallen")' in traces[0]
    assert traces[1:] == ["", "", "in the worker process:\nits traceback", ""]
    assert not report.ok
    assert closed == [True]
    assert seen == [
        (check.id, result) for check in listed for result in (None, next(o.result for o in report.checks if o.id == check.id))
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_closes_its_worker(folder, error):
    context = Context(folder, Sound, CAPACITY)

    def interrupt(check, outcome):
        if check.id == EQUAL:
            raise error

    with pytest.raises(error):
        run_checks(context, worker="w", model="m", progress=interrupt)
    with pytest.raises(WorkerError, match="the worker is closed"):
        context.worker.weights_digest()


DIFFERENCES = {
    "0-d": (torch.tensor(1.5), torch.tensor(2.5), "1 of 1 elements differ, first at []: sent 1.5 (0000c03f), found 2.5 (00002040)"),
    "NaN payload": (
        from_bytes(bytes.fromhex("0100c07f0000c07f"), torch.float32, (2, 1)),
        from_bytes(bytes.fromhex("0100c07f0200c07f"), torch.float32, (2, 1)),
        "1 of 2 elements differ, first at [1, 0]: sent nan (0000c07f), found nan (0200c07f)",
    ),
    "-0.0": (
        torch.zeros(3),
        -torch.zeros(3),
        "3 of 3 elements differ, first at [0]: sent 0.0 (00000000), found -0.0 (00000080)",
    ),
    "transposed": (
        torch.arange(6.0).view(2, 3).t(),
        torch.arange(6.0).view(3, 2),
        "4 of 6 elements differ, first at [0, 1]: sent 3.0 (00004040), found 1.0 (0000803f)",
    ),
    "bf16": (
        torch.ones(2, dtype=torch.bfloat16),
        torch.zeros(2, dtype=torch.bfloat16),
        "2 of 2 elements differ, first at [0]: sent 1.0 (803f), found 0.0 (0000)",
    ),
    "bool": (
        torch.tensor([True]),
        torch.tensor([False]),
        "1 of 1 elements differ, first at [0]: sent True (01), found False (00)",
    ),
    "shape": (torch.ones(2, 3), torch.ones(3, 2), "torch.float32 [2, 3] sent, torch.float32 [3, 2] found"),
}


@pytest.mark.parametrize("case", DIFFERENCES)
def test_a_difference_is_shown_with_its_place_and_bits(case):
    sent, found, words = DIFFERENCES[case]
    context = SimpleNamespace(running=lambda: SimpleNamespace(read_tensor=lambda name: found))
    assert weights._difference(context, "w", sent) == f"'w': {words}"


# The trainer's side of the comparison


def test_the_small_model_is_the_same_each_time_and_met_by_every_rule(folder, tmp_path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    models.make_small_model(tmp_path / "again")
    assert torch.equal(state, torch.random.get_rng_state())
    files = [(place / "model.safetensors").read_bytes() for place in (folder, tmp_path / "again")]
    assert files[0] == files[1]
    trainer = models.load_trainer(folder)
    assert models.eos_token_ids(trainer) == {2, 7, 100, 200}
    assert trainer.lm_head.weight is trainer.model.embed_tokens.weight
    figure = run(folder, Sound)[SHAPES].figure
    ended = int(re.fullmatch(r"48 rows hold, (\d+) ended by an EOS, and one by a stop id", figure).group(1))
    assert ended > 0, "no row met an EOS, so a worker that ignores them would pass"


def test_perturbing_changes_every_tensor_once(folder):
    trainer = models.load_trainer(folder)
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    changed = models.perturb(trainer, 0.05)
    assert set(changed) == {*before, *dict(trainer.named_buffers())}
    for name, tensor in trainer.state_dict().items():
        relative = float((tensor - before[name]).square().mean().sqrt() / before[name].square().mean().sqrt().clamp(min=0.01))
        assert 0.03 < relative < 0.07, f"{name}: {relative}"


def test_the_reference_stops_at_an_eos_and_knows_its_nearest_tie(folder):
    trainer = models.load_trainer(folder)
    tokens, gap = models.greedy_reference(trainer, [5, 6], 8, set())
    assert len(tokens) == 8
    with torch.no_grad():
        logits = trainer(torch.tensor([[5, 6, *tokens[:-1]]])).logits[0, 1:].sort().values
    assert gap == pytest.approx(float((logits[:, -1] - logits[:, -2]).min()), abs=1e-4)
    assert models.greedy_reference(trainer, [5, 6], 8, {tokens[3]})[0] == tokens[: tokens.index(tokens[3]) + 1]
    with torch.no_grad():
        trainer.model.embed_tokens.weight[10] = trainer.model.embed_tokens.weight[11]
        trainer.model.norm.weight.zero_()
    assert models.greedy_reference(trainer, [5, 6], 1, set())[1] == 0


@pytest.mark.parametrize(("value", "found"), [(None, set()), (3, {3}), ([3, 4], {3, 4})])
def test_eos_ids_come_in_every_form(value, found):
    config = SimpleNamespace(eos_token_id=value)
    bare = SimpleNamespace(get_text_config=lambda: SimpleNamespace(eos_token_id=None))
    assert models.eos_token_ids(SimpleNamespace(generation_config=config, config=bare)) == found
    text = SimpleNamespace(get_text_config=lambda: config)
    assert models.eos_token_ids(SimpleNamespace(generation_config=None, config=text)) == found
    assert models.eos_token_ids(SimpleNamespace(config=text)) == found


# The command


def invoke(*arguments, columns=None):
    return CliRunner().invoke(app, ["preflight", *map(str, arguments)], env={"COLUMNS": columns})


FIELDS = {
    "": {"ok", "worker", "model", "seconds", "environment", "checks"},
    "environment": {"rollout_core", "python", "torch", "transformers", "cpus", "threads", "platform"},
    "check": {"id", "clause", "result", "seconds", "figure", "trace"},
}


def assert_report(file: Path) -> dict:
    content = json.loads(file.read_text())
    assert set(content) == FIELDS[""]
    assert set(content["environment"]) == FIELDS["environment"]
    for outcome in content["checks"]:
        assert set(outcome) == FIELDS["check"]
        assert outcome["result"] in ("pass", "fail", "skip")
        assert outcome["figure"]
    assert content["ok"] is all(outcome["result"] == "pass" for outcome in content["checks"])
    assert msgspec.json.decode(file.read_bytes(), type=Report).ok is content["ok"]
    return content


def test_a_real_run_passes_well_within_a_minute(tmp_path):
    """The command as an operator runs it: the worker in a process of its own."""
    start = time.monotonic()
    done = invoke("--json", tmp_path / "report.json", columns="80")
    assert time.monotonic() - start < 60
    assert done.exit_code == 0, done.output
    content = assert_report(tmp_path / "report.json")
    assert [(outcome["id"], outcome["clause"]) for outcome in content["checks"]] == [(check.id, check.clause) for check in CHECKS]
    assert {outcome["result"] for outcome in content["checks"]} == {"pass"}
    assert re.search(r"all 14 checks hold in \d+\.\d s", done.output)
    assert max(map(len, done.output.splitlines())) <= 80
    for outcome in content["checks"]:
        assert f"{outcome['id']} " in done.output


def test_a_failing_run_exits_with_1_and_shows_why(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("rollout_core.workers.hf.worker.HFWorker", lambda path, threads: CannotGenerate(path))
    done = invoke("--model", folder, "--json", tmp_path / "report.json", "--capacity", "300KiB")
    assert done.exit_code == 1, done.output
    content = assert_report(tmp_path / "report.json")
    assert content["model"] == str(folder)
    assert "4 of 14 checks do not hold in" in done.output
    assert "ZeroDivisionError: planted" in done.output
    assert "Traceback" in done.output
    assert max(map(len, done.output.splitlines())) > 80, "in a pipe nothing has to fit 80 columns"


REFUSALS = {
    "no config": (["--model", "{tmp}"], "has no config.json; pass a folder"),
    "no folder": (["--model", "{tmp}/nowhere"], "has no config.json"),
    "worker": (["--worker", "[bold]wat"], r"--worker is '[bold]wat'; this version has hf, vllm"),
    "unit": (["--capacity", "3parsecs"], "--capacity: size '3parsecs' has the unknown unit"),
    "no number": (["--capacity", "much"], "--capacity: size 'much' is no number"),
    "negative": (["--capacity=-1"], "--capacity: size '-1' is negative"),
    "fraction": (["--capacity", "1.5"], "--capacity: size '1.5' is 1.5 bytes, which is not whole"),
    "zero": (["--capacity", "0"], "--capacity is 0; give a number of bytes"),
    "json": (["--json", "{tmp}/nowhere/report.json"], "--json: {tmp}/nowhere/report.json cannot be written"),
    "pictures of a folder": (["--pictures", "--model", "{tmp}"], "--pictures makes a model: a folder's or a server's is checked"),
    "pictures of a server": (["--pictures", "--worker", "vllm", "--url", "http://127.0.0.1:1"], "--pictures makes a model"),
    "json folder": (["--json", "{tmp}"], "--json: {tmp} cannot be written; pass a file"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_begin_exits_with_2_and_one_line(tmp_path, case):
    arguments, message = REFUSALS[case]
    done = invoke(*(argument.replace("{tmp}", str(tmp_path)) for argument in arguments))
    assert done.exit_code == 2
    assert message.replace("{tmp}", str(tmp_path)) in done.output
    assert done.output.count("\n") == 1


def test_an_option_that_is_not_there_exits_with_2():
    assert invoke("--wat").exit_code == 2


def test_a_disk_that_fails_exits_with_2(monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "make_small_model", fail)
    done = invoke()
    assert done.exit_code == 2
    assert "No space left on device" in done.output


def test_a_capacity_too_small_for_the_model_is_a_check_that_fails(folder, monkeypatch):
    monkeypatch.setattr("rollout_core.workers.hf.worker.HFWorker", lambda path, threads: Sound(path))
    done = invoke("--model", folder, "--capacity", "2", columns="80")
    assert done.exit_code == 1
    assert "1 of 14 checks do not hold, 13 could not be judged" in done.output


# The table

LONG = (
    "2 of 41 tensors differ, first 'model.layers.17.self_attn.q_proj.weight': 1 of 30120 elements differ, first at [250, 119]: "
    "sent 0.123456789 (deadbeef), found 0.123456790 (deadbeee)"
)


def report_of(*outcomes, model="small"):
    environment = {"torch": "2.13.0", "transformers": "5.23.0"}
    return Report(ok=False, worker="hf", model=model, seconds=12.3, environment=environment, checks=list(outcomes))


EXAMPLE = report_of(
    Outcome(id="plan agrees with its manifest", clause="B7", result="pass", seconds=0.05, figure="41 tensors in 2 buckets"),
    Outcome(id="changed weights arrive", clause="B1 W2", result="fail", seconds=123.456, figure=LONG, trace="Traceback"),
    Outcome(id="greedy tokens equal", clause="W1 W5", result="skip", seconds=0.0, figure="needs: changed weights arrive"),
)


def rendered(report, width):
    console = Console(width=width, file=io.StringIO())
    console.print(table_of(report, width))
    return console.file.getvalue()


@pytest.mark.parametrize("width", [70, 80, 109, 110, 160])
def test_the_table_can_be_read_at_every_width(width):
    text = rendered(EXAMPLE, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    head = next(line for line in lines if "clause" in line)
    assert all(word in head for word in ("check", "clause", "result", "time", "figure"))
    for outcome in EXAMPLE.checks:
        row = next(line for line in lines if outcome.id in line and outcome.result in line)
        assert f" {outcome.clause} " in row
        assert f" {outcome.seconds:.2f} s " in row
    # The figures' words, in order and uncut but for those longer than a line, whatever stands between them.
    figures = "".join(re.findall(r"[^\s│┃]+", " ".join(lines)))
    start = figures.index("2of41")
    kept = figures[start : start + len(LONG) + 100]
    for word in LONG.split():
        assert word in kept, word
        kept = kept[kept.index(word) + len(word) :]
    narrowest = max(len(re.sub(r"[│┃]", " ", line).strip()) for line in lines if "elements" in line)
    assert narrowest >= 30, "a figure has room for a few words on a line"


@pytest.mark.parametrize("width", [80, 160])
def test_markup_in_names_is_shown_as_it_is(width):
    nasty = "[bold]x[/red] [link=file:///]y"
    report = report_of(Outcome(id="a", clause="B1", result="fail", seconds=1, figure=nasty), model=nasty)
    assert rendered(report, width).count(nasty) == 2


def test_the_verdict_counts_what_failed_apart_from_what_was_not_judged():
    assert verdict_of(EXAMPLE) == "1 of 3 checks do not hold, 1 could not be judged in 12.3 s"
    good = msgspec.structs.replace(EXAMPLE, ok=True, checks=EXAMPLE.checks[:1])
    assert verdict_of(good) == "all 1 checks hold in 12.3 s"
