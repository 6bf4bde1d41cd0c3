import base64
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from web_page import png

from pixart_jax.errors import UserError
from pixart_jax.pipeline.page import uploads as module
from pixart_jax.pipeline.page.form import mask_of
from pixart_jax.pipeline.page.uploads import MAX_KEPT, Uploads

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "temporary", tmp_path / "out" / "inputs")


def url(pixels):
    return f"data:image/png;base64,{base64.b64encode(png(pixels)).decode()}"


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width, height):
    """A PNG that claims a size and has no pixels."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)) + chunk(b"IEND", b"")


def frames(kind):
    file = io.BytesIO()
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    two[0].save(file, kind, save_all=True, append_images=two[1:])
    return file.getvalue()


@pytest.mark.parametrize("kind, suffix", [("PNG", ".png"), ("JPEG", ".jpg"), ("WEBP", ".webp")])
def test_an_upload_keeps_its_bytes(uploads, tmp_path, kind, suffix):
    data = png(PIXELS, kind)
    path = uploads.add(data)
    assert path.endswith(suffix) and path.startswith(str(tmp_path / "temporary"))
    assert uploads.add(data) == path and [
        each.read_bytes() for each in (tmp_path / "temporary").iterdir()
    ] == [data]
    assert uploads.find(path)[:3] == (f"image/{kind.lower()}", 6, 4)
    copy = uploads.use(path)
    assert copy == uploads.use(path) == uploads.use(copy)
    assert copy.startswith(str(tmp_path / "out" / "inputs"))
    with open(copy, "rb") as file:
        assert file.read() == data


def test_the_size_is_that_of_the_upright_image(uploads):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = uploads.find(uploads.add(png(PIXELS, "JPEG", exif=exif)))
    assert (found.height, found.width) == (4, 6)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "not an image that this page reads"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "not an image that"),
        (b"<html><script>alert(1)</script></html>", "not an image that"),
        (png(PIXELS, "GIF"), "not an image that"),
        (png(PIXELS, "TIFF"), "not an image that"),
        (png(PIXELS, "JPEG2000"), "not an image that"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not an image that"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 1000, "cannot be read"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "cannot be read"),
        (png(PIXELS)[:-30], "cannot be read"),
        (png(PIXELS, "JPEG")[:200], "cannot be read"),
        (frames("PNG"), "more than one frame"),
        (frames("WEBP"), "more than one frame"),
        (header(8193, 4097), "33,566,721 pixels: it may have at most 33,554,432"),
        (header(12_000, 12_000), "144,000,000 pixels"),
        (header(60_000, 60_000), "cannot be read"),
        (header(0, 5), ""),
        (header(1000, 1000), "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * module.MAX_BYTES, "it may have at most 16,777,216"),
    ],
)
def test_hostile_uploads_are_one_line_and_leave_nothing(uploads, tmp_path, data, words):
    with pytest.raises(UserError) as caught:
        uploads.add(data)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert not list(tmp_path.iterdir())


def test_the_oldest_uploads_are_removed(uploads, tmp_path, monkeypatch):
    images = [png(np.full((4, 4, 3), value, np.uint8)) for value in range(MAX_KEPT + 2)]
    paths = [uploads.add(data) for data in images]
    used = uploads.use(paths[-1])
    assert len(list((tmp_path / "temporary").iterdir())) == MAX_KEPT
    assert [path for path in paths if uploads.find(path) is None] == paths[:2]
    for gone in (paths[0], "/etc/passwd", ""):
        with pytest.raises(UserError, match="upload it again"):
            uploads.use(gone)
    monkeypatch.setattr(module, "MAX_KEPT_BYTES", 2 * len(images[0]) + 1)
    uploads.add(images[0])
    assert len(list((tmp_path / "temporary").iterdir())) <= 2
    assert uploads.find(used)  # what an image was generated from stays


def test_nothing_is_stored_after_the_end(uploads, tmp_path):
    uploads.close()
    with pytest.raises(UserError, match="ended"):
        uploads.add(png(PIXELS))
    assert not list(tmp_path.iterdir())


def test_a_mask_gets_the_size_of_its_image_and_can_be_drawn_again(uploads):
    image = uploads.add(png(np.zeros((40, 60, 3), np.uint8)))
    small = np.zeros((20, 30), bool)
    small[5:10, 6:12] = True
    path = uploads.add_mask(url(small), image)
    mask = np.asarray(Image.open(path))
    assert mask.dtype == bool and mask.shape == (40, 60)
    np.testing.assert_array_equal(mask, small.repeat(2, 0).repeat(2, 1))
    assert uploads.add_mask(uploads.mask_url(path), image) == path
    assert uploads.add_mask(url(~small), image) != path
    assert uploads.add_mask(url(small & False), image) is None
    assert uploads.mask_url("/etc/passwd") == ""


@pytest.mark.parametrize(
    "mask, words",
    [
        ("x", "damaged"),
        ("data:image/svg+xml;base64,PHN2Zz4=", "damaged"),
        ("data:image/png;base64,!", "damaged"),
        (f"data:image/png;base64,{base64.b64encode(png(PIXELS, 'JPEG')).decode()}", "damaged"),
        (f"data:image/png;base64,{base64.b64encode(png(PIXELS)[:-30]).decode()}", "cannot be read"),
        (f"data:image/png;base64,{base64.b64encode(header(2000, 3000)).decode()}", "6,000,000 pixels"),
        (
            f"data:image/png;base64,{base64.b64encode(png(np.ones((30, 900, 3), np.uint8))).decode()}",
            "shape of the image",
        ),
        (url(np.ones((8, 8), bool)), "shape of the image"),
        ("data:image/png;base64," + "A" * module.MAX_MASK, "larger brush"),
    ],
)
def test_hostile_masks_are_one_line(uploads, tmp_path, mask, words):
    image = uploads.add(png(PIXELS))
    with pytest.raises(UserError, match=words):
        uploads.add_mask(mask, image)
    assert len(list((tmp_path / "temporary").iterdir())) == 1


@pytest.mark.parametrize("brush", ["{", "[]", "1", '{"mask": 1}', "[" * 100_000, 5, True, "{}"])
def test_other_values_of_the_brush_are_refused(brush):
    with pytest.raises(UserError, match="damaged"):
        mask_of(brush)
