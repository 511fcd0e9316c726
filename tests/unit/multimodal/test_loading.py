"""The same content from every source, nothing of the caller's changed or kept, and bad input refused by name."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import struct
import sys
import warnings
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from rollout_core.errors import MediaError
from rollout_core.multimodal.loading import MAX_PIXELS, load_picture, load_sound, load_video


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def same(*pictures) -> bool:
    first = pictures[0]
    return all(p.identity == first.identity and np.array_equal(p.rgb, first.rgb) and p.mode == first.mode for p in pictures)


ARRAYS = st.one_of(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(5, 9), st.integers(1, 9), st.sampled_from([1, 3, 4])),
).flatmap(lambda shape: st.integers(0, 99).map(lambda seed: noise(*shape, seed=seed)))


@given(ARRAYS)
def test_every_source_gives_the_same_picture(tmp_path_factory, array):
    image = Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array)
    data = encoded(image)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    path.write_bytes(data)
    sources = [image, data, bytearray(data), memoryview(data), path, str(path), data_url(data), Image.open(io.BytesIO(data))]
    sources += [array, torch.from_numpy(array), np.asfortranarray(array), encoded(image, "TIFF")]
    assert same(*map(load_picture, sources))
    if image.mode != "L":
        assert same(load_picture(array), load_picture(np.moveaxis(array, -1, 0), channels="first"))
    if image.mode == "RGB":
        assert same(load_picture(array), load_picture(encoded(image, "PPM")), load_picture(encoded(image, "BMP")))
        assert same(load_picture(array), load_picture(encoded(image, "WEBP", lossless=True)))
        assert np.array_equal(load_picture(array).rgb, array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK"])
def test_every_mode_is_read_and_matches_pillow(mode):
    image = Image.fromarray(noise(5, 7, 4), "RGBA" if mode != "CMYK" else None)
    image = image.convert("RGB").convert(mode) if mode != "PA" else image.convert("RGB").convert("P").convert("PA")
    picture = load_picture(image)
    assert picture.mode == mode
    assert picture.size == (7, 5)
    assert np.array_equal(picture.rgb, np.asarray(image.convert("RGB")))
    if mode not in ("PA", "CMYK"):
        assert same(picture, load_picture(encoded(image)), load_picture(Image.open(io.BytesIO(encoded(image)))))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_orientation_is_applied(tmp_path, form, options, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(noise(4, 7, 3)), form, exif=exif, **options)
    path = tmp_path / "picture"
    path.write_bytes(data)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((4, 7) if orientation >= 5 else (7, 4))
    sources = [data, path, data_url(data), Image.open(path), upright, np.asarray(upright)]
    pictures = [load_picture(source, channels=None if isinstance(source, Image.Image) else "last") for source in sources]
    assert same(*pictures)
    assert pictures[0].size == upright.size


def test_orientation_of_a_palette_picture_and_in_xmp():
    image = Image.fromarray(noise(4, 7, 3)).convert("P")
    image.info["transparency"] = 3
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, exif=exif)
    assert same(load_picture(data), load_picture(image.transpose(Image.Transpose.ROTATE_270)))
    image.info["xmp"] = b'<x tiff:Orientation="6"/>'
    assert same(load_picture(data), load_picture(image))


def test_orientation_that_was_set_on_the_image():
    image = Image.fromarray(noise(4, 7, 3))
    image.getexif()[0x0112] = 8
    assert load_picture(image).size == (4, 7)
    assert same(load_picture(image), load_picture(ImageOps.exif_transpose(image)))


def test_the_image_given_is_not_changed():
    image = Image.fromarray(noise(4, 7, 3)).convert("P")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    image = Image.open(io.BytesIO(encoded(image, exif=exif, transparency=3)))
    reference = Image.open(io.BytesIO(image.fp.getvalue()))
    load_picture(image)
    assert (image.size, image.mode, image.info, image.format) == (reference.size, reference.mode, reference.info, reference.format)
    assert image.tobytes() == reference.tobytes()
    assert image.getpalette("RGBA") == reference.getpalette("RGBA")
    assert image._exif is None
    assert dict(image.getexif()) == dict(reference.getexif()) == {0x0112: 6, 0x010E: "a description"}


def test_writing_to_what_was_given_changes_nothing():
    image, array, tensor = Image.fromarray(noise(6, 5, 3)), noise(6, 5, 3), torch.from_numpy(noise(6, 5, 3))
    data = bytearray(encoded(image))
    sources = [image, array, tensor, data]
    pictures = [load_picture(source) for source in sources]
    before = [picture.rgb.copy() for picture in pictures]
    image.paste((0, 0, 0), (0, 0, 5, 6))
    array[:], tensor[:], data[:] = 0, 0, bytes(len(data))
    assert all(np.array_equal(picture.rgb, rgb) for picture, rgb in zip(pictures, before, strict=True))
    assert same(*pictures)
    frames, samples = noise(2, 6, 5, 3), np.ones(4, np.float32)
    video, sound = load_video(frames), load_sound(samples, 8000)
    kept = frames.copy()
    frames[:], samples[:] = 0, 0
    assert np.array_equal(video.frames, kept)
    assert sound.samples.all()


def test_traps():
    """Each pair shares bytes, or RGB values, and is not the same picture."""
    data = noise(30 * 150 * 3)
    assert load_picture(data.reshape(30, 150, 3)) != load_picture(data.reshape(150, 30, 3))
    one, other = (Image.frombytes("P", (2, 1), b"\0\1") for _ in range(2))
    one.putpalette(bytes([1, 2, 3, 4, 5, 6]))
    other.putpalette(bytes([1, 2, 3, 4, 5, 7]))
    assert load_picture(one) != load_picture(other)
    rgba = noise(6, 5, 4)
    less = rgba.copy()
    less[0, 0, 3] ^= 1
    assert load_picture(rgba) != load_picture(less)
    grey = noise(6, 5)
    assert load_picture(grey) != load_picture(np.stack([grey] * 3, axis=-1))
    frames = noise(2, 6, 5, 3)
    videos = [load_video(frames, {"frames_indices": i}) for i in ([0, 1], [0, 2])] + [
        load_video(frames),
        load_video(frames, {"fps": 2}),
    ]
    assert len(set(videos)) == 4
    assert load_sound([0.5], 8000) != load_sound([0.5], 16000)


def test_transparency():
    """The three ways in which a file says it, over a background of the caller's choice."""
    palette = Image.frombytes("P", (2, 1), b"\0\1")
    palette.putpalette(bytes([10, 20, 30, 40, 50, 60]))
    rgb = Image.frombytes("RGB", (2, 1), bytes([10, 20, 30, 40, 50, 60]))
    grey = Image.frombytes("L", (2, 1), bytes([10, 40]))
    bits = Image.frombytes("1", (2, 1), b"\x40")
    blue = (0, 0, 255)
    wanted = [[[0, 0, 255], [40, 50, 60]]]
    for image, transparency in ((palette, 0), (palette, b"\0"), (rgb, (10, 20, 30))):
        data = encoded(image, transparency=transparency)
        assert load_picture(data, background=blue).rgb.tolist() == wanted
        assert load_picture(data) == load_picture(data, background=blue)
        assert load_picture(data) != load_picture(image)
    assert load_picture(encoded(grey, transparency=10), background=blue).rgb.tolist() == [[[0, 0, 255], [40, 40, 40]]]
    assert load_picture(encoded(bits, transparency=0), background=blue).rgb.tolist() == [[[0, 0, 255], [255, 255, 255]]]
    bits.info["transparency"] = 1  # as older Pillow gives the white of a PNG of one bit
    assert load_picture(bits, background=blue).rgb.tolist() == [[[0, 0, 0], [0, 0, 255]]]
    assert load_picture(encoded(palette, transparency=0)) == load_picture(encoded(palette, transparency=b"\0"))
    half = load_picture(encoded(palette, transparency=b"\xff\x80"), background=(0, 0, 0))
    assert half.rgb.tolist() == [[[10, 20, 30], [20, 25, 30]]]
    assert load_picture(encoded(Image.new("P", (1, 1)), "GIF", transparency=0), background=blue).rgb.tolist() == [[[0, 0, 255]]]


