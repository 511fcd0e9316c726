"""What is vLLM's own about pictures: it keeps and drops them, and has a processor of its own (clause W8)."""

import asyncio

import pytest
import transformers

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.workers import SamplingParams, VLLMWorker
from rollout_core.workers.engine import MediaItem, Request
from rollout_core.workers.streaming import Flight
from rollout_core.workers.vllm.async_engine import VLLMAsyncEngine
from support import tiny_vl
from support.forgetful import FORGET, forgetful

GREEDY = SamplingParams(response_length=6, ignore_eos=True)
KEPT = 12 * 28**2 * 3 * 2  # bytes that vLLM keeps of a picture of 12 tokens: it has pixels as uint8, each frame twice


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    tiny_vl.make(folder, "qwen2_vl")
    return folder


def make_worker(folder, **engine):
    with forgetful():
        options = {"kv_cache_memory_bytes": 32 << 20, **engine}
        return VLLMWorker(folder, max_model_len=256, engine_options=options, timeout=60)


@pytest.fixture(scope="module")
def worker(folder):
    with make_worker(folder) as worker:
        yield worker


@pytest.fixture(scope="module")
def processor(folder):
    return transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()


def asked(processor, *seeds):
    parts = [{"type": "image", "image": tiny_vl.picture(seed)} for seed in seeds]
    return Conversation.start(HFRenderer(processor), [{"role": "user", "content": parts}])


def expected(processor, model, *seeds):
    whole = tiny_vl.Whole(processor).text("<|im_start|>user\n")
    for seed in seeds:
        whole.show(tiny_vl.picture(seed))
    return tuple(whole.text("<|im_end|>\n<|im_start|>assistant\n").greedy(model, 6))


def test_w8_a_miss_is_recovered_with_the_same_tokens(worker, processor, model):
    """Its cache is emptied behind the worker's back: in a call, of what it misses and what it does not; and again."""
    prompts = [asked(processor, 1, 2), asked(processor, 2)]
    right = [expected(processor, model, 1, 2), expected(processor, model, 2)]
    assert [one.token_ids for one in worker.generate(prompts, GREEDY)] == right
    for _ in range(2):
        before = worker.media_report()
        worker.read_tensor(FORGET)
        again = worker.generate([*prompts, asked(processor, 3), [40, 41]], GREEDY)
        assert [one.token_ids for one in again[:3]] == [*right, expected(processor, model, 3)]
        assert [one.status for one in again] == ["length"] * 4
        after = worker.media_report()
        assert 2 <= after.misses - before.misses <= 4
        assert not worker._media._open
        assert not worker._rollouts.find(None)
    before = worker.media_report()
    worker.generate(prompts, GREEDY)
    after = worker.media_report()
    assert (after.sent - before.sent, after.named - before.named, after.misses - before.misses) == (0, 3, 0)
    assert (after.hits - before.hits, after.queries - before.queries) == (3, 3)


def test_w4_a_request_that_misses_pictures_can_be_aborted(worker, processor, model):
    """While it is paused vLLM has not said so yet."""
    worker.generate([asked(processor, 4)], GREEDY)
    worker.read_tensor(FORGET)
    worker.pause()
    first, second = worker.submit([asked(processor, 4)] * 2, GREEDY, request_ids=["a", "b"])
    assert worker.abort(["a"]) == ["a"]
    assert first.result(0).token_ids == ()
    worker.resume()
    assert second.result(60).token_ids == expected(processor, model, 4)


def test_w8_other_ids_than_the_conversations_fail_the_request_alone(worker, processor, model, folder):
    """A trainer whose processor makes more tokens of a picture than the engine's."""
    other = transformers.AutoProcessor.from_pretrained(folder)
    other.image_processor.size = {"shortest_edge": 28**2 * 16, "longest_edge": 28**2 * 32}
    bad, good = asked(other, 1), asked(processor, 1)
    wide, narrow = len(bad.with_generation_prompt()), len(good.with_generation_prompt())
    assert wide != narrow
    futures = worker.submit([bad, good], GREEDY)
    failed = futures[0].result(60)
    assert (failed.status, failed.token_ids) == ("failed", ())
    assert f"vLLM made {narrow} tokens of prompt 0, whose conversation has {wide}; the first difference is at" in failed.error
    assert futures[1].result(60).token_ids == expected(processor, model, 1)
    with pytest.raises(WorkerError, match="vLLM made"):
        worker.generate([bad], GREEDY)


@pytest.mark.slow
@pytest.mark.parametrize("pictures", [0, 1])
def test_w8_a_cache_with_little_room_costs_sending_and_nothing_else(folder, processor, model, pictures):
    """None at all, and one that holds one picture."""
    room = pictures * 1.5 * KEPT / 2**30
    prompts = [asked(processor, 1), asked(processor, 2), asked(processor, 1)]
    right = [expected(processor, model, seed) for seed in (1, 2, 1)]
    with make_worker(folder, mm_processor_cache_gb=room) as worker:
        for _ in range(2):
            for prompt, tokens in zip(prompts, right, strict=True):
                assert worker.generate([prompt], GREEDY)[0].token_ids == tokens
        report = worker.media_report()
        assert report.misses == 4 - (pictures == 1)  # of six, two were new, and one was the last before
        assert report.sent == 2 + report.misses
        assert (report.hits is None) == (pictures == 0)


@pytest.mark.slow
def test_a_model_of_text_refuses_pictures(processor, tmp_path):
    config = transformers.Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with make_worker(tmp_path) as worker:
        with pytest.raises(WorkerError, match="prompt 1 shows 2 pictures, and the model takes none"):
            worker.submit([[5], asked(processor, 1, 2)], GREEDY)
        assert worker.abort() == []
        spoken = Conversation.start(HFRenderer(processor), [{"role": "user", "content": "hello"}])
        assert len(worker.generate([spoken], GREEDY)[0].token_ids) == 6


class Llm:
    """Of AsyncLLM, what a request of ours touches; its cache loses a picture between two looks at it, or keeps it."""

    errored = False

    def __init__(self, looks, error):
        self.looks, self.error = looks, error
        self.renderer = self.mm_processor_cache = self

    def is_cached(self, names):
        return [self.looks.pop(0) for _ in names]

    async def generate(self, prompt, params, request_id):
        raise self.error
        yield


def error_of(looks, error):
    engine = object.__new__(VLLMAsyncEngine)
    engine._llm = Llm(looks, error)
    flight = Flight(Request(1, [5, 6], 0, 0, [MediaItem("image", "a")], [5, 6, 6]), GREEDY)

    async def go():
        async for _ in engine._generate(flight, {"max_tokens": 1}):
            pass

    with pytest.raises(Exception) as raised:
        asyncio.run(go())
    assert engine._llm.looks == []
    return raised.value


def test_w8_a_picture_that_is_driven_out_just_then_is_missed_and_other_errors_are_what_they_are():
    assert error_of([False], ValueError("never called")).identities == ["a"]
    assert error_of([True, False], ValueError("its own words")).identities == ["a"]
    assert str(error_of([True, True], ValueError("its own words"))) == "its own words"
    assert isinstance(error_of([True], WorkerError("ours")), WorkerError)
