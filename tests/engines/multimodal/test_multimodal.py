"""Clause W8, and W1, W2, W4 and W5 for models that see. The oracle writes conversations down by hand and runs transformers over all
of them for each token."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from rollout_core.errors import WorkerError
from rollout_core.multimodal import Conversation, HFRenderer
from rollout_core.workers import SamplingParams
from support.tiny_vl import SPECIAL, VOCABULARY, Whole, picture

from .conftest import WAYS

GREEDY = SamplingParams(response_length=8)
LONG = SamplingParams(response_length=24, ignore_eos=True)
END = SPECIAL.index("<|im_end|>")
ASK = "<|im_end|>\n<|im_start|>assistant\n"


def shows(*images, text="look"):
    return [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]


def started(place, *images, renderer=None):
    """A question about pictures, tracked and written by hand."""
    tracked = Conversation.start(renderer or place.renderer, [{"role": "user", "content": shows(*images)}])
    whole = place.whole().text("<|im_start|>user\n")
    for image in images:
        whole.show(image)
    return tracked, whole.text("look" + ASK)


def answered(tracked, whole, completion, *images):
    """The same after an answer and a tool's result."""
    ids = list(completion.token_ids)
    tracked = tracked.append_sampled(ids, logprobs=completion.logprobs, finish=completion.status)
    tracked = tracked.extend([{"role": "tool", "content": shows(*images, text="found")}])
    whole.sampled(ids).text("\n" if ids[-1] == END else "<|im_end|>\n").text("<|im_start|>tool\n")
    for image in images:
        whole.show(image)
    return tracked, whole.text("found" + ASK)


def laid_over(image, grey):
    """A picture with transparency over one shade, by Pillow."""
    over = Image.new("RGBA", image.size, (grey, grey, grey, 255))
    over.alpha_composite(image)
    return over.convert("RGB")


def tokens(completions):
    return [list(completion.token_ids) for completion in completions]


def test_w8_only_new_pictures_are_sent_and_tokens_are_those_of_all_at_once(place):
    """Turns with no, one and two new pictures, one of them seen before; then everything again, with data."""
    turns = [[picture(1)], [picture(2, 84, 140)], [], [picture(3), picture(1)], [picture(4, 200, 60)]]
    tracked, whole = started(place, *turns[0])
    shown = len(turns[0])
    for turn, images in enumerate(turns[1:]):
        (completion,) = place.worker.generate([tracked], GREEDY)
        prompt = tracked.with_generation_prompt()
        assert prompt.input_ids.tolist() == whole.ids
        assert prompt.compact_ids.tolist() == whole.compact
        assert list(completion.token_ids) == whole.greedy(place.model, 8, (END,))
        new = len(turns[turn]) - (turn == 3)  # there, one was seen before
        assert place.sent() == ((new, shown - new) if WAYS.keeps else (shown, 0))
        tracked, whole = answered(tracked, whole, completion, *images)
        shown += len(images)
    (last,) = place.worker.generate([tracked], GREEDY)
    assert place.sent() == ((1, shown - 1) if WAYS.keeps else (shown, 0))
    place.worker._media.forget()
    place.forget()
    assert tokens(place.worker.generate([tracked], GREEDY)) == tokens([last])
    assert place.sent() == ((4, 1) if WAYS.keeps else (shown, 0))  # of the picture that stands twice, once
    assert tokens([last]) == [whole.greedy(place.model, 8, (END,))]


def test_prompts_with_and_without_pictures_share_a_call(place):
    first, whole = started(place, picture(1), picture(2))
    second, other = started(place, picture(2))
    third, silent = started(place)
    ids = [9, 30, 77, 12]
    plain = place.whole().sampled(ids)
    expected = [one.greedy(place.model, 8, (END,)) for one in (whole, plain, other, silent)]
    assert tokens(place.worker.generate([first, ids, second, third], GREEDY)) == expected
    assert place.sent() == ((2, 1) if WAYS.keeps else (3, 0))


