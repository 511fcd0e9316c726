"""Pictures, videos and sounds from whatever the caller has: files, bytes, data URLs, Pillow, numpy, torch. It opens files.

The same content gives the same identity whatever it came in. Everything that cannot be read is a ``MediaError``.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np
import torch

from rollout_core.errors import MediaError
from rollout_core.multimodal.decoding import check_pixels, picture_from_file, picture_from_pillow, samples_from_wav
from rollout_core.multimodal.media import WHITE, Picture, Sound, Video, require_pillow
from rollout_core.multimodal.values import Colour

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

Encoded: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview"
Array: TypeAlias = "np.ndarray[Any, Any] | torch.Tensor"
PictureSource: TypeAlias = "Encoded | Image.Image | Array"
VideoSource: TypeAlias = "Sequence[PictureSource] | Array"
SoundSource: TypeAlias = "Encoded | Array | Sequence[float]"
Channels: TypeAlias = Literal["first", "last"]

#: Pixels of one picture: the number above which Pillow warns of a decompression bomb (Image.MAX_IMAGE_PIXELS).
MAX_PIXELS: Final = 89_478_485
#: Pixels of all frames of a video together: 3 GiB as RGB.
MAX_VIDEO_PIXELS: Final = 1 << 30

_METADATA: Final = ("fps", "frames_indices", "total_num_frames", "duration")


def load_picture(
    source: PictureSource, *, background: Colour = WHITE, max_pixels: int = MAX_PIXELS, channels: Channels | None = None
) -> Picture:
    """A picture from a path, the bytes of a file, a base64 ``data:`` URL, a ``PIL.Image.Image``, or a uint8 array or tensor.

    Files are PNG, JPEG, WebP, GIF, BMP, TIFF and PPM, told by their first bytes. Of a JPEG with several pictures (MPO) the first is
    read; any other file with several frames is refused. EXIF orientation is applied (``PIL.ImageOps.exif_transpose``); the Pillow
    image given is not changed, but for being loaded. Arrays are upright: (H, W) is mode L, and with 1, 3 or 4 channels L, RGB and
    RGBA. The channels are the first or the last dimension, whichever has 1, 3 or 4 entries; if both have, ``channels`` must say.

    Transparent parts show ``background``. The size is checked against ``max_pixels`` before pixels are decoded or copied.

    Raises ``MediaError`` for everything that is no such picture, is damaged, cut short, empty or too large, or has more than 8 bits
    per channel. Pillow's warnings of damaged headers pass through the caller's filters; one that a filter makes an error is a
    ``MediaError`` too.
    """
    if isinstance(source, np.ndarray | torch.Tensor):
        return _from_array(source, background, max_pixels, channels)
    if isinstance(source, require_pillow().Image):
        return picture_from_pillow(source, background, max_pixels, "the Pillow image")
    with _opened(source, "picture", "a path, bytes, a data: URL, a PIL image, or a uint8 array or tensor") as (file, what):
        return picture_from_file(file, background, max_pixels, what)


def load_video(
    source: VideoSource,
    metadata: Mapping[str, Any] | None = None,
    *,
    background: Colour = WHITE,
    max_pixels: int = MAX_VIDEO_PIXELS,
    channels: Channels | None = None,
) -> Video:
    """A video from decoded frames: a list or tuple of what ``load_picture`` takes, all of one size, or a uint8 array or tensor.

    Arrays are (T, H, W, 3) or (T, 3, H, W); if both fit, ``channels`` must say which. ``metadata`` holds any of fps,
    frames_indices, total_num_frames and duration, as ``Video`` describes them. ``max_pixels`` bounds T * H * W.

    Raises ``MediaError`` for a video file (decode it with the decoder of your choice), no frames, frames of different sizes,
    another key in ``metadata``, and what ``load_picture`` and ``Video`` refuse.
    """
    known = _metadata(metadata)
    if isinstance(source, np.ndarray | torch.Tensor):
        array = _uint8(source, "the video")
        if array.ndim != 4:
            raise MediaError(f"the video has shape {array.shape}; it is (T, H, W, 3) or (T, 3, H, W)")
        array = _channels_last(array, 1, (3,), channels, "the video")
        check_pixels(array.size // 3, max_pixels, "the video")
        return Video(array, **known)
    if not isinstance(source, list | tuple):
        file = isinstance(source, str | os.PathLike | bytes | bytearray | memoryview)
        raise MediaError(
            f"{_show(source)} is {'a file' if file else 'no sequence of frames'}, and videos are taken as frames: decode it "
            "with the decoder of your choice, and give a list of pictures, or a uint8 array (T, H, W, 3), and metadata"
        )
    if not source:
        raise MediaError("the video has no frames; leave it out of the message")
    rows: list[bytes] = []
    size: tuple[int, int] | None = None
    for place, frame in enumerate(source):
        try:
            picture = load_picture(frame, background=background, max_pixels=min(max_pixels, MAX_PIXELS), channels=channels)
        except MediaError as error:
            raise MediaError(f"frame {place} of the video: {error}") from error
        if size is None:
            size = picture.size
            check_pixels(size[0] * size[1] * len(source), max_pixels, "the video")
        if picture.size != size:
            raise MediaError(f"frame {place} of the video has size {picture.size}, and frame 0 {size}; bring them to one size")
        rows.append(picture.rgb.tobytes())
    assert size is not None
    return Video(np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), size[1], size[0], 3), **known)


def load_sound(source: SoundSource, sampling_rate: int | None = None) -> Sound:
    """One channel of sound from samples and their rate in Hz, or from a .wav file (path, bytes or ``data:`` URL).

    Samples are a 1-d array or tensor of float32, float64 (rounded to float32) or int16 (divided by 32768), or a list of floats, and
    need ``sampling_rate``. Wav files are PCM of 8, 16, 24 or 32 bits, divided by their largest magnitude; their own rate holds, and
    another one given is an error. More than one channel is refused: how to mix them is the caller's choice.

    Raises ``MediaError`` for everything that is no such sound, is damaged or cut short, is empty, or has a sample not finite.
    """
    if isinstance(source, list | tuple):
        try:
            source = np.asarray(source)
        except (ValueError, TypeError, OverflowError) as error:
            raise MediaError(f"the sound is no list of floats: {error}") from error
    if isinstance(source, np.ndarray | torch.Tensor):
        samples = _samples(_to_numpy(source, "the sound"))
        if sampling_rate is None:
            raise MediaError("the sound is given as samples, and sampling_rate is missing; give it in Hz")
        return Sound(samples, sampling_rate)
    with _opened(source, "sound", "a wav file (path, bytes or data: URL), a list of floats, or a 1-d array or tensor") as (
        file,
        what,
    ):
        samples, rate = samples_from_wav(file, what)
    if sampling_rate is not None and sampling_rate != rate:
        raise MediaError(
            f"{what} has a sampling rate of {rate} Hz, and sampling_rate is {sampling_rate!r:.80}; leave it out, or resample"
        )
    return Sound(samples, rate)


@contextmanager
def _opened(source: object, kind: str, accepted: str) -> Iterator[tuple[Any, str]]:
    """An encoded file to read from, and what to call it in a message."""
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source), f"the {kind} in bytes"
    elif isinstance(source, str) and source[:5].lower() == "data:":
        yield io.BytesIO(_data_url(source)), f"the {kind} in a data: URL"
    elif isinstance(source, str) and "://" in source[:16]:
        raise MediaError(f"{_show(source)} is a URL, and nothing is fetched here: download it, and give the bytes or the path")
    elif isinstance(source, str | os.PathLike):
        try:
            path = Path(source)
            if not path.is_file():  # a folder, or a pipe that would be waited for
                raise MediaError(f"{_show(source)} is no file; give the path of a {kind}, or its bytes")
            with path.open("rb") as file:
                yield file, f"{kind} {_show(source)}"
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(f"{_show(source)} cannot be read: {error}") from error
    else:
        raise MediaError(f"a {kind} cannot be made of a {type(source).__qualname__}; give {accepted}")


def _show(source: object) -> str:
    text = repr(os.fspath(source) if isinstance(source, os.PathLike) else source)
    return text if len(text) <= 120 else f"{text[:80]}... ({len(text)} characters)"


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.lower().endswith(";base64"):
        raise MediaError(f"{_show(header)} begins no base64 data: URL; write data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"the data: URL is no valid base64: {error}") from error


def _to_numpy(source: Array, what: str) -> np.ndarray[Any, Any]:
    """The same values as a plain array, which may share the caller's memory."""
    if isinstance(source, np.ndarray):
        return np.asarray(source)
    try:
        return source.detach().cpu().resolve_neg().numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # meta, sparse, bfloat16: numpy has no such array
        raise MediaError(f"{what} is a tensor ({source.dtype}) that numpy cannot hold: {error}") from error


