"""The fake processors: what a tokenizer, a template and a processor of theirs do, and that worlds can be added."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout_core.testing import make_world, register_world, worlds
from rollout_core.testing.tracker_cases import MediumCase
from rollout_core.testing.worlds import KINDS, TEMPLATES, FakeTokenizer, world_info, world_names
from rollout_core.testing.worlds.kinds import Join

TOKENIZER = FakeTokenizer(("<|im_start|>", "<|image_pad|>"), bos=None)
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab", ["a", "b"]),
        ("a b", ["a", " b"]),
        ("12", ["12"]),
        ("123", ["12", "3"]),
        ("\n\n", ["\n\n"]),
        ("a.\n\n", ["a", ".\n\n"]),
        ("a<|im_start|>\n", ["a", "<|im_start|>", "\n"]),
    ],
)
def test_the_tokenizer_merges(text, pieces):
    out = TOKENIZER(text, return_offsets_mapping=True)
    assert [text[start:stop] for start, stop in out["offset_mapping"]] == pieces
    assert [TOKENIZER.decode([token]) for token in out["input_ids"]] == pieces


def test_encoding_apart_is_not_encoding_together():
    assert TOKENIZER.encode("1") + TOKENIZER.encode("2") != TOKENIZER.encode("12")
    assert TOKENIZER.decode(TOKENIZER.encode("1") + TOKENIZER.encode("2")) == "12"


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_goes_there_and_back(text):
    out = TOKENIZER(text, return_offsets_mapping=True)
    assert TOKENIZER.decode(out["input_ids"]) == text
    assert all(0 <= start < stop <= len(text) for start, stop in out["offset_mapping"])


def test_control_tokens_can_be_taken_as_text_and_surrogates_cannot():
    assert len(TOKENIZER.encode("<|im_start|>")) == 1
    assert len(TOKENIZER.encode("<|im_start|>", split_special_tokens=True)) == 12
    with pytest.raises(UnicodeEncodeError):
        TOKENIZER("\ud800")


@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("chatml", [USER], "<|im_start|>user\na<|im_end|>\n"),
        ("glm", [USER, {"role": "assistant", "content": "b"}], "<|user|>\na<|assistant|>\nb"),
        ("system", [USER], "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"),
        ("trims", [{"role": "user", "content": " a\n"}], "<|im_start|>user\na<|im_end|>\n"),
        (
            "numbered",
            [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            "<|im_start|>user\nPicture 1: @Picture 2: @<|im_end|>\n",
        ),
        (
            "media-first",
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}],
            "<|im_start|>user\n@a<|im_end|>\n",
        ),
        (
            "groups-tools",
            [{"role": "tool", "content": "a"}, {"role": "tool", "content": "b"}],
            "<|im_start|>user\n<tool>a</tool>\n<tool>b</tool><|im_end|>\n",
        ),
        (
            "strips-thinking",
            [{"role": "assistant", "content": "<think>a</think>b"}, USER],
            "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\na<|im_end|>\n",
        ),
    ],
)
def test_templates_write(name, messages, text):
    assert TEMPLATES[name].render(messages, {"image": "@"}) == text


@pytest.mark.parametrize("name", [name for name, case in TEMPLATES.items() if case.stable])
def test_stable_templates_keep_what_they_wrote(name):
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "b"}]}
    messages = [USER, {"role": "assistant", "content": "<think>x</think>y"}, picture, {"role": "tool", "content": "c"}, picture]
    texts = [TEMPLATES[name].render(messages[:count], {"image": "@"}) for count in range(1, 6)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    answered = TEMPLATES[name].render(messages[:2], {"image": "@"})
    assert answered.startswith(TEMPLATES[name].render(messages[:1], {"image": "@"}, generation=True))


def test_templates_refuse():
    with pytest.raises(ValueError, match="No user query"):
        TEMPLATES["needs-user"].render([{"role": "system", "content": "a"}], {})
    with pytest.raises(ValueError, match="Tool messages hold text only"):
        TEMPLATES["text-tools"].render([{"role": "tool", "content": [{"type": "image"}]}], {"image": "@"})


def test_joins():
    a, b = np.ones((1, 2, 3)), np.ones((1, 4, 3))
    assert Join()([a, a]).shape == (2, 2, 3)
    assert Join(1)([a, b]).shape == (1, 6, 3)
    padded = Join(0, (1,), 7.0)([a, b])
    assert padded.shape == (2, 4, 3)
    assert padded[0, 2:].tolist() == [[7.0] * 3] * 2
    with pytest.raises(ValueError):
        Join()([a, b])


@pytest.mark.parametrize("kind", KINDS)
def test_processors_process_many_at_once_and_count(kind):
    world = make_world(f"chatml+{kind}")
    shown = world.shown["image"]
    pictures = [MediumCase(width=w, height=h).image() for w, h in ((2, 2), (5, 3))]
    called = world.processor(text=[f"a{shown}b{shown}"], images=pictures, return_text_replacement_offsets=True)
    assert world.counts.items == 2
    assert world.counts.characters > 0
    feature = world.token(shown.feature)
    if kind not in ("coupled",):
        rows = sum(world.measure(MediumCase(width=w, height=h))[0] for w, h in ((2, 2), (5, 3)))
        assert called["input_ids"][0].count(feature) == rows
    assert [entry["type"] for entry in called["text_replacement_offsets"][0]] == ["image", "image"]
    with pytest.raises(ValueError, match="more placeholders"):
        world.processor(text=[f"{shown}{shown}"], images=pictures[:1])
    with pytest.raises(ValueError, match="more images than placeholders"):
        world.processor(text=["a"], images=pictures[:1])


def test_worlds_are_found_by_their_traits():
    assert world_names()[0] == "chatml+rows"
    assert "strips-thinking+rows" not in world_names("stable")
    assert "chatml+coupled" not in world_names("sums")
    assert world_names("stable", modality="audio") == ["chatml+heard"]
    assert world_names("stable", among=["glm+bare", "plain-end+rows"]) == ["glm+bare"]


def test_a_world_can_be_registered(monkeypatch):
    monkeypatch.setattr(worlds, "_WORLDS", dict(worlds._WORLDS))
    register_world("mine", lambda: make_world("glm+bare"), modalities=("image", "video"))
    assert make_world("mine").name == "glm+bare"
    assert "mine" not in world_names()
    assert world_info("mine").traits == {"stable", "sums", "plain joins", "tool media"}
    with pytest.raises(ValueError, match="'quick' is no trait of a world"):
        register_world("mine", lambda: make_world("glm+bare"), traits=["quick"])
    with pytest.raises(ValueError, match="there is no world 'chatml'; there are chatml\\+rows, "):
        make_world("chatml")
