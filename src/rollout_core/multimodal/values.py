"""What the fields of pictures, videos and sounds may be. Everything else is a ``MediaError``."""

from __future__ import annotations

import math
import operator
from typing import Any, Final, TypeAlias

from rollout_core.errors import MediaError

Colour: TypeAlias = tuple[int, int, int]

_LARGEST: Final = 2**63 - 1


def check_colour(value: object, what: str) -> Colour:
    """Three whole numbers from 0 to 255, or ``MediaError``."""
    try:
        red, green, blue = (operator.index(part) for part in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        red = -1
    if red < 0 or not all(0 <= part <= 255 for part in (red, green, blue)):
        raise MediaError(f"{what} is {value!r:.80}; it is three whole numbers from 0 to 255: red, green, blue")
    return red, green, blue


def pair(size: object) -> tuple[Any, Any]:
    """(width, height), unchecked."""
    if isinstance(size, tuple) and len(size) == 2:
        return size
    raise MediaError(f"a picture's size is {size!r:.80}; it is (width, height)")


def plain_bytes(value: object, what: str) -> bytes:
    """Immutable bytes: a copy, unless it is bytes already."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise MediaError(f"{what} is a {type(value).__qualname__}; it is bytes")
    return bytes(value)


def whole_number(value: object, what: str, least: int = 1) -> int:
    """A whole number from ``least``, as 63 bits hold it; numpy's integers count, bool does not."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not least <= number <= _LARGEST:
        raise MediaError(f"{what} is {value!r:.80}; it is a whole number, at least {least}")
    return number


def positive_or_none(value: object, what: str) -> float | None:
    """A finite number above 0, as float; None stays None."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, bool | str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 < number < math.inf:
        raise MediaError(f"{what} is {value!r:.80}; it is a finite number above 0, or None if it is not known")
    return number


def check_indices(values: Any, frames: int, total: int | None) -> tuple[int, ...]:
    """One place of the original video for each frame, below ``total`` if that is known."""
    try:
        indices = tuple(whole_number(value, f"frames_indices[{place}]", 0) for place, value in enumerate(values))
    except TypeError as error:
        raise MediaError(f"frames_indices is {values!r:.80}; it is a sequence of whole numbers, one for each frame") from error
    if len(indices) != frames:
        raise MediaError(f"frames_indices has {len(indices)} entries for {frames} frames; give one for each frame given")
    if total is not None and max(indices) >= total:
        raise MediaError(f"frames_indices names frame {max(indices)} of a video of total_num_frames {total}; frames count from 0")
    return indices
