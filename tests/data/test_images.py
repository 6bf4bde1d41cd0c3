"""Unusual image files are decoded to the pixels that viewers show, or skipped with the right reason."""

import contextlib
import functools
import io
import json
import pickle
import resource
import struct
import threading
import zlib

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, TiffImagePlugin
from sklearn.datasets import load_sample_image
from source_files import crops, write_folder

from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError

# Upper bound of the mean error of JPEG, WebP and AVIF for this crop at the qualities used here.
CODEC_LOSS = 8.0

# Pillow warns about the damaged metadata of some of these images.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@functools.cache
def photo(height=96, width=160, name="flower.jpg"):
    return np.ascontiguousarray(load_sample_image(name)[200 : 200 + height, 200 : 200 + width])


def encode(image, fmt="PNG", **options):
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, fmt, **options)
    return buffer.getvalue()


def difference(one, other):
    """The mean absolute difference, in levels of 255."""
    assert one.shape == other.shape
    return np.abs(one.astype(int) - other).mean()


def assert_refused(data, reason):
    with pytest.raises(I.Refused) as error:
        I.decode_image(data)
    assert error.value.reason == reason and reason in I.REASONS
    assert error.value.text and "\n" not in error.value.text
    return error.value


def png16(values, alpha=False):
    """Encodes a 16-bit RGB or grayscale PNG. Pillow cannot write 16-bit RGB."""
    values = np.asarray(values)
    colour = {2: 0, 3: 2}[values.ndim]
    rows = values.astype(">u2").reshape(values.shape[0], -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_lossless_formats_give_the_same_pixels(fmt, tmp_path):
    data = encode(photo(), fmt, **({"lossless": True} if fmt == "WEBP" else {}))
    pixels = I.decode_image(data)
    np.testing.assert_array_equal(pixels, photo())
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.flags.writeable
    path = tmp_path / "photo.any"  # the content decides, not the suffix
    path.write_bytes(data)
    np.testing.assert_array_equal(I.decode_image(path), pixels)
    np.testing.assert_array_equal(I.decode_image(str(path)), pixels)
    assert I.read_size(data) == I.read_size(path) == (96, 160) and I.read_area(data) == 96 * 160


@pytest.mark.parametrize("fmt", ["JPEG", "AVIF", "WEBP"])
def test_lossy_formats_are_close(fmt):
    assert difference(I.decode_image(encode(photo(), fmt, quality=95)), photo()) < CODEC_LOSS
    assert difference(photo()[::-1], photo()) > 5 * CODEC_LOSS  # the bound can tell images apart


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(fmt, orientation):
    # The stored image is the upright one, transformed by the inverse of what the tag tells viewers to do.
    stored = {
        1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2), 8: lambda x: np.rot90(x, -1),
    }.get(orientation, lambda x: x)(photo())  # other values mean nothing  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 97}, "AVIF": {"quality": 97}}.get(fmt, {})
    data = encode(np.ascontiguousarray(stored), fmt, exif=exif, **options)
    loss = difference(I.decode_image(data), photo())
    assert loss < CODEC_LOSS if fmt in ("JPEG", "AVIF") else loss == 0
    assert I.read_size(data) == (96, 160)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing", b"Exif\0\0II*\0", b"\0"]
)
@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "JPEG"])
def test_damaged_exif_data_of_all_formats(fmt, exif):
    data = encode(photo(), fmt, exif=exif)
    assert I.decode_image(data).shape[:2] == I.read_size(data) == (96, 160)


