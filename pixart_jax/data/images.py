"""Decoding to upright 8-bit RGB, the one resize-and-crop of the project, and the report of refused images.

The feature extractor, the on-the-fly loader and the evaluation call these functions and no others, so that
features and pixels always agree in geometry. Axes: H height, W width, 3 colours red, green, blue.

What happens to images that are not plain RGB:

    EXIF orientation    applied, in every file format that carries it
    grayscale, 1 bit    copied to the three colours
    palette             looked up
    CMYK, YCbCr         converted with Pillow's formula; an embedded ICC profile is not applied, as in the
                        official code
    16 bits a channel   the high byte is kept (v >> 8), for gray as for colour; nothing is clipped
    alpha               composited on white
    MPO (phone JPEG)    the main picture is taken, previews and depth maps are left
    animated, paged     refused: no frame stands for the whole
    32 bits, float      refused: the range of the values is unknown
    truncated, broken   refused
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile

from pixart_jax.errors import UserError
from pixart_jax.files import write_bytes

# An explicit list keeps Pillow from handing a file to an outside program (EPS) or to a layered format.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# Suffixes that a source lists as images. HEIC and JPEG XL are listed though Pillow cannot read them: they are
# then refused by name instead of passing unseen.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".j2k", ".heic", ".heif", ".jxl",
)  # fmt: skip

# Reason codes with the words of the report table.
REASONS = {
    "missing_image": "the image file does not exist",
    "unreadable": "the file system gave no bytes",
    "format": "not an image in a format that can be read",
    "broken": "truncated or damaged image",
    "animated": "more than one frame or page",
    "depth": "32-bit or float samples of unknown range",
    "colour": "colour space that cannot be converted",
    "too_large": "more pixels than the decompression limit",
    "too_small": "shorter side below min_size",
    "missing_caption": "no caption",
    "bad_caption": "caption that is not text in UTF-8",
    "bad_record": "entry of the list that breaks its format",
    "outside_root": "path that leaves the image folder",
    "duplicate_key": "a second entry with the same key",
}

_WITH_ALPHA = frozenset(["RGBA", "LA", "PA", "RGBa", "La"])
_TO_RGB = frozenset(["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Refused(Exception):
    """A sample that is left out, with the reason for the report.

    Attributes:
      reason: a code, usually a key of `REASONS`.
      text: one line for a human, with the values seen.
    """

    def __init__(self, reason: str, text: str):
        text = " ".join(text.split())
        super().__init__(reason, text)
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


@dataclasses.dataclass(frozen=True)
class Crop:
    """The result of `resize_and_crop`.

    Attributes:
      pixels: uint8 [height, width, 3], C-contiguous.
      original_size: (height, width) of the upright image before anything was done, in pixels. The
        model's size condition.
      resized_size: (height, width) after the resize, in pixels; one side equals the crop's.
      offset: (top, left) of the crop in the resized image, in pixels.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]