def test_w8_two_pictures_never_go_by_one_name(place):
    """Alike in all but content, a transparent colour, or what lies under it."""
    clear = picture(5).convert("RGBA")
    clear.putalpha(picture(6).convert("L"))
    dark = HFRenderer(place.processor, vocab_size=VOCABULARY, background=(0, 0, 0))
    pairs = [
        (started(place, picture(5))[0], picture(5)),
        (started(place, picture(7))[0], picture(7)),
        (started(place, clear)[0], laid_over(clear, 255)),
        (started(place, clear, renderer=dark)[0], laid_over(clear, 0)),
    ]
    assert len({item.uuid() for tracked, _ in pairs for item in tracked.items}) == 4
    expected = [started(place, seen)[1].greedy(place.model, 8, (END,)) for _, seen in pairs]
    place.sent()
    assert tokens(place.worker.generate([tracked for tracked, _ in pairs], GREEDY)) == expected
    assert place.sent() == (4, 0)
    assert len({tuple(one) for one in expected}) == 4


def test_w5_pictures_are_seen_with_the_new_weights_after_a_sync(place):
    """Between two turns, and under a request: nothing that the old weights saw is built on."""
    tracked, whole = started(place, picture(1), picture(2))
    (completion,) = place.worker.generate([tracked], GREEDY)
    tracked, whole = answered(tracked, whole, completion, picture(3))
    place.worker.pause()
    (under_way,) = place.worker.submit([tracked], LONG)
    place.worker.step(5)
    old, new = place.worker.version, place.worker.sync_weights(place.other).version
    place.worker.resume()
    done = under_way.result(60)
    before = done.versions.count(old)
    assert 0 < before <= 5
    assert done.versions == (old,) * before + (new,) * (24 - before)
    ids = list(done.token_ids)
    assert ids[:before] == whole.greedy(place.model, before)
    fresh = place.worker.generate([tracked], GREEDY)
    assert tokens(fresh) == [whole.greedy(place.other, 8, (END,))]
    assert tokens(fresh) != [whole.greedy(place.model, 8, (END,))]
    assert ids[before:] == whole.sampled(ids[:before]).greedy(place.other, 24 - before)


def test_w4_an_aborted_request_of_a_conversation_is_resumed(place):
    tracked, whole = started(place, picture(1), picture(2))
    expected = whole.greedy(place.model, 24)
    place.worker.pause()
    (future,) = place.worker.submit([tracked], LONG, request_ids=["a"])
    place.worker.step(7)
    assert place.worker.abort(["a"]) == ["a"]
    place.worker.resume()
    done = future.result(60)
    prefix = list(done.token_ids)
    assert 1 <= len(prefix) <= 7
    tracked = tracked.append_sampled(prefix, logprobs=done.logprobs, finish="aborted")
    (rest,) = place.worker.generate([tracked], SamplingParams(response_length=24 - len(prefix), ignore_eos=True))
    assert prefix + list(rest.token_ids) == expected


def test_w8_pictures_that_an_engine_has_dropped_come_again(place):
    """Before a request, and under one: an engine that starts requests anew looks for their pictures again."""
    tracked, whole = started(place, picture(1), picture(2))
    first = place.worker.generate([tracked], GREEDY)
    assert tokens(first) == [whole.greedy(place.model, 8, (END,))]
    before = place.worker.media_report().misses
    place.forget()
    assert tokens(place.worker.generate([tracked], GREEDY)) == tokens(first)
    assert place.worker.media_report().misses - before == (2 if WAYS.keeps else 0)
    place.worker.pause()
    (future,) = place.worker.submit([tracked], LONG)
    place.worker.step(5)
    place.forget()
    place.worker.resume()
    assert tokens([future.result(60)]) == [whole.greedy(place.model, 24)]
    starts_anew = place.mode == "async"
    assert place.worker.media_report().misses - before == ((4 if starts_anew else 2) if WAYS.keeps else 0)


def test_samples_of_one_conversation_share_its_pictures(place):
    tracked, _ = started(place, picture(1))
    repeats = "seeds" in place.worker.capabilities
    params = SamplingParams(response_length=8, n=3, temperature=1.0, seed=3 if repeats else None)
    completions = place.worker.generate([tracked], params)
    assert place.sent() == ((1, 2) if WAYS.shares else (3, 0))
    assert len({one.token_ids for one in completions}) > 1
    assert (completions == place.worker.generate([tracked], params)) == repeats


