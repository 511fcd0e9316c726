"""SGLangEngine on stand-ins for SGLang's versions, each with the traps that it has."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import xxhash
from safetensors.torch import save_file

from rollout_core.bucketing import plan_buckets, specs_of
from rollout_core.errors import WorkerError
from rollout_core.transfer import send
from rollout_core.transfer.carriers.memory import MemorySender
from rollout_core.workers import SamplingParams, SGLangWorker
from rollout_core.workers.engine import Group, Request, Update
from rollout_core.workers.sglang import engine as engine_module
from rollout_core.workers.sglang.answers import ENDED, piece_of
from rollout_core.workers.sglang.engine import SGLangEngine
from rollout_core.workers.sglang.features import Features, context_for, room_of
from unit.workers.sglang_stand_in import RequestAbortedError, Script, make, next_token

VERSIONS = ["0.5.17", "0.5.20", "0.5.21", "0.5.22", "0.5.23"]
PROMPT = [3, 1, 4]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50, "max_position_embeddings": 64}))
    save_file({"norm.weight": torch.ones(4, 4)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def start(folder, monkeypatch):
    """A started engine, and what its SGLang was told."""
    engines = []

    def start(version="0.5.23", script=None, positions=None, **options):
        heard = make(monkeypatch, version, script)
        engine = SGLangEngine(str(folder), options={"device": "cpu", **options}, timeout=5.0, positions=positions)
        engines.append(engine)
        return engine, heard

    yield start
    for engine in engines:
        engine.close()


class Heard(list):
    """The progress of one request."""

    tokens = property(lambda self: [token for one in self for token in one.token_ids])
    status = property(lambda self: next((one.status for one in self if one.status is not None), None))
    cause = property(lambda self: next((one.cause for one in self if one.cause is not None), None))


def submit(engine, length=8, media=()):
    params = SamplingParams(response_length=length, ignore_eos=True)
    engine.submit(Group(params, [Request(key=1, prompt=PROMPT, place=0, sample=0)], 8))
    return Heard()


def run_until(engine, found, condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, found
        engine._run(engine_module.asyncio.sleep(0.002))
        engine.step(found.extend, lambda: None)


def expected(count):
    tokens = []
    while len(tokens) < count:
        tokens.append(next_token([*PROMPT, *tokens]))
    return tokens


# Updates


@pytest.mark.parametrize("version", VERSIONS)
def test_what_old_weights_computed_is_flushed_after_an_update_and_no_scheduler_ends_of_it(start, version):
    """A request has just ended: SGLang is not idle yet."""
    engine, heard = start(version)
    found = submit(engine)
    run_until(engine, found, lambda: found.status)
    heard.clear()
    engine._version = 1
    engine.abandon(1)
    flushed = [what for what in heard if what.startswith("flush")]
    assert flushed[-1] == "flush done", heard
    assert ("begin" in heard, "end" in heard) == (version >= "0.5.21",) * 2
    assert heard.index(f"update, flush {version >= '0.5.22'}") < heard.index(flushed[-1])


def test_an_update_that_flushed_by_itself_needs_no_more(start):
    engine, heard = start("0.5.22")
    engine._version = 1
    engine.abandon(1)
    assert heard == ["begin", "update, flush True", "end"]


def update(engine, weights, version):
    """What a worker does with its engine."""
    plan, address = plan_buckets(specs_of(weights), 1 << 20), f"{os.getpid()}-{id(engine)}-{version}"
    with ThreadPoolExecutor(1) as beside:
        sending = beside.submit(lambda: _send(plan, weights, address, version))
        try:
            engine.update(Update(address, version, 5.0))
        finally:
            sending.exception()


def _send(plan, weights, address, version):
    with MemorySender.listen(address, timeout=5) as end:
        send(plan, weights, end, version=version, timeout=5)


@pytest.mark.parametrize("version", VERSIONS)
def test_t5_an_update_is_received_into_the_model(start, version):
    engine, _ = start(version)
    weights = {"norm.weight": torch.arange(16.0).view(4, 4)}
    update(engine, weights, 1)
    assert engine.version == 1
    assert torch.equal(engine.read_tensor("norm.weight"), weights["norm.weight"])
    assert engine.digests(None) == {"norm.weight": xxhash.xxh3_128_hexdigest(weights["norm.weight"].numpy().data)}


def test_t5_weights_that_sglang_has_quantized_are_left_as_they_are(start):
    engine, _ = start("0.5.17")
    parameter = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    engine._engine.model.norm.weight = parameter
    with pytest.raises(WorkerError, match=r"quantized its weights when it started \('norm.weight' has 8 bits\)"):
        update(engine, {"norm.weight": torch.zeros(4, 4)}, 1)
    assert (engine.version, engine._unusable) == (0, None)
    assert bool((parameter.float() == 1).all())
    weights = {"norm.weight": torch.full((4, 4), 3.0).to(torch.float8_e4m3fn)}
    update(engine, weights, 1)
    assert bool((parameter.float() == 3).all())


def test_what_is_only_read_flushes_nothing(start):
    engine, heard = start("0.5.22")
    engine._ask(engine_module.Where())
    assert heard == ["begin", "update, flush False", "end"]


def test_a_rank_that_does_not_answer_is_missed(start):
    engine, _ = start(tp_size=2)
    with pytest.raises(WorkerError, match="1 of SGLang's 2 ranks answered"):
        engine._ask(engine_module.Where())
    engine, _ = start(script=Script(silent_ranks=True))
    with pytest.raises(WorkerError, match="did not come to rollout_core"):
        engine._ask(engine_module.Where())


@pytest.mark.parametrize(("version", "words"), [("0.5.16", "from 0.5.17 on"), ("0.4.10", "not served"), ("main", "is none")])
def test_other_versions_are_refused_in_words(start, version, words):
    with pytest.raises(WorkerError, match=words):
        start(version)


# Requests


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["abort", "call back"])
def test_w4_one_that_is_not_sent_on_yet_is_ended_when_it_is(start, version, way):
    """Told of it before, 0.5.17 ends it by an error; 0.5.20 and later forget it, and it would run to its end."""
    engine, heard = start(version, Script(preparing=20, pace=0.004))
    found = submit(engine, length=55)  # more than 0.2 s, in which it is told
    run_until(engine, found, lambda: "generate" in heard)
    if way == "abort":
        engine.abort([1], found.extend)
        assert found.status == "aborted"
        assert found.tokens == expected(len(found.tokens))
        assert len(found.tokens) < 55
    else:
        engine.run(0, found.extend)
        assert len(found.tokens) < 55
        engine.run(None, found.extend)
        run_until(engine, found, lambda: found.status)
        assert (found.status, found.tokens) == ("length", expected(55))
        assert heard.count("generate") == 2
    assert "abort early" not in heard


def test_w4_a_request_whose_memory_was_taken_is_told_with_its_last_token_again(start):
    """The token is the request's only one, so that its logprobs do not tell that it comes twice."""
    for at in (1, 5):
        engine, heard = start(script=Script(retracts_at=at))
        found = submit(engine)
        run_until(engine, found, lambda found=found, at=at: len(found.tokens) == at)
        engine.run(0, found.extend)
        assert (found.tokens, found.status) == (expected(at), None)
        engine.abort([1], found.extend)
        assert (found.tokens, found.status) == (expected(at), "aborted")
        assert heard.count("abort sent on") == 1


