import json

import numpy as np
import pytest
from PIL import Image

from pixart_jax.errors import UserError
from pixart_jax.sample import file_name, read_prompts, save_png


def test_prompts_come_from_text_or_file(tmp_path):
    assert read_prompts("a corgi") == ["a corgi"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("a corgi\r\n\n  ein Hörnchen \n".encode())
    assert read_prompts(str(file)) == ["a corgi", "ein Hörnchen"]
    assert read_prompts("word " * 400) == [("word " * 400).strip()]
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompts("  ")


def test_file_names_stay_in_the_folder_and_apart():
    assert file_name(3, 7, "../x") == "00003-7-x.png"
    assert file_name(0, 0, "🙂") == "00000-0.png"
    assert "/" not in file_name(0, 0, "a/b\\c") and len(file_name(0, 0, "w" * 500)) < 60
    names = {file_name(number, seed, "same") for number in range(3) for seed in range(3)}
    assert len(names) == 9


def test_a_picture_carries_its_settings(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    save_png(tmp_path / "x.png", pixels, {"prompt": "Hörnchen", "seed": 3})
    read = Image.open(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(read), pixels)
    assert json.loads(read.text["pixart_jax"]) == {"prompt": "Hörnchen", "seed": 3}
