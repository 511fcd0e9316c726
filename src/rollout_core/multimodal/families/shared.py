"""What descriptions of families have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, Final

from rollout_core.multimodal.families import rows
from rollout_core.multimodal.families.family import Family, Pin, Support
from rollout_core.multimodal.merge import Cat, OutputRule, PerToken

IMAGE: Final = attrgetter("image_token")
VIDEO: Final = attrgetter("video_token")
AUDIO: Final = attrgetter("audio_token")
CAT: Final = Cat()
TYPES: Final = PerToken((("image", 1), ("video", 2), ("audio", 3)))
GRID_IMAGES: Final[Mapping[str, OutputRule]] = {"pixel_values": CAT, "image_grid_thw": CAT}
GRID_VIDEOS: Final[Mapping[str, OutputRule]] = {"pixel_values_videos": CAT, "video_grid_thw": CAT}
SOUNDS: Final[Mapping[str, OutputRule]] = {"input_features": CAT, "feature_attention_mask": CAT}
MASKED_SOUNDS: Final[Mapping[str, OutputRule]] = {"input_features": CAT, "input_features_mask": CAT}
#: Padding to the longest clip of a call changes the features of the last frames of a shorter one, or their signs of zero.
FULL_LENGTH: Final = Pin("audio_kwargs", "padding", "max_length", "a clip's features then depend on the longest clip of the call")


def literal(text: str) -> Callable[[Any], str]:
    """A token that no attribute names."""
    return lambda processor: text


def grid_image(grids: rows.Grids | None = rows.image_grid) -> Support:
    """Patches of all pictures in one list, and a grid for each."""
    return Support(IMAGE, IMAGE, rows.merged_grid("image_grid_thw", "image_processor"), grids)


def grid_video(grids: rows.Grids | None, feature: Callable[[Any], str] = VIDEO) -> Support:
    """Patches of all videos in one list, and a grid for each."""
    return Support(VIDEO, feature, rows.merged_grid("video_grid_thw", "video_processor"), grids)


def image(count: rows.Rows, feature: Callable[[Any], str] = IMAGE, *, pins: tuple[Pin, ...] = ()) -> Mapping[str, Support]:
    """Pictures alone."""
    return {"image": Support(IMAGE, feature, count, pins=pins)}


def refused(name: str, processor: str, reason: str) -> Family:
    """A family whose items do not add up."""
    return Family(name, (processor,), refuse=reason)
