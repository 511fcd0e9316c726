"""From the pixels of Pillow's modes to RGB over a background, in numpy alone; and whether pixels, size and palette fit."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from rollout_core.errors import MediaError

#: Bytes per pixel of each mode that is read. Mode 1 has eight pixels to a byte, and every row begins a new byte.
CHANNELS: Final = {"1": 0, "L": 1, "LA": 2, "P": 1, "PA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
#: Bytes of the one transparent colour that a mode may name. In the other modes each pixel, or palette entry, has its own alpha.
_TRANSPARENCY: Final = {"1": 1, "L": 1, "RGB": 3}
_ENTRIES: Final = 256


def check_mode(mode: object, what: str = "the picture") -> None:
    """``MediaError`` for a mode that has no plain way to 8-bit RGB."""
    if not isinstance(mode, str) or mode not in CHANNELS:
        raise MediaError(
            f"{what} has Pillow's mode {mode!r:.80}, and modes {', '.join(CHANNELS)} are read. There is no one way to show "
            "more than 8 bits or another colour space as 8-bit RGB: scale it as the picture needs, and give it in mode RGB"
        )


def check_layout(
    mode: str, size: tuple[int, int], pixels: bytes, palette: bytes | None, transparency: bytes | None
) -> tuple[bytes | None, bytes | None]:
    """The palette (256 RGBA entries) and the transparent colour in their one form, or ``MediaError`` for what does not fit."""
    check_mode(mode)
    width, height = size
    wanted = height * ((width + 7) // 8 if mode == "1" else width * CHANNELS[mode])
    if len(pixels) != wanted:
        raise MediaError(f"a {width}x{height} picture of mode {mode} has {wanted} bytes of pixels, and {len(pixels)} were given")
    if (mode in ("P", "PA")) != (palette is not None):
        raise MediaError(f"a picture of mode {mode} {'needs a' if palette is None else 'has no'} palette")
    if palette is not None:
        palette = _full_palette(palette, opaque=mode == "PA")
    if transparency is not None and len(transparency) != _TRANSPARENCY.get(mode):
        raise MediaError(f"transparency of a {mode} picture is {transparency!r:.80}; it is one colour, for modes 1, L and RGB")
    return palette, transparency


def _full_palette(palette: bytes, *, opaque: bool) -> bytes:
    """256 entries; where there is none Pillow draws opaque black. The pixels of PA have an alpha of their own instead."""
    if len(palette) % 4 or len(palette) > 4 * _ENTRIES:
        raise MediaError(f"the palette has {len(palette)} bytes; it is at most {_ENTRIES} RGBA entries of 4 bytes")
    table = bytearray(palette + b"\0\0\0\xff" * (_ENTRIES - len(palette) // 4))
    if opaque:
        table[3::4] = b"\xff" * _ENTRIES
    return bytes(table)


def rgb_bytes(
    mode: str,
    size: tuple[int, int],
    pixels: bytes,
    palette: bytes | None,
    transparency: bytes | None,
    background: tuple[int, int, int],
) -> bytes:
    """The picture over the background: RGB bytes, row by row. An opaque RGB picture gives its own bytes, not copied.

    Each channel is ``(alpha * colour + (255 - alpha) * background) / 255``, rounded to nearest. That is what Pillow's
    ``Image.paste`` with the alpha channel as mask computes, by which vLLM (multimodal/image.py, ``rgba_to_rgb``) lays RGBA
    pictures on white.
    """
    if mode == "RGB" and transparency is None:
        return pixels
    colours, alpha = _colours(mode, size, pixels, palette)
    if transparency is not None:
        key = np.frombuffer(transparency, np.uint8)
        alpha = np.where((colours[..., : len(key)] == key).all(axis=-1), 0, 255).astype(np.uint8)
    if alpha is None or (alpha == 255).all():
        return np.broadcast_to(colours, (size[1], size[0], 3)).tobytes()
    weight = alpha[..., None].astype(np.uint16)
    total = weight * colours + (255 - weight) * np.array(background, np.uint16) + 128
    # division by 255, rounded to nearest, as Pillow writes it (DIV255, ImagingUtils.h); at most 65407, so uint16 holds it
    composed: Any = ((total + (total >> 8)) >> 8).astype(np.uint8)
    return bytes(composed.data)


def _colours(mode: str, size: tuple[int, int], pixels: bytes, palette: bytes | None) -> tuple[Any, Any]:
    """Colours, uint8 (H, W, 3) or grey (H, W, 1), and alpha, uint8 (H, W), or None where all is opaque."""
    width, height = size
    flat = np.frombuffer(pixels, np.uint8)
    if mode == "1":
        bits = np.unpackbits(flat.reshape(height, -1), axis=1)[:, :width]
        return (bits * np.uint8(255))[..., None], None
    raw = flat.reshape(height, width, CHANNELS[mode])
    if mode == "CMYK":
        return _from_cmyk(raw), None
    if mode in ("LA", "RGBA"):
        return raw[..., :-1], raw[..., -1]
    if mode in ("P", "PA"):
        entries = np.frombuffer(palette or b"", np.uint8).reshape(_ENTRIES, 4)[raw[..., 0]]
        return entries[..., :3], raw[..., 1] if mode == "PA" else entries[..., 3]
    return raw, None


def _from_cmyk(raw: Any) -> Any:
    """``white * (1 - ink)``, with white what black leaves, each step rounded, as Pillow's ``cmyk2rgb`` (Convert.c) does."""
    white = 255 - raw[..., 3:].astype(np.uint16)
    return (white - (raw[..., :3] * white + 127) // 255).astype(np.uint8)
