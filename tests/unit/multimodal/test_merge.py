"""The rules alone, on tensors made by hand; the oracle is numpy."""

from __future__ import annotations

from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rollout_core.errors import ConversationError, UnsupportedProcessorError
from rollout_core.multimodal.families import Family, Pin, Support, rows
from rollout_core.multimodal.families.tiles import cross_attention
from rollout_core.multimodal.fingerprint import processor_fingerprint
from rollout_core.multimodal.merge import Cat, PadCat, PerToken, Rebuild
from rollout_core.multimodal.processing import merge_outputs, sequence_outputs

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)


def raw(tensor: torch.Tensor) -> tuple:
    flat = tensor.contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), (flat.view(torch.uint8) if flat.numel() else flat).numpy().tobytes()


def bits(shape, dtype, seed) -> torch.Tensor:
    """Random bits: NaN payloads and signed zeros among them."""
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype == torch.bool:
        return torch.from_numpy(rng.integers(0, 2, count).astype(bool)).reshape(shape)
    data = torch.from_numpy(rng.integers(0, 256, count * dtype.itemsize, dtype=np.uint8))
    return data.view(dtype).reshape(shape) if count else torch.zeros(shape, dtype=dtype)


def as_words(tensor: torch.Tensor) -> np.ndarray:
    """The same bits as unsigned integers."""
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(width).numpy()


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    dim=st.sampled_from([0, 1, 2, -1, -2, -3]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_cat_is_numpys_on_bits(lengths, dim, dtype, seed):
    shapes = [[2, 3, 2] for _ in lengths]
    for shape, length in zip(shapes, lengths, strict=True):
        shape[dim] = length
    values = [bits(shape, dtype, seed + index) for index, shape in enumerate(shapes)]
    merged = Cat(dim).merge("k", values)
    assert merged.dtype == dtype
    assert np.array_equal(as_words(merged), np.concatenate([as_words(value) for value in values], axis=dim))


@given(
    sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=5),
    dtype=st.sampled_from(DTYPES),
    value=st.sampled_from([0, 1]),
    seed=st.integers(0, 99),
)
def test_pad_cat_is_numpys_on_bits(sizes, dtype, value, seed):
    values = [bits((count, high, 2, wide), dtype, seed + index) for index, (count, high, wide) in enumerate(sizes)]
    merged = PadCat((1, 3), value=value).merge("k", values)
    high, wide = max(size[1] for size in sizes), max(size[2] for size in sizes)
    fill = as_words(torch.full((1,), value, dtype=dtype))[0]
    parts = [
        np.pad(as_words(one), ((0, 0), (0, high - one.shape[1]), (0, 0), (0, wide - one.shape[3])), constant_values=fill)
        for one in values
    ]
    assert merged.dtype == dtype
    assert np.array_equal(as_words(merged), np.concatenate(parts))


#: Signalling and quiet NaNs with payloads, both signs, and the negative zero, as words of each float.
ODD = {
    torch.float16: (torch.int16, [0x7C01, 0x7E55, -0x3FF, -0x8000]),
    torch.bfloat16: (torch.int16, [0x7F81, 0x7FD5, -0x7F, -0x8000]),
    torch.float32: (torch.int32, [0x7F800001, 0x7FC12345, -0x7FFFFF, -0x80000000]),
    torch.float64: (torch.int64, [0x7FF0000000000001, 0x7FF8123456789ABC, -0xFFFFFFFFFFFFF, -0x8000000000000000]),
}


@pytest.mark.parametrize("dtype", ODD, ids=str)
@pytest.mark.parametrize("rule", [Cat(), Cat(1), PadCat((1,)), PadCat((0,), dim=1)])
def test_no_bit_changes(rule, dtype):
    integer, words = ODD[dtype]
    value = torch.tensor([words, words], dtype=integer).view(dtype)
    joined = rule.merge("k", [value, value]).view(integer)
    assert joined[:2, :4].tolist() == [words, words]
    assert joined[-2:, -4:].tolist() == [words, words]
    turned = rule.merge("k", [value.T, value.T]).view(integer)
    assert turned[:4, :2].T.tolist() == [words, words]