def _uint8(source: Array, what: str) -> np.ndarray[Any, Any]:
    array = _to_numpy(source, what)
    if array.dtype != np.uint8:
        raise MediaError(
            f"{what} is an array of {array.dtype}, and uint8 is taken: whether 1 or 255 is white only you know. "
            "Of values from 0 to 1 make (values * 255).round() as uint8"
        )
    return array


def _channels_last(
    array: np.ndarray[Any, Any], first: int, counts: tuple[int, ...], channels: Channels | None, what: str
) -> np.ndarray[Any, Any]:
    """The array with its channels moved to the last dimension, if they are in dimension ``first``."""
    if channels not in (None, "first", "last"):
        raise MediaError(f"channels is {channels!r:.80}; it is 'first', 'last' or None")
    fits = {"first": array.shape[first] in counts, "last": array.shape[-1] in counts}
    allowed = " or ".join(str(count) for count in counts)
    if channels is None and all(fits.values()):
        raise MediaError(f"{what} has shape {array.shape}, whose channels may be first or last; say channels='first' or 'last'")
    where = channels or ("first" if fits["first"] else "last")
    if not fits[where]:
        raise MediaError(f"{what} has shape {array.shape}, with no {allowed} channels {where if channels else 'first or last'}")
    return np.moveaxis(array, first, -1) if where == "first" else array