@pytest.mark.parametrize(
    ("mode", "value"), [("L", 256), ("L", b"a"), ("RGB", 3), ("RGB", (1, 2)), ("RGB", (1, 2, 300)), ("P", -1), ("P", bytes(257))]
)
def test_transparency_that_cannot_be(mode, value):
    image = Image.new(mode, (2, 2))
    image.info["transparency"] = value
    with pytest.raises(MediaError, match="transparen"):
        load_picture(image)


SEVERAL = [Image.fromarray(noise(6, 5, 3, seed=seed)) for seed in range(3)]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animated_pictures_are_refused(form):
    data = encoded(SEVERAL[0], form, save_all=True, append_images=SEVERAL[1:])
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(MediaError, match="several frames.*as a video"):
            load_picture(source)
    image = Image.open(io.BytesIO(data))
    image.seek(1)
    assert load_picture(image.copy()).size == (5, 6)


def test_of_a_jpeg_with_several_pictures_the_first_is_read():
    data = encoded(SEVERAL[0], "MPO", save_all=True, append_images=SEVERAL[1:])
    assert Image.open(io.BytesIO(data)).is_animated
    assert same(load_picture(data), load_picture(Image.open(io.BytesIO(data))))
    place = data.index(b"MPF\0") + 4
    assert same(load_picture(data), load_picture(data[:place] + b"damaged" + data[place + 7 :]))  # the list of the others