def read_bytes(source: bytes | os.PathLike | str) -> bytes:
    """Returns the bytes of a file, or `source` itself when it is bytes already.

    Raises:
      Refused: "missing_image" or "unreadable".
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    try:
        return Path(source).read_bytes()
    except FileNotFoundError:
        raise Refused("missing_image", f"no file '{source}'") from None
    except OSError as error:
        raise Refused("unreadable", f"'{source}': {error.strerror or error}") from None


def decode_image(source: bytes | os.PathLike | str) -> np.ndarray:
    """Decodes an image file to upright RGB by the rules at the head of this module.

    Args:
      source: the encoded bytes, or the path of the file.

    Returns:
      uint8 [H, W, 3], C-contiguous and writable.

    Raises:
      Refused: with a reason of `REASONS`.
    """
    data = read_bytes(source)
    with _open(data) as image:
        _refuse_frames(image)
        try:
            image.load()
            image = _turn_upright(image)
            pixels = _to_rgb(image)
        except (Refused, MemoryError):
            raise
        # Decoders raise many types for damaged data (OSError, SyntaxError, zlib.error, struct.error, ...);
        # whichever it is, the image cannot be used and the report says why.
        except Exception as error:
            raise Refused("broken", f"{image.format} image: {error or type(error).__name__}") from None
    return pixels


def read_size(source: bytes | os.PathLike | str) -> tuple[int, int]:
    """Returns the upright (height, width) in pixels from the file's header, without decoding.

    For planning: the header of a damaged file may promise pixels that `decode_image` then refuses.

    Raises:
      Refused: as `decode_image`, for what a header shows.
    """
    with _open(source if not isinstance(source, (bytes, bytearray, memoryview)) else bytes(source)) as image:
        _refuse_frames(image)
        width, height = image.size
        # Pillow reports TIFF sizes upright already, other formats as stored.
        if image.format != "TIFF" and _orientation(image) >= 5:
            width, height = height, width
        return height, width


def resize_and_crop(image: np.ndarray, height: int, width: int, *, min_size: int = 0) -> Crop:
    """Scales an image, keeping its aspect, until it just covers the target, and crops the centre.

    The filter is Pillow's bicubic, which widens its support when it shrinks and is thus antialiased; the
    official training code uses the same. With s = max(height/H, width/W), the resized sides are
    round(s H) and round(s W), at least the target's, and the crop starts at half the surplus, rounded down.
    A smaller image is enlarged.

    Args:
      image: uint8 [H, W, 3].
      height: target height in pixels.
      width: target width in pixels.
      min_size: refuse images whose shorter side is below this, in pixels; 0 takes all.

    Returns:
      The `Crop`.

    Raises:
      Refused: "too_small".
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    original_height, original_width = image.shape[:2]
    if min(original_height, original_width) < min_size:
        raise Refused("too_small", f"{original_height}x{original_width} (h x w), min_size is {min_size}")

    # Integer arithmetic: the side that decides the scale comes out exact, whatever the floats would round to.
    if height * original_width >= width * original_height:
        resized_height = height
        resized_width = max(width, _divide_round(original_width * height, original_height))
    else:
        resized_width = width
        resized_height = max(height, _divide_round(original_height * width, original_width))

    top = (resized_height - height) // 2
    left = (resized_width - width) // 2
    # The crop is mapped back to the original and only that box is resized: the same samples as resizing the
    # whole image, without the gigabytes that a 10 x 20000 strip would become on its way to 512 x 512.
    up, across = original_height / resized_height, original_width / resized_width
    box = (left * across, top * up, (left + width) * across, (top + height) * up)
    pixels = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=box)
    return Crop(
        pixels=np.array(pixels),
        original_size=(original_height, original_width),
        resized_size=(resized_height, resized_width),
        offset=(top, left),
    )


def _divide_round(numerator: int, denominator: int) -> int:
    """Rounds numerator / denominator to the nearest integer, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _open(source: bytes | os.PathLike | str) -> ImageFile.ImageFile:
    """Reads the header of an image."""
    if isinstance(source, bytes) and not source:
        raise Refused("broken", "0 bytes")
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Refused("format", f"not one of {', '.join(FORMATS)}, or a damaged header") from None
    except Image.DecompressionBombError as error:
        raise Refused("too_large", str(error).split(",")[0]) from None
    except FileNotFoundError:
        raise Refused("missing_image", f"no file '{source}'") from None
    except MemoryError:
        raise
    # As in `decode_image`: a damaged header can make a plugin raise anything.
    except Exception as error:
        raise Refused("broken", f"header: {error or type(error).__name__}") from None


def _refuse_frames(image: Image.Image) -> None:
    """Refuses animations and multi-page files."""
    if image.format == "MPO":
        return
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception as error:  # counting frames parses the whole file, which may be damaged
        raise Refused("broken", f"{image.format} image: {error or type(error).__name__}") from None
    if frames > 1:
        raise Refused("animated", f"{image.format} with {frames} frames; save one of them")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 (upright) where there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata around sound pixels: what cannot be read cannot be applied
        return 1


def _turn_upright(image: Image.Image) -> Image.Image:
    transpose = _UPRIGHT.get(_orientation(image))
    if transpose is None:
        return image
    turned = image.transpose(transpose)
    turned.format = image.format
    return turned


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Converts a loaded image to uint8 [H, W, 3]."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        return _gray16_to_rgb(image, transparency)
    if image.mode in ("I", "F"):
        raise Refused("depth", f"{image.format} image of mode {image.mode}; save it with 8 or 16 bits")
    if image.mode in _WITH_ALPHA or (transparency is not None and image.mode in _TO_RGB):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    if image.mode not in _TO_RGB:
        raise Refused("colour", f"{image.format} image of mode {image.mode}; save it as RGB")
    return np.array(image.convert("RGB"))


def _gray16_to_rgb(image: Image.Image, transparency: int | None) -> np.ndarray:
    """Keeps the high byte of 16-bit gray. Pillow's own conversion would clip all above 255 to white."""
    # TIFF stores 12-bit gray unscaled in 16 bits.
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
    values = np.asarray(image).astype(np.int64)
    gray = (values >> (max(bits, 8) - 8)).clip(0, 255).astype(np.uint8)
    if isinstance(transparency, int):
        gray[values == transparency] = 255
    return np.repeat(gray[:, :, None], 3, axis=2)


