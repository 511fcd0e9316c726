"""Strategies for conversations: worlds, media, and programs of steps. Exported by ``rollout_core.testing.strategies``.

A program is drawn as a list of steps of four numbers, each of which picks from a table, so that a step is left out in one go;
the world is drawn before it, and the numbers are read only then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument

from rollout_core.testing.tracker_cases import MediumCase, MessageCase, Modality, Step, TrackerCase
from rollout_core.testing.worlds import TEMPLATES, TemplateCase, world_info, world_names

#: What messages and policies say: what tokenizers merge, split and spell in bytes.
TEXTS: Final = (
    "a",
    "b",
    "12",
    "1",
    "\n",
    "a\n",
    "\n\n",
    " b",
    ".",
    "x y",
    "",
    "\u00e9",
    "\u65e5\u672c",
    " ",
    "a.\n\nb",
    "3 media",
    "<tool>",
)
#: Media of each modality: sizes that differ in one side, and in both.
MEDIA: Final[dict[str, tuple[MediumCase, ...]]] = {
    "image": tuple(
        MediumCase(width=w, height=h, seed=s, mode=m)
        for w, h, s, m in ((2, 2, 0, "RGB"), (4, 2, 0, "RGB"), (2, 2, 1, "RGB"), (2, 6, 0, "RGB"), (5, 3, 2, "L"), (1, 1, 0, "RGB"))
    ),
    "video": tuple(
        MediumCase("video", w, h, s, frames, fps)
        for w, h, s, frames, fps in ((2, 2, 0, 2, 0.0), (4, 2, 0, 4, 0.0), (2, 4, 1, 5, 1.0), (1, 1, 0, 1, 0.0), (2, 2, 0, 6, 0.5))
    ),
    "audio": tuple(MediumCase("audio", height=h, seed=s) for h, s in ((1, 0), (3, 0), (6, 1))),
}
#: What ``extend`` adds: (role, parts) of each message. ``t`` is the text, ``s`` the next text, ``m`` the medium, ``n`` the next
#: medium, ``c`` a call of a tool.
ADDED: Final = (
    (("user", "t"),),
    (("tool", "t"),),
    (("user", "m"),),
    (("user", "tm"),),
    (("user", "mt"),),
    (("tool", "mt"),),
    (("tool", "tm"),),
    (("user", "mm"),),
    (("user", "mn"),),
    (("user", "tmsnt"),),
    (("user", "t"), ("user", "s")),
    (("tool", "t"), ("tool", "m")),
    (("tool", "m"), ("user", "tn")),
)
#: What ``start`` begins with.
BEGUN: Final = (
    (("user", "t"),),
    (("user", "m"),),
    (("user", "tm"),),
    (("user", "mt"),),
    (("system", "t"), ("user", "s")),
    (("user", "tmn"),),
    (("user", "m"), ("assistant", "t"), ("user", "n")),
    (("system", "t"), ("user", "mt"), ("assistant", "s"), ("user", "t")),
    (("user", "t"), ("assistant", "sc"), ("user", "m")),
)
#: What a policy samples: fields of ``Step``.
PLAIN: Final[tuple[dict[str, Any], ...]] = ({},)
CUT: Final[tuple[dict[str, Any], ...]] = (
    {"finish": "length", "stop": False},
    {"stop": False},
    {"finish": "aborted", "stop": False},
    {"finish": "length"},
)
SPELLED: Final[tuple[dict[str, Any], ...]] = ({"spelling": "spelled"}, {"spelling": "ended early"})
SCORED: Final[tuple[dict[str, Any], ...]] = ({"logprobs": "all"}, {"logprobs": "some"}, {"logprobs": "zero"})
POSED: Final[tuple[dict[str, Any], ...]] = ({"spelling": "placeholder"}, {"spelling": "feature"})
SAMPLES: Final = (*PLAIN, *CUT, *SPELLED, *SCORED, *POSED)

_Row: TypeAlias = Sequence[tuple[str, str]]


def templates(*, stable: bool | None = None) -> st.SearchStrategy[TemplateCase]:
    """Chat templates as data: ChatML first, then one oddity at a time. ``stable``: only those that never change what they wrote
    before, or only those that do."""
    return st.sampled_from([case for case in TEMPLATES.values() if stable is None or case.stable == stable])


def medium_cases(
    modality: Modality = "image", *, max_side: int = 8, modes: Iterable[str] = ("RGB", "L", "P", "RGBA")
) -> st.SearchStrategy[MediumCase]:
    """Recipes of media; ``make()`` makes one."""
    if max_side < 1:
        return _refuse(f"max_side={max_side}: a medium has at least one pixel or sample; pass at least 1")
    side = st.integers(1, max_side)
    shape = {"width": side, "height": side, "seed": st.integers(0, 3)}
    if modality == "image":
        return st.builds(MediumCase, st.just("image"), mode=st.sampled_from(tuple(modes)), **shape)
    if modality == "video":
        fps = st.sampled_from((0.0, 1.0, 2.0, 0.5, 24.0))
        return st.builds(MediumCase, st.just("video"), frames=st.integers(1, 6), fps=fps, **shape)
    return st.builds(MediumCase, st.just("audio"), height=side, seed=st.integers(0, 3))


def pictures(*, max_side: int = 8, modes: Iterable[str] = ("RGB", "L", "P", "RGBA")) -> st.SearchStrategy[Any]:
    """Pictures as ``PIL.Image.Image``: one pixel and long thin ones among them, in the modes that identity and tokens have to
    keep apart."""
    unknown = sorted(set(modes) - {"RGB", "L", "P", "RGBA"})
    if unknown:
        return _refuse(f"modes has {unknown[0]!r}; pictures are made in RGB, L, P and RGBA")
    return medium_cases("image", max_side=max_side, modes=modes).map(MediumCase.make)


def videos(*, max_side: int = 8) -> st.SearchStrategy[dict[str, Any]]:
    """Videos as parts of a message: ``{"type": "video", "video": frames}``, uint8 (T, H, W, 3), some with ``metadata``."""
    return medium_cases("video", max_side=max_side).map(MediumCase.part)


def sounds(*, max_length: int = 800) -> st.SearchStrategy[dict[str, Any]]:
    """Sounds as parts of a message: ``{"type": "audio", "audio": samples, "sampling_rate": 16000}``, float32 (n,)."""
    if max_length < 100:
        return _refuse(f"max_length={max_length}: sounds have a multiple of 100 samples; pass at least 100")
    return medium_cases("audio", max_side=max_length // 100).map(MediumCase.part)


def conversations(
    *,
    worlds: Sequence[str] | None = None,
    begun: Sequence[_Row] = BEGUN,
    added: Sequence[_Row] = ADDED,
    samples: Sequence[dict[str, Any]] = SAMPLES,
    texts: Sequence[str] = TEXTS,
    min_steps: int = 0,
    max_steps: int = 6,
    places: int = 0,
    alternating: bool = False,
) -> st.SearchStrategy[TrackerCase]:
    """Programs on a tracker: a world, what the conversation starts with, and what messages and sampled turns follow.

    ``worlds``: names of worlds, by default all stable fakes. ``begun``, ``added``, ``samples``, ``texts``: tables of what is
    picked from, as ``BEGUN``, ``ADDED``, ``SAMPLES`` and ``TEXTS`` of this module. ``places``: so many numbers in ``at``.
    ``alternating``: sampled turns and messages in turn.
    """
    if not 0 <= min_steps <= max_steps:
        return _refuse(f"min_steps={min_steps}, max_steps={max_steps}: 0 <= min_steps <= max_steps must hold")
    names = world_names("stable", "sums") if worlds is None else list(worlds)
    try:
        for name in names:
            world_info(name)
    except ValueError as error:
        return _refuse(f"worlds: {error}")
    if not names:
        return st.just(TrackerCase(world=""))
    pick = st.integers(0, 11)
    step = st.tuples(st.booleans(), st.integers(0, 59), pick, pick)
    return st.builds(
        partial(_program, begun, added, samples, texts, alternating),
        st.sampled_from(names),
        st.tuples(*[st.integers(0, 63) | st.integers(0, 1 << 16)] * places),
        st.tuples(st.sampled_from(range(len(begun))), pick, pick),
        st.lists(step, min_size=min_steps, max_size=max_steps),
    )


def _program(
    begun: Sequence[_Row],
    added: Sequence[_Row],
    samples: Sequence[dict[str, Any]],
    texts: Sequence[str],
    alternating: bool,
    world: str,
    at: tuple[int, ...],
    first: tuple[int, int, int],
    drawn: Sequence[tuple[bool, int, int, int]],
) -> TrackerCase:
    opening = [("user" if role == "tool" else role, letters) for role, letters in begun[first[0]]]
    steps = [Step("start", messages(world, opening, first[1], first[2], texts))]
    for place, (extends, pattern, text, medium) in enumerate(drawn):
        if extends if not alternating else place % 2:
            steps.append(Step("extend", messages(world, added[pattern % len(added)], text, medium, texts)))
        else:
            steps.append(Step("sample", text=texts[text % len(texts)], **samples[pattern % len(samples)]))
    return TrackerCase(world=world, steps=tuple(steps), at=at)


def messages(world: str, rows: _Row, text: int, medium: int, texts: Sequence[str] = TEXTS) -> tuple[MessageCase, ...]:
    """The messages of a row of ``ADDED`` or ``BEGUN`` in a world."""
    info = world_info(world)
    pool = [case for modality in info.modalities for case in MEDIA[modality]]
    # side by side there is one medium of each modality at the front
    pool.sort(key=lambda case: MEDIA[case.modality].index(case))
    parts: dict[str, str | MediumCase] = {
        "t": texts[text % len(texts)], "s": texts[(text + 1) % len(texts)],
        "m": pool[medium % len(pool)], "n": pool[(medium + 1) % len(pool)],
    }  # fmt: skip
    found = []
    for role, letters in rows:
        shows = any(letter in "mn" for letter in letters)
        said = "user" if role == "tool" and shows and "tool media" not in info.traits else role
        content = tuple(parts[letter] for letter in letters if letter != "c")
        found.append(MessageCase(said, content, "look" if "c" in letters else ""))
    return tuple(found)


def _refuse(message: str) -> st.SearchStrategy[Any]:
    """A strategy that raises when it is drawn from."""

    def fail() -> Any:
        raise InvalidArgument(message)

    return st.builds(fail)


__all__ = ["conversations", "medium_cases", "pictures", "sounds", "templates", "videos"]
