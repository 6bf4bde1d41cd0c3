import json

import numpy as np
import pytest
import tiny
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.pipeline.image_files import (
    contact_sheet,
    file_name,
    make_record,
    read_png_settings,
    save_latents,
    save_png,
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
