"""A data set of real images that needs no download: scikit-learn's handwritten digits, with captions.

It has 1,797 scans of 8 x 8 pixels with values 0 to 16, from the UCI data set "Optical Recognition of
Handwritten Digits" (43 writers, CC BY 4.0), which is part of scikit-learn. Every sixth scan is held out.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image

from pixart_jax.data.captions import Caption
from pixart_jax.errors import UserError, one_of

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = (
    "a handwritten {word}",
    "the digit {numeral} written by hand",
    "the digit {word}",
    "a scan of the number {numeral}",
    "the number {word}",
    "a handwritten {numeral}",
    "{article} {word} drawn with a pen",
    "the numeral {numeral}",
    "a picture of {article} {word}",
    "someone wrote {numeral}",
    "a grey {word}",
    "{word} in pencil",
)
CAPTIONS_PER_IMAGE = 3
SPLITS = ("train", "test", "all")
IMAGE_SIZES = (8, 16)
HELD_OUT_EVERY = 6


@dataclasses.dataclass(frozen=True)
class DigitExample:
    """One scan, with the interface of `sources.Example`.

    Attributes:
      key: "digits/0007", with the number of the scan in scikit-learn's data set.
      pixels: uint8 [H, W, 1], 0 for paper and 255 for ink.
      captions: captions in several wordings.
      label: the digit.
    """

    key: str
    pixels: np.ndarray
    captions: tuple[Caption, ...]
    label: int

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pixels.shape[1]

    def decode(self) -> np.ndarray:
        """Returns the image, uint8 [H, W, 1]."""
        return self.pixels

    def size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels."""
        return self.height, self.width


def caption_for(digit: int, wording: int) -> str:
    """Returns the caption of a digit in one of the `WORDINGS`, for example "an eight drawn with a pen".

    Args:
      digit: 0 to 9.
      wording: index into `WORDINGS`, modulo their number.
    """
    word = NUMBERS[digit]
    return WORDINGS[wording % len(WORDINGS)].format(
        word=word, numeral=digit, article="an" if word == "eight" else "a"
    )


def images_and_labels(split: str = "train", image_size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads the scans of a split.

    Args:
      split: 'train' (1,498 scans), 'test' (the 299 held-out scans) or 'all'.
      image_size: side in pixels: 8 (as scanned) or 16 (enlarged with Pillow's bicubic filter).

    Returns:
      images, uint8 [N, size, size, 1], 0 for paper and 255 for ink; labels, int [N]; and the numbers of the
      scans in scikit-learn's data set, int [N].

    Raises:
      UserError: the split or the size is unknown.
    """
    one_of("split of the digits", split, SPLITS)
    if image_size not in IMAGE_SIZES:
        raise UserError(f"image size {image_size} of the digits: choose 8 (as scanned) or 16.")
    images, labels = _scans()
    numbers = np.arange(len(images))
    held_out = numbers % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
    numbers = numbers[{"train": ~held_out, "test": held_out, "all": slice(None)}[split]]
    images = images[numbers]
    if image_size != images.shape[1]:
        size = (image_size, image_size)
        bicubic = Image.Resampling.BICUBIC
        images = np.stack([np.asarray(Image.fromarray(image).resize(size, bicubic)) for image in images])
    return images[..., None], labels[numbers], numbers


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(
            "the digits need the package 'scikit-learn', which is not installed; pip install scikit-learn"
        ) from None
    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(int)


class DigitsSource:
    """The digits, with the interface of `sources.Source`.

    Args:
      split: as in `images_and_labels`.
      image_size: as in `images_and_labels`.
    """

    kind = "digits"
    channels = 1

    def __init__(self, split: str = "train", image_size: int = 8):
        self._images, self._labels, self._numbers = images_and_labels(split, image_size)
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self._images)

    def key(self, index: int) -> str:
        """Returns the key of a scan."""
        return f"digits/{self._numbers[index]:04d}"

    def __getitem__(self, index: int) -> DigitExample:
        digit, number = int(self._labels[index]), int(self._numbers[index])
        # 5 has no factor in common with the number of wordings, so all wordings are equally frequent.
        wordings = [(5 * number + 4 * i) % len(WORDINGS) for i in range(CAPTIONS_PER_IMAGE)]
        captions = tuple(Caption(caption_for(digit, w), 1.0, f"wording{w}") for w in wordings)
        return DigitExample(self.key(index), self._images[index], captions, digit)
