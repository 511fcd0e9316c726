"""Real processors: the outputs of single items, merged, are those of one call over all items, byte for byte.

The oracle is the processor itself, called once with the text of the whole conversation. It shares nothing with the code under
test but the media.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest
import torch

from rollout_core.errors import ConversationError, MediaError, UnsupportedProcessorError
from rollout_core.multimodal.families import Family, Support, families, family_of, register_family, registry
from rollout_core.multimodal.media import Picture, Sound, Video
from rollout_core.multimodal.merge import Cat
from rollout_core.multimodal.positions import rule
from rollout_core.multimodal.processing import (
    feature_token,
    merge_outputs,
    placeholder,
    process_one,
    processor_fingerprint,
    sequence_outputs,
)
from support.processors import ALIKE, PROCESSORS, REFUSED, SETTINGS, TWINS
from support.whole import called, quiet, raw_bytes

#: Builder -> name of the family that its processor belongs to.
FAMILY_OF = {
    "qwen2_vl": "qwen2-vl",
    "qwen2_5_vl": "qwen2.5-vl",
    "qwen3_vl": "qwen3-vl",
    "glm4v": "glm4v",
    "glm46v": "glm4v",
    "gemma3": "gemma3",
    "gemma3_crops": "gemma3",
    "gemma3n": "gemma3n",
    "gemma4": "gemma4",
    "paligemma": "paligemma",
    "llava": "llava",
    "llava_next": "llava-next",
    "llava_onevision": "llava-onevision",
    "pixtral": "pixtral",
    "internvl": "internvl",
    "idefics2": "idefics2",
    "idefics3": "idefics3",
    "smolvlm": "smolvlm",
    "mllama": "mllama",
    "llama4": "llama4",
    "aria": "aria",
    "aya_vision": "aya-vision",
    "cohere2_vision": "cohere2-vision",
    "lfm2_vl": "lfm2-vl",
    "phi4_multimodal": "phi4-multimodal",
    "kimi": "kimi-k2.5",
    "ovis2": "ovis2",
    "perception_lm": "perception-lm",
    "qwen2_audio": "qwen2-audio",
    "qwen2_5_omni": "qwen2.5-omni",
    "qwen3_omni": "qwen3-omni",
    "video_llama_3": "videollama3",
    "minicpm": "minicpm-v-4.6",
    "glm5_next": "glm5-next",
    "exaone4_5": "patches",
    "lfm3_vl": "patches",
    "paddleocr_vl": "paddleocr-vl",
    "lighton_ocr": "pixtral",
}
SEEDS = range(5)
PICTURE_SIZES = ((300, 200), (150, 450), (64, 64), (500, 120), (90, 400), (224, 224), (37, 211), (640, 480))
BETWEEN = ("", "", "a", " see\n", "<b>", "2")


def pieces_of(name: str) -> tuple[str, str]:
    builder, _, backend = name.partition("+")
    return builder, backend or "pil"


NAMES = [name for name in PROCESSORS if name not in REFUSED]
CASES = [*NAMES, *(f"{name}+torchvision" for name in NAMES if name in TWINS)]


@pytest.fixture(scope="module", params=CASES)
def built(request):
    """(builder's name, processor, its family): one processor in memory at a time."""
    name, backend = pieces_of(request.param)
    processor = PROCESSORS[name](backend=backend)
    return name, processor, family_of(processor)


def make(name: str):
    return PROCESSORS[name]()


def picture(rng, size=None) -> Picture:
    width, height = size or PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
    return Picture("RGB", (width, height), rng.integers(0, 256, (height, width, 3), dtype=np.uint8).tobytes())


def video(rng, frames=None) -> Video:
    count = frames or int(rng.integers(2, 7))
    height, width = (int(side) for side in rng.integers(50, 120, 2))
    shown = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    fps = float(rng.choice([1.0, 2.0, 23.976]))
    step = int(rng.integers(1, 40))
    return Video(shown, fps, tuple(range(0, count * step, step)), count * step + 3, (count * step + 3) / fps)


def sound(rng) -> Sound:
    return Sound((rng.standard_normal(int(rng.integers(2000, 60000))) * 0.3).astype(np.float32), 16000)


def modalities_of(processor, family: Family) -> list[str]:
    return [modality for modality, support in family.modalities.items() if support.refuse is None]


def mix(name: str, processor, family: Family, seed: int) -> list:
    """1 to 5 items of mixed sizes and modalities; with three or more, one of them stands twice."""
    rng = np.random.default_rng(seed)
    sizes = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))], int(rng.integers(2, 6))
    alike = ALIKE.get(name, ())
    makers = {
        "image": lambda: picture(rng, sizes[0] if "image" in alike else None),
        "video": lambda: video(rng, sizes[1] if "video" in alike else None),
        "audio": lambda: sound(rng),
    }
    kinds = modalities_of(processor, family)
    items = [makers[kinds[rng.integers(len(kinds))]]() for _ in range((2, 1, 3, 4, 5)[seed % 5])]
    if len(items) > 2:
        items[-1] = items[0]
    return items


