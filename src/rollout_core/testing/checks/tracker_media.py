"""M13: what a medium is, and whatever becomes of the caller's object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from rollout_core.testing.checks.tracker_base import require_ids, require_items, require_outputs, tracker_check
from rollout_core.testing.registry import Violation
from rollout_core.testing.tracker_cases import SAMPLING_RATE, MediumCase, TrackerCase
from rollout_core.testing.tracker_oracles import outputs
from rollout_core.testing.tracker_play import Play, turn_of
from rollout_core.testing.tracker_strategies import PLAIN, conversations, medium_cases
from rollout_core.testing.trackers import TrackerUnderTest

Part = dict[str, Any]
_CHATML: Final = ("chatml+rows",)


def image_part(image: Any) -> Part:
    """The part of a message that shows a picture."""
    return {"type": "image", "image": image}


def _rgba(medium: MediumCase, alpha: int) -> Part:
    pixels = medium.pixels(4)
    pixels[..., 3] = alpha
    return image_part(_pil("RGBA", pixels))


def _pil(mode: str, pixels: Any) -> Any:
    from PIL import Image

    return Image.frombytes(mode, (pixels.shape[1], pixels.shape[0]), pixels.tobytes())


def _palette(medium: MediumCase, first: int) -> Part:
    image = _pil("P", medium.pixels(1) % 2)
    image.putpalette([first, 2, 3, 4, 5, 6])
    return image_part(image)


def _keyed(image: Any, transparent: Any) -> Part:
    """A picture of which one colour, or one entry of its palette, is transparent."""
    image.info["transparency"] = transparent
    return image_part(image)


def _turned(medium: MediumCase) -> tuple[Part, Part]:
    pixels = medium.pixels()
    return image_part(_pil("RGB", pixels)), image_part(_pil("RGB", pixels.reshape(pixels.shape[1], pixels.shape[0], 3)))


def _changed(pixels: Any) -> Any:
    other = pixels.copy()
    other.reshape(-1)[-1] ^= 1
    return other


def _video(medium: MediumCase, frames: Any = None, **metadata: Any) -> Part:
    video = MediumCase("video", medium.width, medium.height, medium.seed)
    part: Part = {"type": "video", "video": video.pixels() if frames is None else frames}
    return {**part, "metadata": metadata} if metadata else part


def _frames(medium: MediumCase) -> Any:
    return MediumCase("video", medium.width, medium.height, medium.seed).pixels()


def _sound(medium: MediumCase, rate: int = SAMPLING_RATE, change: bool = False) -> Part:
    samples = medium.samples()
    if change:
        samples[-1] += np.float32(0.25)
    return {"type": "audio", "audio": samples, "sampling_rate": rate}


#: Two media that differ in one respect only, made from a recipe whose sides differ.
PAIRS: Final[dict[str, Callable[[MediumCase], tuple[Part, Part]]]] = {
    "the last pixel": lambda m: (image_part(_pil("RGB", m.pixels())), image_part(_pil("RGB", _changed(m.pixels())))),
    "width and height": _turned,
    "the mode, L or P": lambda m: (image_part(_pil("L", m.pixels(1))), image_part(_pil("P", m.pixels(1)))),
    "the mode, RGB or RGBA": lambda m: (image_part(_pil("RGB", m.pixels())), _rgba(m, 255)),
    "the palette": lambda m: (_palette(m, 1), _palette(m, 9)),
    "the alpha": lambda m: (_rgba(m, 255), _rgba(m, 128)),
    "the transparent colour": lambda m: (image_part(_pil("RGB", m.pixels())), _keyed(_pil("RGB", m.pixels()), (1, 2, 3))),
    "the transparent entry of the palette": lambda m: (_palette(m, 1), _keyed(_palette(m, 1)["image"], 0)),
    "the sides of the frames": lambda m: (
        _video(m),
        _video(m, _frames(m).reshape(2, m.width, m.height, 3)),
    ),
    "the number of frames": lambda m: (_video(m), _video(m, np.concatenate([_frames(m)] * 2))),
    "the frames a second": lambda m: (_video(m, fps=1.0), _video(m, fps=2.0)),
    "the places of the frames": lambda m: (_video(m, fps=1.0, frames_indices=[0, 1]), _video(m, fps=1.0, frames_indices=[0, 5])),
    "the last sample": lambda m: (_sound(m), _sound(m, change=True)),
    "the sampling rate": lambda m: (_sound(m), _sound(m, 8000)),
}


def medium_case(kinds: tuple[str, ...], strategy: SearchStrategy[MediumCase]) -> Callable[[list[str]], SearchStrategy[TrackerCase]]:
    def cases(worlds: list[str]) -> SearchStrategy[TrackerCase]:
        return st.builds(
            lambda world, kind, medium: TrackerCase(world=world, kind=kind, media=(medium,)),
            st.sampled_from(worlds), st.sampled_from(kinds), strategy,
        )  # fmt: skip

    return cases


#: No side that could be taken for channels.
WIDE: Final = medium_cases("image", modes=["RGB"], max_side=4).map(
    lambda m: msgspec.structs.replace(m, width=m.width + 4, height=m.height + 4)
)
OBLONG: Final = WIDE.map(lambda m: m if m.width != m.height else msgspec.structs.replace(m, width=m.width + 1))


@tracker_check(
    "tracker/M13-separates",
    "media that differ in shape, mode, palette, transparency, rate or frames have different identities",
    only=("chatml+rows",),
    traits=(),
    needs=["identity"],
    cases=medium_case(tuple(PAIRS), OBLONG),
)
def separates(subject: TrackerUnderTest, case: TrackerCase) -> None:
    tracker = Play(subject, case.world).tracker
    one, other = PAIRS[case.kind](case.media[0])
    identities = [tracker.identity(part["type"], part) for part in (one, other)]
    if identities[0] == identities[1]:
        raise Violation(f"two media that differ in {case.kind} have one identity, {identities[0]!r:.40}")
    again = tracker.identity(one["type"], PAIRS[case.kind](case.media[0])[0])
    if again != identities[0]:
        raise Violation("two objects with the same content have different identities")


@tracker_check(
    "tracker/M13-settings",
    "a setting of the processor changes the artifact's identity, and not the content's",
    only=_CHATML,
    traits=("changed",),
    needs=["identity", "artifact"],
    cases=medium_case(("",), medium_cases("image", modes=["RGB"])),
)
def settings(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    assert found.world.changed is not None
    other = subject.on(found.world.changed().processor)
    part = case.media[0].part()
    if found.tracker.identity("image", part) != other.identity("image", case.media[0].part()):
        raise Violation("the identity of a content depends on a setting of the processor")
    if found.tracker.artifact("image", part) == other.artifact("image", case.media[0].part()):
        raise Violation("two settings of the processor give one artifact")


def _spoil(messages: list[Any]) -> None:
    """Change everything that was handed over, in place."""
    for message in messages:
        content = message["content"]
        for part in content if isinstance(content, list) else ():
            medium = part.get("image", part.get("video", part.get("audio")))
            if hasattr(medium, "paste"):
                medium.paste(77, (0, 0, *medium.size)) if medium.mode in ("L", "P") else medium.paste(
                    (9, 9, 9), (0, 0, *medium.size)
                )
            elif isinstance(medium, np.ndarray):
                medium[...] = 7 if medium.dtype == np.uint8 else 0.5
            if isinstance(part.get("metadata"), dict):
                part["metadata"]["fps"] = 24.0
            if "text" in part:
                part["text"] = "spoiled"
        if isinstance(content, list):
            content.reverse()
        message["role"] = "system"
    messages.clear()


@tracker_check(
    "tracker/M13-spoiled",
    "changing messages, pictures, frames and samples after they were added changes nothing",
    cases=lambda worlds: conversations(worlds=worlds, samples=PLAIN, texts=("a", "b"), max_steps=3),
)
def spoiled(subject: TrackerUnderTest, case: TrackerCase) -> None:
    found = Play(subject, case.world)
    for step in case.steps:
        if not found.can(step):
            continue
        turn = turn_of(found.oracle, step)
        if turn.ids is not None:
            ids = list(turn.ids)
            found.state = found.tracker.append_sampled(found.state, ids, None, turn.finish)
            ids[:] = [0] * len(ids)
        else:
            made = [message.make() for message in turn.messages]
            found.state = found.tracker.start(made) if found.state is None else found.tracker.extend(found.state, made)
            _spoil(made)
        found.turns = (*found.turns, turn)
    expected = found.expected()
    try:
        require_ids(found.world, expected.ids, found.tracker.input_ids(found.state))
        if "items" in subject.capabilities:
            require_items(found, expected)
        if "multi_modal_inputs" in subject.capabilities:
            require_outputs(
                outputs(found.oracle, expected.items, len(expected.ids)),
                found.tracker.multi_modal_inputs(found.state),
                found.world.ignored,
            )
    except Violation as violation:
        raise Violation(f"after the caller changed its own objects: {violation}") from None