def _from_array(source: Array, background: Colour, max_pixels: int, channels: Channels | None) -> Picture:
    array = _uint8(source, "the picture")
    if array.ndim == 3:
        array = _channels_last(array, 0, (1, 3, 4), channels, "the picture")
    elif array.ndim != 2:
        raise MediaError(f"the picture has shape {array.shape}; it is (H, W), or (H, W, C) with 1, 3 or 4 channels")
    height, width, depth = (*array.shape, 1)[:3]
    check_pixels(height * width, max_pixels, "the picture")
    return Picture({1: "L", 3: "RGB", 4: "RGBA"}[depth], (width, height), array.tobytes(), background=background)


def _samples(array: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    if array.ndim != 1:
        raise MediaError(f"the sound has shape {array.shape}; it is (n,), one channel: mix or choose first")
    if array.dtype.kind == "i" and array.dtype.itemsize == 2:
        return array.astype(np.float32) / np.float32(32768)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (4, 8):
        raise MediaError(
            f"the sound has samples of {array.dtype}; float32, float64 and int16 are taken: scale others to [-1, 1] first"
        )
    with np.errstate(over="ignore"):  # beyond float32 is infinite, which is refused with its place
        return array.astype(np.float32)


def _metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise MediaError(f"metadata is a {type(metadata).__qualname__}; it is a mapping with any of {', '.join(_METADATA)}")
    for key in metadata:
        if key not in _METADATA:
            raise MediaError(f"metadata has the unknown key {key!r:.80}; it may have {', '.join(_METADATA)}")
    return dict(metadata)
