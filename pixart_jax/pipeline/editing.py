"""Images to start from and masks to redraw by, as the samplers take them.

Axes: H, W pixels as given, h, w, C latent.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from pixart_jax.data.images import Refused, decode_image, resize_and_crop
from pixart_jax.encoders.images import Codec
from pixart_jax.errors import UserError
from pixart_jax.pipeline.sizes import Size

# Strength where an image is given and no mask: diffusers' default.
IMAGE_STRENGTH = 0.8

ImageSource = np.ndarray | str | os.PathLike


def read_image(image: ImageSource) -> np.ndarray:
    """uint8 [H, W, 3] of a file, or of an array uint8 [H, W, 3].

    Raises:
      UserError: neither an image file nor such an array.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(f"image is {image.dtype} {list(image.shape)}: give uint8 [height, width, 3].")
        return image
    try:
        return decode_image(image)
    except Refused as error:
        raise UserError(
            f"image '{os.fspath(image)}' cannot be read ({error.text}): give a PNG or JPEG."
        ) from None


def read_mask(mask: ImageSource) -> np.ndarray:
    """bool [H, W], True where the image is redrawn.

    Args:
      mask: a file, light where the image is redrawn; or an array [H, W]: bool, uint8 (from 128 on redrawn) or
        float (from 0.5 on).

    Raises:
      UserError: neither.
    """
    if not isinstance(mask, np.ndarray):
        return read_image(mask).mean(axis=2) > 127.5
    if mask.ndim != 2 or not mask.size:
        raise UserError(f"mask is {list(mask.shape)}: give [height, width].")
    return mask >= (0.5 if mask.dtype != np.uint8 else 128)


def default_strength(image: object, mask: object) -> float:
    """The part of the steps that is run, where it is not told."""
    return IMAGE_STRENGTH if image is not None and mask is None else 1.0


def clean_latents(image: ImageSource, height: int, width: int, codec: Codec, channels: int) -> np.ndarray:
    """Latents of an image, resized and cropped to a size: the posterior mean.

    Args:
      image: as `read_image`.
      height, width: in pixels, that the model draws.
      codec: of the pipeline.
      channels: C.

    Returns:
      [h, w, C] float32, unscaled.
    """
    pixels = resize_and_crop(read_image(image), height, width).pixels
    mean, std = codec.encode(pixels[None])
    if std is not None:
        return mean[0]
    # The codec of pixels hands them through.
    scaled = mean[0].astype(np.float32) / np.float32(127.5) - 1
    return scaled.mean(axis=2, keepdims=True) if channels == 1 else scaled


def latent_mask(mask: ImageSource, height: int, width: int, side: int) -> np.ndarray:
    """[h, w, 1] float32, 1 for a latent of which any pixel is redrawn, so that what stays has no new pixel.

    Args:
      mask: as `read_mask`, resized and cropped as the image is.
      height, width: in pixels, that the model draws.
      side: pixels per latent.
    """
    pixels = np.where(read_mask(mask), np.uint8(255), np.uint8(0))
    pixels = resize_and_crop(pixels[:, :, None].repeat(3, axis=2), height, width).pixels[:, :, 0] > 127
    cells = pixels.reshape(height // side, side, width // side, side)
    return cells.any(axis=(1, 3))[:, :, None].astype(np.float32)


def resize_back(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [N, H, W, 1 or 3] -> [N, height, width, 1 or 3], the centre where the aspect differs."""
    if images.shape[1:3] == (height, width):
        return images
    channels = images.shape[3]
    rgb = images.repeat(3, axis=3) if channels == 1 else images
    return np.stack([resize_and_crop(image, height, width).pixels[:, :, :channels] for image in rgb])


def edited_rows(
    image: ImageSource | Sequence[ImageSource] | None,
    mask: ImageSource | Sequence[ImageSource] | None,
    count: int,
    size: Size,
    codec: Codec,
    channels: int,
) -> dict[str, np.ndarray]:
    """What a program reads of images and masks, a row for each prompt.

    Args:
      image, mask: one for all prompts, or one for each.
      count: prompts.
      size, codec, channels: of the pipeline.

    Returns:
      'init' [count, h, w, C] unscaled clean latents and 'mask' [count, h, w, 1], where they were given.

    Raises:
      UserError: a mask without image or of another size, another number of them than of prompts, or files
        that cannot be read.
    """
    if image is None:
        if mask is not None:
            raise UserError("mask comes without image: give the image it is for.")
        return {}
    images = _one_each("image", image, count)
    sides = size.height, size.width
    # Several images are often made from one: it is encoded once.
    distinct = {_identity(each): each for each in images}
    clean = {key: clean_latents(each, *sides, codec, channels) for key, each in distinct.items()}
    out = {"init": np.stack([clean[_identity(each)] for each in images])}
    if mask is not None:
        masks = _one_each("mask", mask, count)
        for one, other in zip(images, masks):
            shapes = read_image(one).shape[:2], read_mask(other).shape
            if shapes[0] != shapes[1]:
                raise UserError(f"mask is {list(shapes[1])} and its image {list(shapes[0])}: give one size.")
        out["mask"] = np.stack([latent_mask(each, *sides, codec.downsampling) for each in masks])
    return out


def _identity(image: ImageSource) -> object:
    return id(image) if isinstance(image, np.ndarray) else os.fspath(image)


def _one_each(name: str, given: Any, count: int) -> list[Any]:
    if not isinstance(given, list | tuple):
        return [given] * count
    if len(given) != count:
        raise UserError(f"{name} has {len(given)} entries for {count} prompts: give 1 or {count}.")
    return list(given)
