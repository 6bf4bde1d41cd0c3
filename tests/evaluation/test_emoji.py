import dataclasses

import numpy as np
import pytest
import tiny
from tiny_text_encoders import WIDTH, save_encoder

from pixart_jax.config import FeaturesConfig, TextEncoderConfig
from pixart_jax.data.openmoji import NEW_WORDINGS, emojis, rasterize, split_of
from pixart_jax.evaluation.emoji import (
    SETS,
    captions,
    contact_sheet,
    distort,
    make_generator,
    measure,
    read_part,
    score,
    table,
    train_reader,
    variants,
)

SIZE = 16


@pytest.fixture(scope="module")
def people():
    return [emoji for emoji in emojis() if emoji.concept and len(emoji.tones) == 1][::60]


def test_readers_recognize_real_pictures(people):
    rng = np.random.default_rng(0)
    real = np.stack([rasterize(emoji, SIZE) for emoji in people])
    scores = score(people, real)
    assert scores == {"pictures": len(people), "emoji": 1.0, "concept": 1.0, "part": 1.0}
    distorted = score(people, np.stack([distort(image, rng) for image in real]))
    assert distorted["concept"] > 0.7 and distorted["part"] > 0.6
    # Pictures of other emojis are not what was asked for.
    wrong = score(people[1:] + people[:1], real)
    assert wrong["emoji"] == 0 and wrong["concept"] < 0.1


def test_the_reader_finds_the_nearest_picture():
    reader = train_reader(SIZE)
    chosen = list(reader.emojis[::400])
    found = reader.read(np.stack([rasterize(emoji, SIZE) for emoji in chosen]))
    assert found == chosen


def test_parts_that_vary():
    red, blue, face = (
        next(emoji for emoji in emojis() if emoji.concept == name)
        for name in ("red heart", "blue heart", "grinning face")
    )
    same = variants(red)
    assert {red, blue} < set(same) and len(same) == 9
    assert variants(face) == []
    assert read_part(rasterize(blue, SIZE), same) == blue
    # A slightly paler blue is nearer to blue than to any other colour of the hearts.
    pale = (rasterize(blue, SIZE) * 0.9 + 255 * 0.1).astype(np.uint8)
    assert read_part(pale, same) == blue


def test_captions_of_each_set():
    for name, split in (("trained", "train"), ("wordings", "train"), ("compositions", "compositions")):
        found = captions(name, 20, seed=1)
        assert len(found) == 20 and all(split_of(emoji) == split for emoji, _ in found)
    trained, new = captions("trained", 20, seed=1), captions("wordings", 20, seed=1)
    assert [emoji for emoji, _ in trained] == [emoji for emoji, _ in new]
    seen = {caption for emoji in emojis() if emoji.concept for _, caption in emoji.captions()}
    assert not seen & {text for _, text in new} and len(NEW_WORDINGS) > 1
    assert len(captions("compositions")) == sum(split_of(e) == "compositions" for e in emojis())


def test_tables_and_sheets(people):
    rows = [
        {"stage": "a", "captions": "trained"} | score(people, np.stack([rasterize(e, SIZE) for e in people]))
    ]
    assert (
        table(rows).splitlines()[-1].startswith(f"| a | trained | {len(people)} | 100.0% | 100.0% | 100.0% |")
    )
    images = np.zeros((3, SIZE, SIZE, 3), np.uint8)
    sheet = contact_sheet(images, ["a", "b", "a long caption that needs several lines"], 2, side=4 * SIZE)
    assert sheet.shape[1] == 2 * (4 * SIZE + 12)
    black = (sheet == 0).all(axis=-1)
    assert black.sum() >= 3 * (4 * SIZE) ** 2
    assert ((sheet > 0) & (sheet < 200)).any()  # the captions


def test_pictures_are_generated_from_captions(tmp_path, random_params):
    """Two captions of each set, and the i-th picture depends only on its caption and its seed."""
    save_encoder(tmp_path, "bert")
    model = dataclasses.replace(tiny.MODEL, text_dim=WIDTH, text_length=16, base_size=8)
    encoder = TextEncoderConfig(
        tokenizer=str(tmp_path), tokenizer_subfolder="", weights=str(tmp_path), dtype="float32"
    )
    features = FeaturesConfig(codec="pixels", latent_scale=1.0, text_length=16, text_encoder=encoder)
    config = dataclasses.replace(tiny.CONFIG, model=model, features=features)
    size = config.features.image_size
    params = random_params(model)[1]
    rows, sheet = measure(params, config, 2, steps=2)
    assert [row["captions"] for row in rows] == [*SETS, "real pictures, distorted"]
    assert all(row["pictures"] == 2 and row["pixels"] == size for row in rows)
    assert sheet.ndim == 3 and sheet.std() > 0
    generate = make_generator(config, steps=2)
    images = generate(params, ["a red fox", "a dog"], 5)
    assert images.shape == (2, size, size, 3) and images.std() > 1
    np.testing.assert_array_equal(generate(params, ["a dog"], 6), images[1:])