class Refusal(NamedTuple):
    """A line of refused.jsonl."""

    key: str
    reason: str
    text: str


class RefusalReport:
    """Counts what was taken and what was refused, and stops a run that refuses too much.

    Safe to use from several threads.

    Args:
      max_refused_share: the share of refused samples, 0 to 1, beyond which the run is stopped.
      minimum: samples to have seen before the share is judged, so that a bad start does not stop a run.
    """

    def __init__(self, max_refused_share: float = 0.05, minimum: int = 200):
        if not 0 <= max_refused_share <= 1:
            raise UserError(
                f"max_refused_share {max_refused_share}: must lie between 0 and 1, for example 0.05"
            )
        self.max_refused_share = max_refused_share
        self.minimum = minimum
        self.taken = 0
        self.refused: list[Refusal] = []
        self._lock = threading.Lock()

    def take(self, count: int = 1) -> None:
        """Counts samples that were used."""
        with self._lock:
            self.taken += count

    def refuse(self, key: str, refused: Refused) -> None:
        """Records a refused sample.

        Raises:
          UserError: the refused share has passed its limit.
        """
        with self._lock:
            self.refused.append(Refusal(key, refused.reason, refused.text))
        if self.taken + len(self.refused) >= self.minimum:
            self.check()

    @property
    def share(self) -> float:
        """Refused samples over all seen so far, 0 to 1."""
        return len(self.refused) / max(1, self.taken + len(self.refused))

    def counts(self) -> dict[str, int]:
        """Returns the refused samples of each reason, most first, equals by name."""
        counts: dict[str, int] = {}
        for refusal in list(self.refused):
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def check(self) -> None:
        """Judges the share now, whatever the minimum: call it at the end of a run.

        Raises:
          UserError: the refused share is above its limit, or nothing at all was taken.
        """
        if self.share > self.max_refused_share or (self.refused and not self.taken):
            reason, count = next(iter(self.counts().items()))
            first = min(refusal for refusal in list(self.refused) if refusal.reason == reason)
            seen = self.taken + len(self.refused)
            raise UserError(
                f"refused {len(self.refused)} of {seen} samples ({self.share:.1%}), max_refused_share is "
                f"{self.max_refused_share:g}; most often {reason} ({count}), for example '{first.key}': "
                f"{first.text}; mend the samples or raise the limit"
            )

    def table(self) -> str:
        """Returns the table of what was taken and what was refused and why, with the first key of each."""
        lines = [("taken", self.taken, "")]
        for reason, count in self.counts().items():
            first = min(refusal.key for refusal in list(self.refused) if refusal.reason == reason)
            lines.append((f"refused: {REASONS.get(reason, reason)}", count, f"for example {first}"))
        lines.append(("refused in all", len(self.refused), f"{self.share:.2%}"))
        width = max(len(name) for name, _, _ in lines)
        return "\n".join(f"{name:{width}}  {count:>12,}  {note}".rstrip() for name, count, note in lines)

    def write(self, path: str | os.PathLike) -> None:
        """Writes refused.jsonl: one {"key", "reason", "text"} a line, by key, atomically."""
        lines = (json.dumps(refusal._asdict(), ensure_ascii=False) + "\n" for refusal in sorted(self.refused))
        write_bytes(path, "".join(lines).encode(errors="backslashreplace"))