def test_only_errors_of_the_exif_data_are_ignored(monkeypatch):
    data = encode(photo())
    for error, reason in ((OSError("image file is truncated"), "broken"), (ZeroDivisionError(), "broken")):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "getexif", lambda _, error=error: (_ for _ in ()).throw(error))
            with pytest.raises(I.Refused, match=reason):
                I.read_size(data)
            with pytest.raises(I.Refused, match=reason):
                I.decode_image(data)
    monkeypatch.setattr(Image.Image, "getexif", lambda _: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        I.read_size(data)


def test_broken_exif_leaves_the_image_upright():
    data = encode(photo(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    np.testing.assert_array_equal(I.decode_image(data), I.decode_image(encode(photo(), "JPEG", quality=95)))


def test_gray_one_bit_and_palette():
    gray = photo()[:, :, 0]
    np.testing.assert_array_equal(I.decode_image(encode(gray)), np.stack([gray] * 3, -1))
    one_bit = Image.fromarray(gray).point(lambda v: 255 * (v > 100), "1")
    expected = np.stack([(gray > 100) * np.uint8(255)] * 3, -1)
    np.testing.assert_array_equal(I.decode_image(encode(one_bit)), expected)
    palette = Image.fromarray(photo()).quantize(16)
    np.testing.assert_array_equal(I.decode_image(encode(palette)), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(I.decode_image(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))


def test_cmyk():
    cmyk = Image.fromarray(photo()).convert("CMYK")
    np.testing.assert_allclose(I.decode_image(encode(cmyk, "TIFF")), photo(), atol=2)
    # Pillow writes CMYK JPEG inverted with Adobe's marker, as Photoshop does.
    assert difference(I.decode_image(encode(cmyk, "JPEG", quality=95)), photo()) < CODEC_LOSS


def test_sixteen_bit_values_are_not_clipped():
    gray = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    expected = np.stack([(gray >> 8).astype(np.uint8)] * 3, -1)
    assert expected.min() == 0 and expected.max() == 255 and len(np.unique(expected)) == 256
    np.testing.assert_array_equal(I.decode_image(png16(gray)), expected)
    np.testing.assert_array_equal(I.decode_image(encode(Image.fromarray(gray), "TIFF")), expected)
    pgm = b"P5 64 64 65535\n" + gray.astype(">u2").tobytes()
    np.testing.assert_array_equal(I.decode_image(pgm), expected)
    colour = np.stack([gray, gray[::-1], gray.T], -1)
    np.testing.assert_array_equal(I.decode_image(png16(colour)), (colour >> 8).astype(np.uint8))


def test_sixteen_bit_gray_with_a_transparent_value():
    gray = np.array([[0, 1000], [30000, 65535]], np.uint16)
    data = encode(Image.fromarray(gray), transparency=1000)
    np.testing.assert_array_equal(I.decode_image(data)[:, :, 0], [[0, 255], [117, 255]])


def test_alpha_is_composited_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., :3] = [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [10, 20, 30]]]
    rgba[..., 3] = [[255, 0], [128, 255]]
    expected = [[[255, 0, 0], [255, 255, 255]], [[127, 127, 127], [10, 20, 30]]]
    for fmt, options in [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})]:
        np.testing.assert_array_equal(I.decode_image(encode(rgba, fmt, **options)), expected)
    gray_alpha = Image.fromarray(rgba).convert("LA")
    np.testing.assert_array_equal(I.decode_image(encode(gray_alpha))[0, 1], [255] * 3)


def test_palette_and_colour_key_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(I.decode_image(encode(palette, transparency=1)), [[[200, 0, 0], [255] * 3]])
    rgb = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    data = encode(rgb, transparency=(1, 2, 3))
    np.testing.assert_array_equal(I.decode_image(data), [[[255] * 3, [4, 5, 6]]])


