import json
import os
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import tiny
from damage import damaged
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.pipeline.image_files import (
    check_contact_sheet,
    contact_sheet,
    file_name,
    make_record,
    read_png_settings,
    read_record,
    save_latents,
    save_png,
    sha256_of,
)
from pixart_jax.pipeline.requests import Request


def test_file_names_stay_in_the_folder_and_apart():
    assert file_name(3, 7, "../x") == "00003-7-x.png"
    assert file_name(0, 0, "🙂") == "00000-0.png"
    assert "/" not in file_name(0, 0, "a/b\\c") and len(file_name(0, 0, "w" * 500)) < 60
    names = {file_name(number, seed, "same") for number in range(3) for seed in range(3)}
    assert len(names) == 9


def test_an_image_carries_its_settings(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    settings = {"prompt": "Hörnchen ☕" * 100, "seed": 3}
    save_png(tmp_path / "x.png", pixels, settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
    assert read_png_settings(tmp_path / "x.png") == settings
    save_png(tmp_path / "gray.png", pixels[..., :1], settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "gray.png")), pixels[..., 0])


def test_an_interrupted_write_leaves_no_image(tmp_path, monkeypatch):
    pixels = np.zeros((4, 6, 3), np.uint8)
    save = Image.Image.save

    def interrupted(self, path, **kwargs):
        save(self, path, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_png(tmp_path / "x.png", pixels, {})
    assert not list(tmp_path.glob("*.png"))
    monkeypatch.undo()
    save_png(tmp_path / "x.png", pixels, {})
    save_latents(tmp_path / "x.npy", pixels)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "x.png"]


def test_settings_with_a_path_that_is_not_unicode(tmp_path):
    save_png(tmp_path / "x.png", np.zeros((2, 2, 3), np.uint8), {"checkpoint": "a\udcff"})
    with pytest.raises(UserError, match=r"surrogate pair, which is not Unicode\): give a PNG"):
        read_png_settings(tmp_path / "x.png")