def test_an_image_whose_file_is_closed(tmp_path):
    for form in ("GIF", "PNG", "TIFF", "JPEG"):
        path = tmp_path / "picture"
        path.write_bytes(encoded(Image.fromarray(noise(6, 5)), form))
        with Image.open(path) as image:
            image.load()
        assert same(load_picture(image), load_picture(path))
        with Image.open(path) as image:
            pass
        with pytest.raises(MediaError, match="cannot be read"):
            load_picture(image)


COMPLETE = {  # the most bytes that may be missing at the end while all pixels are there
    "PNG": ({}, 12 + 4 + 4 + 2),  # IEND, two checksums, and the end mark of the compressed data
    "JPEG": ({}, 0),
    "GIF": ({}, 2),  # an empty block and the trailer
    "BMP": ({}, 1),  # what fills the last row up to 4 bytes
    "TIFF": ({}, 0),
    "WEBP": ({"lossless": True}, 0),
    "PPM": ({}, 0),
}


@pytest.mark.parametrize("form", COMPLETE)
def test_files_cut_short_are_refused(tmp_path, form):
    options, spare = COMPLETE[form]
    data = encoded(Image.fromarray(noise(11, 13, 3) // 64 * 60), form, **options)
    whole = load_picture(data)
    path = tmp_path / "picture"
    for length in range(len(data)):
        try:
            picture = load_picture(data[:length])
        except MediaError:
            path.write_bytes(data[:length])
            with pytest.raises(MediaError):
                load_picture(path)
        else:
            assert length >= len(data) - spare, f"{len(data) - length} bytes missing"
            assert same(picture, whole)


@pytest.mark.parametrize("form", COMPLETE)
@given(st.data())
def test_damaged_files_are_pictures_or_media_errors(form, data):
    file = bytearray(encoded(Image.fromarray(noise(6, 5, 3)), form, **COMPLETE[form][0]))
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, len(file) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(data.draw(st.sampled_from(["error", "ignore"])))
            picture = load_picture(file, max_pixels=10**6)
    except MediaError:
        return
    assert picture.rgb.shape == (picture.size[1], picture.size[0], 3)


@given(
    st.binary(max_size=60),
    st.sampled_from([b"", b"BM", b"II*\0", b"MM\0*", b"GIF89a", b"\xff\xd8\xff", b"P6 ", b"RIFF\0\0\0\0WEBP"]),
)
def test_arbitrary_bytes_are_media_errors(data, start):
    try:
        load_picture(start + data, max_pixels=10**6)
    except MediaError:
        return
    assert start in (b"BM", b"P6 ", b"GIF89a")  # formats so small that chance may hit them


def test_truncated_pictures_are_never_filled_in(monkeypatch):
    data = encoded(Image.fromarray(noise(11, 13, 3)))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for source in (data, data[:200]):
        with pytest.raises(MediaError, match="LOAD_TRUNCATED_IMAGES is set"):
            load_picture(source)


def png_header(width: int, height: int) -> bytes:
    """A whole PNG whose few bytes of pixels cannot fill the size that it claims."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9460, 9460), (20000, 20000), (2**31 - 1, 2**31 - 1), (9459, 9460)])
def test_decompression_bombs_are_refused_before_they_are_decoded(size, monkeypatch):
    """Above Pillow's bound for a warning, and for an error; no warning is given whatever the filters are."""
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self.size))
    data = png_header(*size)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(MediaError, match=f"has {size[0] * size[1]} pixels, and max_pixels is {MAX_PIXELS}"):
            load_picture(data)
        with pytest.raises(MediaError, match="max_pixels is 99"):
            load_picture(png_header(10, 10), max_pixels=99)
    assert not seen
    assert not loaded