@pytest.mark.parametrize("names", ["module", "checkpoint"])
def test_w2_every_tensor_is_read_back(place, names, tmp_path):
    """By either of its names, in the tower that sees and in the model of text."""
    if names == "module":
        weights = dict(place.other.state_dict())
    elif WAYS.checkpoint:
        place.other.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
    else:
        weights = dict(place.other.named_parameters())
    report = place.worker.sync_weights(weights, capacity=300_000)
    assert report.digest == place.worker.weights_digest()
    seeing = [name for name in weights if "visual" in name]
    assert len(seeing) > 20
    for name, expected in weights.items():
        found = place.worker.read_tensor(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name


def test_w2_one_changed_value_of_the_tower_that_sees_is_found(place):
    before = place.worker.tensor_digests()
    with torch.no_grad():
        place.model.model.visual.blocks[1].attn.qkv.weight[100, 3] += 1e-3
    place.worker.sync_weights(place.model)
    after = place.worker.tensor_digests()
    (name,) = [name for name in before if before[name] != after[name]]
    assert name.endswith("visual.blocks.1.attn.qkv.weight")


# Refusals


def test_a_sampled_placeholder_fails_its_request_alone(place):
    """The model, or vLLM's processor, would take it for the place of a picture."""
    tracked, whole = started(place, picture(1))
    stray = tracked.append_sampled([20, SPECIAL.index("<|image_pad|>"), 21], finish="stop")
    stray = stray.extend([{"role": "tool", "content": shows(picture(2))}])
    bad, good = place.worker.submit([stray, tracked], GREEDY)
    assert good.result(60).status != "failed"
    assert tokens([good.result()]) == [whole.greedy(place.model, 8, (END,))]
    failed = bad.result(60)
    assert (failed.status, failed.token_ids) == ("failed", ())
    assert WAYS.stray in failed.error


def test_w8_other_ids_than_the_conversations_fail_the_request_alone(place):
    """A trainer's processor that makes more tokens of a picture than the engine's; where that has none, the trainer's holds."""
    finer = AutoProcessor.from_pretrained(place.folder)
    area = (2 * finer.image_processor.patch_size) ** 2
    finer.image_processor.size = {"shortest_edge": 16 * area, "longest_edge": 32 * area}
    other, _ = started(place, picture(1), renderer=HFRenderer(finer, vocab_size=VOCABULARY))
    more = Whole(finer).text("<|im_start|>user\n").show(picture(1)).text("look" + ASK)
    tracked, whole = started(place, picture(1))
    assert other.with_generation_prompt().input_ids.tolist() == more.ids
    assert len(more.ids) > len(whole.ids)
    bad, good = place.worker.submit([other, tracked], GREEDY)
    assert tokens([good.result(60)]) == [whole.greedy(place.model, 8, (END,))]
    found = bad.result(60)
    if WAYS.expands:
        assert (found.status, found.token_ids) == ("failed", ())
        assert f"{WAYS.expands} {len(whole.ids)} tokens of prompt 0, whose conversation has {len(more.ids)}" in found.error
    else:
        assert tokens([found]) == [more.greedy(place.model, 8, (END,))]


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 56, 56, 3), dtype=np.uint8)


def test_what_cannot_be_served_is_refused_before_anything_is_submitted(place):
    tracked, whole = started(place, picture(1))
    video = Conversation.start(place.renderer, [{"role": "user", "content": [{"type": "video", "video": frames(4)}]}])
    ended = tracked.append_sampled([20, END], finish="stop")
    cut = tracked.with_generation_prompt().truncate(len(tracked) - 1)
    long = SamplingParams(response_length=1024)
    for prompt, params, words in (
        (video, GREEDY, "prompt 1 shows video 0: workers take pictures"),
        (ended, GREEDY, "prompt 1 cannot be answered: .*turn has ended"),
        (cut, GREEDY, "prompt 1 cannot be answered: .*truncated"),
        (tracked, long, f"prompt 0 has {len(whole.ids)} tokens and with response_length 1024 passes the model's 1024 positions"),
    ):
        with pytest.raises(WorkerError, match=words):
            place.worker.submit([tracked, prompt], params)
    assert place.worker.abort() == []
    assert tokens(place.worker.generate([tracked], GREEDY)) == [whole.greedy(place.model, 8, (END,))]
