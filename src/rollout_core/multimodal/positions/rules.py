"""Position ids of a token sequence with pictures, videos and sounds in it, under explicit, named and versioned rules.

Models with multimodal rotary positions (mrope) give every token three coordinates: time, row, column. Text moves all three by one
per token; the placeholders of an item span a grid. What differs between programs is where the text goes on after a grid, and how
seconds become steps, so a trainer and an engine can disagree about the same tokens. A rule here is data, and its name says which.

Where the text goes on after a grid that began at position p:

- ``largest``: after the largest position used, p + max(t', h, w), where t' is the coordinate of the last time step plus one.
  ``get_rope_index`` of transformers 4.57.1 (Qwen2-VL, Qwen2.5-VL, Qwen3-VL), of verl (models/transformers/qwen2_vl.py) and of
  SGLang (layers/rotary_embedding/mrope_rope_index.py): the maximum of the last part plus one.
- ``sides``: p + max(h, w), however long the video: ``get_rope_index`` of transformers 5.23. Text after a long video then shares
  positions with its last frames.

The two agree as long as no time step reaches past the sides; always so for pictures, and for Qwen3-VL, where a frame is a grid of
its own. Under ``sides`` transformers is not at one with itself: ``generate`` goes on from ``rope_deltas``, which is the largest
position plus one, while recomputing over the whole sequence gives the sides. The rules here are what recomputation gives.

How a time step i of a video becomes a coordinate:

- ``steps``: i. Qwen2-VL.
- ``seconds``: trunc(i * (rate * seconds)) in float32, rate being the vision config's ``tokens_per_second``. Qwen2.5-VL in 5.23.
- ``seconds-then-rate``: trunc((i * seconds) * rate) in float32. Qwen2.5-VL in verl and SGLang; the same as ``seconds`` where the
  rate is a power of two: verl fixes it at 2, the config of transformers 5.23 has 4 unless a checkpoint says otherwise.
- ``whole-seconds``: i * trunc(seconds) * rate. transformers 4.57.1 casts the seconds to int64 first, so 0.5 seconds are none.
- ``frames``: nothing to count. Each frame is a grid of its own with its timestamp as text between. Qwen3-VL, GLM-4V.

Rules for Qwen2.5-Omni and Qwen3-Omni are not here: they interleave the tokens of a video with those of its sound.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from rollout_core.errors import ConversationError
from rollout_core.multimodal.positions.segments import Grid, Segment, Text, check_whole

TimeUnit: TypeAlias = Literal["steps", "seconds", "seconds-then-rate", "whole-seconds", "frames"]
Resume: TypeAlias = Literal["largest", "sides"]

_NAME: Final = re.compile(r"(?P<base>[a-z0-9][a-z0-9._-]*)(\+rate(?P<rate>[1-9][0-9]{0,2}))?@(?P<version>[1-9][0-9]{0,3})")


@dataclass(frozen=True, slots=True)
class PositionRule:
    """How positions are counted. Immutable, comparable and hashable; a rule that counts differently gets another name.

    ``name``: ``family@version``, with ``+rateN`` before the ``@`` where ``rate`` is not the family's own. ``axes``: 1 (a plain
    counter, every grid is just tokens) or 3 (time, row, column). ``time``, ``resume``: see the module. ``rate``: positions per
    second of video, at least 1. Raises ``ConversationError`` for values outside these.
    """

    name: str
    axes: int
    time: TimeUnit = "steps"
    resume: Resume = "largest"
    rate: int = 1

    def __post_init__(self) -> None:
        parts = _NAME.fullmatch(self.name) if isinstance(self.name, str) else None
        if parts is None:
            raise ConversationError(f"name of a position rule is {self.name!r}; it looks like 'qwen2-vl@1', the version at its end")
        if type(self.axes) is not int or self.axes not in (1, 3):
            raise ConversationError(f"axes of position rule {self.name!r} is {self.axes!r}; it is 1 or 3")
        if self.time not in get_args(TimeUnit):
            raise ConversationError(f"time of position rule {self.name!r} is {self.time!r}; it is one of {get_args(TimeUnit)}")
        if self.resume not in get_args(Resume):
            raise ConversationError(f"resume of position rule {self.name!r} is {self.resume!r}; it is one of {get_args(Resume)}")
        check_whole(f"rate of position rule {self.name!r}", self.rate, least=1, limit=1000)
        if parts["rate"] and int(parts["rate"]) != self.rate:
            raise ConversationError(f"rate of position rule {self.name!r} is {self.rate}; the name says {parts['rate']}")

    @property
    def version(self) -> int:
        """The number at the end of the name."""
        return int(self.name.rpartition("@")[2])

    def with_rate(self, rate: int) -> PositionRule:
        """This rule at another ``tokens_per_second`` of the vision config, under the name ``family+rateN@version``.

        ``rule`` knows such names once it knows the family. ``ConversationError`` if the rule does not count seconds or is itself
        the result of ``with_rate``.
        """
        if not self.time.endswith(("seconds", "rate")):
            raise ConversationError(f"position rule {self.name!r} does not count seconds and has no rate; use it as it is")
        base, _, version = self.name.rpartition("@")
        if "+" in base:
            raise ConversationError(f"position rule {self.name!r} has its rate already; start from the rule without one")
        check_whole("rate", rate, least=1, limit=1000)
        return self if rate == self.rate else replace(self, name=f"{base}+rate{rate}@{version}", rate=rate)

    def advance(self, start: int, segments: Iterable[Segment]) -> tuple[NDArray[np.int64], int]:
        """Positions of the tokens of ``segments``, the first at ``start``: int64, C-contiguous, shape (axes, tokens); and the
        position at which whatever follows begins.

        One call over everything (from 0) equals any chain of calls that hand on the second result, wherever between two
        segments or inside a ``Text`` it is cut. Time and memory are in proportion to segments plus tokens. Raises
        ``ConversationError`` for a bad start, a thing that is no segment, or a grid that this rule has no positions for.
        """
        check_whole("start", start, least=0)
        segments = list(segments)
        for index, segment in enumerate(segments):
            self._check(index, segment)
        total = sum(segment.length for segment in segments)
        if self.axes == 1:
            return np.arange(start, start + total, dtype=np.int64)[None], start + total
        positions = np.empty((3, total), dtype=np.int64)
        done, position = 0, start
        for segment in segments:
            part = positions[:, done : done + segment.length]
            done += segment.length
            if isinstance(segment, Text):
                part[:] = np.arange(position, position + segment.length)
                position += segment.length
            else:
                position = self._place(part, position, segment)
        return positions, position

    def _place(self, part: NDArray[np.int64], position: int, grid: Grid) -> int:
        """Fill ``part`` (3, tokens) with the coordinates of a grid that begins at ``position``; return where the next begins."""
        times = self._times(grid)
        time, row, column = (axis.reshape(grid.t, grid.h, grid.w) for axis in part)  # views: each row of part is contiguous
        time[:] = position + times[:, None, None]
        row[:] = np.arange(position, position + grid.h)[:, None]
        column[:] = np.arange(position, position + grid.w)
        reach = max(grid.h, grid.w)
        return position + (reach if self.resume == "sides" else max(reach, int(times[-1]) + 1))

    def _times(self, grid: Grid) -> NDArray[np.int64]:
        """The coordinate of each time step, the first 0 (so 0 for an image): int64, shape (t,). Never decreases."""
        steps = np.arange(grid.t, dtype=np.int64)
        if self.time in ("steps", "frames"):
            return steps
        seconds = 1.0 if grid.seconds is None else grid.seconds
        if self.time == "whole-seconds":
            return steps * (int(np.float32(seconds)) * self.rate)
        # float32 throughout: processors return the seconds as a float32 tensor, and torch keeps that dtype against integers.
        rate, length = np.float32(self.rate), np.float32(seconds)
        real = steps.astype(np.float32)
        real = real * (rate * length) if self.time == "seconds" else real * length * rate
        return real.astype(np.int64)

    def _check(self, index: int, segment: Segment) -> None:
        if isinstance(segment, Text):
            return
        if not isinstance(segment, Grid):
            raise ConversationError(f"segment {index} is a {type(segment).__name__}; segments are Text and Grid")
        if self.axes == 1:
            return
        if segment.modality == "audio":
            raise ConversationError(f"segment {index} is audio, for which position rule {self.name!r} has no positions")
        if segment.t > 1 and (segment.modality == "image" or self.time == "frames"):
            what = "an image" if segment.modality == "image" else "one frame of a video, its timestamps being text between"
            raise ConversationError(
                f"segment {index} is a Grid of {segment.t} time steps; under position rule {self.name!r} it is {what}, with t=1"
            )


#: One axis, for models without mrope.
PLAIN: Final = PositionRule("plain@1", axes=1)
#: Qwen2-VL in transformers 4, verl and SGLang.
QWEN2_VL_V1: Final = PositionRule("qwen2-vl@1", axes=3, time="steps", resume="largest")
#: Qwen2-VL in transformers 5.23.
QWEN2_VL_V2: Final = PositionRule("qwen2-vl@2", axes=3, time="steps", resume="sides")
#: Qwen2.5-VL in verl and SGLang.
QWEN2_5_VL_V1: Final = PositionRule("qwen2.5-vl@1", axes=3, time="seconds-then-rate", resume="largest", rate=2)
#: Qwen2.5-VL in transformers 5.23.
QWEN2_5_VL_V2: Final = PositionRule("qwen2.5-vl@2", axes=3, time="seconds", resume="sides", rate=2)
#: Qwen2.5-VL in transformers 4.57.1, which drops fractions of seconds.
QWEN2_5_VL_WHOLE: Final = PositionRule("qwen2.5-vl-whole-seconds@1", axes=3, time="whole-seconds", resume="largest", rate=2)
#: Qwen3-VL in transformers 4.57.1 and 5.23 alike, and in 5.23 all models that cut a video into frames.
QWEN3_VL: Final = PositionRule("qwen3-vl@1", axes=3, time="frames", resume="largest")

_RULES: Final[dict[str, PositionRule]] = {
    known.name: known for known in (PLAIN, QWEN2_VL_V1, QWEN2_VL_V2, QWEN2_5_VL_V1, QWEN2_5_VL_V2, QWEN2_5_VL_WHOLE, QWEN3_VL)
}

#: ``config.model_type`` -> name of the rule that transformers 5.23 follows; only those compared with its own functions.
#: A Qwen2.5-VL config whose ``vision_config.tokens_per_second`` is not 2 needs ``with_rate`` on top.
RULE_OF_MODEL_TYPE: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(("qwen2_vl", "paddleocr_vl", "ernie4_5_vl_moe"), QWEN2_VL_V2.name),
        "qwen2_5_vl": QWEN2_5_VL_V2.name,
        **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), QWEN3_VL.name),
        **dict.fromkeys(("glm4v", "glm4v_moe", "glm46v", "glm_ocr"), QWEN3_VL.name),
        **dict.fromkeys(("cohere_compass", "cosmos3_edge", "cosmos3_omni"), QWEN3_VL.name),
    }
)


def rule(name: str) -> PositionRule:
    """The rule of this full name, version included. ``ConversationError`` listing the known names if there is none."""
    parts = _NAME.fullmatch(name) if isinstance(name, str) else None
    if parts is not None:
        family = _RULES.get(f"{parts['base']}@{parts['version']}")
        found = family.with_rate(int(parts["rate"])) if family is not None and parts["rate"] else family
        if found is not None and found.name == name:
            return found
    raise ConversationError(
        f"no position rule is named {name!r}; known are {', '.join(sorted(_RULES))}; add others with register_rule"
    )


def register_rule(new: PositionRule) -> PositionRule:
    """Make a rule known to ``rule`` under its name, and return it. The same rule twice is harmless; another rule under a name
    that is taken is a ``ConversationError``: a rule that counts differently is a new version."""
    if not isinstance(new, PositionRule):
        raise ConversationError(f"register_rule takes a PositionRule, not a {type(new).__name__}")
    if "+" in new.name:
        raise ConversationError(f"{new.name!r} is a name that with_rate makes; register the rule under one without '+rate'")
    known = _RULES.setdefault(new.name, new)
    if known != new:
        raise ConversationError(f"{new.name!r} is already the name of {known}; give the new rule another name or version")
    return known