def test_a_gif_whose_frame_is_larger_than_its_screen():
    """Pillow warns of it while it reads the header; here the filter makes that an error."""
    data = bytearray(encoded(Image.new("P", (1, 1)), "GIF"))
    place = data.index(b",", 13) + 5
    data[place : place + 4] = struct.pack("<HH", 10000, 10000)
    with pytest.raises(MediaError, match="100000000 pixels"):
        load_picture(data)


def test_the_bound_holds_for_every_source():
    array = noise(10, 10, 3)
    image = Image.fromarray(array)
    for source in (array, torch.from_numpy(array), image, encoded(image), encoded(image, "TIFF")):
        assert load_picture(source, max_pixels=100).size == (10, 10)
        with pytest.raises(MediaError, match="100 pixels, and max_pixels is 99"):
            load_picture(source, max_pixels=99)
    frames = noise(3, 10, 10, 3)
    for source in (frames, list(frames)):
        assert len(load_video(source, max_pixels=300).frames) == 3
        with pytest.raises(MediaError, match="300 pixels, and max_pixels is 299"):
            load_video(source, max_pixels=299)
    with pytest.raises(MediaError, match=f"frame 0 of the video: .* max_pixels is {MAX_PIXELS}"):
        load_video([png_header(9460, 9460)])


def test_zero_sized_pictures():
    sources = [Image.new("RGB", (0, 5)), np.zeros((0, 5, 3), np.uint8), np.zeros((5, 0), np.uint8), torch.zeros(5, 0, 3).byte()]
    for source in sources:
        with pytest.raises(MediaError, match="at least one pixel|side is 0"):
            load_picture(source)
    for source in [png_header(0, 5), b"GIF89a" + bytes(20)]:
        with pytest.raises(MediaError, match="cannot be read"):
            load_picture(source)
    with pytest.raises(MediaError, match="the Pillow image has size"):
        load_picture(sources[0])


@pytest.mark.parametrize("mode", ["I", "F", "I;16", "YCbCr", "HSV", "LAB", "La", "RGBa", "RGBX"])
def test_modes_without_a_plain_way_to_rgb_are_refused_by_name(mode):
    with pytest.raises(MediaError, match=f"mode '{mode}'"):
        load_picture(Image.new(mode, (2, 2)))


def test_16_bit_files_are_refused_by_name():
    with pytest.raises(MediaError, match="mode 'I;16'"):
        load_picture(encoded(Image.fromarray(noise(3, 3).astype(np.uint16))))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((5, 5, 3), np.float32), "array of float32, and uint8"),
        (np.zeros((5, 5, 3), bool), "array of bool"),
        (torch.zeros(5, 5, 3), "array of float32"),
        (torch.zeros(5, 5, 3, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(5, 5, 3, dtype=torch.uint8, device="meta"), "numpy cannot hold"),
        (torch.zeros(5, 5, dtype=torch.uint8).to_sparse(), "numpy cannot hold"),
        (np.zeros(5, np.uint8), "shape \\(5,\\)"),
        (np.zeros((1, 5, 5, 3), np.uint8), "shape \\(1, 5, 5, 3\\)"),
        (np.zeros((5, 5, 2), np.uint8), "no 1 or 3 or 4 channels first or last"),
        (np.zeros((3, 5, 3), np.uint8), "say channels="),
        (torch.zeros(3, 5, 4, dtype=torch.uint8), "say channels="),
        (None, "NoneType"),
        (3, "cannot be made of a int"),
        ([[0]], "cannot be made of a list"),
        ("http://example.org/a.png", "download it"),
        ("https://example.org/a.png", "download it"),
        ("file:///a.png", "URL"),
        ("/nowhere/a.png", "'/nowhere/a.png' is no file"),
        (Path("/nowhere"), "'/nowhere' is no file"),
        ("/", "is no file"),
        ("", "is no file"),
        ("a\0b", "is no file|cannot be read"),
        ("a" * 5000, "5002 characters"),
        (b"", "no PNG, JPEG"),
        (b"hello world", "no PNG, JPEG"),
        (b"RIFF\0\0\0\0WAVE", "cannot be read"),
        ("data:image/png,abc", "no base64 data: URL"),
        ("data:image/png;base64", "no base64 data: URL"),
        ("data:image/png;base64,a", "no valid base64"),
        ("data:image/png;base64,YWJj!", "no valid base64"),
        ("data:image/png;base64,\u00e9", "no valid base64"),
        ("data:image/png;base64,YWJj", "no PNG"),
    ],
)
def test_pictures_that_cannot_be(source, message):
    with pytest.raises(MediaError, match=message):
        load_picture(source)