def message(items, rng) -> list:
    parts = [{"type": "text", "text": "look"}]
    for item in items:
        parts += [{"type": item.modality}, {"type": "text", "text": BETWEEN[rng.integers(len(BETWEEN))]}]
    return [{"role": "user", "content": parts}]


def one_call(processor, text: str, items, more: dict, nested: bool = False) -> dict:
    """The oracle: the processor's own outputs for all items at once; ``nested`` gives pictures as those of one conversation."""
    return called(processor, text, items, more, nested=nested, add_special_tokens=False, return_text_replacement_offsets=True)


def render(name: str, processor, items, seed: int) -> str:
    text = processor.apply_chat_template(message(items, np.random.default_rng(seed)), tokenize=False)
    # Mllama's call puts <bos> behind leading pictures unless the text has one, as its own templates do.
    return processor.tokenizer.bos_token + text if name == "mllama" else text


def expand(text: str, processor, family: Family, items, processed):
    """The text with each placeholder replaced, tokenized, and each item's runs of feature tokens."""
    at, grown, places = 0, "", []
    for item, one in zip(items, processed, strict=True):
        token = placeholder(processor, family, item.modality)
        found = text.index(token, at)
        grown += text[at:found]
        places.append((len(grown), len(grown) + len(one.replacement)))
        grown += one.replacement
        at = found + len(token)
    encoded = processor.tokenizer(grown + text[at:], add_special_tokens=False, return_offsets_mapping=True)
    spans = []
    for (start, stop), item in zip(places, items, strict=True):
        feature = processor.tokenizer.convert_tokens_to_ids(feature_token(processor, family, item.modality))
        inside = [
            index
            for index, (token, offset) in enumerate(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
            if token == feature and start <= offset[0] and offset[1] <= stop
        ]
        cuts = [index for index in inside if index - 1 not in inside]
        ends = [index + 1 for index in inside if index + 1 not in inside]
        spans.append(list(zip(cuts, ends, strict=True)))
    return encoded["input_ids"], spans


def single(name, processor, family, items):
    with quiet() if name == "minicpm" else contextlib.nullcontext():
        return [process_one(processor, family, item.modality, item, processor_kwargs=SETTINGS.get(name)) for item in items]


@pytest.mark.parametrize("seed", SEEDS)
def test_merged_singles_are_one_call(built, seed):
    name, processor, family = built
    items = mix(name, processor, family, seed)
    text = render(name, processor, items, seed)
    expected = one_call(processor, text, items, SETTINGS.get(name, {}), nested=seed % 2 == 1)
    processed = single(name, processor, family, items)

    outputs = [(item.modality, one.outputs) for item, one in zip(items, processed, strict=True)]
    ids, spans = expand(text, processor, family, items, processed)
    assert ids == expected["input_ids"][0].tolist()
    merged = merge_outputs(family, outputs) | sequence_outputs(family, len(ids), outputs, spans)
    oracle = {key: expected[key] for key in expected if key not in ("input_ids", "attention_mask", "text_replacement_offsets")}
    assert set(merged) == set(oracle)
    for key, value in oracle.items():
        assert raw_bytes(merged[key]) == raw_bytes(value), key

    reported = (expected.get("text_replacement_offsets") or [[]])[0]
    if reported:
        assert [entry["replacement"] for entry in reported] == [one.replacement for one in processed]
    features = {feature_token(processor, family, item.modality) for item in items}
    tokens = torch.isin(expected["input_ids"], torch.tensor(processor.tokenizer.convert_tokens_to_ids(sorted(features))))
    assert sum(one.rows for one in processed) == int(tokens.sum())
    for one, runs in zip(processed, spans, strict=True):
        assert one.rows == sum(stop - start for start, stop in runs)
        if one.grids:
            assert [grid.length for grid in one.grids] == [stop - start for start, stop in runs]


def test_singles_do_not_change_when_asked_again(built):
    name, processor, family = built
    items = mix(name, processor, family, 3)
    first, again = single(name, processor, family, items), single(name, processor, family, items)
    for one, other in zip(first, again, strict=True):
        assert one.replacement == other.replacement
        assert {key: raw_bytes(value) for key, value in one.outputs.items()} == {
            key: raw_bytes(value) for key, value in other.outputs.items()
        }


def test_text_alone(built):
    """Without items, what is left is what the processor gives for text alone, or nothing."""
    _, processor, family = built
    expected = one_call(processor, "no pictures here", [], {})
    length = expected["input_ids"].shape[1]
    oracle = {key: expected[key] for key in expected if key not in ("input_ids", "attention_mask", "text_replacement_offsets")}
    assert merge_outputs(family, []) == {}
    made = sequence_outputs(family, length, [], [])
    assert {key: raw_bytes(value) for key, value in made.items()} == {key: raw_bytes(value) for key, value in oracle.items()}


def test_family_and_positions_are_known(built):
    name, _, family = built
    assert family.name == FAMILY_OF[name]
    if "omni" in family.name:
        with pytest.raises(ConversationError, match="no position rule is named"):
            rule(family.positions)
    else:
        assert rule(family.positions).axes == (3 if any(support.grids for support in family.modalities.values()) else 1)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "llava_next", "pixtral"])
