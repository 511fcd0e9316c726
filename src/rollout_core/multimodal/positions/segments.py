"""Segments: a token sequence as position rules see it, runs of text and grids of placeholders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from rollout_core.errors import ConversationError

Modality: TypeAlias = Literal["image", "video", "audio"]

_LIMIT: Final = 1 << 31  # no sequence is near it, and sums of a few such numbers stay far inside int64
_MAX_SECONDS: Final = 1e6


def check_whole(what: str, value: object, least: int, limit: int = _LIMIT) -> None:
    """``ConversationError`` unless ``value`` is an int, no bool, from ``least`` up to but without ``limit``."""
    if type(value) is not int or not least <= value < limit:
        raise ConversationError(f"{what} is {value!r} ({type(value).__name__}); it is an int from {least} to {limit - 1}")


@dataclass(frozen=True, slots=True)
class Text:
    """``length`` tokens in a row that belong to no item, 0 or more. ``ConversationError`` for anything else."""

    length: int

    def __post_init__(self) -> None:
        check_whole("length of Text", self.length, least=0)


@dataclass(frozen=True, slots=True)
class Grid:
    """One contiguous run of ``t * h * w`` placeholder tokens of an item, time-major, then rows.

    ``t``, ``h``, ``w``: at least 1, in tokens: a ``grid_thw`` row whose sides (and whose time, where the model merges that too)
    are divided by the merge size. ``seconds``: of a video, how long one time step is (``second_per_grid_ts``), above 0; the rules
    that use it take 1.0 for None, as the models do. Raises ``ConversationError`` for values outside these.
    """

    modality: Modality
    t: int
    h: int
    w: int
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.modality not in get_args(Modality):
            raise ConversationError(f"modality of Grid is {self.modality!r}; it is one of {', '.join(get_args(Modality))}")
        for side in ("t", "h", "w"):
            check_whole(f"{side} of Grid", getattr(self, side), least=1)
        check_whole("t * h * w of Grid", self.length, least=1)
        if self.seconds is None:
            return
        if self.modality != "video":
            raise ConversationError(f"seconds of Grid is {self.seconds!r} for modality {self.modality!r}; only a video has it")
        if type(self.seconds) not in (int, float) or not 0 < self.seconds <= _MAX_SECONDS:
            raise ConversationError(
                f"seconds of Grid is {self.seconds!r} ({type(self.seconds).__name__}); it is a float above 0 and at most "
                f"{_MAX_SECONDS:.0f}, or None"
            )

    @property
    def length(self) -> int:
        """Tokens in the run."""
        return self.t * self.h * self.w


Segment: TypeAlias = Text | Grid
