"""Identities against the format written in the module's docstring, golden values, and what they must tell apart."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from rollout_core.errors import MediaError
from rollout_core.multimodal.identity import (
    artifact_identity,
    engine_uuid,
    picture_identity,
    sound_identity,
    video_identity,
)

PALETTE = bytes(range(256)) * 4
FRAMES = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
SAMPLES = np.array([0.0, 0.5, -1.0], np.float32)
HEX = "0123456789abcdef" * 4
GOLDEN = {
    "picture": "4124e5810d061c50046e27869de9d1716afacd451bf3c88af4775e4052a49249",
    "palette": "24ed341b91b2d28e29e518a7e4c442b81dab5979be5b02a608cfd09a55d5aafd",
    "transparency": "b2e26248ce864648db021213beb43a3328fe012a239c7c44afd06436841c4815",
    "video": "748f52b0b7e3819afe8f87266e87264875942618d9144f237a467d0666abd47b",
    "sound": "edd2c057f939343392d5f6dc7d02ccfe18b758794696e5d1bb4d03c8d47a3579",
    "artifact": "e2ffd8d992f08afff2e2ce55d9cc6048957e61251bcb05bbbd5e899276dce41f",
    "uuid": "0d82d2ce91a8f380cb0201c4c02ca23b1a5e6fab205a631a1285f68ebf980b48",
}


def hashed(*fields: tuple[str, bytes]) -> str:
    """SHA-256 over the fields, as the docstring says to write them."""
    text = b""
    for kind, value in fields:
        text += struct.pack("<B", len(kind)) + kind.encode("ascii") + struct.pack("<Q", len(value)) + value
    return hashlib.sha256(text).hexdigest()


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def test_picture_format():
    head = (("domain", b"rollout_core/content/1"), ("modality", b"image"))
    plain = hashed(*head, ("mode", b"RGB"), ("size", numbers(2, 1)), ("dtype", b"uint8"), ("pixels", b"abcdef"))
    assert picture_identity("RGB", (2, 1), b"abcdef") == plain
    keyed = hashed(
        *head,
        ("mode", b"RGB"),
        ("size", numbers(2, 1)),
        ("transparency", b"abc"),
        ("dtype", b"uint8"),
        ("pixels", b"abcdef"),
    )
    assert picture_identity("RGB", (2, 1), b"abcdef", transparency=b"abc") == keyed
    coloured = hashed(
        *head,
        ("mode", b"P"),
        ("size", numbers(1, 2)),
        ("palette", PALETTE),
        ("dtype", b"uint8"),
        ("pixels", b"ab"),
    )
    assert picture_identity("P", (1, 2), b"ab", PALETTE) == coloured


def test_video_format():
    head = (("domain", b"rollout_core/content/1"), ("modality", b"video"), ("dtype", b"uint8"), ("shape", numbers(2, 2, 2, 3)))
    assert video_identity(FRAMES) == hashed(*head, ("data", bytes(range(24))))
    full = hashed(
        *head,
        ("fps", struct.pack("<d", 2.5)),
        ("frames_indices", numbers(0, 7)),
        ("total_num_frames", numbers(8)),
        ("duration", struct.pack("<d", 3.2)),
        ("data", bytes(range(24))),
    )
    assert video_identity(FRAMES, 2.5, (0, 7), 8, 3.2) == full


def test_sound_format():
    wanted = hashed(
        ("domain", b"rollout_core/content/1"),
        ("modality", b"audio"),
        ("dtype", b"float32"),
        ("shape", numbers(3)),
        ("sampling_rate", numbers(16000)),
        ("data", struct.pack("<3f", 0.0, 0.5, -1.0)),
    )
    assert sound_identity(SAMPLES, 16000) == wanted


def test_derived_formats():
    artifact = hashed(("domain", b"rollout_core/artifact/1"), ("content", HEX.encode()), ("fingerprint", "größe=2".encode()))
    assert artifact_identity(HEX, "größe=2") == artifact
    assert engine_uuid(HEX, "") == hashed(("domain", b"rollout_core/engine-uuid/1"), ("artifact", HEX.encode()), ("salt", b""))


def test_golden_values():
    """Pinned: a change here makes every cache and every stored conversation miss, so it needs a new version in the domain."""
    assert picture_identity("RGB", (2, 1), b"abcdef") == GOLDEN["picture"]
    assert picture_identity("P", (1, 2), b"ab", PALETTE) == GOLDEN["palette"]
    assert picture_identity("L", (2, 1), b"ab", transparency=b"a") == GOLDEN["transparency"]
    assert video_identity(FRAMES, 2.5, (0, 7), 8, 3.2) == GOLDEN["video"]
    assert sound_identity(SAMPLES, 16000) == GOLDEN["sound"]
    assert artifact_identity(HEX, "größe=2") == GOLDEN["artifact"]
    assert engine_uuid(HEX, "tenant") == GOLDEN["uuid"]


PICTURES = st.builds(
    lambda mode, size, pixels, palette, transparency: (mode, size, pixels, palette, transparency),
    st.sampled_from(["L", "P", "RGB", "R", "GB"]),
    st.tuples(st.integers(1, 300), st.integers(1, 300)),
    st.binary(max_size=4),
    st.none() | st.binary(max_size=4),
    st.none() | st.binary(max_size=4),
)


@given(PICTURES, PICTURES)
def test_pictures_that_differ_anywhere_differ(one, other):
    assume(one != other)
    assert picture_identity(*one) != picture_identity(*other)


@given(PICTURES, st.integers(0, 4), st.data())
def test_pictures_that_differ_in_one_field_differ(one, place, data):
    other = list(one)
    other[place] = data.draw(PICTURES)[place]
    assert (picture_identity(*one) == picture_identity(*other)) == (list(one) == other)


VIDEOS = st.tuples(
    st.sampled_from([(2, 1, 1, 3), (1, 2, 1, 3), (1, 1, 2, 3)]),
    st.binary(min_size=6, max_size=6),
    st.none() | st.floats(0.1, 100),
    st.none() | st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=3),
    st.none() | st.integers(1, 2**63 - 1),
    st.none() | st.floats(0.1, 100),
)


@given(VIDEOS, st.integers(0, 5), st.data())
def test_videos_that_differ_in_one_field_differ(one, place, data):
    other = list(one)
    other[place] = data.draw(VIDEOS)[place]
    first, second = (
        video_identity(np.frombuffer(content, np.uint8).reshape(shape), *rest) for shape, content, *rest in (one, tuple(other))
    )
    assert (first == second) == (list(one) == other)


def test_a_number_in_another_field_differs():
    """fps and duration, total and one frame index have values of the same bytes."""
    assert video_identity(FRAMES, fps=2.0) != video_identity(FRAMES, duration=2.0)
    assert video_identity(FRAMES, frames_indices=[5]) != video_identity(FRAMES, total_num_frames=5)
    assert video_identity(FRAMES, frames_indices=[]) != video_identity(FRAMES)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=4), st.integers(1, 96000), st.data())
def test_sounds(samples, rate, data):
    array = np.array(samples, np.float32)
    changed = array.copy()
    changed.view(np.uint32)[data.draw(st.integers(0, len(samples) - 1))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    assert sound_identity(array, rate) != sound_identity(changed, rate)
    assert sound_identity(array, rate) != sound_identity(array, rate + 1)
    assert sound_identity(array, rate) == sound_identity(array.astype(">f4"), rate)


def test_layout_in_memory_is_not_content():
    strided = np.zeros((2, 2, 2, 6), np.uint8)[..., ::2]
    strided[:] = FRAMES
    assert video_identity(strided) == video_identity(FRAMES)
    assert sound_identity(SAMPLES[::-1], 8000) == sound_identity(SAMPLES[::-1].copy(), 8000)


def test_modalities_differ():
    data = np.zeros((1, 1, 1, 3), np.uint8)
    assert len({picture_identity("RGB", (1, 1), bytes(3)), video_identity(data), sound_identity(SAMPLES[:1], 1)}) == 3


@given(st.text(max_size=8), st.text(max_size=8))
def test_fingerprints_and_salts_separate(one, other):
    assume(one != other)
    assert artifact_identity(HEX, one) != artifact_identity(HEX, other)
    assert engine_uuid(HEX, one) != engine_uuid(HEX, other)


def test_an_artifact_is_no_uuid():
    assert len({artifact_identity(HEX, "x"), engine_uuid(HEX, "x"), HEX}) == 3
    assert artifact_identity(HEX, "x") != artifact_identity(HEX[::-1], "x")
    assert engine_uuid(HEX, "x") != engine_uuid(HEX[::-1], "x")


@pytest.mark.parametrize("bad", ["", "ab", HEX + "\n", HEX.upper(), HEX[:-1] + "g", None, b"0" * 64])
def test_only_identities_are_identities(bad):
    with pytest.raises(MediaError, match="64 lower case hex digits"):
        artifact_identity(bad, "x")
    with pytest.raises(MediaError, match="64 lower case hex digits"):
        engine_uuid(bad, "x")


@pytest.mark.parametrize("bad", ["\ud800", None, b"x"])
def test_text_that_has_no_bytes(bad):
    with pytest.raises(MediaError, match="plain str"):
        engine_uuid(HEX, bad)
