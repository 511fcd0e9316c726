"""The values: private, read-only, equal by identity, and laid over their background as Pillow would."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from rollout_core.errors import MediaError
from rollout_core.multimodal.identity import picture_identity
from rollout_core.multimodal.media import Picture, Sound, Video

BYTES_PER_PIXEL = {"L": 1, "LA": 2, "P": 1, "PA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}
COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


@st.composite
def fields(draw, modes=("1", *BYTES_PER_PIXEL)):
    """Arguments of a picture of up to 9 by 4 pixels."""
    mode, width, height = draw(st.sampled_from(modes)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    if mode == "1":
        bits = draw(st.lists(st.booleans(), min_size=width * height, max_size=width * height))
        pixels = np.packbits(np.array(bits).reshape(height, width), axis=1).tobytes()
    else:
        count = width * height * BYTES_PER_PIXEL[mode]
        pixels = draw(st.binary(min_size=count, max_size=count))
    palette = draw(st.binary(min_size=1, max_size=256).map(lambda b: b * 4)) if mode in ("P", "PA") else None
    keyed = {
        "1": st.sampled_from([b"\0", b"\xff"]),
        "L": st.sampled_from(pixels).map(lambda v: bytes([v])),
        "RGB": st.just(pixels[:3]),
    }
    transparency = draw(st.none() | keyed[mode]) if mode in keyed else None
    return mode, (width, height), pixels, palette, transparency


def by_pillow(mode, size, pixels, palette, transparency, background) -> np.ndarray:
    """The picture over a background, with Pillow's own conversion and mask."""
    image = Image.frombytes(mode, size, pixels)
    if palette is not None:
        image.putpalette(palette, "RGBA")
    if transparency is not None:
        image.info["transparency"] = transparency[0] if len(transparency) == 1 else tuple(transparency)
    if mode == "CMYK":
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    below = Image.new("RGB", size, background)
    below.paste(rgba, mask=rgba.split()[3])
    return np.asarray(below)


@given(fields(), COLOURS)
def test_rgb_is_what_pillow_lays_over_the_background(arguments, background):
    picture = Picture(*arguments, background)
    assert picture.rgb.dtype == np.uint8
    assert np.array_equal(picture.rgb, by_pillow(*arguments, background))
    assert np.array_equal(np.asarray(picture.to_pil()), picture.rgb)
    assert picture.to_pil().mode == "RGB"


def test_only_the_very_colour_is_transparent():
    pixels = bytes([1, 2, 3, 1, 2, 4, 1, 5, 3, 6, 2, 3])
    rgb = Picture("RGB", (4, 1), pixels, transparency=bytes([1, 2, 3]), background=(9, 9, 9)).rgb
    assert rgb.tolist() == [[[9, 9, 9], [1, 2, 4], [1, 5, 3], [6, 2, 3]]]


