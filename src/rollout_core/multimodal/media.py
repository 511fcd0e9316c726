"""Pictures, videos and sounds as frozen values: private, read-only, and equal exactly if their content identity is.

Their bytes are immutable and nobody else's, so nothing that a caller or a processor does later changes one. Copies (``copy``,
``deepcopy``) are the value itself. Unpickling checks and hashes anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias

import numpy as np

from rollout_core.errors import MediaError
from rollout_core.multimodal.compose import check_layout, rgb_bytes
from rollout_core.multimodal.identity import picture_identity, sound_identity, video_identity
from rollout_core.multimodal.values import Colour, check_colour, check_indices, pair, plain_bytes, positive_or_none, whole_number

if TYPE_CHECKING:
    from PIL import Image

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

WHITE: Final[Colour] = (255, 255, 255)


class _Value:
    """Equality, hash and copies of all three."""

    __slots__ = ()
    modality: ClassVar[str]
    identity: str

    def __eq__(self, other: object) -> bool:
        return self.identity == other.identity if isinstance(other, _Value) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.identity)

    def __copy__(self) -> _Value:
        return self

    def __deepcopy__(self, memo: object) -> _Value:
        return self


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Picture(_Value):
    """One picture, upright: EXIF orientation was applied before.

    ``mode`` and ``pixels`` are Pillow's (``Image.tobytes``), ``size`` is (width, height). The modes are 1, L, LA, P, PA, RGB, RGBA
    and CMYK. ``palette`` (P, PA) is given as RGBA entries and kept as 256 of them, opaque black where it had none, as Pillow draws
    them; a P picture is transparent where its palette's alpha says so. ``transparency`` (1, L, RGB) is the one transparent colour.

    ``rgb`` is uint8 (H, W, 3): the picture laid over ``background``. It is made of the other fields alone, and shares the bytes of
    ``pixels`` for an opaque RGB picture. ``background`` is not content, so it is no part of ``identity`` and of equality: it
    belongs to the artifact's fingerprint.

    Raises ``MediaError`` for another mode, an empty picture, or fields that do not fit each other.
    """

    modality: ClassVar[str] = "image"
    mode: str
    size: tuple[int, int]
    pixels: bytes
    palette: bytes | None = None
    transparency: bytes | None = None
    background: Colour = WHITE
    rgb: Bytes = field(init=False)
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        width, height = (whole_number(side, "a picture's side") for side in pair(self.size))
        background = check_colour(self.background, "background")
        pixels = plain_bytes(self.pixels, "pixels")
        given = (
            None if self.palette is None else plain_bytes(self.palette, "palette"),
            None if self.transparency is None else plain_bytes(self.transparency, "transparency"),
        )
        palette, transparency = check_layout(self.mode, (width, height), pixels, *given)
        data = rgb_bytes(self.mode, (width, height), pixels, palette, transparency, background)
        values: dict[str, Any] = {"size": (width, height), "pixels": pixels, "background": background}
        values |= {"palette": palette, "transparency": transparency}
        values["rgb"] = np.frombuffer(data, np.uint8).reshape(height, width, 3)
        values["identity"] = picture_identity(self.mode, (width, height), pixels, palette, transparency)
        _set(self, values)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for pixels and palette."""
        shared = self.mode == "RGB" and self.transparency is None
        return len(self.pixels) + (0 if shared else self.rgb.nbytes) + len(self.palette or b"")

    def to_pil(self) -> Image.Image:
        """A new Pillow image in mode RGB, the caller's own."""
        image: Image.Image = require_pillow().frombytes("RGB", self.size, self.rgb.tobytes())
        return image

    def __reduce__(self) -> tuple[Any, ...]:
        return Picture, (self.mode, self.size, self.pixels, self.palette, self.transparency, self.background)

    def __repr__(self) -> str:
        return f"Picture({self.mode}, {self.size[0]}x{self.size[1]}, {self.identity[:12]})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Video(_Value):
    """Frames, uint8 (T, H, W, 3), and what is known of the video that they were taken from.

    The names are those of ``VideoMetadata`` in transformers 5.23 (video_utils.py): ``fps`` in frames per second of the original,
    ``frames_indices`` the place of each frame in it, ``total_num_frames`` its length, ``duration`` in seconds. None is unknown.

    Raises ``MediaError`` for frames of another dtype or shape, no frames, or metadata that is impossible.
    """

    modality: ClassVar[str] = "video"
    frames: Bytes
    fps: float | None = None
    frames_indices: tuple[int, ...] | None = None
    total_num_frames: int | None = None
    duration: float | None = None
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        shape, dtype = getattr(self.frames, "shape", None), getattr(self.frames, "dtype", None)
        if not isinstance(self.frames, np.ndarray) or dtype != np.uint8 or self.frames.ndim != 4 or self.frames.shape[3] != 3:
            raise MediaError(f"frames are {dtype} {shape}; they are a numpy array, uint8 (T, H, W, 3)")
        if self.frames.size == 0:
            raise MediaError(f"frames have shape {shape}; a video has at least one frame, of at least one pixel")
        fps, duration = (positive_or_none(value, name) for name, value in (("fps", self.fps), ("duration", self.duration)))
        total = None if self.total_num_frames is None else whole_number(self.total_num_frames, "total_num_frames")
        indices = None if self.frames_indices is None else check_indices(self.frames_indices, len(self.frames), total)
        frames = _frozen(self.frames)
        values: dict[str, Any] = {"frames": frames, "fps": fps, "duration": duration}
        values |= {"frames_indices": indices, "total_num_frames": total}
        values["identity"] = video_identity(frames, fps, indices, total, duration)
        _set(self, values)

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for the frames."""
        return int(self.frames.nbytes)

    def metadata(self) -> dict[str, Any]:
        """fps, frames_indices (a list), total_num_frames, duration; new objects every time: processors change them in place."""
        indices = None if self.frames_indices is None else list(self.frames_indices)
        return {
            "fps": self.fps,
            "frames_indices": indices,
            "total_num_frames": self.total_num_frames,
            "duration": self.duration,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return Video, (self.frames, self.fps, self.frames_indices, self.total_num_frames, self.duration)

    def __repr__(self) -> str:
        frames, height, width, _ = self.frames.shape
        return f"Video({frames} frames, {width}x{height}, {self.identity[:12]})"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Sound(_Value):
    """One channel of samples, float32 (n,), at ``sampling_rate`` Hz.

    Raises ``MediaError`` for another dtype or shape, no samples, NaN or infinity, or a rate that is no whole number above 0.
    """

    modality: ClassVar[str] = "audio"
    samples: Floats
    sampling_rate: int
    identity: str = field(init=False)

    def __post_init__(self) -> None:
        shape, dtype = getattr(self.samples, "shape", None), getattr(self.samples, "dtype", None)
        if not isinstance(self.samples, np.ndarray) or dtype != np.float32 or self.samples.ndim != 1:
            raise MediaError(f"samples are {dtype} {shape}; they are a numpy array, float32 (n,), one channel")
        if self.samples.size == 0:
            raise MediaError("the sound has no samples; leave it out of the message")
        samples = _frozen(self.samples)
        if not np.isfinite(samples).all():
            place = int(np.flatnonzero(~np.isfinite(samples))[0])
            raise MediaError(f"sample {place} of the sound is {samples[place]}; every sample is a finite number")
        rate = whole_number(self.sampling_rate, "sampling_rate")
        _set(self, {"samples": samples, "sampling_rate": rate, "identity": sound_identity(samples, rate)})

    @property
    def nbytes(self) -> int:
        """Bytes held in memory for the samples."""
        return int(self.samples.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return Sound, (self.samples, self.sampling_rate)

    def __repr__(self) -> str:
        return f"Sound({len(self.samples)} samples, {self.sampling_rate} Hz, {self.identity[:12]})"


Media: TypeAlias = Picture | Video | Sound


def require_pillow() -> Any:
    """The module ``PIL.Image``; ``MediaError`` that says how to get it if it is missing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MediaError("pictures need Pillow, which is not installed: pip install 'rollout-core[hf]'") from error
    return Image


def _set(value: _Value, values: dict[str, Any]) -> None:
    for name, part in values.items():
        object.__setattr__(value, name, part)


def _frozen(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array over immutable bytes that no other array can write: a copy, unless it is all of such bytes already."""
    owner: Any = array
    while isinstance(owner, np.ndarray):
        owner = owner.base
    whole = isinstance(owner, bytes) and len(owner) == array.nbytes and array.flags.c_contiguous and array.dtype.isnative
    data = owner if whole else array.astype(array.dtype.newbyteorder("="), copy=False).tobytes()
    return np.frombuffer(data, array.dtype.newbyteorder("=")).reshape(array.shape)
