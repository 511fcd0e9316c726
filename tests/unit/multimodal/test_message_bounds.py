"""Which message a token belongs to, also where the template's text is not kept apart by message; and cuts between messages."""

from __future__ import annotations

import re

import numpy as np
import pytest

from rollout_core.errors import TruncationError
from rollout_core.multimodal import Conversation, HFRenderer, Picture
from rollout_core.multimodal.contents import bounds_of
from rollout_core.multimodal.deltas import Payload
from rollout_core.multimodal.layout import Medium, Script, lay_out, media_in
from rollout_core.multimodal.tracks import Encoded
from rollout_core.testing.worlds import make_world

WORLDS = (
    "chatml+rows", "chatml+soft", "no-separator+tiles", "glm+rows", "glm+bare", "glm+framed", "system+rows", "numbered+rows",
    "groups-tools+rows", "strips-thinking+rows", "counts-media+rows",
)  # fmt: skip
#: Their templates change an answer, or the front, when something follows: nothing can be added to them.
CHANGING = ("strips-thinking+rows", "counts-media+rows")
#: A role and its parts, ``m`` for a picture, else text. Templates are not probed for all of these joins.
CONVERSATIONS = (
    (("user", "am"), ("system", "b")),
    (("user", "m"), ("system", "b"), ("user", "mc")),
    (("user", "m"), ("tool", "m"), ("user", "m")),
    (("user", "am"), ("tool", "bm"), ("tool", "mc"), ("user", "d")),
    (("user", "q"), ("tool", "am"), ("tool", "b")),
    (("user", "q"), ("tool", "m"), ("tool", "b")),
    (("user", "am"), ("assistant", "b"), ("assistant", "c"), ("user", "m")),
    (("user", "am"), ("assistant", "T"), ("user", "bm")),
)
THINKING = "<think>\nso\n</think>\n\nyes"


def picture(value):
    return {"type": "image", "image": Picture("RGB", (4, 4), bytes([value]) * 48)}


def messages_of(rows):
    """The messages of a row of ``CONVERSATIONS``; no two pictures are the same."""
    found = []
    for number, (role, letters) in enumerate(rows):
        content = [
            picture(10 * number + place) if c == "m" else {"type": "text", "text": THINKING if c == "T" else c}
            for place, c in enumerate(letters)
        ]
        found.append({"role": role, "content": content})
    return found


def started(world, rows):
    return Conversation.start(HFRenderer(make_world(world).processor), messages_of(rows))


def extended(world, rows):
    renderer = HFRenderer(make_world(world).processor)
    begun = Conversation.start(renderer, [{"role": "user", "content": "hi"}]).append_sampled(renderer.encode("yes").ids)
    return begun.extend(messages_of(rows))


def texts_of(conversation):
    """The text of each message, control tokens included."""
    ids, owner = conversation.input_ids, conversation.message_ids
    return [conversation.renderer.tokenizer.decode(ids[owner == n].tolist()) for n in range(owner.max() + 1)]


@pytest.mark.parametrize("rows", CONVERSATIONS, ids=lambda rows: "-".join("".join(row) for row in rows))
@pytest.mark.parametrize(
    ("world", "grown"), [*((world, started) for world in WORLDS), *((world, extended) for world in WORLDS if world not in CHANGING)]
)
def test_an_item_and_what_stands_around_it_belong_to_one_message(world, rows, grown):
    found = grown(world, rows)
    first = 0 if grown is started else 2
    assert [item.message for item in found.items] == [first + n for n, (_, parts) in enumerate(rows) for c in parts if c == "m"]
    assert (np.diff(found.message_ids) >= 0).all()
    for item in found.items:
        assert set(found.message_ids[slice(*item.envelope)].tolist()) == {item.message}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("rows", CONVERSATIONS, ids=lambda rows: "-".join("".join(row) for row in rows))
@pytest.mark.parametrize("world", WORLDS)
def test_a_cut_between_messages_leaves_nothing_of_an_item(world, rows, side):
    whole = started(world, rows)
    for length in range(1, len(whole)):
        try:
            cut = whole.truncate(length, side, "drop_message")
        except TruncationError:
            continue
        at = len(cut) if side == "right" else len(whole) - len(cut)
        assert not [item.envelope for item in whole.items if item.envelope[0] < at < item.envelope[1]]
        kept = [item for item in whole.items if (item.envelope[1] <= at) == (side == "right")]
        assert [item.identity for item in cut.items] == [item.identity for item in kept]


