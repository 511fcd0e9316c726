"""Pillow images and open files to pictures and samples. The size is known and checked before a pixel is decoded."""

from __future__ import annotations

import operator
import wave
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rollout_core.errors import MediaError
from rollout_core.multimodal.compose import check_mode
from rollout_core.multimodal.media import Picture, require_pillow
from rollout_core.multimodal.values import Colour

if TYPE_CHECKING:
    from PIL import Image

#: First bytes, and Pillow's class for them. Its plugins for other formats are left out: some start programs, many are rarely used.
#: ``Image.open`` is not used because it warns of large pictures by itself, and warning filters belong to the whole process.
_FORMATS: Final = (
    (b"\x89PNG\r\n\x1a\n", "PngImagePlugin", "PngImageFile"),
    (b"\xff\xd8\xff", "JpegImagePlugin", "JpegImageFile"),
    (b"RIFF", "WebPImagePlugin", "WebPImageFile"),
    (b"GIF8", "GifImagePlugin", "GifImageFile"),
    (b"BM", "BmpImagePlugin", "BmpImageFile"),
    (b"II", "TiffImagePlugin", "TiffImageFile"),
    (b"MM", "TiffImagePlugin", "TiffImageFile"),
    *((b"P%d" % kind, "PpmImagePlugin", "PpmImageFile") for kind in range(1, 7)),
)
_ORIENTATION: Final = 0x0112  # Exif 2.3, table 4
#: What undoes each orientation, as in ``PIL.ImageOps.exif_transpose``; 1 and unknown values change nothing.
_UNDO: Final = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def picture_from_file(file: Any, background: Colour, max_pixels: int, what: str) -> Picture:
    """The picture in an open file; ``what`` names it in messages."""
    require_pillow()
    start = file.read(16)
    file.seek(0)
    plugin = next((plugin for prefix, *plugin in _FORMATS if start.startswith(prefix)), None)
    if plugin is None:
        raise MediaError(f"{what} is no PNG, JPEG, WebP, GIF, BMP, TIFF or PPM file; decode it yourself, and give the PIL image")
    try:
        if import_module("PIL.ImageFile").LOAD_TRUNCATED_IMAGES:
            raise MediaError(
                f"{what} is not decoded while PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: a file cut short would pass as whole. "
                "Unset it, or decode the picture yourself and give the PIL image"
            )
        module, name = plugin
        image = getattr(import_module(f"PIL.{module}"), name)(file)
    except (MediaError, MemoryError):
        raise
    except Exception as error:  # the plugins raise whatever their parsers do
        raise _unreadable(what, error) from error
    return picture_from_pillow(image, background, max_pixels, what)


def picture_from_pillow(image: Image.Image, background: Colour, max_pixels: int, what: str) -> Picture:
    """The picture of a Pillow image, which is loaded and otherwise left as it is."""
    if 0 in image.size:
        raise MediaError(f"{what} has size {image.size}; a picture has at least one pixel")
    check_pixels(image.width * image.height, max_pixels, what)
    check_mode(image.mode, what)
    try:
        if _animated(image):
            raise MediaError(
                f"{what} has several frames: give one of them (image.copy()), or all as a video: "
                "[frame.copy() for frame in PIL.ImageSequence.Iterator(image)]"
            )
        own = _upright(image)
        check_mode(own.mode, what)
        check_pixels(own.width * own.height, max_pixels, what)
        palette = _palette(own) if own.mode in ("P", "PA") else None
        transparency = _transparency(own) if own.mode in ("1", "L", "RGB") else None
        return Picture(own.mode, own.size, own.tobytes(), palette, transparency, background)
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(what, error) from error


def check_pixels(pixels: int, bound: int, what: str) -> None:
    """``MediaError`` if a picture, or all frames of a video, have more pixels than ``bound``."""
    if pixels > bound:
        raise MediaError(f"{what} has {pixels} pixels, and max_pixels is {bound}; shrink it, or raise the bound if you trust it")


def _unreadable(what: str, error: Exception) -> MediaError:
    return MediaError(f"{what} cannot be read, it may be damaged or cut short: {type(error).__name__}: {error}")


def _animated(image: Image.Image) -> bool:
    """A JPEG with several pictures (MPO) is not: the others are previews, or the other eye's."""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except ValueError:  # the file behind the image is closed, so all there can be of it is the frame in memory
        return False


def _upright(image: Image.Image) -> Image.Image:
    """A private copy with the orientation undone. The copy has the EXIF bytes; ``_exif`` is what the caller set with getexif()."""
    own = image.copy()
    exif = (image if getattr(image, "_exif", None) is not None else own).getexif()
    method = _UNDO.get(exif.get(_ORIENTATION, 1))
    return own if method is None else own.transpose(getattr(require_pillow().Transpose, method))


def _palette(image: Image.Image) -> bytes:
    """256 RGBA entries, the transparent ones with their alpha, whether Pillow keeps it in the palette or beside it."""
    table = bytearray(image.getpalette("RGBA") or b"")
    table += b"\0\0\0\xff" * (256 - len(table) // 4)
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        if len(transparency) > 256:
            raise MediaError(f"the picture's palette has {len(transparency)} transparencies for 256 entries; it is damaged")
        table[3 : 4 * len(transparency) : 4] = transparency
    elif transparency is not None:
        table[4 * _byte(transparency) + 3] = 0
    return bytes(table)


def _transparency(image: Image.Image) -> bytes | None:
    value = image.info.get("transparency")
    if value is None:
        return None
    if image.mode == "RGB":
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise MediaError(f"the picture's transparent colour is {value!r:.80}, and it is RGB; delete image.info['transparency']")
        return bytes(_byte(part) for part in value)
    return bytes([_byte(value) and 255 if image.mode == "1" else _byte(value)])


def _byte(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if not 0 <= number <= 255:
        raise MediaError(
            f"the picture's transparency has {value!r:.80}, which is no value from 0 to 255: it is damaged, or has 16 bits. "
            "Delete image.info['transparency'], and give the PIL image"
        )
    return number


def samples_from_wav(file: Any, what: str) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """Samples, float32 (n,), and the rate in Hz of an open PCM wav file with one channel."""
    try:
        size = file.seek(0, 2)
        file.seek(0)
        with wave.open(file) as wav:
            channels, width, rate, frames = wav.getparams()[:4]
            if channels != 1:
                raise MediaError(f"{what} has {channels} channels, and one is taken; mix or choose, and give the samples")
            if width not in (1, 2, 3, 4):
                raise MediaError(f"{what} has samples of {8 * width} bits, and 8, 16, 24 and 32 are read; convert it")
            data = wav.readframes(frames) if frames * width <= size else b""  # no buffer for a length that cannot be
    except (MediaError, MemoryError):
        raise
    except Exception as error:
        raise MediaError(f"{what} cannot be read as a PCM wav file: {type(error).__name__}: {error}") from error
    if len(data) != frames * width:
        raise MediaError(f"{what} is cut short: its header says {frames} samples, and {len(data) // width} could be read")
    return _scaled(data, width), rate


def _scaled(data: bytes, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """PCM of 1 (unsigned), 2, 3 or 4 bytes over its largest magnitude."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
    if width == 3:  # as the upper bytes of 32 bits
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    pcm = np.frombuffer(data, np.int16 if width == 2 else np.int32).astype(np.float64)
    return (pcm / (1 << (8 * width - 1))).astype(np.float32)