@pytest.mark.parametrize("error", [RequestAbortedError("Request 1 was aborted"), KeyError("text")])
def test_w4_what_the_front_end_raises_of_an_end_is_one(start, error):
    engine, _ = start(script=Script(breaks_with=error))
    found = submit(engine)
    run_until(engine, found, lambda: found.status)
    assert (found.status, found.tokens) == ("aborted", [])


@pytest.mark.parametrize("error", [KeyError("meta_info"), ValueError("out of range"), RuntimeError("no")])
def test_another_error_fails_the_request(start, error):
    engine, _ = start(script=Script(breaks_with=error))
    found = submit(engine)
    run_until(engine, found, lambda: found.status)
    assert found.status == "failed"
    assert str(error) in found.cause.message


def test_pieces_of_answers():
    rows = [(-1.0, 5, None), (None, 6, None)]
    meta = {"prompt_tokens": 3, "output_token_logprobs": rows, "finish_reason": None}
    piece = piece_of({"output_ids": [5, 6], "meta_info": meta}, 0)
    assert (piece.token_ids, piece.logprobs[0], piece.finish) == ([5, 6], -1.0, None)
    assert piece.logprobs[1] != piece.logprobs[1]
    assert piece_of({"output_ids": [5, 6], "meta_info": meta}, 1).token_ids == [6]
    assert piece_of(ENDED, 0).finish == "aborted"
    aborted = {**meta, "finish_reason": {"type": "abort", "status_code": None}}
    assert piece_of({"output_ids": [5, 6], "meta_info": aborted}, 0).token_ids == [5, 6]
    refused = {"type": "abort", "status_code": 400, "message": "long"}
    for reason, words in ((refused, "refused .*400.*long"), ({"type": "x"}, "by .*x")):
        with pytest.raises(WorkerError, match=words):
            piece_of({"output_ids": [], "meta_info": {**meta, "finish_reason": reason}}, 0)


