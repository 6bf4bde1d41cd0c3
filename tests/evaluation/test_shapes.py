import numpy as np
import pytest

from pixart_jax.data.shapes import SPLITS, Scene, Thing, all_scenes, all_things, draw
from pixart_jax.evaluation.shapes import SCORES, read_scene, score, score_all

PERFECT = dict.fromkeys(SCORES, 1.0)


def things(scene, image):
    """What was read, in the order of the scene's colours and shapes."""
    return sorted((f.size, f.colour, f.shape) for f in read_scene(image)), sorted(
        (t.size, t.colour, t.shape) for t in scene.things
    )


def test_the_reader_is_exact_on_drawn_scenes():
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
    assert read_scene(np.zeros((16, 16, 3), np.uint8)) == []


RING, SQUARE = Thing("small", "red", "ring"), Thing("large", "cyan", "square")
ASKED = Scene((RING, SQUARE), "left of")


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (ASKED, {}),
        # The mirrored caption tells the same scene.
        (Scene((SQUARE, RING), "right of"), {}),
        (Scene((SQUARE, RING), "left of"), dict(relation=0, scene=0)),
        (Scene((RING, SQUARE), "above"), dict(relation=0, scene=0)),
        (Scene((Thing("large", "red", "ring"), SQUARE), "left of"), dict(scene=0)),
        (
            Scene((Thing("small", "blue", "ring"), SQUARE), "left of"),
            dict(colour=0.5, relation=0, scene=0),
        ),
        (
            Scene((Thing("small", "red", "diamond"), SQUARE), "left of"),
            dict(shape=0.5, relation=0, scene=0),
        ),
        # Colours that went to the wrong things are wrong.
        (
            Scene((Thing("small", "cyan", "ring"), Thing("large", "red", "square")), "left of"),
            dict(colour=0, relation=0, scene=0),
        ),
        (Scene((RING,)), dict(colour=0.5, shape=0.5, number=0, relation=0, scene=0)),
    ],
)
def test_scores(drawn, expected):
    image = draw(drawn, np.random.default_rng(0))
    assert score(ASKED, read_scene(image)) == {**PERFECT, **expected}


def test_a_thing_too_many_costs_the_number():
    image = draw(ASKED, np.random.default_rng(0))
    free = np.argwhere((image == 0).all(axis=-1))
    top, left = next(p for p in free if not image[p[0] : p[0] + 5, p[1] : p[1] + 5].any() and max(p) <= 11)
    image[top + 1 : top + 4, left + 1 : left + 4] = (0, 0, 255)
    assert score(ASKED, read_scene(image)) == {**PERFECT, "number": 0, "scene": 0}