def test_cat_along_the_first_dimension_is_not_enough(name):
    """So the sizes above are mixed enough to tell the rules apart."""
    processor = make(name)
    family = family_of(processor)
    failed = 0
    for seed in SEEDS:
        items = mix(name, processor, family, seed)
        expected = one_call(processor, render(name, processor, items, seed), items, {})["pixel_values"]
        pixels = [one.outputs["pixel_values"] for one in single(name, processor, family, items)]
        try:
            failed += raw_bytes(torch.cat(pixels)) != raw_bytes(expected)
        except RuntimeError:
            failed += 1
    assert failed >= 2


class TestRefusals:
    @pytest.mark.parametrize("name", sorted(REFUSED))
    def test_family_by_name(self, name):
        processor = make(name)
        family = family_of(processor)
        item = picture(np.random.default_rng(0))
        with pytest.raises(UnsupportedProcessorError, match=f"{type(processor).__name__}.*is refused"):
            process_one(processor, family, "image", item)
        with pytest.raises(UnsupportedProcessorError, match="is refused"):
            merge_outputs(family, [("image", {})])

    def test_the_reason_against_llava_onevision_is_true(self):
        processor, rng = make("llava_onevision"), np.random.default_rng(0)
        pair = [picture(rng, (600, 400)), picture(rng, (300, 900))]
        together = one_call(processor, "<image><image>", pair, {}, nested=True)["text_replacement_offsets"][0]
        alone = one_call(processor, "<image>", pair[:1], {}, nested=True)["text_replacement_offsets"][0]
        assert together[0]["replacement"] != alone[0]["replacement"]

    def test_the_reason_against_idefics2_is_true(self):
        processor = make("idefics2")
        pair = [picture(np.random.default_rng(0), (64, 64))] * 2
        alone = one_call(processor, "<image>", pair[:1], {})["input_ids"].shape[1]
        assert one_call(processor, "<image><image>", pair, {})["input_ids"].shape[1] == 2 * alone - 1

    def test_the_reason_against_paligemma_is_true(self):
        processor = make("paligemma")
        item = picture(np.random.default_rng(0))
        ids = one_call(processor, "<image>see", [item], {})["input_ids"][0].tolist()
        assert processor.tokenizer.decode(ids).endswith("<image><|endoftext|>see\n")

    def test_the_reason_against_voxtral_is_true(self):
        from transformers import VoxtralProcessor

        assert set(inspect.signature(VoxtralProcessor.__call__).parameters) == {"self", "text", "kwargs"}
        with pytest.raises(UnsupportedProcessorError, match="its call takes no sound"):
            family_of(object.__new__(VoxtralProcessor)).support(None, "audio")

    def test_the_reason_against_smolvlm_videos_is_true(self):
        processor, rng = make("smolvlm"), np.random.default_rng(0)
        pair = [video(rng, 3), video(rng, 5)]
        first = one_call(processor, "<video><video>", pair, {})["text_replacement_offsets"][0][0]["replacement"]
        assert "series of five frames" in first
        with pytest.raises(UnsupportedProcessorError, match="SmolVLMProcessor.*refused for modality 'video'"):
            process_one(processor, family_of(processor), "video", pair[0])

    def test_the_reason_against_phi4_sounds_is_true(self):
        processor, rng = make("phi4_multimodal"), np.random.default_rng(0)
        pair = [sound(rng), sound(rng)]
        together = one_call(processor, "<|audio|><|audio|>", pair, {})
        alone = [one_call(processor, "<|audio|>", [item], {}) for item in pair]
        assert "audio_attention_mask" in together
        assert "audio_attention_mask" not in alone[0]
        short = int(np.argmin([len(item.samples) for item in pair]))
        frames = together["audio_input_features"][short]
        assert frames[alone[short]["audio_input_features"].shape[1] :].abs().max() > 0
        with pytest.raises(UnsupportedProcessorError, match="refused for modality 'audio'"):
            process_one(processor, family_of(processor), "audio", pair[0])

    def test_the_reason_against_qwen3_omni_sounds_is_true(self):
        processor, rng = make("qwen3_omni"), np.random.default_rng(0)
        short = Sound(rng.standard_normal(3000).astype(np.float32), 16000)
        padded = one_call(processor, processor.audio_token, [short], {"audio_kwargs": {"padding": "max_length"}})
        assert padded["input_features"].shape[-1] < 100, "full length would be 3000 frames"
        with pytest.raises(UnsupportedProcessorError, match="refused for modality 'audio': .*drops audio_kwargs"):
            process_one(processor, family_of(processor), "audio", short)

    @pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
    def test_sounds_need_full_length(self, name):
        processor, rng = make(name), np.random.default_rng(0)
        token = processor.audio_token
        pair = [
            Sound(rng.standard_normal(12345).astype(np.float32), 16000),
            Sound(rng.standard_normal(31000).astype(np.float32), 16000),
        ]
        together = one_call(processor, token * 2, pair, {})["input_features"]
        alone = one_call(processor, token, pair[:1], {})["input_features"]
        padded = torch.zeros_like(together[:1])
        padded[:, : alone.shape[1], : alone.shape[2]] = alone
        assert raw_bytes(padded) != raw_bytes(together[:1]), "the reason for the pin"
        with pytest.raises(UnsupportedProcessorError, match="pass processor_kwargs={'audio_kwargs': {'padding': 'max_length'}}"):
            process_one(processor, family_of(processor), "audio", pair[0])
        process_one(processor, family_of(processor), "audio", pair[0], processor_kwargs={"padding": "max_length"})

    def test_aria_tiles(self):
        processor, item = make("aria"), picture(np.random.default_rng(0))
        with pytest.raises(UnsupportedProcessorError, match="split_image=True"):
            process_one(processor, family_of(processor), "image", item, processor_kwargs={"images_kwargs": {"split_image": True}})

    def test_minicpm_numbers(self):
        processor, item = make("minicpm"), picture(np.random.default_rng(0))
        with pytest.raises(UnsupportedProcessorError, match="pass processor_kwargs={'use_image_id': False}"):
            process_one(processor, family_of(processor), "image", item)

    def test_tiles_that_no_call_takes(self):
        processor, rng = make("perception_lm"), np.random.default_rng(0)
        family = family_of(processor)
        pair = [picture(rng, (300, 200)), picture(rng, (150, 450))]
        with pytest.raises(ValueError, match="Unable to convert"):
            one_call(processor, "<|image|><|image|>", pair, {})
        outputs = [("image", one.outputs) for one in single("perception_lm", processor, family, pair)]
        with pytest.raises(UnsupportedProcessorError, match="pixel_values.*dimension 1"):
            merge_outputs(family, outputs)

    def test_modality_that_a_family_lacks(self):
        processor = make("llava")
        with pytest.raises(UnsupportedProcessorError, match="LlavaProcessor.*does not take modality 'video'; it takes image"):
            process_one(processor, family_of(processor), "video", video(np.random.default_rng(0)))

    def test_text_family(self):
        processor = make("llava").tokenizer
        family = family_of(processor)
        assert family.name == "text"
        assert merge_outputs(family, []) == {}
        with pytest.raises(UnsupportedProcessorError, match="takes text only"):
            process_one(processor, family, "image", picture(np.random.default_rng(0)))


