"""Strategies for conversations and media, and that their counterexamples shrink to the smallest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from rollout_core.testing import strategies as rst
from rollout_core.testing.tracker_machine import programs
from rollout_core.testing.worlds import TEMPLATES, make_world, world_names

SETTINGS = settings(
    max_examples=3000,
    database=None,
    deadline=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow],
)


def smallest(strategy, condition):
    return find(strategy, condition, settings=SETTINGS)


def operations(case):
    return [step.operation for step in case.steps]


def has_picture(step):
    return any(medium.modality == "image" for message in step.messages for medium in message.media())


CASES = {
    "anything": (rst.conversations(), lambda c: True, "world chatml+rows; start [user 'a']"),
    "sampled": (rst.conversations(), lambda c: "sample" in operations(c), "world chatml+rows; start [user 'a']; sample 'a'"),
    "sampled, then added": (
        rst.conversations(),
        lambda c: "sample extend" in " ".join(operations(c)),
        "world chatml+rows; start [user 'a']; sample 'a'; extend [user 'a']",
    ),
    "a picture later": (
        rst.conversations(),
        lambda c: any(has_picture(step) for step in c.steps[1:]),
        "world chatml+rows; start [user 'a']; extend [user <2x2>]",
    ),
    "cut by length": (
        rst.conversations(),
        lambda c: any(step.finish == "length" and not step.stop for step in c.steps),
        "world chatml+rows; start [user 'a']; sample 'a', without its end, length",
    ),
    "sounds": (
        rst.conversations(),
        lambda c: "<sound" in str(c),
        "world chatml+heard; start [user <sound of 100 samples>]",
    ),
    "another template": (
        rst.conversations(),
        lambda c: c.world == "glm+rows" and "sample" in operations(c),
        "world glm+rows; start [user 'a']; sample 'a'",
    ),
    "a program": (
        programs(world_names("stable")),
        lambda c: [o for o in operations(c) if o in ("fork", "back")] == ["fork", "back"],
        "world chatml+rows; start [user 'a']; fork 0; back 0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_example(name):
    strategy, condition, words = CASES[name]
    assert str(smallest(strategy, condition)) == words


def test_conversations_reach_every_template_kind_and_way_to_sample():
    seen = set()
    for name in world_names("stable", "sums"):
        seen.add(smallest(rst.conversations(), lambda case, name=name: case.world == name).world)
    assert seen == set(world_names("stable", "sums"))
    for spelling in ("spelled", "placeholder", "feature", "ended early"):
        assert smallest(rst.conversations(), lambda c, spelling=spelling: any(s.spelling == spelling for s in c.steps))


def test_pictures_shrink_to_one_pixel_and_are_pillows():
    picture = smallest(rst.pictures(), lambda picture: True)
    assert (picture.size, picture.mode) == ((1, 1), "RGB")
    assert smallest(rst.pictures(), lambda picture: picture.mode == "P").getpalette() is not None
    assert smallest(rst.pictures(), lambda picture: picture.size[0] > 3 * picture.size[1])


def test_videos_and_sounds_are_parts_of_messages():
    video = smallest(rst.videos(), lambda part: "metadata" in part)
    assert video["video"].dtype == np.uint8
    assert video["metadata"] == {"fps": 1.0}
    sound = smallest(rst.sounds(), lambda part: True)
    assert sound["sampling_rate"] == 16_000
    assert sound["audio"].dtype == np.float32
    assert len(sound["audio"]) == 100


@given(rst.templates(stable=True))
def test_templates_are_templates(case):
    assert TEMPLATES[case.name] == case
    assert case.stable


@settings(max_examples=30, deadline=None)
@given(rst.conversations(), st.data())
def test_what_is_drawn_can_be_rendered(case, data):
    world = make_world(case.world)
    messages = [message.make() for step in case.steps for message in step.messages]
    assert world.processor.apply_chat_template(messages)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (rst.conversations(worlds=["nowhere"]), "there is no world 'nowhere'"),
        (rst.conversations(min_steps=3, max_steps=2), "min_steps=3, max_steps=2: 0 <= min_steps <= max_steps must hold"),
        (rst.pictures(modes=["CMYK"]), "modes has 'CMYK'; pictures are made in RGB, L, P and RGBA"),
        (rst.pictures(max_side=0), "max_side=0: a medium has at least one pixel"),
        (rst.videos(max_side=0), "max_side=0"),
        (rst.sounds(max_length=5), "max_length=5: sounds have a multiple of 100 samples"),
    ],
)
def test_bad_arguments(strategy, message):
    with pytest.raises(InvalidArgument, match=message):
        smallest(strategy, lambda value: True)
