"""Which of a prompt's pictures go to an engine with data (clause W8): against one that only keeps them."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, HFRenderer, Picture
from rollout_core.testing.worlds import make_world
from rollout_core.workers import SamplingParams
from rollout_core.workers.engine import MediaItem, Request
from rollout_core.workers.link.hosts import Spec
from rollout_core.workers.media import Media, decode_picture, decode_tensors, encode_picture, encode_tensors
from rollout_core.workers.names import name_among
from rollout_core.workers.sglang.media import check_placeholders, placeholder_of, wrong_length
from rollout_core.workers.vllm.media import check_expanded
from rollout_core.workers.worker import Worker

FOUR = SamplingParams(response_length=4)


class Pictures(Worker):
    media_form = "pictures"


def make_worker(kind=Pictures, **options):
    return kind(Spec("support.keeping:KeepingEngine", options), process=False, timeout=20)


def engine_of(worker):
    return worker._link.host.engine


@pytest.fixture(scope="module")
def renderer():
    return HFRenderer(make_world("chatml+rows").processor)


def picture(seed):
    return Picture("RGB", (8, 8), np.random.default_rng(seed).integers(0, 256, 192, dtype=np.uint8).tobytes())


def asked(renderer, *seeds):
    parts = [{"type": "image", "image": picture(seed)} for seed in seeds]
    return Conversation.start(renderer, [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}])


def lengths(*seeds):
    return tuple(len(encode_picture(picture(seed))) for seed in seeds)


def test_w8_data_is_sent_once_and_told_apart_by_identity(renderer):
    with make_worker() as worker:
        first, second = worker.generate([asked(renderer, 1, 2), asked(renderer, 2, 3)], FOUR)
        assert first.token_ids == lengths(1, 2, 1, 2)
        assert second.token_ids == lengths(2, 3, 2, 3)
        assert [had for _, had in engine_of(worker).taken] == [[True, True], [False, True]]
        worker.generate([asked(renderer, 3, 1, 1, 4)], FOUR)
        assert engine_of(worker).taken[-1][1] == [False, False, False, True]
        report = worker.media_report()
        assert (report.sent, report.named, report.misses, report.nbytes) == (4, 4, 0, sum(lengths(1, 2, 3, 4)))
        assert (report.hits, report.queries) == (None, None)


def test_w8_samples_share_data(renderer):
    with make_worker() as worker:
        worker.generate([asked(renderer, 1)], SamplingParams(response_length=2, n=3, temperature=1.0))
        assert [had for _, had in engine_of(worker).taken] == [[True], [False], [False]]


def test_w8_a_miss_is_recovered_by_sending_all_of_it_once_more(renderer):
    with make_worker() as worker:
        (before,) = worker.generate([asked(renderer, 1, 2)], FOUR)
        engine_of(worker).forget()
        (after,) = worker.generate([asked(renderer, 1, 2)], FOUR)
        assert after == before
        assert [had for _, had in engine_of(worker).taken] == [[True, True], [False, False], [True, True]]
        assert worker.media_report().misses == 2
        worker.generate([asked(renderer, 2)], FOUR)
        assert engine_of(worker).taken[-1][1] == [False]
        assert not worker._media._open


def test_w8_a_request_that_misses_pictures_in_the_middle_goes_on_from_its_tokens(renderer):
    """As engines do that start requests anew."""
    with make_worker() as worker:
        worker.pause()
        (future,) = worker.submit([asked(renderer, 1, 2)], SamplingParams(response_length=9))
        worker.step(4)
        engine_of(worker).forget(engine_of(worker).taken[0][0])
        worker.resume()
        done = future.result(20)
        assert done.token_ids == lengths(1, 2, 1, 2) + lengths(1, 2, 1, 2, 1)
        assert done.status == "length"


def test_w8_what_is_sent_again_does_not_drive_out_what_was_there(renderer):
    """A cache that is just large enough, of which one picture is gone: all of them come again."""
    with make_worker(room=2) as worker:
        worker.generate([asked(renderer, 1, 2)], FOUR)
        worker.generate([asked(renderer, 3)], FOUR)
        assert worker.generate([asked(renderer, 1, 2)], FOUR)[0].token_ids == lengths(1, 2, 1, 2)
        assert worker.media_report().misses == 1


def test_w8_an_engine_that_has_no_room_for_them_fails_the_request_with_words(renderer):
    with make_worker(room=1) as worker:
        with pytest.raises(WorkerError, match="misses 1 pictures of prompt 0, first [0-9a-f]{64}, which it was just given"):
            worker.generate([asked(renderer, 1, 2)], FOUR)
        assert len(engine_of(worker).taken) == 2
        assert worker.generate([asked(renderer, 3)], FOUR)[0].token_ids == lengths(3, 3, 3, 3)
        assert worker.generate([asked(renderer, 4)], FOUR)[0].token_ids == lengths(4, 4, 4, 4)
        assert worker.generate([asked(renderer, 3)], FOUR)[0].token_ids == lengths(3, 3, 3, 3)


def test_w4_a_request_that_is_aborted_while_it_is_sent_again_is_aborted(renderer):
    """The engine has forgotten it when the abort comes, and has it again after."""
    with make_worker(forgets_on_abort=True) as worker:
        worker.pause()
        (future,) = worker.submit([asked(renderer, 1)], FOUR, request_ids=["a"])
        assert worker.abort(["a"]) == ["a"]
        assert future.result(0).status == "aborted"
        assert len(engine_of(worker).taken) == 2
        worker.resume()
        assert not engine_of(worker).under_way


def test_what_was_refused_is_sent_again_with_data(renderer, monkeypatch):
    with make_worker() as worker:
        engine = engine_of(worker)

        def refuse(group):
            raise WorkerError("not now")

        with monkeypatch.context() as patch:
            patch.setattr(engine, "submit", refuse)
            with pytest.raises(WorkerError, match="not now"):
                worker.generate([asked(renderer, 1)], FOUR)
        assert not worker._media._open
        worker.generate([asked(renderer, 1)], FOUR)
        assert engine.taken[0][1] == [True]
        assert worker.media_report().misses == 0


def test_a_request_that_is_refused_when_it_is_sent_again_has_failed(renderer, monkeypatch):
    with make_worker() as worker:
        worker.generate([asked(renderer, 1)], FOUR)
        engine = engine_of(worker)
        engine.forget()
        submit, calls = engine.submit, []

        def once(group):
            calls.append(group)
            if len(calls) == 2:
                raise WorkerError("no second time")
            submit(group)

        monkeypatch.setattr(engine, "submit", once)
        (future,) = worker.submit([asked(renderer, 1)], FOUR)
        done = future.result(20)
        assert (done.status, done.error) == ("failed", "no second time")


def test_a_worker_that_is_forgotten_is_not_kept_by_its_link():
    worker = make_worker()
    gone, engine = weakref.ref(worker), engine_of(worker)
    link = weakref.ref(worker._link)
    del worker
    gc.collect()
    assert gone() is None
    assert link() is None
    assert engine is not None


def test_identities_that_are_remembered_are_bounded_and_the_oldest_goes(renderer):
    media = Media("pictures", remembered=2)
    sent = []
    for seeds in ((1, 2), (1,), (3,), (1,), (2,)):
        items = asked(renderer, *seeds).items
        sent.append([item.data is not None for item in media._media(items)])
    assert sent == [[True, True], [False], [True], [False], [True]]
    assert len(media._believed) == 2


def test_w8_an_engine_that_keeps_nothing_gets_data_in_every_call_and_all_of_it_counts(renderer):
    """In a call once, as its engine hands it on to each request that shows the picture."""

    class EachTime(Worker):
        media_form = "pictures_each_time"

    with make_worker(EachTime) as worker:
        for calls in (1, 2):
            found = worker.generate([asked(renderer, 1, 2, 1), asked(renderer, 2)], FOUR)
            assert [one.token_ids for one in found] == [lengths(1, 2, 1, 1), lengths(2, 2, 2, 2)]
            assert [had for _, had in engine_of(worker).taken[-2:]] == [[True, True, False], [False]]
            report = worker.media_report()
            assert (report.sent, report.named, report.nbytes) == (4 * calls, 0, calls * sum(lengths(1, 2, 1, 2)))
        assert not worker._media._open
        started = asked(renderer, 1)
        item = dataclasses.replace(started.items[0], payload=dataclasses.replace(started.items[0].payload, media=None))
        with pytest.raises(WorkerError, match="prompt 0 has no picture for image 0"):
            worker.submit([dataclasses.replace(started, tip=dataclasses.replace(started.tip, items=(item,)))], FOUR)


def request(prompt, media=(), input_ids=()):
    return Request(0, list(prompt), 3, 0, [MediaItem("image", name) for name in media], list(input_ids))


def test_w8_placeholders_are_counted_before_sglang_looks_for_them():
    assert placeholder_of({"image_token_id": 6, "image_token_index": 8}) == 6
    assert placeholder_of({"image_token_index": 8}) == 8
    assert placeholder_of({"image_token_id": None}) is None
    check_placeholders(request([1, 6, 2, 6], "ab"), [1, 6, 2, 6, 9], 6)
    check_placeholders(request([1, 6, 2]), [1, 6, 2], 6)  # without pictures it is an id as any
    for ids, found in (([1, 6, 2], 1), ([1, 6, 2, 6, 9, 6], 3)):
        with pytest.raises(WorkerError, match=f"prompt 3 shows 2 pictures, and SGLang would look for {found}"):
            check_placeholders(request([1, 6, 2, 6], "ab"), ids, 6)


def test_w8_sglang_and_vllm_are_held_to_the_ids_of_a_conversation_and_what_came_of_it():
    of_a_conversation = request([1, 6, 2], "a", [1, 6, 6, 2])
    assert wrong_length(of_a_conversation, [], 4) is None
    assert wrong_length(of_a_conversation, [9, 9], 6) is None
    assert wrong_length(request([1, 6, 2]), [], 7) is None
    assert "SGLang made 4 tokens of prompt 3, whose conversation has 6" in str(wrong_length(of_a_conversation, [9, 9], 4))
    check_expanded(of_a_conversation, [1, 6, 6, 2])
    check_expanded(of_a_conversation, [1, 6, 6, 2, 9], [9])
    check_expanded(request([1, 6, 2]), [5])
    for found, tokens, place in (([1, 6, 6, 2, 8], [9], 4), ([1, 6, 6, 2], [9], 4), ([1, 6, 2], [], 2)):
        with pytest.raises(WorkerError, match=f"vLLM made {len(found)} tokens of prompt 3, .* is at position {place}"):
            check_expanded(of_a_conversation, found, tokens)


def test_weights_are_found_under_either_name():
    names = ["model.language_model.norm.weight", "visual.a", "lm_head.weight"]
    assert name_among("model.norm.weight", names) == names[0]
    assert name_among("model.visual.a", names) == name_among("visual.a", names) == names[1]
    assert name_among("visual.b", names) is None


def test_conversations_are_refused_where_they_cannot_be_served(renderer):
    class Text(Worker):
        pass

    with make_worker(Text) as worker, pytest.raises(WorkerError, match="prompt 1 is a conversation, which this worker does not"):
        worker.submit([[1], asked(renderer, 1)], FOUR)
    with make_worker() as worker:
        started = asked(renderer, 1)
        bare = dataclasses.replace(started.items[0].payload, media=None)
        item = dataclasses.replace(started.items[0], payload=bare)
        without = dataclasses.replace(started, tip=dataclasses.replace(started.tip, items=(item,)))
        with pytest.raises(WorkerError, match="prompt 0 has no picture for image 0"):
            worker.submit([without], FOUR)
        assert engine_of(worker).taken == []


def test_a_conversation_of_text_is_its_ids(renderer):
    with make_worker() as worker:
        spoken = Conversation.start(renderer, [{"role": "user", "content": "hello"}])
        assert worker.generate([spoken, [1, 2]], FOUR)[0].token_ids == (1, 1, 1, 1)
        assert worker.media_report().sent == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_a_picture_comes_out_as_it_went_in(mode):
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (21, 13, 4), dtype=np.uint8), "RGBA").convert(mode)
    from rollout_core.multimodal.loading import load_picture

    taken = load_picture(image, background=(10, 200, 30))
    found = decode_picture(encode_picture(taken))
    assert found.mode == "RGB"
    assert np.array_equal(np.asarray(found), taken.rgb)


def test_tensors_come_out_as_they_went_in():
    given = {
        "a": torch.randn(3, 4),
        "b": torch.arange(6).view(2, 3).t(),
        "c": torch.zeros(0, 5, dtype=torch.bfloat16),
        "d": torch.tensor([True, False]),
    }
    found = decode_tensors(encode_tensors(given))
    assert found.keys() == given.keys()
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