class TestCalls:
    def test_unknown_output(self):
        processor = make("llava")
        family = dataclasses.replace(family_of(processor), outputs={})
        with pytest.raises(UnsupportedProcessorError, match="LlavaProcessor gives an output 'pixel_values'.*register_family"):
            process_one(processor, family, "image", picture(np.random.default_rng(0)))

    def test_unknown_output_of_a_subclass(self):
        from transformers import LlavaProcessor

        class Extra(LlavaProcessor):
            def __call__(self, **kwargs):
                called = super().__call__(**kwargs)
                called["extra_sizes"] = torch.ones(1)
                return called

        processor = make("llava")
        processor.__class__ = Extra
        assert family_of(processor).name == "llava"
        with pytest.raises(UnsupportedProcessorError, match="'extra_sizes'"):
            process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0)))

    def test_segment_numbers_count_only_if_they_say_something(self):
        from transformers import LlavaProcessor

        value = torch.zeros(1, 4, dtype=torch.int64)

        class Segments(LlavaProcessor):
            def __call__(self, **kwargs):
                called = super().__call__(**kwargs)
                called["token_type_ids"] = value
                return called

        processor = make("llava")
        processor.__class__ = Segments
        assert (
            "token_type_ids" not in process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0))).outputs
        )
        value[0, 1] = 1
        with pytest.raises(UnsupportedProcessorError, match="'token_type_ids'"):
            process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0)))

    def test_processor_that_does_not_report(self):
        processor = make("idefics2")
        support = Support(lambda p: "<image>", lambda p: "<image>")
        family = Family("mine", ("x",), {"image": support}, dict.fromkeys(("pixel_values", "pixel_attention_mask"), Cat(1)))
        with pytest.raises(UnsupportedProcessorError, match="Idefics2Processor does not report text_replacement_offsets"):
            process_one(processor, family, "image", picture(np.random.default_rng(0)))

    def test_processor_that_reports_something_else(self):
        from transformers import LlavaProcessor

        class Odd(LlavaProcessor):
            def __call__(self, **kwargs):
                called = super().__call__(**kwargs)
                called["text_replacement_offsets"] = [called["text_replacement_offsets"][0] * 2]
                return called

        processor = make("llava")
        processor.__class__ = Odd
        with pytest.raises(UnsupportedProcessorError, match="Odd was given one image with the text '<image>' and reports"):
            process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0)))

    def test_one_call_per_item(self):
        from transformers import Qwen2VLProcessor

        calls = []

        class Counting(Qwen2VLProcessor):
            def __call__(self, **kwargs):
                calls.append(sorted(kwargs))
                return super().__call__(**kwargs)

        processor = make("qwen2_vl")
        processor.__class__ = Counting
        rng = np.random.default_rng(0)
        processed = [process_one(processor, family_of(processor), item.modality, item) for item in (picture(rng), video(rng))]
        assert len(calls) == 2
        merge_outputs(family_of(processor), [("image", processed[0].outputs), ("video", processed[1].outputs)])
        assert len(calls) == 2

    @pytest.mark.parametrize(
        "more", [{"return_tensors": "np"}, {"videos_kwargs": {"do_sample_frames": True}}, {"text": "x"}, {"return_metadata": True}]
    )
    def test_reserved_keywords(self, more):
        processor = make("qwen2_vl")
        with pytest.raises(ConversationError, match="decided per item"):
            process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0)), processor_kwargs=more)

    def test_wrong_modality_and_rate(self):
        processor = make("qwen2_5_omni")
        family = family_of(processor)
        with pytest.raises(ConversationError, match="of modality 'image', not 'video'"):
            process_one(processor, family, "video", picture(np.random.default_rng(0)))
        with pytest.raises(MediaError, match="8000 Hz and Qwen2_5OmniProcessor takes 16000 Hz"):
            process_one(processor, family, "audio", Sound(np.ones(5000, np.float32), 8000))

    def test_keywords_reach_the_processor(self):
        processor, item = make("qwen2_vl"), picture(np.random.default_rng(0), (300, 200))
        size = {"images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 6272}}}
        small = process_one(processor, family_of(processor), "image", item, processor_kwargs=size)
        assert small.rows < process_one(processor, family_of(processor), "image", item).rows

    def test_what_the_processor_raises_says_what_it_was_given(self):
        processor = make("qwen2_vl")
        with pytest.raises(ValueError, match="aspect ratio") as caught:
            process_one(processor, family_of(processor), "image", picture(np.random.default_rng(0), (900, 2)))
        assert "Qwen2VLProcessor was given Picture(RGB, 900x2" in caught.value.__notes__[0]

    @pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "glm4v"])
    def test_media_are_not_changed_and_metadata_may_be_missing(self, name):
        processor = make(name)
        bare = Video(np.random.default_rng(0).integers(0, 256, (4, 60, 60, 3), dtype=np.uint8))
        before = bare.frames.tobytes(), bare.metadata()
        one = process_one(processor, family_of(processor), "video", bare)
        assert (bare.frames.tobytes(), bare.metadata()) == before
        text = processor.video_token
        with quiet():
            expected = processor(
                text=[text], videos=[bare.frames.copy()], videos_kwargs={"do_sample_frames": False}, return_tensors="pt"
            )
        for key, value in one.outputs.items():
            assert raw_bytes(value) == raw_bytes(expected[key])
        partly = Video(bare.frames, fps=2.0)
        assert process_one(processor, family_of(processor), "video", partly).rows == one.rows

    def test_missing_output(self):
        processor, rng = make("llava_next"), np.random.default_rng(0)
        family = family_of(processor)
        one, two = single("llava_next", processor, family, [picture(rng), picture(rng)])
        with pytest.raises(UnsupportedProcessorError, match="'image_sizes' is missing in item 1"):
            merge_outputs(family, [("image", one.outputs), ("image", {"pixel_values": two.outputs["pixel_values"]})])

    def test_unknown_output_when_merging(self):
        with pytest.raises(UnsupportedProcessorError, match="family 'llava' gives an output 'depth'"):
            merge_outputs(family_of(make("llava")), [("image", {"depth": torch.ones(1)})])