def test_padding_may_stand_before_the_joined_dimension():
    one, two = torch.ones(1, 2, 3), torch.full((2, 1, 3), 2.0)
    merged = PadCat((0,), dim=1, value=-1.0).merge("k", [one, two])
    assert merged[:, :, 0].tolist() == [[1, 1, 2], [-1, -1, 2]]


@pytest.mark.parametrize("rule", [Cat(), PadCat((1,))])
def test_one_value_is_a_copy(rule):
    value = torch.zeros(2, 2)
    merged = rule.merge("k", [value])
    merged += 1
    assert value.sum() == 0


@pytest.mark.parametrize("rule", [Cat(), PadCat((1,))])
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "'k' has no value"),
        ([torch.ones(1, 2), [1, 2]], "'k' of item 1 is a list; the rules merge tensors"),
        ([np.ones((1, 2))], "'k' of item 0 is a ndarray"),
        ([torch.ones(1, 2), torch.ones(1, 2, dtype=torch.int64)], "'k' is torch.float32 in item 0 and torch.int64 in item 1"),
        ([torch.ones(1, 2), torch.ones(1, 2, 1)], r"'k' has 2 dimensions in item 0 and 3 in item 1: \[1, 2\], \[1, 2, 1\]"),
    ],
)
def test_values_are_checked(rule, values, said):
    with pytest.raises(UnsupportedProcessorError, match=said):
        rule.merge("k", values)


@pytest.mark.parametrize("rule", [Cat(3), Cat(-4), PadCat((3,)), PadCat((0,)), PadCat((1, -2)), PadCat((0,), dim=-3)])
def test_dimensions_are_checked(rule):
    with pytest.raises(UnsupportedProcessorError, match=r"'k' has shape \[1, 1, 1\], so its rule cannot use"):
        rule.merge("k", [torch.ones(1, 1, 1)])


@pytest.mark.parametrize(("rule", "second"), [(Cat(), (5, 3, 4)), (Cat(1), (2, 3, 9)), (PadCat((1,)), (2, 9, 9))])
def test_other_sizes_are_equal(rule, second):
    with pytest.raises(UnsupportedProcessorError, match=r"'k' has shape \[2, 3, 5\] in item 0 and .* dimension 2"):
        rule.merge("k", [torch.ones(2, 3, 5), torch.ones(second)])


class TestSequences:
    def test_per_token(self):
        rule = PerToken((("image", 1), ("audio", 3)))
        made = rule.merge("k", 7, [("image", {}), ("audio", {})], [[(1, 2), (3, 4)], [(5, 7)]])
        assert made.dtype == torch.int64
        assert made.tolist() == [[0, 1, 0, 1, 0, 3, 3]]
        assert rule.merge("k", 2, [], []).tolist() == [[0, 0]]

    def test_per_token_of_an_unknown_modality(self):
        with pytest.raises(UnsupportedProcessorError, match="'k' has no value for tokens of modality 'video'"):
            PerToken((("image", 1),)).merge("k", 7, [("video", {})], [[(0, 1)]])

    @pytest.mark.parametrize("span", [(-1, 1), (2, 2), (3, 2), (4, 6)])
    @pytest.mark.parametrize("rule", [PerToken((("image", 1),)), Rebuild(lambda length, items, spans: torch.ones(1))])
    def test_spans_are_checked(self, rule, span):
        with pytest.raises(UnsupportedProcessorError, match="'k': the span .* is not inside a sequence of 5 tokens"):
            rule.merge("k", 5, [("image", {})], [[span]])

    def test_rebuild_without_items_is_absent(self):
        assert Rebuild(lambda length, items, spans: torch.ones(1)).merge("k", 5, [], []) is None

    def test_spans_of_every_item(self):
        with pytest.raises(ValueError, match="zip"):
            PerToken((("image", 1),)).merge("k", 5, [("image", {})], [])

    def test_cross_attention(self):
        """Two pictures side by side are seen to the end of the second; the third to the end of the text."""
        one, all_four = torch.tensor([[[1, 0, 0, 0]]]), torch.ones(1, 1, 4, dtype=torch.int64)
        items = [{"aspect_ratio_mask": one}, {"aspect_ratio_mask": all_four}, {"aspect_ratio_mask": one}]
        mask = cross_attention(9, items, [[(1, 2)], [(2, 3)], [(6, 7)]])
        assert (mask.dtype, tuple(mask.shape)) == (torch.int64, (1, 9, 3, 4))
        assert mask[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1, 1, 0, 0, 0]
        assert mask[0, :, 1, 3].tolist() == [0, 0, 1, 1, 1, 1, 0, 0, 0]
        assert mask[0, :, 2, 0].tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1]
        assert mask[0, :, 0, 1:].sum() == 0