def test_channels():
    array = noise(3, 5, 3)
    assert load_picture(array, channels="last").size == (5, 3)
    assert load_picture(array, channels="first").size == (3, 5)
    assert same(load_picture(noise(3, 7, 5)), load_picture(np.moveaxis(noise(3, 7, 5), 0, -1)))
    with pytest.raises(MediaError, match="channels is 'middle'"):
        load_picture(array, channels="middle")
    with pytest.raises(MediaError, match="channels first"):
        load_picture(noise(5, 5, 3), channels="first")


def test_a_file_that_may_not_be_read_and_one_that_would_block(tmp_path, monkeypatch):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(MediaError, match="is no file"):
        load_picture(pipe)
    path = tmp_path / "picture"
    path.write_bytes(b"x")

    def refuse(*_):
        raise PermissionError("not yours")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(MediaError, match="picture' cannot be read: not yours"):
        load_picture(path)


def test_pillow_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert load_picture(noise(5, 5, 3)).size == (5, 5)
    with pytest.raises(MediaError, match="pip install 'rollout-core\\[hf\\]'"):
        load_picture(b"x")


def test_every_source_gives_the_same_video():
    frames = noise(4, 6, 5, 3)
    images = [Image.fromarray(frame) for frame in frames]
    metadata = {"fps": 2, "frames_indices": [0, 2, 4, 6], "total_num_frames": 9, "duration": 4.5}
    tensor = torch.from_numpy(frames)
    sources = [frames, tensor, tensor.permute(0, 3, 1, 2), np.moveaxis(frames, -1, 1), list(frames), tuple(images)]
    sources += [[encoded(image) for image in images], list(tensor)]
    videos = [load_video(source, metadata) for source in sources]
    assert {video.identity for video in videos} == {videos[0].identity}
    assert all(np.array_equal(video.frames, frames) for video in videos)
    assert videos[0].metadata() == metadata
    metadata["frames_indices"].append(8)
    assert videos[0].frames_indices == (0, 2, 4, 6)
    assert load_video(frames) != videos[0]


def test_frames_may_be_grey_or_transparent():
    grey = noise(6, 5)
    assert load_video([grey]).frames[0].tolist() == load_picture(grey).rgb.tolist()
    clear = np.zeros((6, 5, 4), np.uint8)
    assert set(load_video([clear], background=(7, 7, 7)).frames.flat) == {7}


@pytest.mark.parametrize(
    ("source", "metadata", "message"),
    [
        ([], None, "no frames"),
        (np.zeros((0, 5, 5, 3), np.uint8), None, "at least one frame"),
        ([np.zeros((5, 5, 3), np.uint8), np.zeros((5, 6, 3), np.uint8)], None, "frame 1 of the video has size \\(6, 5\\)"),
        ([np.zeros((5, 5, 3), np.uint8), b"x"], None, "frame 1 of the video: .*no PNG"),
        ("clip.mp4", None, "'clip.mp4' is a file.*decode it"),
        (Path("clip.mp4"), None, "'clip.mp4' is a file.*decode it"),
        (b"\0\0\0 ftypisom", None, "is a file.*decode it"),
        (None, None, "no sequence of frames"),
        (iter([]), None, "no sequence of frames"),
        (np.zeros((5, 5, 3), np.uint8), None, "\\(T, H, W, 3\\)"),
        (np.zeros((2, 5, 5, 4), np.uint8), None, "no 3 channels"),
        (np.zeros((2, 3, 5, 3), np.uint8), None, "say channels="),
        (np.zeros((2, 5, 5, 3), np.float32), None, "float32"),
        (np.zeros((2, 5, 5, 3), np.uint8), {"frames_indices": [1]}, "1 entries for 2 frames"),
        (np.zeros((2, 5, 5, 3), np.uint8), {"fps": float("nan")}, "fps is nan"),
        (np.zeros((2, 5, 5, 3), np.uint8), {"FPS": 2}, "unknown key 'FPS'"),
        (np.zeros((2, 5, 5, 3), np.uint8), [2], "mapping"),
    ],
)
def test_videos_that_cannot_be(source, metadata, message):
    with pytest.raises(MediaError, match=message):
        load_video(source, metadata)


