"""M8: positions by the rules, against a slow oracle of each convention, at every split, and what the rules refuse."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import math
import pickle
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rollout_core.errors import ConversationError
from rollout_core.multimodal.positions import (
    PLAIN,
    QWEN2_5_VL_V1,
    QWEN2_5_VL_V2,
    QWEN2_5_VL_WHOLE,
    QWEN2_VL_V1,
    QWEN2_VL_V2,
    QWEN3_VL,
    RULE_OF_MODEL_TYPE,
    Grid,
    PositionRule,
    Text,
    register_rule,
    rule,
)

RULES = [PLAIN, QWEN2_VL_V1, QWEN2_VL_V2, QWEN2_5_VL_V1, QWEN2_5_VL_V2, QWEN2_5_VL_WHOLE, QWEN3_VL, QWEN2_5_VL_V1.with_rate(25)]
RULES.append(QWEN2_5_VL_V2.with_rate(25))
ids = [known.name for known in RULES]
#: 0.04 and its like fall between float32 numbers: rounding early or late gives another step.
SECONDS = st.one_of(st.none(), st.sampled_from([0.04, 0.1, 0.5, 1.0, 2 / 3, 1.2, 2]), st.floats(1e-3, 10))


def grids(known: PositionRule, side: int = 5):
    sides = {"h": st.integers(1, side), "w": st.integers(1, side)}
    image = st.builds(Grid, modality=st.just("image"), t=st.just(1), **sides)
    steps = st.just(1) if known.time == "frames" else st.integers(1, 12)
    video = st.builds(Grid, modality=st.just("video"), t=steps, seconds=SECONDS, **sides)
    return st.one_of(image, video)


def sequences(known: PositionRule):
    return st.lists(st.one_of(st.builds(Text, st.integers(0, 6)), grids(known)), max_size=7)


def step_of(known: PositionRule, grid: Grid, i: int) -> int:
    """The coordinate of step i, one number at a time."""
    if grid.modality == "image" or "qwen2.5" not in known.name:
        return i
    seconds = np.float32(grid.seconds or 1)
    if known is QWEN2_5_VL_WHOLE:
        return i * int(seconds) * known.rate
    if known.version == 2:
        return int(np.float32(i) * np.float32(np.float32(known.rate) * seconds))
    return int(np.float32(np.float32(i) * seconds) * np.float32(known.rate))


def slow(known: PositionRule, segments) -> tuple[list[tuple[int, ...]], int]:
    """Token by token, from the description of each convention.

    Version 1 and Qwen3-VL: a part begins one after the largest position so far (transformers 4.57.1, verl's get_rope_index in
    models/transformers/qwen2_vl.py, SGLang's in layers/rotary_embedding/mrope_rope_index.py). Version 2: a counter that a grid
    moves by its longer side (transformers 5.23, Qwen2VLModel.get_rope_index).
    """
    tokens: list[tuple[int, ...]] = []
    counter = 0
    for segment in segments:
        first = counter if known.version == 2 else 1 + max((x for token in tokens for x in token), default=-1)
        if isinstance(segment, Text) or known is PLAIN:
            tokens += [(first + k,) * known.axes for k in range(segment.length)]
            counter = first + segment.length
        else:
            for i, y, x in itertools.product(range(segment.t), range(segment.h), range(segment.w)):
                tokens.append((first + step_of(known, segment, i), first + y, first + x))
            counter = first + max(segment.h, segment.w)
    return tokens, counter if known.version == 2 else 1 + max((x for token in tokens for x in token), default=-1)


def same(got: np.ndarray, want: np.ndarray) -> bool:
    return got.dtype == want.dtype == np.int64 and got.shape == want.shape and got.tobytes() == want.tobytes()


@pytest.mark.parametrize("known", RULES, ids=ids)
@given(st.data())
def test_equals_the_slow_oracle(known, data):
    segments = data.draw(sequences(known))
    positions, following = known.advance(0, iter(segments))
    tokens, counter = slow(known, segments)
    assert same(positions, np.array(tokens, dtype=np.int64).reshape(-1, known.axes).T)
    assert following == counter
    assert type(following) is int
    assert positions.flags.c_contiguous
    assert positions.shape == (known.axes, sum(s.length for s in segments))


def cuts(segments, at: int):
    """The two sides of a cut before token ``at``; None if it falls inside a grid."""
    left, done = [], 0
    for index, segment in enumerate(segments):
        if done + segment.length > at:
            inside = at - done
            if inside and isinstance(segment, Grid):
                return None
            rest = [Text(segment.length - inside)] if inside else [segment]
            return [*left, *([Text(inside)] if inside else [])], [*rest, *segments[index + 1 :]]
        left.append(segment)
        done += segment.length
    return left, []


@pytest.mark.parametrize("known", RULES, ids=ids)
@given(st.data())
def test_equals_full_recomputation_at_every_split(known, data):
    segments = data.draw(sequences(known))
    start = data.draw(st.integers(0, 1000))
    whole, end = known.advance(start, segments)
    for at in range(sum(s.length for s in segments) + 1):
        if (parts := cuts(segments, at)) is not None:
            first, middle = known.advance(start, parts[0])
            second, last = known.advance(middle, parts[1])
            assert same(np.concatenate([first, second], axis=1), whole), f"cut before token {at}"
            assert last == end
    pieces, position = [np.empty((known.axes, 0), np.int64)], start
    for segment in segments:
        piece, position = known.advance(position, [segment])
        pieces.append(piece)
    assert same(np.concatenate(pieces, axis=1), whole)
    assert position == end


@pytest.mark.parametrize("known", RULES, ids=ids)
@given(lengths=st.lists(st.integers(0, 9), max_size=5))
def test_text_alone_counts_from_zero(known, lengths):
    positions, following = known.advance(0, map(Text, lengths))
    assert same(positions, np.tile(np.arange(sum(lengths), dtype=np.int64), (known.axes, 1)))
    assert following == sum(lengths)


def added_per_axis(known: PositionRule, prefix, delta) -> np.ndarray:
    """verl's way of growing positions (workers/rollout/schemas.py): the delta's own positions plus the last ones plus one, each
    axis for itself."""
    before, _ = known.advance(0, prefix)
    new, _ = known.advance(0, delta)
    return np.concatenate([before, new + before[:, -1:] + 1], axis=1)


MROPE = [known for known in RULES if known.axes == 3]


@pytest.mark.parametrize("known", MROPE, ids=lambda known: known.name)
@given(st.data())
def test_adding_per_axis_is_right_after_text_only(known, data):
    prefix = [*data.draw(sequences(known)), Text(data.draw(st.integers(1, 3)))]
    delta = data.draw(sequences(known))
    whole, _ = known.advance(0, prefix + delta)
    assert same(added_per_axis(known, prefix, delta), whole)


@pytest.mark.parametrize("known", MROPE, ids=lambda known: known.name)
@given(h=st.integers(1, 5), w=st.integers(1, 5), delta=st.integers(1, 3), before=st.integers(0, 3))
@example(h=2, w=3, delta=1, before=4)
def test_adding_per_axis_is_wrong_after_an_item(known, h, w, delta, before):
    segments = [Text(before), Grid("image", 1, h, w)], [Text(delta)]
    first, following = known.advance(0, segments[0])
    second, _ = known.advance(following, segments[1])
    whole, _ = known.advance(0, segments[0] + segments[1])
    assert same(np.concatenate([first, second], axis=1), whole)
    # Only a picture of one token leaves all three axes at one position.
    assert same(added_per_axis(known, *segments), whole) == (h == w == 1)


# Two text tokens, a video of 4 steps of 1 x 2 tokens, 0.75 seconds each, one text token.
CLIP = [Text(2), Grid("video", 4, 1, 2, seconds=0.75), Text(1)]


@pytest.mark.parametrize(
    ("known", "times", "last"),
    [
        (QWEN2_VL_V1, [2, 3, 4, 5], 6),
        (QWEN2_VL_V2, [2, 3, 4, 5], 4),
        (QWEN2_5_VL_V1, [2, 3, 5, 6], 7),
        (QWEN2_5_VL_V2, [2, 3, 5, 6], 4),
        (QWEN2_5_VL_WHOLE, [2, 2, 2, 2], 4),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_one_clip_under_each_convention(known, times, last):
    positions, following = known.advance(0, CLIP)
    assert positions.tolist() == [
        [0, 1, *(t for t in times for _ in range(2)), last],
        [0, 1, *([2] * 8), last],
        [0, 1, *([2, 3] * 4), last],
    ]
    assert following == last + 1


def test_rates_that_are_no_power_of_two_round_in_their_own_order():
    clip = [Grid("video", 12, 1, 1, seconds=0.04)]
    early, _ = QWEN2_5_VL_V2.with_rate(25).advance(0, clip)
    late, _ = QWEN2_5_VL_V1.with_rate(25).advance(0, clip)
    assert early[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert late[0].tolist() == [0, 1, 2, 3, 4, 4, 6, 7, 8, 9, 9, 11]


def test_seconds_left_out_are_one_second():
    for known in (QWEN2_5_VL_V1, QWEN2_5_VL_V2, QWEN2_5_VL_WHOLE):
        left_out, _ = known.advance(0, [Grid("video", 3, 1, 1)])
        assert left_out[0].tolist() == [0, 2, 4]


def test_plain_takes_any_grid_as_tokens():
    positions, following = PLAIN.advance(3, [Grid("audio", 5, 1, 1), Grid("image", 2, 2, 2), Text(2)])
    assert positions.tolist() == [list(range(3, 18))]
    assert following == 18


def lines_run(known: PositionRule, segments) -> int:
    """Lines of Python that one call runs."""
    count = 0

    def tracer(frame, event, argument):
        nonlocal count
        count += event == "line"
        return tracer

    before = sys.gettrace()
    gc.disable()  # or the lines of whoever is called at a collection count too, hypothesis for one
    sys.settrace(tracer)
    try:
        known.advance(0, segments)
    finally:
        sys.settrace(before)
        gc.enable()
    return count


@pytest.mark.parametrize("known", RULES, ids=ids)
def test_no_line_runs_per_token(known):
    steps = 1 if known.time == "frames" else 3
    small = lines_run(known, [Text(1), Grid("video", steps, 1, 2)])
    assert 0 < small == lines_run(known, [Text(10_000), Grid("video", steps, 50, 70)])


@pytest.mark.parametrize("bad", [-1, True, 1.0, "1", None, np.int64(1), 1 << 31])
def test_bad_numbers_are_refused(bad):
    with pytest.raises(ConversationError, match="length of Text is"):
        Text(bad)
    with pytest.raises(ConversationError, match="start is"):
        PLAIN.advance(bad, [])
    for side in "thw":
        with pytest.raises(ConversationError, match=f"{side} of Grid is"):
            Grid("image", **{"t": 1, "h": 1, "w": 1, side: bad})
    with pytest.raises(ConversationError, match="rate"):
        PositionRule("own@1", axes=3, rate=bad)


@pytest.mark.parametrize("side", "thw")
def test_empty_grids_are_refused(side):
    with pytest.raises(ConversationError, match=f"{side} of Grid is 0"):
        Grid("image", **{"t": 1, "h": 1, "w": 1, side: 0})


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, True, "1", 1e7, np.float32(1)])
def test_bad_seconds_are_refused(bad):
    with pytest.raises(ConversationError, match="seconds of Grid"):
        Grid("video", 1, 1, 1, seconds=bad)


def test_other_bad_segments_are_refused():
    with pytest.raises(ConversationError, match="one of image, video, audio"):
        Grid("picture", 1, 1, 1)
    with pytest.raises(ConversationError, match="only a video has it"):
        Grid("image", 1, 1, 1, seconds=1.0)
    with pytest.raises(ConversationError, match=r"t \* h \* w of Grid"):
        Grid("video", 1 << 15, 1 << 15, 2)
    for known in RULES:
        with pytest.raises(ConversationError, match="segment 1 is a int"):
            known.advance(0, [Text(1), 3])


@pytest.mark.parametrize("known", MROPE, ids=lambda known: known.name)
def test_grids_without_positions_are_refused(known):
    with pytest.raises(ConversationError, match="segment 1 is audio"):
        known.advance(0, [Text(1), Grid("audio", 1, 1, 1)])
    with pytest.raises(ConversationError, match="segment 0 is a Grid of 2 time steps.* an image"):
        known.advance(0, [Grid("image", 2, 1, 1)])


def test_a_video_of_frames_is_one_grid_per_frame():
    with pytest.raises(ConversationError, match="segment 0 is a Grid of 2 time steps.* one frame"):
        QWEN3_VL.advance(0, [Grid("video", 2, 1, 1)])


def test_rules_are_found_by_their_full_name():
    for known in RULES:
        assert rule(known.name) == known
        assert known.name.endswith(f"@{known.version}")
    assert rule("plain@1") is PLAIN
    assert rule("qwen2.5-vl+rate4@2") == QWEN2_5_VL_V2.with_rate(4)
    assert {rule(name).name for name in RULE_OF_MODEL_TYPE.values()} <= set(ids)


@pytest.mark.parametrize(
    "name",
    ["plain", "qwen2-vl@3", "qwen2-vl", "", "qwen2.5-vl+rate2@2", "own+rate4@1", "qwen2.5-vl+rate04@2", None, 1, "plain@1\n"],
)
def test_an_unknown_name_lists_the_known_ones(name):
    with pytest.raises(ConversationError, match=r"known are plain@1, qwen2-vl@1, qwen2-vl@2, .*register_rule"):
        rule(name)


def test_a_rule_of_ones_own_is_registered_once(monkeypatch):
    monkeypatch.setattr("rollout_core.multimodal.positions.rules._RULES", {QWEN3_VL.name: QWEN3_VL})
    own = PositionRule("own@7", axes=3, time="steps", resume="sides")
    assert register_rule(own) is own
    assert register_rule(dataclasses.replace(own)) is own
    assert rule("own@7") is own
    assert own.version == 7
    with pytest.raises(ConversationError, match=r"'own@7' is already the name of .*another name or version"):
        register_rule(dataclasses.replace(own, resume="largest"))
    with pytest.raises(ConversationError, match="not a str"):
        register_rule("own@7")
    with pytest.raises(ConversationError, match="with_rate"):
        register_rule(PositionRule("own+rate3@1", axes=3, time="seconds", rate=3))
    assert rule("own@7") is own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "own"}, "name of a position rule"),
        ({"name": "own@0"}, "name of a position rule"),
        ({"name": "Own@1"}, "name of a position rule"),
        ({"name": 3}, "name of a position rule"),
        ({"name": "own+rate3@1"}, "rate of position rule"),
        ({"axes": 2}, "axes of position rule"),
        ({"axes": True}, "axes of position rule"),
        ({"time": "minutes"}, "time of position rule"),
        ({"resume": "never"}, "resume of position rule"),
        ({"rate": 0}, "rate of position rule"),
        ({"rate": 1000}, "rate of position rule"),
    ],
)
def test_bad_rules_are_refused(change, message):
    with pytest.raises(ConversationError, match=message):
        PositionRule(**{"name": "own@1", "axes": 3, **change})


def test_rates():
    assert QWEN2_5_VL_V2.with_rate(2) is QWEN2_5_VL_V2
    assert QWEN2_5_VL_V1.with_rate(4).name == "qwen2.5-vl+rate4@1"
    for known in (PLAIN, QWEN2_VL_V1, QWEN3_VL):
        with pytest.raises(ConversationError, match="does not count seconds"):
            known.with_rate(2)
    with pytest.raises(ConversationError, match="start from the rule without one"):
        QWEN2_5_VL_V1.with_rate(4).with_rate(2)
    for bad in (0, True, 2.0, 1000):
        with pytest.raises(ConversationError, match="rate is"):
            QWEN2_5_VL_V1.with_rate(bad)


@pytest.mark.parametrize("known", RULES, ids=ids)
def test_rules_and_segments_are_values(known):
    assert pickle.loads(pickle.dumps(known)) == known
    assert len({known, dataclasses.replace(known)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        known.axes = 1
    assert Grid("image", 1, 2, 3) == Grid("image", 1, 2, 3) != Grid("image", 1, 3, 2)
    with pytest.raises(TypeError):
        RULE_OF_MODEL_TYPE["qwen2_vl"] = known.name
