"""Each tracker of a peer is its real class, and the bugs that it is known to have come out of the kit's own checks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import rollout_core.testing.checks
import rollout_core.testing.peers
from rollout_core.testing.own_tracker import ConversationTracker
from rollout_core.testing.peers import TRACKER_PEERS, real_worlds
from rollout_core.testing.registry import Skipped, Violation, get_check
from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Step, TrackerCase
from rollout_core.testing.tracker_play import Play
from rollout_core.testing.trackers import TrackerUnderTest

PICTURE = MediumCase(width=4, height=2)
ASKED = Step("start", (MessageCase("user", ("a",)),))
SHOWN = Step("start", (MessageCase("user", ("a", PICTURE)),))
SAID = Step("sample", text="a")
TOLD = Step("extend", (MessageCase("tool", ("b",)),))
LOOKED = Step("extend", (MessageCase("tool", (PICTURE,)),))
real_worlds.register()


def judge(name, check, *steps, world=None, **more):
    """Run one of the kit's checks on one case."""
    peer = TRACKER_PEERS[name]
    subject = TrackerUnderTest(peer.load())
    return get_check(f"tracker/{check}").run(subject, TrackerCase(world=world or peer.worlds[0], steps=steps, **more))


def played(name, *steps, world=None, factory=None):
    peer = TRACKER_PEERS[name]
    found = Play(TrackerUnderTest(factory or peer.load()), world or peer.worlds[0])
    found.run(TrackerCase(world=world or peer.worlds[0], steps=steps))
    return found


# ------------------------------------------------------------------------------------------------ worlds


@pytest.mark.parametrize("world", [name for name in real_worlds.WORLDS if name != "real:qwen3-vl"])
@pytest.mark.parametrize("check", ["M2-splice", "M8-recompute", "M16-work", "M4-rows", "M7-payload"])
def test_our_own_tracker_passes_in_the_worlds_of_the_peers(world, check):
    case = TrackerCase(world=world, steps=(SHOWN, SAID, TOLD, LOOKED, SAID, LOOKED))
    get_check(f"tracker/{check}").run(TrackerUnderTest(ConversationTracker), case)


def test_tool_messages_of_qwen3_are_grouped():
    world = real_worlds.WORLDS["real:qwen3-vl"]()
    messages = [{"role": "tool", "content": text} for text in "ab"]
    assert world.processor.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|im_end|>\n"
    )


def test_a_world_counts_its_own_work_alone():
    one, other = real_worlds.WORLDS["real:qwen2-vl"](), real_worlds.WORLDS["real:qwen2-vl"]()
    one.processor(text=["ab" + str(one.shown["image"])], images=[PICTURE.image()], return_tensors="pt")
    assert one.counts.items == 1
    assert one.counts.characters >= 2
    assert (other.counts.items, other.counts.characters) == (0, 0)


# ------------------------------------------------------------------------------------------------ verl


def test_verl_is_verl():
    found = played("verl-request", ASKED)
    assert type(found.state).__module__ == "verl.workers.rollout.schemas"
    assert type(found.state).__name__ == "AsyncRolloutRequest"
    assert "verl" not in sys.modules


def test_verl_drops_the_separator_after_a_sampled_turn():
    with pytest.raises(Violation, match=r"first difference is at 11: '\\n<\|im_start\|>tool.*has '<\|im_start\|>tool"):
        judge("verl-request", "M2-separator", ASKED, SAID, TOLD)
    judge("verl-request", "M2-separator", ASKED, SAID, TOLD, world="real:qwen2-vl-open-4")  # no separator, nothing to drop


def test_verl_counts_on_from_each_axis_after_a_feature_token():
    steps = (ASKED, SAID, LOOKED, SAID)
    with pytest.raises(
        Violation, match=r"after step 3 \(sample\) token 18 has position \[13, 14, 15\]; recomputing gives \[15, 15, 15\]"
    ):
        judge("verl-request", "M8-recompute", *steps, world="real:qwen2-vl-open-4")
    judge("verl-request", "M8-recompute", *steps[:3], world="real:qwen2-vl-open-4")


def test_verl_processes_the_pictures_of_the_prompt_four_times():
    with pytest.raises(Violation, match=r"after step 0 \(start\) 4 items were processed; 1 were added"):
        judge("verl-request", "M16-work", SHOWN)
    judge("verl-request", "M16-work", ASKED, SAID, LOOKED, SAID, LOOKED)


def test_verl_with_the_inference_template_processes_everything_each_turn():
    """Ten turns with a picture each, as a trainer has them: the prompt of each turn, and the check at the end."""
    peer = TRACKER_PEERS["verl-request"]
    factory = type("Again", (peer.load(),), {"use_inference_chat_template": True})
    found = played("verl-request", SHOWN, *(SAID, LOOKED) * 9, SAID, factory=factory)
    assert found.world.counts.items == 4 + 9 + sum(range(1, 11))  # and 10 more where finalize checks


