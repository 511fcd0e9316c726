"""Worlds: what a tracker is tried in. A world is a processor with its template, and what the kit knows of both.

The kit ships fakes, in pure Python and numpy, named ``template+kind``, and a few real processors of transformers, for peers that
know no fakes (``rollout_core.testing.peers.real_worlds``); ``register_world`` adds others:

    register_world("real:qwen2_vl", build, modalities=("image", "video"))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np

from rollout_core.testing.tracker_cases import MediumCase
from rollout_core.testing.worlds.kinds import KINDS, Positions, Shown
from rollout_core.testing.worlds.making import Grid
from rollout_core.testing.worlds.processor import PROCESSORS, FakeProcessor
from rollout_core.testing.worlds.templates import TEMPLATES, TemplateCase
from rollout_core.testing.worlds.tokenizer import Counts, FakeTokenizer

__all__ = [
    "KINDS",
    "TEMPLATES",
    "TRAITS",
    "FakeProcessor",
    "FakeTokenizer",
    "Grid",
    "Positions",
    "Shown",
    "TemplateCase",
    "World",
    "WorldInfo",
    "make_world",
    "register_world",
    "world_info",
    "world_names",
]

#: What is true of a world; checks pick the worlds that they mean.
TRAITS: Final = {
    "stable": "the template never changes what it wrote before, and its turns end with control tokens",
    "sums": "the outputs of all items are those of single items put together",
    "counted": "the processor counts the characters that it encoded and the items that it processed",
    "positions": "the kit knows how positions are counted",
    "tool media": "tool messages may show media",
    "plain joins": "nothing that the template writes depends on anything but the messages beside it",
    "trims": "the template trims what messages say",
    "changed": "there is the same processor with another setting",
}


@dataclass(frozen=True, kw_only=True)
class World:
    """A processor and what is known of it.

    ``shown``: by modality, what the template writes for a medium. ``stops``: the tokens with which a policy may end its turn.
    ``positions``: how positions are counted, or None if the kit does not know. ``measure(medium)``: of an item made by this
    recipe, its feature rows (None if the kit does not know) and the grid of each of its spans, in tokens. ``sequence``: output
    per token -> its value on the feature tokens of each modality. ``ignored``: output keys that are not compared. ``counts``:
    what the processor was asked to do. ``changed``: makes the same world with another setting of its processor.
    """

    name: str
    processor: Any
    shown: Mapping[str, Shown]
    stops: tuple[str, ...]
    positions: Positions | None = None
    measure: Callable[[MediumCase], tuple[int | None, tuple[Grid, ...]]] | None = None
    sequence: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    counts: Counts | None = None
    changed: Callable[[], World] | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def token(self, text: str) -> int:
        """The id of a control token."""
        return int(self.tokenizer.convert_tokens_to_ids(text))


Builder: TypeAlias = Callable[[], World]


@dataclass(frozen=True)
class WorldInfo:
    """What is known of a world before it is built."""

    name: str
    builder: Builder
    modalities: tuple[str, ...]
    traits: frozenset[str]


_WORLDS: Final[dict[str, WorldInfo]] = {}


def register_world(
    name: str,
    builder: Builder,
    *,
    modalities: Iterable[str] = ("image",),
    traits: Collection[str] = ("stable", "sums", "plain joins", "tool media"),
) -> None:
    """Make a world known under a name. ``builder`` is called for every case; what is dear about it, it keeps. ``ValueError`` for
    an unknown trait."""
    unknown = sorted(set(traits) - TRAITS.keys())
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no trait of a world; there are {', '.join(TRAITS)}")
    _WORLDS[name] = WorldInfo(name, builder, tuple(modalities), frozenset(traits))


def world_info(name: str) -> WorldInfo:
    """What is known of a world. ``ValueError`` if there is none of this name."""
    if name.startswith("real:") and name not in _WORLDS:
        from rollout_core.testing.peers import real_worlds

        real_worlds.register()
    try:
        return _WORLDS[name]
    except KeyError:
        raise ValueError(f"there is no world {name!r}; there are {', '.join(_WORLDS)}") from None


def make_world(name: str) -> World:
    """A world of this name, with counters at zero."""
    return world_info(name).builder()


def world_names(*traits: str, modality: str | None = None, among: Iterable[str] | None = None) -> list[str]:
    """The worlds that have all these traits, the plainest first: all fakes, or those ``among`` these."""
    names = [name for name in _WORLDS if "+" in name] if among is None else list(among)
    infos = [world_info(name) for name in names]
    return [info.name for info in infos if info.traits >= set(traits) and (modality is None or modality in info.modalities)]


def fake_world(template: TemplateCase, kind: str, *, scale: float = 1.0) -> World:
    """A world of a template and a kind of processing."""
    from rollout_core.testing.worlds import families

    families.register()
    processor = PROCESSORS[kind](template, scale=scale)
    known = KINDS[kind]

    def measure(medium: MediumCase) -> tuple[int, tuple[Grid, ...]]:
        if medium.modality == "image":
            data = np.asarray(medium.image().convert("RGB"))
        else:
            data = medium.pixels() if medium.modality == "video" else medium.samples()
        done = known.make[medium.modality](data, scale, {"fps": medium.fps or None}, 1)
        return done.rows, done.grids

    return World(
        name=f"{template.name}+{kind}",
        processor=processor,
        shown=known.shown,
        stops=template.stops,
        positions=known.positions,
        measure=measure,
        sequence=known.sequence,
        counts=processor.counts,
        changed=lambda: fake_world(template, kind, scale=scale + 1.0),
    )


def _register_fakes() -> None:
    pairs = [("chatml", kind) for kind in KINDS] + [(template, "rows") for template in TEMPLATES if template != "chatml"]
    pairs += [("glm", "bare"), ("glm", "framed"), ("no-separator", "tiles"), ("media-first", "timed"), ("trims", "soft")]
    for template, kind in pairs:
        case, known = TEMPLATES[template], KINDS[kind]
        facts = {
            "stable": case.stable,
            "sums": not known.refused and not known.undeclared,
            "counted": True,
            "positions": True,
            "tool media": case.tool_media,
            "plain joins": not case.numbers_media,
            "trims": case.trims,
            "changed": True,
        }
        traits = [trait for trait, holds in facts.items() if holds]
        register_world(f"{template}+{kind}", partial(fake_world, case, kind), modalities=known.shown, traits=traits)


_register_fakes()
