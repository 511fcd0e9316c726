"""What a picture, video or sound is, as one hash: equal content has equal identity, in any process, version and language.

Every identity is SHA-256 (lower case hex) over a list of fields, written one after another as

    length of kind (1 byte) | kind (ASCII) | length of value (8 bytes, little-endian) | value

so no two lists of fields share their bytes. The first field has the kind ``domain`` and says what is hashed and in which version
of this format. A field that does not apply is left out, which differs from an empty one. Whole numbers are 8 bytes, unsigned,
little-endian; several stand one after another. Real numbers are IEEE 754 binary64, little-endian. Text is UTF-8.

======== =================================================================================================================
image    domain ``rollout_core/content/1``, modality ``image``, mode, size (width, height), palette if any (256 RGBA
         entries), transparency if any (one byte per colour channel), dtype ``uint8``, pixels
video    domain ``rollout_core/content/1``, modality ``video``, dtype ``uint8``, shape (T, H, W, 3), fps, frames_indices,
         total_num_frames, duration (each if known), data
audio    domain ``rollout_core/content/1``, modality ``audio``, dtype ``float32``, shape (n), sampling_rate, data
         (little-endian)
artifact domain ``rollout_core/artifact/1``, content (64 hex digits), fingerprint
uuid     domain ``rollout_core/engine-uuid/1``, artifact (64 hex digits), salt
======== =================================================================================================================

The background colour under a transparent picture is not content: it belongs to the fingerprint.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np

from rollout_core.errors import MediaError

_CONTENT: Final = b"rollout_core/content/1"
_ARTIFACT: Final = b"rollout_core/artifact/1"
_ENGINE_UUID: Final = b"rollout_core/engine-uuid/1"
_HEX: Final = re.compile(r"[0-9a-f]{64}")

_Field: TypeAlias = tuple[bytes, bytes | memoryview | None]


def picture_identity(
    mode: str, size: tuple[int, int], pixels: bytes, palette: bytes | None = None, transparency: bytes | None = None
) -> str:
    """Content identity of a picture: Pillow's mode, (width, height), and the bytes of that mode, row by row.

    ``palette`` is 256 RGBA entries, for the modes P and PA; ``transparency`` the one colour that is transparent, for 1, L and RGB.
    """
    return _hash(
        (b"domain", _CONTENT),
        (b"modality", b"image"),
        (b"mode", mode.encode()),
        (b"size", _whole(size)),
        (b"palette", palette),
        (b"transparency", transparency),
        (b"dtype", b"uint8"),
        (b"pixels", pixels),
    )


def video_identity(
    frames: np.ndarray[Any, np.dtype[np.uint8]],
    fps: float | None = None,
    frames_indices: Sequence[int] | None = None,
    total_num_frames: int | None = None,
    duration: float | None = None,
) -> str:
    """Content identity of frames, uint8 (T, H, W, 3), and what is known of the video that they were taken from."""
    return _hash(
        (b"domain", _CONTENT),
        (b"modality", b"video"),
        (b"dtype", b"uint8"),
        (b"shape", _whole(frames.shape)),
        (b"fps", None if fps is None else struct.pack("<d", fps)),
        (b"frames_indices", None if frames_indices is None else _whole(frames_indices)),
        (b"total_num_frames", None if total_num_frames is None else _whole([total_num_frames])),
        (b"duration", None if duration is None else struct.pack("<d", duration)),
        (b"data", _bytes_of(frames, "u1")),
    )


def sound_identity(samples: np.ndarray[Any, np.dtype[np.float32]], sampling_rate: int) -> str:
    """Content identity of samples, float32 (n,), at a sampling rate in Hz. Bytewise: -0.0 differs from 0.0."""
    return _hash(
        (b"domain", _CONTENT),
        (b"modality", b"audio"),
        (b"dtype", b"float32"),
        (b"shape", _whole(samples.shape)),
        (b"sampling_rate", _whole([sampling_rate])),
        (b"data", _bytes_of(samples, "<f4")),
    )


def artifact_identity(content: str, fingerprint: str) -> str:
    """Identity of what a processor makes of a content.

    ``fingerprint`` names everything that has a say in it: the processor's class, library version, revision and settings, and the
    background colour that transparent pictures are laid on. Raises ``MediaError`` if ``content`` is no identity.
    """
    return _hash((b"domain", _ARTIFACT), (b"content", _identity(content, "content")), (b"fingerprint", _text(fingerprint)))


def engine_uuid(artifact: str, salt: str) -> str:
    """The name under which an engine caches an artifact, 64 hex digits. Tenants or weights that must not share a cache take
    different salts; "" is no salt. Raises ``MediaError`` if ``artifact`` is no identity."""
    return _hash((b"domain", _ENGINE_UUID), (b"artifact", _identity(artifact, "artifact")), (b"salt", _text(salt)))


def _hash(*fields: _Field) -> str:
    state = hashlib.sha256()
    for kind, value in fields:
        if value is not None:
            state.update(bytes([len(kind)]) + kind + len(value).to_bytes(8, "little"))
            state.update(value)
    return state.hexdigest()


def _whole(values: Iterable[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def _bytes_of(array: np.ndarray[Any, Any], dtype: str) -> memoryview:
    """The array's bytes in C order, without a copy where they lie so already."""
    return np.ascontiguousarray(array, dtype=dtype).reshape(-1).view(np.uint8).data


def _identity(value: str, what: str) -> bytes:
    if not isinstance(value, str) or not _HEX.fullmatch(value):
        raise MediaError(f"{what} is {value!r:.80}; it is an identity: 64 lower case hex digits, as this module makes them")
    return value.encode()


def _text(value: str) -> bytes:
    try:
        return value.encode()
    except (UnicodeEncodeError, AttributeError) as error:
        raise MediaError(f"{value!r:.80} is no text that UTF-8 can hold; give a plain str") from error