class TestRegistry:
    @pytest.fixture(autouse=True)
    def _as_before(self, monkeypatch):
        monkeypatch.setattr(registry, "_BY_PROCESSOR", dict(registry._BY_PROCESSOR))

    def test_unknown_processor(self):
        class Mine:
            pass

        with pytest.raises(UnsupportedProcessorError, match="no family is known for Mine.*register_family"):
            family_of(Mine())

    def test_register(self):
        class Mine:
            pass

        class Derived(Mine):
            pass

        mine = Family("mine", ("Mine",))
        assert register_family(mine) is mine
        assert family_of(Derived()) is mine
        assert register_family(mine) is mine, "twice is harmless"
        with pytest.raises(UnsupportedProcessorError, match="belongs to family 'mine' already"):
            register_family(Family("other", ("Mine",)))
        other = register_family(Family("other", ("Mine",)), replace=True)
        assert family_of(Mine()) is other
        with pytest.raises(UnsupportedProcessorError, match="names no processor class"):
            register_family(Family("none", ()))

    def test_names_are_of_real_classes(self):
        import transformers

        remote = {"DeepseekVLV2Processor"}
        for family in families():
            for name in family.processors:
                assert name in remote or hasattr(transformers, name), name

    def test_every_family_is_tried_here(self):
        assert {family.name for family in families()} - set(FAMILY_OF.values()) == {"text", "voxtral", "deepseek-vl2"}