def test_every_alpha_is_rounded_to_nearest():
    """All pairs of alpha and colour, in exact integers."""
    pixels = bytes(part for alpha in range(256) for value in range(256) for part in (value, alpha))
    rgb = Picture("LA", (256, 256), pixels, background=(0, 100, 255)).rgb
    for channel, below in enumerate((0, 100, 255)):
        wanted = [[(2 * (a * v + (255 - a) * below) + 255) // 510 for v in range(256)] for a in range(256)]
        assert rgb[..., channel].tolist() == wanted


@given(fields())
def test_identity_is_of_the_content_and_not_of_the_background(arguments):
    white, black = Picture(*arguments), Picture(*arguments, background=(0, 0, 0))
    assert white == black
    assert hash(white) == hash(black)
    assert white.identity == picture_identity(white.mode, white.size, white.pixels, white.palette, white.transparency)


@given(fields())
def test_copies_and_pickles_are_equal_and_still_private(arguments):
    picture = Picture(*arguments, background=(1, 2, 3))
    assert copy.deepcopy(picture) is picture
    assert copy.copy(picture) is picture
    again = pickle.loads(pickle.dumps(picture))
    assert again == picture
    assert np.array_equal(again.rgb, picture.rgb)
    assert not again.rgb.flags.writeable
    assert again.background == (1, 2, 3)


def check_read_only(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="read-only"):
        array[...] = 0
    with pytest.raises(ValueError, match="WRITEABLE"):
        array.setflags(write=True)


def test_arrays_cannot_be_written():
    check_read_only(Picture("RGB", (1, 2), bytes(6)).rgb)
    check_read_only(Picture("L", (1, 2), bytes(2)).rgb)
    check_read_only(Video(np.zeros((1, 2, 2, 3), np.uint8)).frames)
    check_read_only(Sound(np.zeros(3, np.float32), 8000).samples)


def test_writing_to_what_was_given_changes_nothing():
    pixels, frames, samples, indices = bytearray(6), np.zeros((2, 1, 1, 3), np.uint8), np.zeros(2, np.float32), [0, 1]
    picture, video, sound = Picture("RGB", (1, 2), pixels), Video(frames, frames_indices=indices), Sound(samples, 8000)
    pixels[0], frames[0], samples[0], indices[0] = 9, 9, 9, 9
    assert not picture.rgb.any()
    assert picture.pixels == bytes(6)
    assert not video.frames.any()
    assert video.frames_indices == (0, 1)
    assert not sound.samples.any()


def test_a_read_only_view_of_the_callers_array_is_copied_too():
    frames = np.zeros((2, 1, 1, 3), np.uint8)
    view = frames[:]
    view.setflags(write=False)
    owner = bytearray(8)
    video, sound = Video(view), Sound(np.frombuffer(owner, np.float32), 8000)
    frames[:], owner[3] = 1, 66
    assert not video.frames.any()
    assert not sound.samples.any()


def test_a_part_of_a_larger_value_holds_no_more_than_itself():
    large = Video(np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3))
    part = Video(large.frames[1:2])
    owner = part.frames
    while isinstance(owner, np.ndarray):
        owner = owner.base
    assert len(owner) == 12
    assert part.frames.tolist() == large.frames[1:2].tolist()
    assert Video(large.frames[::-1]).frames.tolist() == large.frames[::-1].tolist()
    turned = Video(large.frames.transpose(0, 2, 1, 3))
    assert turned.frames.tolist() == large.frames.transpose(0, 2, 1, 3).tolist()


def test_values_are_frozen():
    picture = Picture("L", (1, 1), b"a")
    for name in ("identity", "rgb", "mode"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(picture, name, None)


def test_an_rgb_picture_holds_its_pixels_once():
    pixels = bytes(range(12))
    picture = Picture("RGB", (2, 2), pixels)
    assert picture.pixels is pixels
    assert picture.nbytes == 12
    assert np.shares_memory(picture.rgb, np.frombuffer(pixels, np.uint8))
    assert Picture("L", (2, 2), bytes(4)).nbytes == 4 + 12
    assert Picture("P", (2, 2), bytes(4), bytes(4)).nbytes == 4 + 12 + 1024
    assert Video(np.zeros((1, 2, 2, 3), np.uint8)).nbytes == 12
    assert Sound(np.zeros(3, np.float32), 8000).nbytes == 12


def test_modalities_and_equality():
    values = [Picture("RGB", (1, 1), bytes(3)), Video(np.zeros((1, 1, 1, 3), np.uint8)), Sound(np.zeros(1, np.float32), 1)]
    assert [value.modality for value in values] == ["image", "video", "audio"]
    assert len(set(values)) == 3
    assert values[0] != values[0].identity
    assert values[0] == Picture("RGB", (1, 1), bytes(3))


def test_reprs_are_short_and_show_no_pixels():
    assert repr(Picture("RGB", (300, 100), bytes(90000))).startswith("Picture(RGB, 300x100, ")
    assert repr(Video(np.zeros((3, 10, 20, 3), np.uint8))).startswith("Video(3 frames, 20x10, ")
    assert repr(Sound(np.zeros(9, np.float32), 8000)).startswith("Sound(9 samples, 8000 Hz, ")
    assert len(repr(Picture("RGB", (300, 100), bytes(90000)))) < 50


def test_metadata_is_new_every_time():
    video = Video(np.zeros((2, 1, 1, 3), np.uint8), 2, [3, 5], np.int64(8), 4)
    wanted = {"fps": 2.0, "frames_indices": [3, 5], "total_num_frames": 8, "duration": 4.0}
    metadata = video.metadata()
    assert metadata == wanted
    assert type(metadata["frames_indices"]) is list
    metadata["frames_indices"].append(9)
    metadata["fps"] = None
    assert video.metadata() == wanted
    assert set(Video(video.frames).metadata().values()) == {None}
    again = pickle.loads(pickle.dumps(video))
    assert again == video
    assert again.metadata() == wanted
    check_read_only(again.frames)


@given(st.binary(max_size=256).map(lambda b: b * 4))
@example(b"\0\0\0\xff")
def test_a_palette_is_kept_in_full(palette):
    """Entries that are missing are opaque black, so writing them out changes nothing; PA has its alpha in the pixels."""
    short = Picture("P", (1, 1), b"\0", palette)
    assert short == Picture("P", (1, 1), b"\0", short.palette)
    assert len(short.palette) == 1024
    assert short.palette == palette + b"\0\0\0\xff" * (256 - len(palette) // 4)
    assert set(Picture("PA", (1, 1), b"\0\0", palette).palette[3::4]) == {255}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("I;16", (1, 1), bytes(2)), "mode 'I;16'"),
        ((["RGB"], (1, 1), bytes(3)), "mode"),
        (("RGB", (0, 1), b""), "side is 0"),
        (("RGB", (1, -1), b""), "side is -1"),
        (("RGB", (1, 1.0), bytes(3)), "side is 1.0"),
        (("RGB", [1, 1], bytes(3)), "width, height"),
        (("RGB", (1, 1), bytes(4)), "3 bytes of pixels, and 4"),
        (("1", (9, 2), bytes(3)), "4 bytes of pixels, and 3"),
        (("RGB", (1, 1), 3), "pixels is a int"),
        (("P", (1, 1), b"a"), "needs a palette"),
        (("L", (1, 1), b"a", bytes(4)), "has no palette"),
        (("P", (1, 1), b"a", bytes(3)), "palette has 3 bytes"),
        (("P", (1, 1), b"a", bytes(1028)), "palette has 1028 bytes"),
        (("L", (1, 1), b"a", None, b"abc"), "one colour"),
        (("RGBA", (1, 1), b"abcd", None, b"abc"), "one colour"),
        (("L", (1, 1), b"a", None, None, (1, 2)), "background"),
        (("L", (1, 1), b"a", None, None, (1, 2, 256)), "background"),
        (("L", (1, 1), b"a", None, None, (1, 2, 0.5)), "background"),
        (("L", (1, 1), b"a", None, None, None), "background"),
    ],
)
def test_pictures_that_cannot_be(arguments, message):
    with pytest.raises(MediaError, match=message):
        Picture(*arguments)