FAMILY = Family(
    "toy",
    ("Toy",),
    {"image": Support(lambda p: "<i>", lambda p: "<i>"), "video": Support(lambda p: "<v>", lambda p: "<v>", refuse="they melt")},
    {"pixels": Cat(), "sizes": Cat()},
    {
        "types": PerToken((("image", 1),)),
        "again": Rebuild(lambda length, items, spans: torch.tensor([length, len(items), len(spans)])),
    },
)


class TestFamily:
    def test_order_is_token_order_and_repeats_count(self):
        one, two = {"pixels": torch.tensor([1.0])}, {"pixels": torch.tensor([2.0, 3.0])}
        merged = merge_outputs(FAMILY, [("image", two), ("image", one), ("image", two)])
        assert merged["pixels"].tolist() == [2, 3, 1, 2, 3]
        assert "sizes" not in merged

    def test_sequence(self):
        made = sequence_outputs(FAMILY, 4, [("image", {})], [[(1, 3)]])
        assert made["types"].tolist() == [[0, 1, 1, 0]]
        assert made["again"].tolist() == [4, 1, 1]
        assert set(sequence_outputs(FAMILY, 4, [], [])) == {"types"}

    def test_refusals(self):
        with pytest.raises(UnsupportedProcessorError, match="family 'toy' is refused for modality 'video': they melt"):
            merge_outputs(FAMILY, [("video", {})])
        with pytest.raises(UnsupportedProcessorError, match="family 'toy' does not take modality 'audio'; it takes image, video"):
            sequence_outputs(FAMILY, 4, [("audio", {})], [[(0, 1)]])
        with pytest.raises(UnsupportedProcessorError, match="family 'toy' gives an output 'depth' that family 'toy' has no rule"):
            merge_outputs(FAMILY, [("image", {"depth": torch.ones(1)})])
        with pytest.raises(ConversationError, match="'sizes' is missing in item 1"):
            merge_outputs(FAMILY, [("image", {"sizes": torch.ones(1)}), ("image", {"pixels": torch.ones(1)})])


class Settings:
    def __init__(self, value):
        self.value = value

    def to_dict(self):
        return {"x": self.value}


def fingerprint_of(value) -> str:
    return processor_fingerprint(SimpleNamespace(image_processor=Settings(value)))


class TestFingerprint:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (1, 2),
            (None, 0),
            ("1", 1),
            ((1, 2), (2, 1)),
            ({1, 2}, {1, 3}),
            (np.zeros(2), np.zeros(3)),
            (np.zeros(2), np.zeros((2, 1))),
            (np.zeros(2), np.zeros(2, np.float32)),
            (np.zeros(2), np.array([0.0, -0.0])),
            (torch.zeros(2), torch.ones(2)),
            (np.float32(1), np.float64(1)),
            (torch.float32, torch.bfloat16),
            (torch.device("cpu"), torch.device("meta")),
            (MappingProxyType({"a": 1}), MappingProxyType({"a": 2})),
            (Pin(None, "a", 1, ""), Pin(None, "a", 2, "")),
        ],
        ids=repr,
    )
    def test_settings_are_told_apart(self, one, other):
        assert fingerprint_of(one) == fingerprint_of(one) != fingerprint_of(other)

    def test_sets_have_no_order(self):
        words = [f"w{number}" for number in range(20)]
        assert fingerprint_of(set(words)) == fingerprint_of(frozenset(sorted(words)))

    def test_settings_without_a_canonical_form(self):
        with pytest.raises(UnsupportedProcessorError, match="SimpleNamespace have no fingerprint.*has no canonical form"):
            fingerprint_of(object())


