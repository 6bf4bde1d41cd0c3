import itertools
from collections import Counter

import numpy as np
import pytest

from pixart_jax.config import FeaturesConfig
from pixart_jax.data.planning import open_images
from pixart_jax.data.shapes import (
    COLOURS,
    DENSITIES,
    RELATIONS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    ShapesSource,
    Thing,
    all_scenes,
    draw,
    mask,
    random_scene,
)
from pixart_jax.errors import UserError

RED_PLUS = Thing("small", "red", "plus")
CYAN_SQUARE = Thing("large", "cyan", "square")


def test_captions_of_three_densities():
    scene = Scene((RED_PLUS, CYAN_SQUARE), "left of")
    assert [scene.caption(density) for density in DENSITIES] == [
        "a plus",
        "a small red plus and a large cyan square",
        "a small red plus left of a large cyan square",
    ]
    single = Scene((RED_PLUS,))
    assert [single.caption(density) for density in DENSITIES] == ["a plus", *2 * ["a small red plus"]]
    # Full captions describe scenes completely: no two scenes have the same caption.
    scenes = [scene for split in SPLITS for part in all_scenes(split) for scene in part]
    assert len({scene.caption() for scene in scenes}) == len(scenes)


def test_held_out_scenes():
    kinds, couples = {}, {}
    for split in SPLITS:
        singles, pairs = all_scenes(split)
        kinds[split] = {thing.kind for scene in singles for thing in scene.things}
        couples[split] = {frozenset(thing.kind for thing in scene.things) for scene in pairs}
        assert all(scene.split == split for scene in singles + pairs)
        assert len(pairs) > 1000  # enough prompts for an evaluation
    assert kinds["novel"] == {(i, i) for i in range(4)}
    assert len(kinds["train"]) == len(COLOURS) * len(SHAPES) - 4 and not kinds["test"]
    # Together the splits contain all pairs of kinds. Each pair is in one split only, with all its sizes and
    # relations.
    assert not couples["train"] & couples["test"]
    everything = {
        frozenset(couple)
        for couple in itertools.combinations(kinds["train"] | kinds["novel"], 2)
        if couple[0][0] != couple[1][0]
    }
    assert couples["train"] | couples["test"] | couples["novel"] == everything
    # Each kind of a held-out pair also occurs in training scenes, alone and together with other kinds.
    assert set.union(*map(set, couples["test"])) <= set.union(*map(set, couples["train"])) == kinds["train"]


def test_the_image_shows_the_scene():
    rng = np.random.default_rng(0)
    for relation, offset in RELATIONS.items():
        places = set()
        for _ in range(50):
            image = draw(Scene((RED_PLUS, CYAN_SQUARE), relation), rng)
            colours = {tuple(pixel) for pixel in image.reshape(-1, 3)}
            assert colours == {(0, 0, 0), COLOURS["red"], COLOURS["cyan"]}
            plus, square = ((image == COLOURS[name]).all(axis=-1) for name in ("red", "cyan"))
            assert plus.sum() == mask("plus", 3).sum() and square.sum() == 16
            first, second = (np.argwhere(pixels).mean(axis=0) for pixels in (plus, square))
            # Truncated, because the centres of a small and a large thing in one row differ by half a pixel.
            np.testing.assert_array_equal(np.sign(np.trunc(first - second)), offset)
            places.add(tuple(first))
        assert len(places) == 2
    assert len({draw(Scene((RED_PLUS,)), rng).tobytes() for _ in range(50)}) == 4


def test_shapes_differ_at_both_sizes():
    for size in SIZES.values():
        for one, other in itertools.combinations(SHAPES, 2):
            assert (mask(one, size) ^ mask(other, size)).sum() >= 4
        assert [mask(shape, size).shape for shape in SHAPES] == [(size, size)] * 4
    assert [mask(shape, 3).sum() for shape in SHAPES] == [9, 5, 5, 5]


def test_examples_are_a_function_of_seed_and_index():
    source = ShapesSource("train", count="300", seed=1)
    assert len(source) == 300 and source.channels == 3 and source.classes == list(SHAPES)
    assert source.key(7) == "shapes/train/000007"
    for i in (0, 7, 299):
        example, again = source[i], ShapesSource("train", count=900, seed=1)[i]
        assert example.scene == again.scene and (example.decode() == again.decode()).all()
        assert [c.name for c in example.captions] == list(DENSITIES)
        assert example.captions[2].text == example.scene.caption()
        assert SHAPES[example.label] == example.scene.things[0].shape
        assert example.size() == (8, 8)
    assert any(source[i].scene != ShapesSource("train", seed=2)[i].scene for i in range(3))
    things = Counter(len(source[i].scene.things) for i in range(300))
    assert 60 < things[1] < 140 and things[1] + things[2] == 300
    assert all(source[i].scene.split == "train" for i in range(300))
    test = ShapesSource("test", density="noun", count=20)
    assert all(test[i].scene.split == "test" for i in range(20))
    assert [len(test[i].captions) for i in range(20)] == [1] * 20


def test_split_of_random_scenes():
    rng = np.random.default_rng(0)
    for split in SPLITS:
        assert {random_scene(rng, split).split for _ in range(200)} == {split}


def test_the_source_is_opened_by_name():
    config = FeaturesConfig(image_size=8, codec="pixels", vae="", latent_scale=1.0)
    source = open_images("auto", "shapes", config, {"split": "novel", "count": "5", "density": "full"})
    assert isinstance(source, ShapesSource) and len(source) == 5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "tests"}, "choose one of train, test, novel. Did you mean 'test'?"),
        ({"density": "nouns"}, "choose one of noun, attributes, full. Did you mean 'noun'?"),
        ({"image_size": 32}, "image size 32 of the shapes: it must be 8."),
        ({"count": "0"}, "count '0' of the shapes: it must be a whole number in [1, 10000000]."),
        ({"seed": "-1"}, "seed '-1' of the shapes: it must be a whole number in [0, 4294967295]."),
    ],
)
def test_input_errors(options, words):
    with pytest.raises(UserError) as error:
        ShapesSource(**options)
    assert words in str(error.value)


def test_unknown_option():
    with pytest.raises(UserError, match=r"option of source 'shapes' is 'spilt'.*Did you mean 'split'"):
        open_images("shapes", "shapes", FeaturesConfig(image_size=8), {"spilt": "test"})