@pytest.mark.parametrize("fmt", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_animations_are_skipped(fmt):
    frames = [Image.fromarray(photo()), Image.fromarray(photo()[::-1].copy())]
    data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
    assert "more than one frame" in assert_refused(data, "animated").text
    with pytest.raises(I.Refused, match="animated"):
        I.read_size(data)


def test_the_main_image_of_a_phone_jpeg_is_used():
    image = Image.fromarray(photo())
    preview = image.resize((40, 24))
    data = encode(image, "MPO", save_all=True, append_images=[preview], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert I.decode_image(data).shape == (96, 160, 3)


def test_unsupported_depths_and_colour_spaces_are_skipped():
    assert_refused(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "depth")
    assert_refused(encode(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"), "depth")
    assert_refused(encode(Image.new("LAB", (4, 4)), "TIFF"), "colour")


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.95])
def test_truncated_files_are_skipped(fmt, share):
    data = encode(photo(), fmt)
    with pytest.raises(I.Refused) as error:
        I.decode_image(data[: int(share * len(data))])
    assert error.value.reason in ("broken", "format")
    assert "\n" not in error.value.text


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000"])
def test_damaged_images_are_decoded_or_skipped(fmt):
    data = encode(photo(24, 32), fmt)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            damaged[position] ^= int(rng.integers(1, 256))
        try:
            pixels = I.decode_image(bytes(damaged))
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        except I.Refused as refused:
            assert refused.reason in I.REASONS


def test_files_that_are_not_images(tmp_path):
    assert_refused(b"", "broken")
    assert_refused(b"hello", "format")
    assert_refused(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "format")
    assert_refused(tmp_path / "absent.jpg", "missing_image")
    assert_refused(tmp_path, "unreadable")
    with pytest.raises(I.Refused, match="missing_image"):
        I.read_size(tmp_path / "absent.jpg")


def test_decompression_bombs_are_skipped(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert_refused(encode(photo()), "too_large")


def test_refused_can_be_pickled():
    refused = pickle.loads(pickle.dumps(I.Refused("broken", "why")))
    assert (refused.reason, refused.text, str(refused)) == ("broken", "why", "broken: why")
    assert not isinstance(refused, UserError)


@pytest.mark.parametrize(
    ("size", "target", "resized", "offset"),
    [
        ((100, 200), (50, 50), (50, 100), (0, 25)),
        ((200, 100), (50, 50), (100, 50), (25, 0)),
        ((100, 100), (64, 96), (96, 96), (16, 0)),
        ((64, 96), (64, 96), (64, 96), (0, 0)),
        ((64, 97), (64, 96), (64, 97), (0, 0)),
        ((30, 40), (60, 60), (60, 80), (0, 10)),
        ((427, 640), (384, 672), (448, 672), (32, 0)),  # 427 * 672 / 640 = 448.35
        ((3, 1000), (128, 512), (128, 42667), (0, 21077)),
        ((1, 1), (16, 32), (32, 32), (8, 0)),
    ],
)
def test_geometry_of_some_sizes(size, target, resized, offset):
    image = np.zeros((*size, 3), np.uint8)
    crop = I.resize_and_crop(image, *target)
    assert crop.pixels.shape == (*target, 3) and crop.pixels.flags.c_contiguous
    assert (crop.original_size, crop.resized_size, crop.offset) == (size, resized, offset)


def test_the_resized_image_just_covers_the_target():
    rng = np.random.default_rng(0)
    for height, width, a, b in rng.integers(1, 90, (300, 4)):
        crop = I.resize_and_crop(np.zeros((height, width, 3), np.uint8), int(a), int(b))
        assert crop.pixels.shape == (a, b, 3)
        assert crop.resized_size[0] >= a and crop.resized_size[1] >= b
        assert a == crop.resized_size[0] or b == crop.resized_size[1]


def test_the_aspect_ratio_and_the_centre_are_kept():
    # A circle stays a circle. The official multi-scale feature extractor distorts it to an ellipse.
    y, x = np.mgrid[:300, :600]
    disc = np.repeat(
        (255 * ((y - 149.5) ** 2 + (x - 299.5) ** 2 < 100**2)).astype(np.uint8)[:, :, None], 3, 2
    )
    crop = I.resize_and_crop(disc, 96, 128)
    inside = crop.pixels[:, :, 0] > 127
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert len(rows) == len(columns) == 64
    assert rows[0] + rows[-1] == 95 and columns[0] + columns[-1] == 127


def test_shrinking_is_antialiased():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = I.resize_and_crop(stripes, 32, 32).pixels[4:-4, 4:-4]
    assert abs(pixels.astype(float).mean() - 127.5) < 1 and pixels.std() < 3


def test_pixels_are_unchanged_without_a_resize():
    crop = I.resize_and_crop(photo(), 96, 96)
    np.testing.assert_array_equal(crop.pixels, photo()[:, 32:128])
    assert not np.shares_memory(crop.pixels, photo())


@pytest.mark.parametrize("resampling", [Image.Resampling.BICUBIC, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("target", [(64, 64), (96, 32), (40, 200), (200, 40), (128, 256)])
def test_equals_resizing_the_entire_image_and_cropping(target, resampling):
    image = photo(90, 150)
    crop = I.resize_and_crop(image, *target, resampling=resampling)
    whole = Image.fromarray(image).resize(crop.resized_size[::-1], resampling)
    (top, left), (height, width) = crop.offset, target
    # Pillow may resize rows and columns in the other order, which rounds differently.
    assert difference(crop.pixels, np.asarray(whole)[top : top + height, left : left + width]) < 0.3


def test_views_of_an_image():
    """Crops are parts of the resized image, from one end of it to the other; mirror images are mirrored."""
    image = photo(64, 150)
    whole = I.resize_and_crop(image, 32, 75).pixels.astype(int)
    offsets = []
    for position in (0.0, 0.3, 0.999):
        crop = I.resize_and_crop(image, 32, 40, view=I.View(position))
        assert crop.resized_size == (32, 75)
        top, left = crop.offset
        offsets.append(left)
        assert top == 0 and np.abs(crop.pixels - whole[:, left : left + 40]).max() <= 1
        flipped = I.resize_and_crop(image, 32, 40, view=I.View(position, True))
        np.testing.assert_array_equal(flipped.pixels, crop.pixels[:, ::-1])
        assert (flipped.offset, flipped.original_size) == (crop.offset, (64, 150))
    assert offsets == [0, 10, 35]
    upright = np.ascontiguousarray(image.transpose(1, 0, 2))
    assert I.resize_and_crop(upright, 40, 32, view=I.View(0.3)).offset == (10, 0)
    np.testing.assert_array_equal(
        I.resize_and_crop(image, 32, 40, view=I.CENTRE).pixels, I.resize_and_crop(image, 32, 40).pixels
    )


def test_memory_for_long_strips():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = I.resize_and_crop(np.zeros((2, 20_000, 3), np.uint8), 512, 512)
    assert crop.resized_size == (512, 5_120_000)  # would take 7.9 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_min_size():
    with pytest.raises(I.Refused, match="too_small: 30x40"):
        I.resize_and_crop(np.zeros((30, 40, 3), np.uint8), 16, 16, min_size=31)
    I.resize_and_crop(np.zeros((30, 40, 3), np.uint8), 16, 16, min_size=30)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.uint8)]
)
def test_resize_checks_its_input(image):
    with pytest.raises(ValueError, match="uint8"):
        I.resize_and_crop(image, 2, 2)


# --- The report


def test_report_of_a_run(tmp_path):
    files = crops()
    root = write_folder(tmp_path / "data", files)
    (root / "a.png").write_bytes(files["a.png"][0][:100])
    (root / "z.tif.txt").unlink()
    (root / "moving.gif").write_bytes(
        encode(
            np.zeros((4, 4, 3), np.uint8),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (4, 4), "red")],
        )
    )
    (root / "moving.txt").write_text("moves")
    source, report = S.open_source("auto", root), I.RefusalReport(max_refused_share=0.5)
    for i in reversed(range(len(source))):
        try:
            source[i].decode()
            report.take()
        except I.Refused as refused:
            report.refuse(source.key(i), refused)
    report.check()
    assert (report.taken, len(report.refused)) == (4, 3)
    assert report.counts() == {"animated": 1, "broken": 1, "missing_caption": 1}
    table = report.table().splitlines()
    assert table[0].split() == ["used", "4"]
    assert table[-1].split() == ["skipped", "in", "total", "3", "42.86%"]
    assert any("no caption" in line and "z.tif" in line for line in table)
    captions = I.RefusalReport(max_refused_share=0.5)
    captions.refuse("a.png", I.Refused("missing_caption", "no a.txt"))
    with pytest.raises(UserError, match=r"--caption='TEXT' gives all images one caption"):
        captions.check()
    report.write(tmp_path / "refused.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "refused.jsonl").read_text("utf-8").splitlines()]
    assert [line["key"] for line in lines] == ["a.png", "moving.gif", "z.tif"]
    assert lines == [refusal._asdict() for refusal in sorted(report.refused)]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "refused.jsonl"}


