"""Conversations grown turn by turn over real processors are what processing them whole gives: M2, M4, M6, M7, M16."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from rollout_core.errors import UnstableTemplateError, UnsupportedProcessorError
from rollout_core.multimodal import Conversation, HFRenderer, Picture
from support import processors, real_tokenizers
from support.processors import ALIKE, REFUSED, SETTINGS
from support.whole import Drawer, differences, grown, quiet, whole

FAMILIES = [name for name in processors.PROCESSORS if name not in REFUSED]


def built(name: str):
    processor = processors.PROCESSORS[name]()
    if name == "mllama":  # writes a bos token of its own otherwise
        processor.chat_template = "{{ '<|endoftext|>' }}" + processor.chat_template
    return processor


def renderer_of(name: str, processor) -> HFRenderer:
    return HFRenderer(processor, processor_kwargs=SETTINGS.get(name), positions="plain@1" if "omni" in name else None)


def check(name: str, processor, renderer: HFRenderer, seeds) -> list[str]:
    found = []
    modalities = [m for m, support in renderer.family.modalities.items() if support.refuse is None]
    for seed in seeds:
        drawer = Drawer(processor, modalities, seed, ALIKE.get(name, ()))
        drawn = drawer.conversation(seed % 4, raw=seed % 3 == 2)
        with quiet():
            found += [f"seed {seed}: {d}" for d in differences(grown(renderer, drawn), processor, drawn, SETTINGS.get(name, {}))]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_grown_is_whole(name):
    processor = built(name)
    assert check(name, processor, renderer_of(name, processor), range(4)) == []


@pytest.mark.parametrize("tokenizer", real_tokenizers.NAMES[1:])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3_crops", "idefics3", "pixtral"])
def test_with_other_real_tokenizers(name, tokenizer, monkeypatch):
    monkeypatch.setattr(processors, "base_tokenizer", lambda: real_tokenizers.backend(tokenizer))
    processor = built(name)
    assert check(name, processor, renderer_of(name, processor), range(3)) == []


def test_smollm2_with_its_own_template():
    """Text alone; the template adds a system prompt if there is none."""
    tokenizer = real_tokenizers.smollm2()
    renderer = HFRenderer(tokenizer)
    assert not renderer.verdict.breaks
    messages = [{"role": "user", "content": "Name three colors."}]
    conversation = Conversation.start(renderer, messages)
    for turn in range(4):
        answer = {"role": "assistant", "content": f"Answer {turn}:\n\n- red"}
        ids = tokenizer(answer["content"])["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        new = [{"role": "user", "content": f" and {turn}?"}]
        conversation = conversation.append_sampled(ids).extend(new)
        messages += [answer, *new]
        assert conversation.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert conversation.position_ids.tolist() == [list(range(len(conversation)))]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert conversation.with_generation_prompt().input_ids.tolist() == prompt


class Counting:
    """An image processor that counts the pictures it is given."""

    def __init__(self, real) -> None:
        self._real, self.pictures = real, 0

    def __getattr__(self, name):
        return getattr(self._real, name)

    def __call__(self, images, **kwargs):
        self.pictures += sum(len(entry) if isinstance(entry, list) else 1 for entry in images)
        return self._real(images, **kwargs)


def test_ten_pictures_are_processed_ten_times():
    processor = built("qwen2_vl")
    processor.image_processor = counting = Counting(processor.image_processor)
    renderer = HFRenderer(processor)
    noise = np.random.default_rng(0)
    conversation = Conversation.start(renderer, [{"role": "user", "content": "look around"}])
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    earlier = conversation
    for turn in range(10):
        picture = Picture("RGB", (84, 56), noise.integers(0, 256, 84 * 56 * 3, dtype=np.uint8).tobytes())
        conversation = conversation.append_sampled([1, 2, 3, end])
        part = {"type": "image", "image": picture}
        conversation = conversation.extend([{"role": "tool", "content": [part, {"type": "text", "text": f"view {turn}"}]}])
        assert [item.index for item in conversation.delta(earlier).items] == [turn]
        conversation.multi_modal_inputs()
        earlier = conversation
    assert counting.pictures == 10
    again = conversation.append_sampled([4, end]).extend([{"role": "tool", "content": [part]}])
    assert counting.pictures == 10, "the same picture again"
    restored = Conversation.from_bytes(renderer, again.to_bytes())
    assert restored.to_bytes() == again.to_bytes()
    assert counting.pictures == 10


def test_a_new_segment_processes_no_picture_again():
    """Thinking is stripped from the history: what was sampled stays a sample of its own, and the prompt is written anew."""
    processor = built("qwen2_vl")
    stripping = processor.chat_template.replace(
        "{{ part['text'] }}",
        "{{ part['text'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last and false else part['text'] }}",
    ).replace(
        "{{ message['content'] }}",
        "{{ message['content'].split('</think>')[-1] if message['role'] == 'assistant' and not loop.last else "
        "message['content'] }}",
    )
    processor.chat_template = stripping
    processor.image_processor = counting = Counting(processor.image_processor)
    renderer = HFRenderer(processor)
    assert [b for b in renderer.verdict.breaks if b.join.before == "assistant"]
    picture = Picture("RGB", (56, 56), bytes(56 * 56 * 3))
    first = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]}]
    tokenizer = processor.tokenizer
    ids = tokenizer("<think>\nhm\n</think>\n\nblack")["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    more = [{"role": "user", "content": "sure?"}]

    refusing = Conversation.start(renderer, first).append_sampled(ids)
    with pytest.raises(UnstableTemplateError, match=r"message 2 \(user\) makes the chat template change message 1 \(assistant\)"):
        refusing.extend(more)

    before = Conversation.start(renderer, first, on_unstable="segment").append_sampled(ids, logprobs=[-1.0] * len(ids))
    after = before.extend(more)
    assert counting.pictures == 1
    assert [s.input_ids.tolist() for s in after.segments] == [before.input_ids.tolist()]
    assert after.loss_mask.sum() == 0
    shown = [
        {"role": "user", "content": [{"type": "image"}, first[0]["content"][1]]},
        {"role": "assistant", "content": "\n\nblack"},
        *more,
    ]
    text = processor.apply_chat_template(shown, tokenize=False)
    oracle = processor(text=[text], images=[[picture.to_pil()]])
    assert after.input_ids.tolist() == list(oracle["input_ids"][0])
    assert Conversation.from_bytes(renderer, after.to_bytes()).segments[0].input_ids.tolist() == before.input_ids.tolist()


def test_mllama_needs_a_template_that_begins_with_bos():
    processor = processors.PROCESSORS["mllama"]()
    with pytest.raises(UnsupportedProcessorError, match="let the chat template begin with it"):
        Conversation.start(HFRenderer(processor), [{"role": "user", "content": "hi"}])


def test_the_oracle_sees_a_difference():
    """An oracle that calls everything equal would pass all of the above."""
    processor = built("qwen2_vl")
    renderer = HFRenderer(processor)
    drawn = Drawer(processor, ["image"], 1).conversation(2)
    conversation = grown(renderer, drawn)
    assert differences(conversation, processor, drawn, {}) == []
    drawn.messages[-1]["content"].append({"type": "text", "text": "x"})
    assert differences(conversation, processor, drawn, {})[0].startswith("ids: first at")
    assert whole(processor, drawn, {})["input_ids"].shape[1] > len(conversation)


def test_threads_may_share_a_renderer():
    """transformers keeps in the tokenizer whether control tokens are taken as text: nobody else may see it while a literal is
    encoded."""
    renderer = HFRenderer(built("qwen2_vl"))
    texts = {"literal": "see <|image_pad|> " * 10, "plain": "w " * 500}
    expected = {
        name: Conversation.start(renderer, [{"role": "user", "content": text}]).input_ids.tolist() for name, text in texts.items()
    }
    wrong = []

    def work(name):
        for _ in range(150):
            if Conversation.start(renderer, [{"role": "user", "content": texts[name]}]).input_ids.tolist() != expected[name]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(name,)) for name in (*texts, *texts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_turn_of_qwen3_does_not_render_the_history():
    """Its template strips thinking once a user speaks, and not before: tool results after thinking are rendered after the last
    answer."""
    processor = built("qwen2_vl")
    processor.chat_template = (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.index0 < ns.last %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rendered = []
    real = processor.apply_chat_template
    processor.apply_chat_template = lambda messages, **options: (rendered.append(len(messages)), real(messages, **options))[1]
    renderer = HFRenderer(processor)
    conversation = Conversation.start(renderer, [{"role": "user", "content": "go"}])
    said = processor.tokenizer("<think>\nhm\n</think>\n\nlook")["input_ids"] + [
        processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ]
    for turn in range(6):
        rendered.clear()
        conversation = conversation.append_sampled(said).extend([{"role": "tool", "content": f"result {turn}"}])
    assert max(rendered) <= 4
    conversation.verify()
    with pytest.raises(UnstableTemplateError, match=r"makes the chat template change message 1 \(assistant\)"):
        conversation.append_sampled(said).extend([{"role": "user", "content": "stop"}])
