"""M8 against transformers' own ``get_rope_index``: the same int64 bytes, for every model type that the table names.

The functions run on the real model classes and their default configs, without weights. The conventions of transformers 4, verl and
SGLang have no code here; their oracle is in ``tests/unit/multimodal/test_positions.py``.
"""

from __future__ import annotations

import ast
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING

from rollout_core.multimodal.positions import QWEN2_5_VL_V2, QWEN2_VL_V2, RULE_OF_MODEL_TYPE, Grid, PositionRule, Text, rule

MODELS = Path(transformers.__file__).parent / "models"
CASES = 200
#: Folders of models with positions of their own that no rule here describes, and why.
NOT_DESCRIBED = {
    "glm_image": "an image that is being drawn has positions before its tokens exist",
    "hunyuan_vl": "four axes, and an item does not move the counter",
    "minicpmv4_7": "slices share one canvas, and markers get positions between",
    "qwen2_5_omni": "the tokens of a video and of its sound interleave",
    "qwen3_omni_moe": "the tokens of a video and of its sound interleave",
}


@functools.cache
def bare(model_type: str) -> nn.Module:
    """The model of this type with its default config and no weights: enough for its position functions."""
    config = CONFIG_MAPPING[model_type]()
    kind = MODEL_MAPPING[type(config)]
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.config = config
    return model


def follows(model_type: str) -> PositionRule:
    """The rule of a model type, at the rate that the default config has."""
    known = rule(RULE_OF_MODEL_TYPE[model_type])
    if known is QWEN2_5_VL_V2:
        return known.with_rate(bare(model_type).config.vision_config.tokens_per_second)
    return known


def rope_index(model: nn.Module, segments) -> tuple[np.ndarray, int]:
    """What the model computes for a batch of one: positions (3, n), and its rope delta."""
    vision = model.config.vision_config
    side, step = vision.spatial_merge_size, getattr(vision, "temporal_merge_size", 1)
    kinds: list[int] = []
    images, videos, seconds = [], [], []
    frames = rule(RULE_OF_MODEL_TYPE[model.config.model_type]).time == "frames"
    for segment in segments:
        if isinstance(segment, Text):
            kinds += [0] * segment.length
        elif segment.modality == "image":
            kinds += [1] * segment.length
            images.append([1, segment.h * side, segment.w * side])
        else:
            kinds += [2] * segment.length
            videos.append([segment.t * step, segment.h * side, segment.w * side])
            seconds.append(segment.seconds)
    if frames:
        videos = clips(videos)
    types = torch.tensor([kinds], dtype=torch.int32)
    extra = {"second_per_grid_ts": torch.tensor(seconds, dtype=torch.float32)} if seconds and None not in seconds else {}
    positions, deltas = model.get_rope_index(
        torch.zeros(1, len(kinds), dtype=torch.int64),
        mm_token_type_ids=types,
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        attention_mask=torch.ones(1, len(kinds), dtype=torch.int64),
        **extra,
    )
    assert positions.dtype == torch.int64
    return positions[:, 0].numpy(), int(deltas)


def clips(frames: list[list[int]]) -> list[list[int]]:
    """Frames of equal size next to each other in the list as rows with t > 1: the form that processors return for a video."""
    rows: list[list[int]] = []
    for frame in frames:
        if rows and rows[-1][1:] == frame[1:]:
            rows[-1][0] += 1
        else:
            rows.append(list(frame))
    return rows


def sequences(known: PositionRule, seed: int):
    """Text, images and videos. Two items of one modality have text between; an image and a video may touch."""
    random = np.random.default_rng(seed)
    seconds = bool(random.integers(4))  # of all videos or of none, as processors return them
    while True:
        segments: list[Text | Grid] = []
        for _ in range(random.integers(1, 9)):
            before = segments[-1].modality if segments and isinstance(segments[-1], Grid) else None
            kind = random.choice([k for k in ("text", "image", "video") if k != before])
            h, w = (int(n) for n in random.integers(1, 7, size=2))
            if kind == "text":
                segments.append(Text(int(random.integers(1, 9))))
            elif kind == "image":
                segments.append(Grid("image", 1, h, w))
            else:
                t = 1 if known.time == "frames" else int(random.integers(1, 13))
                length = float(random.choice([0.04, 0.1, 0.5, 2 / 3, 1.0, random.uniform(0.01, 5)])) if seconds else None
                segments.append(Grid("video", t, h, w, seconds=length))
        if any(isinstance(segment, Grid) for segment in segments):
            return segments


