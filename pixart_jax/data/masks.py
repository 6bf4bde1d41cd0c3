"""Masks: images that say how much each part of another image counts in the loss.

A mask is white (1) where the model shall learn, black (0) where it shall not, and grey in between. Masks are
files in a folder, paired with the images by their keys. The mask of an image with the key "a/b.jpg" is

    a/b-masklabel.png   with any suffix of images, if the folder has files of such names (OneTrainer's names);
                        the folder may then be that of the images
    a/b.jpg, a/b.png    otherwise: the same name, or the same name with another suffix of images

Axes: H, W rows and columns of an image in pixels; h, w those of its latents.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pixart_jax.data.buckets import Bucket
from pixart_jax.data.images import FORMATS, Refused, View, decode_image, resize_and_crop
from pixart_jax.data.sources.base import Example, Source, WrappedSource
from pixart_jax.data.sources.paths import image_names, printable
from pixart_jax.errors import UserError, short

# The end of the name of a mask, before its suffix.
LABEL = "-masklabel"


def labelled(folder: str | os.PathLike) -> Iterator[str]:
    """Yields the paths of all files NAME-masklabel.png of a folder, relative to it; none if it is a file."""
    return (name for name in image_names(Path(folder)) if os.path.splitext(name)[0].endswith(LABEL))


class MaskedSource(WrappedSource):
    """The samples of another source, with masks from a folder.

    An image without a mask has the mask None. Samples whose images are masks of the folder are left out.

    Args:
      source: the images.
      folder: the folder of the masks.

    Raises:
      UserError: the folder does not exist, has no mask of any image, or is that of the images.
    """

    def __init__(self, source: Source, folder: str | os.PathLike):
        super().__init__(source)
        self.masked, self._root = True, Path(folder)
        if not self._root.is_dir():
            raise UserError(f"masks '{folder}': does not exist or is not a folder; give the folder of masks.")
        self.job_options = {**source.job_options, "masks": True}
        labels = sorted(labelled(self._root))
        names = labels or sorted(image_names(self._root))
        own = {printable(name) for name in labels}
        self._kept = [i for i in range(len(source)) if source.key(i) not in own]
        by_stem: dict[str, list[str]] = collections.defaultdict(list)
        for name in names:
            by_stem[printable(os.path.splitext(name)[0]).removesuffix(LABEL if labels else "")].append(name)
        exact = {} if labels else {printable(name): [name] for name in names}
        # For each sample the masks that it may have; more than one is an error of the sample.
        self._masks = []
        for i in self._kept:
            key = source.image_key(i)
            stem = os.path.splitext(key)[0]
            self._masks.append(exact.get(key) or by_stem.get(stem) or by_stem.get(key) or [])
        used = {name for masks in self._masks for name in masks}
        unmasked = [source.key(i) for i, masks in zip(self._kept, self._masks) if not masks]
        if not used:
            example = f", such as '{printable(names[0])}'," if names else ""
            raise UserError(
                f"masks '{folder}': none of its {len(names):,} images{example} has the name of an image; the "
                f"mask of '{short(source.key(0))}' would be "
                f"'{os.path.splitext(source.key(0))[0]}{LABEL if labels else ''}.png'."
            )
        if not labels:
            self._check_folder()
        self.notes = source.notes
        if unmasked:
            self.notes += (
                f"{len(unmasked):,} of {len(self._kept):,} images have no mask in '{folder}', for example "
                f"'{unmasked[0]}'; their loss covers the whole image",
            )
        if lost := [name for name in names if name not in used]:
            self.notes += (
                f"{len(lost):,} of {len(names):,} masks in '{folder}' are of no image, for example "
                f"'{printable(lost[0])}'; they are not read",
            )

    def _check_folder(self) -> None:
        """Raises a `UserError` if the images would be their own masks."""
        for position in range(len(self)):
            try:
                example = self[position]
            except Refused:
                continue
            if example.mask is not None:
                if isinstance(example.image, Path) and os.path.realpath(example.image) == os.path.realpath(
                    example.mask
                ):
                    raise UserError(
                        f"masks '{self._root}': is the folder of the images; name the masks there "
                        f"NAME{LABEL}.png, or give another folder."
                    )
                return

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, index: int) -> str:
        return self._source.key(self._kept[index])

    def image_key(self, index: int) -> str:
        return self._source.image_key(self._kept[index])

    def __getitem__(self, index: int) -> Example:
        example, masks = self._source[self._kept[index]], self._masks[index]
        if len(masks) > 1:
            raise Refused("bad_mask", f"'{masks[0]}' and '{masks[1]}' could both be its mask; remove one")
        return dataclasses.replace(example, mask=self._root / masks[0]) if masks else example


def decode_mask(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decodes a mask and resizes it to the size of its image.

    Args:
      data: the encoded mask.
      size: (H, W) of the image.

    Returns:
      uint8 [H, W], 255 for 1.

    Raises:
      Refused: it cannot be decoded, has transparent parts, or another aspect ratio than the image.
    """
    try:
        mask = np.asarray(Image.fromarray(decode_image(data)).convert("L"))
    except Refused as error:
        raise Refused("bad_mask", f"its mask: {error.text}") from None
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255:
            raise Refused("bad_mask", "its mask has transparent parts; save it in black, white and grey")
    (height, width), (rows, columns) = size, mask.shape
    # Equal up to the rounding of a smaller or larger copy to whole pixels.
    if abs(rows * width - columns * height) > max(height, width, rows, columns):
        raise Refused(
            "bad_mask",
            f"its mask is {rows}x{columns} (h x w), the image {height}x{width}; give both one aspect ratio",
        )
    if mask.shape != size:
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.BILINEAR))
    return mask


def latent_mask(mask: np.ndarray | None, bucket: Bucket, view: View, downsampling: int) -> np.ndarray:
    """Resizes and crops a mask to the part that its image shows, and averages it over each latent position.

    The filter of the resize is bicubic for all sizes.

    Args:
      mask: uint8 [H, W]; None for 1 everywhere.
      bucket: the bucket of the image.
      view: the view of the image.
      downsampling: pixels per latent position, along a side.

    Returns:
      uint8 [h, w], 255 for 1.
    """
    height, width = bucket.height // downsampling, bucket.width // downsampling
    if mask is None:
        return np.full((height, width), 255, np.uint8)
    grey: Any = np.repeat(mask[:, :, None], 3, axis=2)
    pixels = resize_and_crop(grey, bucket.height, bucket.width, view=view).pixels[:, :, 0]
    blocks = pixels.reshape(height, downsampling, width, downsampling)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
