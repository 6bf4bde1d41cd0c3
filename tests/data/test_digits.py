from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from pixart_jax.data.digits import NUMBERS, WORDINGS, DigitsSource, caption_for, images_and_labels
from pixart_jax.errors import UserError


def test_images_are_those_of_scikit_learn():
    images, labels, numbers = images_and_labels("all")
    digits = load_digits()
    assert images.shape == (1797, 8, 8, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.rint(images[..., 0] / 255 * 16), digits.images)
    np.testing.assert_array_equal(labels, digits.target)
    assert numbers.tolist() == list(range(1797))


def test_splits_are_fixed_and_disjoint():
    train, test = DigitsSource("train"), DigitsSource("test")
    assert (len(train), len(test)) == (1498, 299)
    keys = [{source.key(i) for i in range(len(source))} for source in (train, test)]
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 1797
    assert test.key(0) == "digits/0005" and test.key(1) == "digits/0011"
    # All digits are held out about equally often.
    counts = Counter(test[i].label for i in range(len(test)))
    assert set(counts) == set(range(10)) and min(counts.values()) >= 20


def test_images_are_enlarged_with_pillows_bicubic_filter():
    small, labels, _ = images_and_labels("test", 8)
    large, same, _ = images_and_labels("test", 16)
    assert large.shape == (299, 16, 16, 1) and (labels == same).all()
    expected = Image.fromarray(small[7, ..., 0]).resize((16, 16), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(large[7, ..., 0], np.asarray(expected))


def test_captions():
    assert caption_for(7, 0) == "a handwritten seven"
    assert caption_for(7, 1) == "the digit 7 written by hand"
    assert caption_for(8, 6) == "an eight drawn with a pen"
    assert caption_for(1, 6) == "a one drawn with a pen"
    everything = [caption_for(digit, w) for digit in range(10) for w in range(len(WORDINGS))]
    assert len(set(everything)) == 10 * len(WORDINGS) >= 80
    for digit in range(10):
        for wording in range(len(WORDINGS)):
            # A caption names its digit once, as a word or a numeral, and no other digit.
            words = caption_for(digit, wording).replace(",", "").split()
            named = [w for w in words if w.isdecimal() or w in NUMBERS]
            assert named in ([str(digit)], [NUMBERS[digit]])


def test_examples():
    source = DigitsSource("train", 16)
    assert source.classes == list("0123456789") and source.channels == 1
    wordings = Counter()
    for i in range(len(source)):
        example = source[i]
        assert example.key == source.key(i) and example.size() == (16, 16)
        assert len({c.text for c in example.captions}) == len(example.captions) == 3
        wordings.update((example.label, c.name) for c in example.captions)
        for caption in example.captions:
            assert caption.text == caption_for(example.label, int(caption.name.removeprefix("wording")))
    # There are captions of every digit in every wording.
    assert len(wordings) == 10 * len(WORDINGS) and min(wordings.values()) > 10
    np.testing.assert_array_equal(source[5].decode(), images_and_labels("train", 16)[0][5])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"split": "tests"}, "choose one of train, test, all. Did you mean 'test'?"),
        ({"image_size": 12}, "image size 12 of the digits: choose 8 (as scanned) or 16."),
    ],
)
def test_input_errors(options, words):
    with pytest.raises(UserError) as error:
        DigitsSource(**options)
    assert words in str(error.value)