@pytest.mark.parametrize("model_type", sorted(RULE_OF_MODEL_TYPE))
def test_equals_the_models_own_function(model_type):
    known, model = follows(model_type), bare(model_type)
    seen = {"touching": 0, "ends in an item": 0, "longer than its sides": 0}
    for seed in range(CASES):
        segments = sequences(known, seed)
        positions, following = known.advance(0, segments)
        expected, delta = rope_index(model, segments)
        assert positions.dtype == expected.dtype == np.int64
        assert positions.shape == expected.shape, segments
        assert positions.tobytes() == np.ascontiguousarray(expected).tobytes(), segments
        # generate goes on after the largest position, recomputation after the sides: the known difference, and the only one.
        largest = int(positions.max()) + 1
        assert delta == largest - positions.shape[1], segments
        assert following <= largest, segments
        if known.resume == "largest":
            assert delta == following - positions.shape[1], segments
        seen["longer than its sides"] += following < largest
        seen["ends in an item"] += isinstance(segments[-1], Grid)
        seen["touching"] += any(isinstance(a, Grid) and isinstance(b, Grid) for a, b in itertools.pairwise(segments))
    assert seen["touching"] > 20
    assert seen["ends in an item"] > 20
    assert (seen["longer than its sides"] > 20) == (known.resume == "sides")


@pytest.mark.parametrize("rate", [2, 3, 25])
def test_equals_qwen2_5_vl_at_other_rates(rate):
    model, known = bare("qwen2_5_vl"), QWEN2_5_VL_V2.with_rate(rate)
    before = model.config.vision_config.tokens_per_second
    model.config.vision_config.tokens_per_second = rate
    try:
        for seed in range(CASES):
            segments = sequences(known, 10_000 + seed)
            expected, _ = rope_index(model, segments)
            assert known.advance(0, segments)[0].tobytes() == np.ascontiguousarray(expected).tobytes(), segments
    finally:
        model.config.vision_config.tokens_per_second = before


@pytest.mark.parametrize("model_type", sorted(RULE_OF_MODEL_TYPE))
@pytest.mark.parametrize("modality", ["image", "video"])
def test_two_touching_items_of_one_modality_are_refused_by_transformers(model_type, modality):
    """The known difference: transformers 5.23 takes the run for one item. A template that puts markers around items never gets
    here; the rules go on after the first item as after any other."""
    first, second = Grid(modality, 1, 2, 3), Grid(modality, 1, 3, 2)
    with pytest.raises(RuntimeError, match="shape mismatch|expanded size|must match"):
        rope_index(bare(model_type), [Text(1), first, second])
    known = follows(model_type)
    positions, following = known.advance(0, [Text(1), first, second])
    apart, _ = known.advance(0, [Text(1), first, Text(1), second])
    apart = np.delete(apart, 7, axis=1)  # the text token between
    apart[:, 7:] -= 1
    assert positions.tobytes() == np.ascontiguousarray(apart).tobytes()
    assert following == 7


@pytest.mark.parametrize("model_type", sorted(RULE_OF_MODEL_TYPE))
def test_two_touching_items_of_one_token_pass_unseen_in_transformers(model_type):
    """The same difference where no shape gives it away: one position is spread over both tokens."""
    segments = [Grid("image", 1, 1, 1), Grid("image", 1, 1, 1)]
    expected, _ = rope_index(bare(model_type), segments)
    assert expected.tolist() == [[0, 0]] * 3
    assert follows(model_type).advance(0, segments)[0].tolist() == [[0, 1]] * 3


def test_text_after_a_long_video_is_where_recomputation_and_generate_part():
    model = bare("qwen2_vl")
    segments = [Text(4), Grid("video", 8, 2, 3)]
    _, following = QWEN2_VL_V2.advance(0, segments)
    _, delta = rope_index(model, segments)
    recomputed, _ = rope_index(model, [*segments, Text(1)])
    assert recomputed[:, -1].tolist() == [7, 7, 7] == [following] * 3
    assert 4 + 48 + delta == 12, "where generate puts the same token"


def test_every_model_with_its_own_positions_is_named():
    """A new release with a new family fails here until somebody has compared it."""
    found = set()
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if "def get_rope_index" in text:
            found.add(path.parent.name)
            assert any(isinstance(node, ast.FunctionDef) and node.name == "get_rope_index" for node in ast.walk(ast.parse(text)))
    described = {MODEL_MAPPING[type(bare(name).config)].__module__.split(".")[-2] for name in RULE_OF_MODEL_TYPE}
    assert not described & set(NOT_DESCRIBED)
    assert found == described | set(NOT_DESCRIBED)