def test_report_stops_a_run_that_skips_too_much():
    report = I.RefusalReport(max_refused_share=0.1, minimum=20)
    for i in range(10):  # all of the first ten are skipped, but ten are too few to check the share
        report.refuse(f"k{i}", I.Refused("broken", "bad\nbytes"))
    report.take(9)
    with pytest.raises(
        UserError, match=r"skipped 11 of 20 samples \(55.0%\).*broken \(11\).*'k0': bad bytes"
    ):
        report.refuse("k10", I.Refused("broken", "x"))
    report.take(90)
    report.check()  # 11 of 110 is exactly a tenth
    report.refused.append(I.Refusal("k", "format", "t"))
    with pytest.raises(UserError):
        report.check()


def test_final_check_of_the_report():
    nothing_taken = I.RefusalReport(max_refused_share=1.0, minimum=100)
    nothing_taken.refuse("k", I.Refused("broken", "x"))
    with pytest.raises(UserError, match="1 of 1"):
        nothing_taken.check()
    I.RefusalReport().check()
    with pytest.raises(UserError, match=r"max_refused_share 5.*between 0 and 1"):
        I.RefusalReport(max_refused_share=5)


def test_report_from_many_threads():
    report = I.RefusalReport(max_refused_share=1.0)

    def work():
        for i in range(300):
            report.take()
            with contextlib.suppress(UserError):
                report.refuse(str(i), I.Refused("broken", "x"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (report.taken, len(report.refused)) == (2400, 2400)


@pytest.mark.parametrize("image", [GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile])
def test_frames_are_not_counted(image, monkeypatch):
    # Pillow reads all of them to count them, and there may be millions.
    monkeypatch.setattr(image, "n_frames", property(lambda self: pytest.fail("counts the frames")))
    frames = [Image.fromarray(np.full((2, 2), i, np.uint8)) for i in range(3)]
    assert_refused(encode(frames[0], image.format, save_all=True, append_images=frames[1:]), "animated")
    assert I.decode_image(encode(frames[0], image.format)).shape == (2, 2, 3)


def test_images_that_are_too_large(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(2**31)
    assert_refused(tmp_path / "sparse.png", "too_large")
    # Dimensions in a header, without the pixels.
    data = encode(photo())
    data = data[:16] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + data[24:]
    data = data[:29] + struct.pack(">I", zlib.crc32(data[12:29])) + data[33:]
    assert_refused(data, "too_large")
    with pytest.raises(I.Refused, match="too_large"):
        I.read_size(data)
    strip = np.zeros((1, 10_000_000, 3), np.uint8)
    with pytest.raises(I.Refused, match=r"too_large: 1x10000000 .* would have 256x2560000000 pixels"):
        I.resize_and_crop(strip, 256, 256)
