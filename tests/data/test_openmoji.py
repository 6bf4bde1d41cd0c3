import sys
from collections import Counter

import numpy as np
import pytest

from pixart_jax.config import FeaturesConfig
from pixart_jax.data.openmoji import (
    CAPTIONS_PER_IMAGE,
    COLOURS,
    GROUPS,
    SHAPES,
    TONES,
    OpenMojiSource,
    emojis,
    held_out_combinations,
    originals,
    rasterize,
    split_of,
    subject,
    word,
)
from pixart_jax.data.planning import open_images
from pixart_jax.errors import UserError


def by_code(code):
    return next(emoji for emoji in emojis() if emoji.code == code)


def test_names_have_parts():
    woman = by_code("1F469-1F3FF-200D-1F692")
    assert (woman.concept, woman.tones) == ("woman firefighter", ("dark",))
    assert woman.name == "woman firefighter, dark skin tone"
    couple = by_code("1F469-1F3FB-200D-2764-FE0F-200D-1F468-1F3FE")
    assert (couple.concept, couple.tones) == ("couple with heart woman man", ("light", "medium-dark"))
    assert by_code("1F1E8-1F1ED").concept == "flag of Switzerland"
    assert by_code("E0C0").concept == "" and by_code("1F3FB").concept == ""
    named = [emoji for emoji in emojis() if emoji.concept]
    assert (len(emojis()), len(named), len({emoji.name for emoji in named})) == (4495, 3948, 3948)


def test_pictures_with_two_names():
    pictures = originals()
    monaco, indonesia = "1F1F2-1F1E8", "1F1EE-1F1E9"
    assert pictures[monaco] == pictures[indonesia] == indonesia
    assert len(set(pictures.values())) < 4300 and all(pictures[code] == code for code in pictures.values())


def test_captions_read_well():
    assert word("cook", ("dark",), "a picture of {a}{name}") == "a picture of a cook with dark skin"
    assert word("apple", (), "an emoji of {a}{name}") == "an emoji of an apple"
    assert word("flag of Chad", (), "{a}{name}") == "the flag of Chad"
    assert word("Santa Claus", (), "{a}{name}") == "Santa Claus"
    tone = "{name} with {a_tone} skin tone"
    assert word("elf", ("light",), "{name} emoji", tone) == "elf with a light skin tone emoji"
    assert word("kiss", ("light", "dark"), "{name}") == "kiss, light skin tone, dark skin tone"
    for emoji in emojis()[::50]:
        captions = [caption for _, caption in emoji.captions()]
        assert bool(captions) == bool(emoji.concept)
        assert len(set(captions)) == len(captions) <= CAPTIONS_PER_IMAGE
        # Every caption of a person says which skin tone, if one is shown.
        assert all(tone in caption for caption in captions for tone in emoji.tones)


def test_held_out_combinations_are_never_trained_but_their_parts_are():
    train = [emoji for emoji in emojis() if emoji.concept and split_of(emoji) == "train"]
    held_out = [emoji for emoji in emojis() if emoji.code in held_out_combinations()]
    trained = Counter(emoji.concept for emoji in train)
    assert not {originals()[emoji.code] for emoji in train} & {originals()[emoji.code] for emoji in held_out}
    shapes = {emoji.concept for emoji in held_out if emoji.concept.split()[-1] in SHAPES}
    assert len(shapes) == len(SHAPES)
    roles = {
        emoji.concept
        for emoji in held_out
        if not emoji.tones and emoji.concept.split()[0] in ("man", "woman")
    }
    assert len(roles) > 5
    for emoji in held_out:
        if emoji.concept in shapes:
            colour, shape = emoji.concept.split()
            assert colour in COLOURS and any(f"{colour} {other}" in trained for other in SHAPES)
            assert sum(f"{other} {shape}" in trained for other in COLOURS) > 5
        elif emoji.concept in roles:
            gender, role = emoji.concept.split(" ", 1)
            assert trained[f"{'woman' if gender == 'man' else 'man'} {role}"]
            assert not trained[emoji.concept]
        elif not emoji.tones:  # drawn like a held-out role
            assert originals()[emoji.code] in {originals()[e.code] for e in held_out if e.concept in roles}
        elif trained[emoji.concept]:
            (tone,) = emoji.tones
            same = {other.tones for other in train if other.concept == emoji.concept and other.tones}
            # Validation may hold out further pictures of the same concept.
            assert len(same) >= 2 and (tone,) not in same
            assert sum(other.tones == (tone,) for other in train) > 200


def test_splits_share_no_picture():
    splits = {split: OpenMojiSource(split, named="no") for split in ("train", "validation", "compositions")}
    keys = [source.key(i) for source in splits.values() for i in range(len(source))]
    everything = OpenMojiSource("all", named="no")
    assert sorted(keys) == [everything.key(i) for i in range(len(everything))]
    assert len(set(keys)) == 4495
    assert 0.03 < len(splits["validation"]) / 4495 < 0.06
    assert len(OpenMojiSource("all")) == 3948


def test_pictures_and_labels():
    features = FeaturesConfig(image_size=32, codec="pixels", vae="", latent_scale=1.0)
    source = open_images("auto", "openmoji", features, {"split": "train"})
    assert source.classes == list(GROUPS)
    example = source[17]
    pixels = example.decode()
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert (pixels[0, 0] == 255).all() and (pixels < 128).any()
    labels = Counter(emoji.group for emoji in emojis())
    assert set(labels) == set(range(len(GROUPS)))
    assert list(GROUPS)[by_code("1F98A").group] == "animals"
    assert list(GROUPS)[by_code("1F34E").group] == "food and drink"
    # The skin tone is what its name says.
    thumbs = [rasterize(by_code(f"1F44D-1F3F{c}"), 64).astype(int).sum(axis=-1) for c in "BCDEF"]
    means = [np.mean(image) for image in thumbs]
    assert means == sorted(means, reverse=True) and len(TONES) == 5


def test_a_part_has_whole_subjects():
    for concept, wanted in (
        ("woman firefighter", "firefighter"),
        ("person running", "running"),
        ("red heart", "heart"),
        ("red apple", "red apple"),
        ("manual wheelchair", "manual wheelchair"),
        ("fox", "fox"),
    ):
        assert subject(concept) == wanted
    whole, part = (OpenMojiSource("train", one_in=count) for count in (1, "4"))
    assert 0.2 < len(part) / len(whole) < 0.3
    kept = {subject(part[i].emoji.concept) for i in range(len(part))}
    # All pictures of these subjects, and thus also held-out combinations.
    assert len(part) == sum(subject(whole[i].emoji.concept) in kept for i in range(len(whole)))
    held_out = OpenMojiSource("compositions", one_in=4)
    assert len(held_out) > 50
    assert all(subject(held_out[i].emoji.concept) in kept for i in range(len(held_out)))


def test_bad_options():
    for value in ("0", "101", "half", 2.5):
        with pytest.raises(UserError, match=f"one_in '{value}' of OpenMoji: it must be a whole number in"):
            OpenMojiSource("train", one_in=value)
    with pytest.raises(UserError, match="split of OpenMoji is 'test': choose one of train"):
        OpenMojiSource("test")
    with pytest.raises(UserError, match="image size 4 of OpenMoji: it must be in"):
        OpenMojiSource("train", 4)


def test_a_missing_package_is_named(monkeypatch):
    # None in place of a module makes its import fail.
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    with pytest.raises(UserError, match=r"need the package 'resvg-py'.*pip install 'pixart_jax\[openmoji\]'"):
        rasterize(by_code("1F600"), 32)
