import numpy as np
import pytest

from pixart_jax.data.shapes import SPLITS, Scene, Thing, all_scenes, all_things, draw
from pixart_jax.evaluation.shapes import SCORES, read_scene, score, score_all

PERFECT = dict.fromkeys(SCORES, 1.0)


def things(scene, image):
    """Returns what was read from the image and what is in the scene, both sorted."""
    return sorted((f.size, f.colour, f.shape) for f in read_scene(image)), sorted(
        (t.size, t.colour, t.shape) for t in scene.things
    )


def test_the_reader_is_exact_on_rendered_scenes():
    rng = np.random.default_rng(0)
    scenes = [Scene((thing,)) for thing in all_things()]
    for split in SPLITS:
        _, pairs = all_scenes(split)
        scenes += [pairs[i] for i in rng.integers(len(pairs), size=80)]
    for scene in scenes:
        image = draw(scene, rng)
        read, drawn = things(scene, image)
        assert read == drawn
        assert score(scene, read_scene(image)) == PERFECT


def test_the_reader_bears_blur_and_noise_and_reads_nothing_in_noise():
    rng = np.random.default_rng(0)
    _, pairs = all_scenes("train")
    scenes = [pairs[i] for i in rng.integers(len(pairs), size=40)]
    images = np.stack([draw(scene, rng) for scene in scenes]).astype(float)
    noisy = (0.8 * images + 20 + 15 * rng.normal(size=images.shape)).clip(0, 255).astype(np.uint8)
    assert score_all(scenes, noisy)["scene"] == 1
    noise = rng.integers(0, 256, images.shape).astype(np.uint8)
    assert score_all(scenes, noise)["scene"] == 0
    assert read_scene(np.zeros((8, 8, 3), np.uint8)) == []


PLUS, SQUARE = Thing("small", "red", "plus"), Thing("large", "cyan", "square")
ASKED = Scene((PLUS, SQUARE), "left of")


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (ASKED, {}),
        # The mirrored caption describes the same scene.
        (Scene((SQUARE, PLUS), "right of"), {}),
        (Scene((SQUARE, PLUS), "left of"), dict(relation=0, scene=0)),
        (Scene((PLUS, SQUARE), "above"), dict(relation=0, scene=0)),
        (Scene((Thing("large", "red", "plus"), SQUARE), "left of"), dict(scene=0)),
        (
            Scene((Thing("small", "blue", "plus"), SQUARE), "left of"),
            dict(colour=0.5, relation=0, scene=0),
        ),
        (
            Scene((Thing("small", "red", "corner"), SQUARE), "left of"),
            dict(shape=0.5, relation=0, scene=0),
        ),
        # Swapped colours count as wrong.
        (
            Scene((Thing("small", "cyan", "plus"), Thing("large", "red", "square")), "left of"),
            dict(colour=0, relation=0, scene=0),
        ),
        (Scene((PLUS,)), dict(colour=0.5, shape=0.5, number=0, relation=0, scene=0)),
    ],
)
def test_scores(drawn, expected):
    image = draw(drawn, np.random.default_rng(0))
    assert score(ASKED, read_scene(image)) == {**PERFECT, **expected}


def test_a_thing_too_many_costs_the_number():
    image = draw(ASKED, np.random.default_rng(0))
    row = 0 if image[4:].any() else 4
    image[row : row + 2, :2] = (0, 0, 255)
    assert score(ASKED, read_scene(image)) == {**PERFECT, "number": 0, "scene": 0}