# Room


def test_requests_have_the_room_that_sglang_really_has(start, monkeypatch):
    """Of 64 positions it gives 58 to prompts that start again; with 70 it would give all 64."""
    engine, _ = start()
    with pytest.raises(WorkerError, match="passes the model's 58 positions"):
        submit(engine, length=56)
    submit(engine, length=55)
    monkeypatch.setattr(os, "environ", {**os.environ})
    engine, _ = start(positions=64, script=Script(info={"max_req_input_len": 90, "max_total_num_tokens": 10_000}))
    assert engine._engine.options["context_length"] == 70
    submit(engine, length=61)
    with pytest.raises(WorkerError, match="passes the model's 64 positions"):
        submit(engine, length=62)


def test_requests_are_held_to_what_was_asked_for_where_sglang_has_more_room(start):
    engine, _ = start(positions=20, context_length=200, script=Script(info={}))
    submit(engine, length=17)
    with pytest.raises(WorkerError, match="passes the model's 20 positions"):
        submit(engine, length=18)


def test_room_of_a_small_cache():
    assert room_of({"max_req_input_len": 250, "max_total_num_tokens": 128, "page_size": 16}, 256) == 96
    assert room_of({"max_req_input_len": 250, "max_total_num_tokens": 128}, 256) == 126
    assert room_of({"max_req_input_len": 40, "max_total_num_tokens": 128}, 256) == 40
    assert room_of({}, 256) == 250
    assert room_of({"max_total_num_tokens": 1}, 256) == 1


def test_only_positions_that_no_request_has_are_added_beyond_the_models():
    for positions, allowed in ((50, False), (58, False), (59, True), (64, True), (65, False)):
        environment = {}
        assert context_for(positions, {"max_position_embeddings": 64}, environment) == positions + 6
        assert bool(environment) == allowed, positions
    environment = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "0"}
    context_for(64, {"max_position_embeddings": 64}, environment)
    assert environment == {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "0"}, "whoever set it has a reason"


def test_features():
    assert Features.of("0.5.17", is_incremental=True) == Features(False, False, True)
    assert Features.of("0.5.20.post1", is_incremental=False) == Features(False, False, False)
    assert Features.of("0.5.21", is_incremental=True) == Features(True, False, True)
    assert Features.of("0.6.0rc1", is_incremental=True) == Features(True, True, True)


# Memory


def test_w6_memory_is_measured_around_its_release_with_nothing_under_way(start, monkeypatch):
    engine, heard = start("0.5.17", device="cuda", enable_memory_saver=True)
    found = submit(engine)
    run_until(engine, found, lambda: found.status)
    monkeypatch.setattr(engine_module, "used_memory", lambda gpus: heard.append("measure") or (300 if "release" in heard else 1000))
    heard.clear()
    assert engine.release_memory() == 700
    assert heard == ["update, flush False", "measure", "flush refused", "flush refused", "flush done", "release", "measure"]
    assert engine.release_memory() == 0
    engine.resume_memory()
    assert heard.count("release") == heard.count("resume") == 1


def test_w6_without_a_memory_saver_nothing_is_said_to_be_free(start):
    engine, heard = start(device="cuda")
    with pytest.raises(WorkerError, match="without enable_memory_saver"):
        engine.release_memory()
    assert "release" not in heard
    submit(engine)  # it is not released


def test_w6_a_worker_says_whether_its_memory_can_be_released(folder, monkeypatch):
    made = []
    monkeypatch.setattr("rollout_core.workers.worker.Link", lambda spec, **rest: made.append(spec))
    for options, capabilities in (
        ({}, {"memory"}),
        ({"enable_memory_saver": False}, set()),
        ({"enable_deterministic_inference": True}, {"memory", "seeds"}),
    ):
        worker = SGLangWorker(str(folder), device="cuda:1", engine_options=options)
        assert worker.capabilities == capabilities
        given = made[-1].options["options"]
        assert (given["device"], given["base_gpu_id"], given["dtype"]) == ("cuda", 1, "bfloat16")
    SGLangWorker(str(folder))
    assert (made[-1].options["options"]["device"], made[-1].options["options"]["dtype"]) == ("cpu", "float32")
