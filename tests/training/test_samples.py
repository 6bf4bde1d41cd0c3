import dataclasses
import io

import numpy as np
import pytest
import tiny
from etils import epath
from feature_folders import TEXT_LENGTH, WIDTH, three_shards
from PIL import Image

from pixart_jax.config import DataConfig, FeaturesConfig, InitConfig, LogConfig, TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.encoders.images import PixelCodec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.configs import NULL_TEXT, PixArtConfig
from pixart_jax.sampling import picture_grid
from pixart_jax.training import samples
from pixart_jax.training.data import Prompt, held_out_batches

MODEL = PixArtConfig(
    size="custom", depth=1, hidden_size=16, num_heads=2, base_size=4, text_dim=WIDTH, text_length=TEXT_LENGTH
)
CONFIG = TrainConfig(
    model=MODEL,
    features=FeaturesConfig(text_length=TEXT_LENGTH),
    data=DataConfig(batch_size=4),
    log=LogConfig(samples=4, sample_steps=1),
)


def test_images_that_are_not_finite_do_not_end_the_run(tmp_path, random_params, monkeypatch, capsys):
    monkeypatch.setattr(samples, "make_codec", lambda features, batch_size: PixelCodec())
    held_out = FeatureDataset(three_shards(tmp_path / "f"))
    generate = samples.make_sample_grid(CONFIG, held_out, [], epath.Path(tmp_path))
    params = random_params(MODEL)[1]
    params["final_layer"]["linear"]["bias"] *= np.nan
    grid = generate(params, 7)
    assert grid.shape[2] == 3 and (tmp_path / "samples" / "00000007.png").exists()
    assert not np.asarray(Image.open(tmp_path / "samples" / "00000007.png"))[4, 4].any()
    assert "step 7: the sample images are black, because 4 of 4 decoded images" in capsys.readouterr().err
    # The captions are those of the records.
    records = {record.key: record for record in map(held_out.__getitem__, range(len(held_out)))}
    lines = (tmp_path / "samples" / "00000007.txt").read_text().splitlines()
    keys = next(held_out_batches(CONFIG, held_out)).keys
    for index, (line, key) in enumerate(zip(lines, keys, strict=True)):
        place, _, caption = line.partition(": ")
        assert place == f"row {index // 2 + 1}, column {index % 2 + 1}"
        assert caption in [f"{each.text} ({key})" for each in records[key].captions]


# --- Prompts

PROMPTS = [Prompt("a red fox", 0), Prompt("two\ncorgis", 5), Prompt("", 0)]


def with_prompts(**changes):
    model = dataclasses.replace(tiny.MODEL, hidden_size=24, size_conditions=True, base_size=tiny.SIDE // 2)
    log = LogConfig(prompts="as in PROMPTS", sample_steps=2, samples=2)
    values = {"model": model, "data": DataConfig(batch_size=4), "log": log, **changes}
    return dataclasses.replace(tiny.CONFIG, **values)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_prompts_give_the_images_of_sample(tmp_path, random_params, monkeypatch):
    """The images are those that `sample` generates, and the text encoder does not stay in memory."""
    config, encoders = with_prompts(), []

    def make_encoder(*arguments, **options):
        encoders.append(TextEncoder(*arguments, **options))
        return encoders[0]

    monkeypatch.setattr(samples, "TextEncoder", make_encoder)
    generate = samples.make_sample_grid(config, None, PROMPTS, epath.Path(tmp_path))
    assert encoders[0].network._params is None
    pipe = tiny.make_pipe(random_params, config=config)
    params = random_params(config.model)[1]
    null, _ = pipe.text_encoder.null_text()
    params[NULL_TEXT] = null
    grid = generate(params, 3)
    texts = [prompt.text for prompt in PROMPTS]
    expected = pipe(texts, seed=[prompt.seed for prompt in PROMPTS], steps=2)
    expected = picture_grid(expected, columns=2, magnify=2)
    assert grid.shape == expected.shape
    assert np.abs(grid.astype(int) - expected).max() <= 1 and grid.std() > 20
    np.testing.assert_array_equal(pixels((tmp_path / "samples" / "00000003.png").read_bytes()), grid)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["00000003.png", "00000003.txt"]
    assert (tmp_path / "samples" / "00000003.txt").read_text() == (
        "row 1, column 1: a red fox (seed 0)\nrow 1, column 2: two corgis (seed 5)\n"
        "row 2, column 1: (seed 0)\n"
    )


def test_images_beside_those_of_step_0(tmp_path, random_params, capsys):
    config = with_prompts(init=InitConfig(method="weights", path="other"))
    folder = tmp_path / "samples"

    def grid(seed, step, prompts=PROMPTS):
        # A new function each time, as after a resume.
        generate = samples.make_sample_grid(config, None, prompts, epath.Path(tmp_path))
        return generate(random_params(config.model, seed)[1], step)

    first, second = grid(1, 0), grid(2, 6)
    # Three rows, with gaps of 2 pixels. Images of 32 pixels are shown with 64.
    assert first.shape == (3 * 66 + 2, 66 + 2, 3) and second.shape == (3 * 66 + 2, 2 * 64 + 4, 3)
    for top in (2, 68, 134):
        before, after = np.split(second[top : top + 64, 2:130].astype(int), 2, axis=1)
        np.testing.assert_array_equal(before, first[top : top + 64, 2:66])
        assert np.abs(after - before).max() > 20
    assert sorted(path.name for path in (folder / "initial").iterdir()) == [
        "0000.png", "0001.png", "0002.png", "captions.txt",
    ]  # fmt: skip
    about, *listed = (folder / "00000006.txt").read_text().splitlines()
    assert about == "each with the image of step 0 on its left and that of step 6 on its right"
    assert listed == (folder / "00000000.txt").read_text().splitlines()
    assert not capsys.readouterr().err
    # Without the images of step 0, or with those of other prompts, the grid has the new ones alone.
    alone = grid(2, 7, [Prompt("a red fox", 0), Prompt("two corgis", 5), Prompt("another", 0)])
    assert alone.shape == first.shape
    assert "step 7: the sample images are not compared with those of step 0: those" in capsys.readouterr().err
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:60]), lambda path: path.unlink()):
        damage(folder / "initial" / "0001.png")
        np.testing.assert_array_equal(grid(2, 8), grid(2, 9))
        assert capsys.readouterr().err.count("are not compared") == 2
    assert "each" not in (folder / "00000008.txt").read_text()


def test_an_encoder_of_another_width(tmp_path):
    config = with_prompts()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, text_dim=24))
    with pytest.raises(UserError, match=r"has features of width 16, and model.text_dim is 24"):
        samples.make_sample_grid(config, None, PROMPTS, epath.Path(tmp_path))
    text = dataclasses.replace(tiny.TEXT, weights="")
    config = dataclasses.replace(config, features=dataclasses.replace(config.features, text_encoder=text))
    with pytest.raises(UserError, match=r"features.text_encoder.weights is empty: give a folder"):
        samples.make_sample_grid(config, None, PROMPTS, epath.Path(tmp_path))


def test_prompts_that_are_too_long_or_unknown_are_reported(tmp_path):
    said = []
    prompts = [Prompt("a very long prompt of more than 32 bytes", 0)]
    samples.make_sample_grid(with_prompts(), None, prompts, epath.Path(tmp_path), said.append)
    assert len(said) == 1 and said[0].startswith("log.prompts: 1 captions were truncated to 32 tokens")