ONE = np.zeros((1, 1, 1, 3), np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "uint8 \\(T, H, W, 3\\)"),
        ((ONE.astype(np.float32),), "float32"),
        ((ONE[0],), "\\(1, 1, 3\\)"),
        ((ONE[..., :2],), "\\(1, 1, 1, 2\\)"),
        ((ONE[:0],), "at least one frame"),
        ((ONE[:, :0],), "at least one frame"),
        ((ONE, 0), "fps is 0"),
        ((ONE, -1.0), "fps is -1"),
        ((ONE, float("nan")), "fps is nan"),
        ((ONE, float("inf")), "fps is inf"),
        ((ONE, "2"), "fps is '2'"),
        ((ONE, True), "fps is True"),
        ((ONE, 10**400), "fps is 1000"),
        ((ONE, None, [0, 1]), "2 entries for 1 frames"),
        ((ONE, None, []), "0 entries for 1 frames"),
        ((ONE, None, [-1]), "frames_indices\\[0\\] is -1"),
        ((ONE, None, [0.0]), "frames_indices\\[0\\] is 0.0"),
        ((ONE, None, 3), "sequence of whole numbers"),
        ((ONE, None, [2**64]), "frames_indices\\[0\\]"),
        ((ONE, None, [5], 5), "frame 5 of a video of total_num_frames 5"),
        ((ONE, None, None, 0), "total_num_frames is 0"),
        ((ONE, None, None, True), "total_num_frames is True"),
        ((ONE, None, None, None, 0.0), "duration is 0.0"),
    ],
)
def test_videos_that_cannot_be(arguments, message):
    with pytest.raises(MediaError, match=message):
        Video(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], 1), "float32 \\(n,\\)"),
        ((np.zeros(2), 1), "float64"),
        ((np.zeros((2, 1), np.float32), 1), "\\(2, 1\\)"),
        ((np.zeros(0, np.float32), 1), "no samples"),
        ((np.array([0, np.nan], np.float32), 1), "sample 1 of the sound is nan"),
        ((np.array([-np.inf], np.float32), 1), "sample 0 of the sound is -inf"),
        ((np.zeros(1, np.float32), 0), "sampling_rate is 0"),
        ((np.zeros(1, np.float32), 8000.0), "sampling_rate is 8000.0"),
        ((np.zeros(1, np.float32), None), "sampling_rate is None"),
    ],
)
def test_sounds_that_cannot_be(arguments, message):
    with pytest.raises(MediaError, match=message):
        Sound(*arguments)


def test_to_pil_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MediaError, match="pip install 'rollout-core\\[hf\\]'"):
        Picture("L", (1, 1), b"a").to_pil()


def test_to_pil_is_the_callers_own():
    picture = Picture("RGB", (1, 1), bytes(3))
    picture.to_pil().putpixel((0, 0), (9, 9, 9))
    assert not picture.rgb.any()