class TestPin:
    """Keywords come before the class's defaults, and those before the part's settings."""

    PIN = Pin("images_kwargs", "cut", False, "cuts are bad")

    @pytest.mark.parametrize(
        ("part", "default", "keywords", "good"),
        [
            (False, None, {}, True),
            (True, None, {}, False),
            (True, False, {}, True),
            (False, True, {}, False),
            (True, True, {"images_kwargs": {"cut": False}}, True),
            (True, True, {"cut": False}, True),
            (False, False, {"cut": True}, False),
            (False, False, {"images_kwargs": {"cut": True}}, False),
            (None, None, {}, False),
        ],
    )
    def test_precedence(self, part, default, keywords, good):
        processor = SimpleNamespace(image_processor=SimpleNamespace(**({} if part is None else {"cut": part})))
        if default is not None:
            processor.images_kwargs = {"cut": default}
        if good:
            self.PIN.check(processor, keywords)
        else:
            with pytest.raises(
                UnsupportedProcessorError, match=r"cuts are bad; pass processor_kwargs={'images_kwargs': {'cut': False}}"
            ):
                self.PIN.check(processor, keywords)

    @pytest.mark.parametrize(
        ("own", "keywords", "good"), [(1, {}, True), (2, {}, False), (2, {"n": 1}, True), (1, {"n": 3}, False)]
    )
    def test_setting_of_the_processor(self, own, keywords, good):
        pin = Pin(None, "n", 1, "so it is")
        if good:
            pin.check(SimpleNamespace(n=own), keywords)
        else:
            with pytest.raises(UnsupportedProcessorError, match=r"so it is; pass processor_kwargs={'n': 1}"):
                pin.check(SimpleNamespace(n=own), keywords)


class TestRows:
    """Formulas on numbers worked out by hand."""

    def test_grids(self):
        processor = SimpleNamespace(image_processor=SimpleNamespace(merge_size=2), video_processor=SimpleNamespace(merge_size=2))
        outputs = {"image_grid_thw": torch.tensor([[1, 4, 6]]), "video_grid_thw": torch.tensor([[3, 4, 6]])}
        outputs["second_per_grid_ts"] = torch.tensor([0.5])
        assert rows.merged_grid("image_grid_thw", "image_processor")(processor, outputs) == 6
        assert rows.pooled_grid("video_grid_thw", "video_processor")(processor, outputs) == 6
        assert [(g.t, g.h, g.w) for g in rows.image_grid(processor, outputs)] == [(1, 2, 3)]
        assert [(g.t, g.h, g.w, g.seconds) for g in rows.video_grid(processor, outputs)] == [(3, 2, 3, None)]
        assert [(g.t, g.h, g.w, g.seconds) for g in rows.timed_video_grid(processor, outputs)] == [(3, 2, 3, 0.5)]
        assert [(g.t, g.h, g.w) for g in rows.frame_grids(processor, outputs)] == [(1, 2, 3)] * 3

    def test_whisper(self):
        assert rows.whisper_frames(None, {"feature_attention_mask": torch.ones(1, 100)}) == 25
        assert rows.chunked_frames(SimpleNamespace(n_window=50), {"feature_attention_mask": torch.ones(1, 250)}) == 26 + 7
        assert rows.quartered_frames(None, {"input_features_mask": torch.ones(1, 9)}) == 3

    def test_anyres(self):
        """300x150 (w x h) fits 2x1 tiles of 4x4 patches with nothing to cut: 16 + 4 * 8 + 4 newlines."""
        processor = SimpleNamespace(
            patch_size=10,
            num_additional_image_tokens=0,
            vision_feature_select_strategy="full",
            image_processor=SimpleNamespace(image_grid_pinpoints=[[40, 80], [80, 40], [80, 80]]),
        )
        outputs = {"image_sizes": torch.tensor([[150, 300]]), "pixel_values": torch.zeros(1, 3, 3, 40, 40)}
        assert rows.anyres(processor, outputs) == 16 + 32 + 4