def wav(data: bytes, width: int = 2, rate: int = 8000, channels: int = 1) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(data)
    return file.getvalue()


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1, max_size=20))
def test_every_source_gives_the_same_sound(tmp_path_factory, values):
    pcm = np.array(values, np.int16)
    exact = [value / 32768 for value in values]
    path = tmp_path_factory.mktemp("sound") / "sound.wav"
    path.write_bytes(wav(pcm.tobytes()))
    wide = wav(b"".join((value << 8).to_bytes(3, "little", signed=True) for value in values), 3)
    widest = wav(b"".join((value << 16).to_bytes(4, "little", signed=True) for value in values), 4)
    sources = [pcm, torch.from_numpy(pcm), exact, np.array(exact), np.array(exact, ">f4"), torch.tensor(exact), path, str(path)]
    sources += [path.read_bytes(), bytearray(path.read_bytes()), data_url(path.read_bytes(), "audio/wav"), wide, widest]
    sounds = [load_sound(source, 8000) for source in sources]
    assert {sound.identity for sound in sounds} == {sounds[0].identity}
    assert all(sound.samples.tolist() == exact for sound in sounds)
    assert load_sound(path).sampling_rate == 8000


def test_8_bit_wav_is_unsigned():
    assert load_sound(wav(bytes([0, 128, 192, 255]), 1)).samples.tolist() == [-1.0, 0.0, 0.5, 127 / 128]


def test_a_tensor_that_needs_grad_or_is_strided():
    tensor = torch.tensor([0.0, 1.0, 0.5, 1.0], requires_grad=True)
    assert load_sound(tensor[::2], 8000).samples.tolist() == [0.0, 0.5]


WAV = wav(np.arange(100, dtype=np.int16).tobytes())


@pytest.mark.parametrize(
    ("source", "rate", "message"),
    [
        ([], 8000, "no samples"),
        (np.zeros(0, np.float32), 8000, "no samples"),
        (wav(b""), None, "no samples"),
        ([0.0, float("nan")], 8000, "sample 1 of the sound is nan"),
        ([1e39], 8000, "sample 0 of the sound is inf"),
        ([0, 1], 8000, "samples of int64"),
        (["a"], 8000, "samples of <U1"),
        ([[0.0], [0.0, 1.0]], 8000, "no list of floats"),
        (np.zeros(3, np.float16), 8000, "float16"),
        (torch.zeros(3, dtype=torch.bfloat16), 8000, "bfloat16"),
        (np.zeros((1, 3), np.float32), 8000, "one channel"),
        (np.zeros((3, 2)), 8000, "one channel"),
        ([0.0], None, "sampling_rate is missing"),
        ([0.0], 0, "sampling_rate is 0"),
        ([0.0], 8000.5, "sampling_rate is 8000.5"),
        (WAV, 16000, "8000 Hz, and sampling_rate is 16000"),
        (wav(bytes(8), channels=2), None, "2 channels"),
        (WAV[:-1], None, "cut short: its header says 100 samples"),
        (WAV[:60], None, "cut short"),
        (WAV[:30], None, "cannot be read as a PCM wav"),
        (b"", None, "cannot be read as a PCM wav"),
        (b"ID3mp3", None, "cannot be read as a PCM wav"),
        (WAV[:34] + b"\x28\0" + WAV[36:], None, "samples of 40 bits"),
        (WAV[:20] + b"\3\0" + WAV[22:], None, "cannot be read as a PCM wav"),
        ("https://example.org/a.wav", None, "download it"),
        ("/nowhere/a.wav", None, "is no file"),
        (None, 8000, "NoneType"),
    ],
)
def test_sounds_that_cannot_be(source, rate, message):
    with pytest.raises(MediaError, match=message):
        load_sound(source, rate)


@given(st.data())
def test_damaged_wavs_are_sounds_or_media_errors(data):
    file = bytearray(WAV)
    for _ in range(data.draw(st.integers(1, 3))):
        file[data.draw(st.integers(0, 43))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MediaError):
        assert load_sound(file).samples.size