def test_messages_whose_roles_were_not_probed_together_are_kept_apart():
    assert texts_of(started("glm+framed", (("user", "am"), ("system", "b"), ("user", "c")))) == [
        "<|user|>\na<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>",
        "<|system|>\nb",
        "<|user|>\nc",
    ]


def test_a_tool_call_belongs_to_the_message_that_makes_it():
    """The template writes it behind the content, and nothing ends the turn."""
    call = {"type": "function", "id": "c0", "function": {"name": "look", "arguments": {}}}
    given = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [call]}]
    whole = Conversation.start(HFRenderer(make_world("glm+rows").processor), [*given, {"role": "user", "content": "c"}])
    assert texts_of(whole) == ["<|user|>\na", "<|assistant|>\nb[call look]", "<|user|>\nc"]


def test_a_message_without_text_is_kept_from_what_the_template_begins_with():
    """The text that the template puts in front has what ends a turn, too."""
    front, shown = "<|im_start|>system\nYou are helpful.<|im_end|>\n", "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    whole = started("system+rows", (("user", "m"), ("tool", "b")))
    assert texts_of(whole) == [
        f"{front}<|im_start|>user\n{shown}<|im_end|>\n",
        "<|im_start|>tool\nb<|im_end|>\n",
    ]


class TestTextThatIsNotKeptApart:
    """``bounds_of``: two messages, of which the first shows a picture with a mark before and behind it."""

    def test_media_of_a_message_stay_in_it(self):
        assert bounds_of(["Ua(<>)Sb"], 2, [(1, 2, 0), (2, 6, 0), (7, 8, 1)], "") == (0, 6)

    def test_media_of_the_next_message_are_not_reached(self):
        assert bounds_of(["UaU(<>).Uc."], 3, [(1, 2, 0), (3, 7, 1), (9, 10, 2)], ".") == (0, 2, 8)

    def test_what_ends_a_turn_is_looked_for_behind_the_media(self):
        assert bounds_of(["S.U(<>).Ub."], 2, [(3, 7, 0), (9, 10, 1)], ".") == (0, 8)

    def test_a_later_message_without_text_or_media_begins_no_earlier(self):
        assert bounds_of(["Ua(<>)SUb"], 3, [(1, 2, 0), (2, 6, 0), (8, 9, 2)], "") == (0, 6, 6)

    def test_what_ends_a_turn_is_not_looked_for_in_a_later_message(self):
        assert bounds_of(["UaSU(<>)."], 3, [(1, 2, 0), (4, 8, 2)], ".") == (0, 2, 2)

    def test_where_no_text_is_known_the_media_and_the_ends_of_turns_tell(self):
        assert bounds_of(["Ua(<>).Ub(<>)."], 2, [(2, 6, 0), (9, 13, 1)], ".") == (0, 7)


def test_an_opener_that_takes_the_white_space_before_it_belongs_to_its_item():
    def encode(text, *, plain=False, first=False):
        found = list(re.finditer(r"\s*\(|.", text, re.DOTALL))
        return Encoded(np.array([ord(m.group()[-1]) for m in found], np.int64), np.array([m.span() for m in found], np.int64))

    payload = Payload("artifact", "identity", None, {}, "**", 2, ())
    text = "a\n(*)b"
    shown = media_in(text, [Medium("image", 1, payload)], {"image": "*"}, {"image": ("(", ")")})
    laid = lay_out(
        Script(text, {}, ((0, 1), (5, 6)), (0, 2), tuple(shown), 0, 0, first=True), encode, {"image": [ord("*")]}, lambda _: False,
        np.zeros(0, np.int64),
    )  # fmt: skip
    assert "".join(map(chr, laid.input_ids)) == "a(**)b"
    assert laid.items[0].envelope == (1, 5)
    assert laid.message.tolist() == [0, 1, 1, 1, 1, 1]