class TestFingerprint:
    def test_a_setting_counts(self):
        processor = make("qwen2_vl")
        first = processor_fingerprint(processor)
        assert processor_fingerprint(processor) == first
        processor.image_processor.merge_size = 4
        second = processor_fingerprint(processor)
        assert second != first
        processor.image_processor.merge_size = 2
        assert processor_fingerprint(processor) == first
        processor.video_processor.size = {"shortest_edge": 1, "longest_edge": 2}
        assert processor_fingerprint(processor) not in (first, second)

    def test_a_nested_setting_changed_in_place_counts(self):
        processor = make("llava_next")
        first = processor_fingerprint(processor)
        processor.image_processor.image_grid_pinpoints[0][0] += 112
        assert processor_fingerprint(processor) != first

    def test_an_attribute_of_the_processor_counts_and_the_template_does_not(self):
        processor = make("internvl")
        first = processor_fingerprint(processor)
        processor.chat_template = "{{ messages }}"
        assert processor_fingerprint(processor) == first
        processor.image_seq_length = 64
        assert processor_fingerprint(processor) != first

    def test_sound_settings_count_and_arrays_by_their_bytes(self):
        processor = make("gemma4")
        seen = {processor_fingerprint(processor)}
        processor.feature_extractor.dither = 0.5
        seen.add(processor_fingerprint(processor))
        processor.feature_extractor.per_bin_mean = np.zeros((1, 1, 128))
        seen.add(processor_fingerprint(processor))
        processor.feature_extractor.per_bin_mean[0, 0, 64] = 1e-9
        seen.add(processor_fingerprint(processor))
        assert len(seen) == 4

    def test_cheap_enough_for_every_item(self):
        """2 ms at most, on the processor with most parts; the best of several, for the machine may be busy."""
        processor = make("gemma4")
        assert min(timeit.repeat(lambda: processor_fingerprint(processor), number=1, repeat=30)) < 0.002

    def test_keywords_count_in_any_order(self):
        processor = make("qwen2_vl")
        first = processor_fingerprint(processor, {"images_kwargs": {"a": 1, "b": 2}, "c": 3})
        assert first == processor_fingerprint(processor, {"c": 3, "images_kwargs": {"b": 2, "a": 1}})
        assert first != processor_fingerprint(processor)
        assert processor_fingerprint(processor, {}) == processor_fingerprint(processor)
        with pytest.raises(UnsupportedProcessorError, match="no fingerprint"):
            processor_fingerprint(processor, {"f": lambda: 0})

    def test_the_backend_counts(self):
        assert processor_fingerprint(PROCESSORS["llava"](backend="pil")) != processor_fingerprint(
            PROCESSORS["llava"](backend="torchvision")
        )

    def test_the_version_counts(self, monkeypatch):
        import transformers

        processor = make("llava")
        first = processor_fingerprint(processor)
        monkeypatch.setattr(transformers, "__version__", "0.0.0")
        assert processor_fingerprint(processor) != first

    def test_equal_in_another_process(self):
        names = ("gemma4", "aria")
        program = (
            "from support import torchvision_cpu\ntorchvision_cpu.prepare()\nfrom support.processors import PROCESSORS\n"
            "from rollout_core.multimodal.processing import processor_fingerprint\n"
            f"print(*[processor_fingerprint(PROCESSORS[name]()) for name in {names}])"
        )
        environment = {
            "PYTHONHASHSEED": "7",
            "PYTHONPATH": ":".join([".", *sys.path]),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        shown = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program],
            cwd=Path(__file__).parent.parent,
            env=environment,
            capture_output=True,
            check=True,
            text=True,
        )
        assert shown.stdout.split() == [processor_fingerprint(make(name)) for name in names]
