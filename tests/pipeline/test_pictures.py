import numpy as np
import pytest
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.pipeline.pictures import contact_sheet, file_name, read_settings, save_latents, save_png


def test_file_names_stay_in_the_folder_and_apart():
    assert file_name(3, 7, "../x") == "00003-7-x.png"
    assert file_name(0, 0, "🙂") == "00000-0.png"
    assert "/" not in file_name(0, 0, "a/b\\c") and len(file_name(0, 0, "w" * 500)) < 60
    names = {file_name(number, seed, "same") for number in range(3) for seed in range(3)}
    assert len(names) == 9


def test_a_picture_carries_its_settings(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    settings = {"prompt": "Hörnchen ☕" * 100, "seed": 3}
    save_png(tmp_path / "x.png", pixels, settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), pixels)
    assert read_settings(tmp_path / "x.png") == settings
    save_png(tmp_path / "gray.png", pixels[..., :1], settings)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "gray.png")), pixels[..., 0])


def test_no_half_of_a_picture_is_left(tmp_path, monkeypatch):
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
            read_settings(tmp_path / f"{name}.png")


def test_a_contact_sheet_shows_every_picture(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    paths = [tmp_path / f"{k}.png" for k in range(3)]
    for path, colour, size in zip(paths, colours, [(8, 8), (600, 300), (20, 40)]):
        Image.new("RGB", size, colour).save(path)
    sheet = contact_sheet(paths, columns=2)
    assert sheet.shape == (2 * 258 + 2, 2 * 258 + 2, 3)
    centres = [sheet[130, 130], sheet[130, 388], sheet[388, 130]]
    assert [tuple(centre) for centre in centres] == colours
    assert (sheet[388, 388] == 255).all() and (sheet[20, 388] == 255).all()