def test_files_without_settings(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("x")
    for name, message in (("plain", "holds no settings"), ("text", "cannot be read"), ("none", "cannot be")):
        with pytest.raises(UserError, match=message):
            read_png_settings(tmp_path / f"{name}.png")


def test_a_contact_sheet_shows_every_image(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, colour, size in zip(paths, colours, [(8, 8), (600, 300), (20, 40)]):
        Image.new("RGB", size, colour).save(path)
    sheet = contact_sheet(paths, columns=2)
    assert sheet.shape == (2 * 258 + 2, 2 * 258 + 2, 3)
    centres = [sheet[130, 130], sheet[130, 388], sheet[388, 130]]
    assert [tuple(centre) for centre in centres] == colours
    assert (sheet[388, 388] == 255).all() and (sheet[20, 388] == 255).all()


@pytest.mark.parametrize(("suffix", "longest"), [("jpg", 65_500), ("webp", 16_383)])
def test_a_contact_sheet_that_its_format_cannot_hold(tmp_path, suffix, longest):
    Image.new("L", (longest, 1)).save(tmp_path / f"fits.{suffix}")
    with pytest.raises((OSError, ValueError)):
        Image.new("L", (longest + 1, 1)).save(tmp_path / f"large.{suffix}")
    most = (longest - 2) // 258
    for columns in (1, most):
        check_contact_sheet(tmp_path / f"s.{suffix}", most, columns)
    for columns in (1, most + 1):
        with pytest.raises(
            UserError, match=rf"would have .* has at most {longest:,} in a row .*: give .*png"
        ):
            check_contact_sheet(tmp_path / f"s.{suffix}", most + 1, columns)
        check_contact_sheet(tmp_path / "s.png", most + 1, columns)


def test_a_record_holds_the_request_and_the_hashes_of_its_files(random_params, tmp_path):
    pipe, file = tiny.make_pipe(random_params), tmp_path / "x.png"
    file.write_bytes(b"an image")
    asked = Request("x", image=str(file), guidance_interval=(0, 500), sampler_options={"order": 3})
    request, _ = pipe.resolve(asked)
    record = make_record(pipe, request, {"checkpoint": "c"}, 1)
    assert record == json.loads(json.dumps(record))
    assert Request.from_dict(record["request"]) == request
    assert record["source"] == {"checkpoint": "c"} and record["made_with"]["batch_size"] == 1
    before = record["files"][str(file)]
    file.write_bytes(b"another image")
    assert make_record(pipe, request, {}, 1)["files"][str(file)] != before
    file.unlink()
    with pytest.raises(UserError, match=r"x\.png' does not exist"):
        make_record(pipe, request, {}, 1)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(*texts: bytes, side: int = 1) -> bytes:
    """A PNG with these chunks before its pixels, which are missing."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(texts) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def text(settings: bytes) -> bytes:
    return chunk(b"tEXt", b"pixart_jax\0" + settings)


def test_pipes_and_devices_have_no_hash(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path)):
        with pytest.raises(UserError, match="not a regular file"):
            sha256_of(path)


def test_settings_in_every_kind_of_text(tmp_path):
    path = tmp_path / "x.png"
    settings = {"prompt": "Hörnchen ☕"}
    ascii_json, utf8 = json.dumps(settings).encode(), json.dumps(settings, ensure_ascii=False).encode()
    for content in (
        text(ascii_json),
        chunk(b"zTXt", b"pixart_jax\0\0" + zlib.compress(ascii_json)),
        chunk(b"iTXt", b"pixart_jax\0\0\0de\0Schl\xc3\xbcssel\0" + utf8),
        chunk(b"iTXt", b"pixart_jax\0\1\0\0\0" + zlib.compress(utf8)),
    ):
        # The size of the picture does not matter: its pixels are not decoded.
        path.write_bytes(png(chunk(b"tEXt", b"other\0x"), content, side=100_000))
        assert read_png_settings(path) == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (png(text(b"{}"), text(b"{}")), "it has settings 2 times"),
        (png(chunk(b"zTXt", b"pixart_jax\0\0" + zlib.compress(bytes(2**27)))), "more than 67,108,864 bytes"),
        (png(chunk(b"iTXt", b"pixart_jax\0\1\0\0\0" + zlib.compress(bytes(2**27)))), "more than 67,108,864"),
        (png(chunk(b"zTXt", b"pixart_jax\0\0not packed")), "a text of the PNG is damaged"),
        (png(b"\xff\xff\xff\xfftEXt"), "a text of the PNG has more than"),
        (png(b"\xff\xff\xff\xffeXIf"), "the PNG is cut off"),
        (png(text(b"{}"))[:56], "a text of the PNG is damaged"),
        (png(text(b"{}"))[:30], "cut off"),
        (png(text(b"{}")).replace(b"{}", b"[]"), "a text of the PNG is damaged"),
        (png(text(b"[" * 100_000)), "nested"),
        (png(text(b"{")), "Expecting"),
        (png(text(b'{"a": ' + b"1" * 5000 + b"}")), "more than 64 bits"),
        (png(text(b'{"a": "\\ud800"}')), "half of a surrogate pair"),
        (png(chunk(b"iTXt", b"pixart_jax\0\0\0\0\0\xff")), "can't decode"),
        (png(chunk(b"iTXt", b"pixart_jax\0")), "Expecting"),
        (png(text(b"[]")), "holds no settings"),
        (b"", "not a PNG"),
    ],
)
def test_hostile_texts(tmp_path, content, message):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"x.png' (cannot be read \(.*)?{message}.*: give a PNG that sample"):
        read_png_settings(path)
    assert tracemalloc.get_traced_memory()[1] < 2**28
    tracemalloc.stop()


def test_a_record_of_other_types(tmp_path):
    path = tmp_path / "x.png"
    record = {
        "request": {"prompt": "x", "image": "a", "mask": None, "latents": ["l", 0], "embeddings": ["e", 0]},
        "source": {"checkpoint": "c", "weights": None, "pipeline": "p"},
        "fingerprint": "f",
        "files": {"a": "0"},
        "made_with": {"batch_size": 1},
    }
    path.write_bytes(png(text(json.dumps(record).encode())))
    assert read_record(path) == record
    count = 0
    for place, changed in damaged(record):
        path.write_bytes(png(text(json.dumps(changed).encode())))
        try:
            read_record(path)
        except UserError as error:
            assert str(error).endswith(": give a PNG that sample wrote.") and "\n" not in str(error), place
            count += 1
    assert count > 150