def test_verl_can_add_nothing_through_a_processor_of_transformers_5():
    for steps in ((ASKED, SAID, TOLD), (ASKED, SAID, LOOKED)):
        with pytest.raises(Violation, match="AttributeError: 'Message' object has no attribute"):
            judge("verl-request", "M2-splice", *steps, world="real:qwen2-vl")
    with pytest.raises(Violation, match="start raised ValidationError: 1 validation error for AsyncRolloutRequest"):
        judge("verl-request", "M2-splice", SHOWN, world="real:qwen2-vl")


@pytest.mark.parametrize(
    "steps",
    [
        (ASKED, TOLD),
        (ASKED, SAID, Step("extend", (MessageCase("user", (PICTURE,)),))),
        (ASKED, SAID, Step("extend", (MessageCase("tool", ("a", PICTURE)),))),
        (ASKED, Step("sample", text="a", finish="length", stop=False), TOLD),
    ],
)
def test_what_verl_has_no_call_for_is_not_judged(steps):
    with pytest.raises(Skipped, match="verl"):
        judge("verl-request", "M2-splice", *steps)


# ------------------------------------------------------------------------------------------------ renderers


def test_renderers_is_renderers():
    found = played("renderers-bridge", ASKED)
    renderer = found.tracker.tracker._renderer
    assert (type(renderer).__module__, type(renderer).__name__) == ("renderers.qwen3_vl", "Qwen3VLRenderer")
    assert "renderers" not in sys.modules


def test_renderers_bridges_pictures_and_keeps_the_separator():
    steps = (SHOWN, SAID, Step("extend", (*LOOKED.messages, *TOLD.messages)), SAID, LOOKED)
    for check in ("M2-separator", "M2-splice", "M4-spans", "M7-payload", "M9-repeated", "M16-work"):
        judge("renderers-bridge", check, *steps)
    assert played("renderers-bridge", SHOWN, *(SAID, LOOKED) * 10).world.counts.items == 1  # one picture, kept by its hash
    judge("renderers-bridge", "M16-ten-turns")


def test_renderers_finds_pictures_in_what_was_sampled():
    with pytest.raises(Violation, match="mm_token_type_ids .* has other bytes than one call over the real items, first in"):
        judge("renderers-bridge", "M5-sampled-placeholder", ASKED, Step("sample", text="a", spelling="placeholder"))


def test_renderers_encodes_what_an_assistant_said_apart_from_the_header():
    opened = Step("start", (MessageCase("user", ("a",)), MessageCase("assistant", ("\n",)), MessageCase("user", ("b",))))
    with pytest.raises(Violation, match=r"271, .*the tracker has '\\n\\n<\|im_end\|>.*\[198, 198"):
        judge("renderers-bridge", "M2-splice", opened)


def test_renderers_does_not_turn_pictures_upright_and_drops_alpha():
    with pytest.raises(Violation, match="with EXIF orientation 6"):
        judge("renderers-bridge", "M14-orientation", kind="6", media=(MediumCase(width=6, height=5),))
    with pytest.raises(Violation, match="differ in the alpha have one identity"):
        judge("renderers-bridge", "M13-separates", kind="the alpha", media=(MediumCase(width=6, height=5),))
    judge("renderers-bridge", "M13-separates", kind="width and height", media=(MediumCase(width=6, height=5),))


def test_renderers_has_no_call_between_sampled_turns():
    with pytest.raises(Skipped, match="in one call"):
        judge("renderers-bridge", "M2-splice", ASKED, TOLD)


# ------------------------------------------------------------------------------------------------ the table


@pytest.mark.parametrize("name", TRACKER_PEERS)
def test_each_tracker_works_first_and_alone(name):
    code = (
        f"from rollout_core.testing.peers import TRACKER_PEERS; made = TRACKER_PEERS[{name!r}].load(); "
        "from rollout_core.testing.worlds import make_world; "
        f"tracker = made(make_world(TRACKER_PEERS[{name!r}].worlds[0]).processor); "
        "print(len(tracker.input_ids(tracker.start([{'role': 'user', 'content': 'a'}]))))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (out.stdout.strip(), out.returncode) == ("6", 0), out.stderr


@pytest.mark.parametrize("entry", TRACKER_PEERS.values(), ids=lambda peer: peer.name)
def test_requirements_pin_what_the_table_says(entry):
    lines = Path(rollout_core.testing.peers.__file__).with_name("requirements.txt").read_text().splitlines()
    assert f"{entry.distribution}=={entry.version}" in lines
    assert set(entry.worlds) <= set(real_worlds.WORLDS)
    for judged in entry.judged.values():
        assert all(get_check(check).kind == "tracker" for check in judged)
