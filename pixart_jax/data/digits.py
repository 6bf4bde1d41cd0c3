"""Real images that need no download: scikit-learn's handwritten digits, with captions.

1,797 scans of 8 x 8 pixels with values 0 to 16, from the UCI "Optical Recognition of Handwritten Digits" data
set (43 writers, CC BY 4.0), which scikit-learn carries. Every sixth scan is held out, always the same ones.
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
      key: "digits/0007", the number of the scan in scikit-learn's set.
      pixels: uint8 [H, W, 1], 0 for paper and 255 for ink.
      captions: in several wordings.
      label: the digit.
    """

    key: str
    pixels: np.ndarray
    captions: tuple[Caption, ...]
    label: int

    @property
    def height(self) -> int:
        """Pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.pixels.shape[1]

    def decode(self) -> np.ndarray:
        """Returns the image, uint8 [H, W, 1]."""
        return self.pixels

    def size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels."""
        return self.height, self.width


def caption_for(digit: int, wording: int) -> str:
    """Writes a digit in one of the `WORDINGS`, for example "an eight drawn with a pen"."""
    word = NUMBERS[digit]
    return WORDINGS[wording % len(WORDINGS)].format(
        word=word, numeral=digit, article="an" if word == "eight" else "a"
    )


def images_and_labels(split: str = "train", image_size: int = 8) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loads the scans of a split.

    Args:
      split: 'train' (1,498), 'test' (the 299 that are held out) or 'all'.
      image_size: side in pixels: 8 as scanned, 16 enlarged with Pillow's bicubic filter.

    Returns:
      uint8 images [N, size, size, 1], int labels [N], and the numbers [N] of the scans in scikit-learn's set.

    Raises:
      UserError: unknown split or size.
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
    """The digits with the interface of `sources.Source`.

    Args:
      split: as `images_and_labels`.
      image_size: likewise.
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
        # A stride that shares no factor with the number of wordings spreads them evenly over the scans.
        wordings = [(5 * number + 4 * i) % len(WORDINGS) for i in range(CAPTIONS_PER_IMAGE)]
        captions = tuple(Caption(caption_for(digit, w), 1.0, f"wording{w}") for w in wordings)
        return DigitExample(self.key(index), self._images[index], captions, digit)
