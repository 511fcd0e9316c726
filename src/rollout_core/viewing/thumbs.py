"""Small pictures of pictures, videos and sounds."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from rollout_core.multimodal.media import Media, Picture, Sound, Video, require_pillow

Pixels = npt.NDArray[np.uint8]
_BLANK, _WAVE, _EDGE = (238, 240, 243), (52, 101, 164), (40, 40, 40)


def thumbnail(media: Media | None, height: int) -> Pixels:
    """uint8 (height, w, 3), w from height / 2 to 2 * height: the picture; the first frame of a video between perforated edges; the
    waveform of a sound; an empty square for None. The same input gives the same bytes."""
    if isinstance(media, Picture):
        return _fitted(media.rgb, height, 0)
    if isinstance(media, Video):
        return _perforated(_fitted(media.frames[0], height, max(3, height // 8)), max(3, height // 8))
    if isinstance(media, Sound):
        return waveform(media, height, 2 * height)
    return np.full((height, height, 3), _BLANK, np.uint8)


def waveform(sound: Sound, height: int, width: int) -> Pixels:
    """A column of pixels per stretch of samples, from the least to the greatest of them; the loudest reaches the edge."""
    pixels = np.full((height, width, 3), _BLANK, np.uint8)
    loudest = float(np.abs(sound.samples).max()) or 1.0
    edges = np.linspace(0, len(sound.samples), width + 1).astype(int)
    middle = (height - 1) / 2
    for x, (start, stop) in enumerate(itertools.pairwise(edges.tolist())):
        column = sound.samples[start : max(stop, start + 1)] / loudest
        top, bottom = (round(middle - float(value) * middle) for value in (column.max(), column.min()))
        pixels[top : bottom + 1, x] = _WAVE
    return pixels


def _fitted(rgb: Pixels, height: int, edge: int) -> Pixels:
    """Scaled to fit, with blank margins where it is very long or very narrow; ``edge`` columns at both sides stay blank."""
    image = require_pillow()
    tall, wide = rgb.shape[:2]
    scale = min(height / tall, (2 * height - 2 * edge) / wide)
    size = (max(1, round(wide * scale)), max(1, round(tall * scale)))
    method = image.Resampling.NEAREST if scale > 1 else image.Resampling.LANCZOS
    # reducing_gap: a photograph need not be filtered at full size.
    small = np.asarray(image.fromarray(np.ascontiguousarray(rgb)).resize(size, method, reducing_gap=3.0))
    width = max(size[0], height // 2) + 2 * edge
    pixels = np.full((height, width, 3), _BLANK, np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    pixels[top : top + size[1], left : left + size[0]] = small
    return pixels


def _perforated(pixels: Pixels, edge: int) -> Pixels:
    for columns in (slice(0, edge), slice(pixels.shape[1] - edge, None)):
        pixels[:, columns] = _EDGE
    hole = max(1, edge // 3)
    for top in range(hole, pixels.shape[0] - hole, 3 * hole):
        for left in (hole, pixels.shape[1] - edge + hole):
            pixels[top : top + hole + 1, left : left + max(1, edge - 2 * hole)] = 255
    return pixels
