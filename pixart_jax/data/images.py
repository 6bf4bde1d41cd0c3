"""Decodes images to upright 8-bit RGB, resizes and crops them, and reports the samples that were skipped.

Features, training on the fly and evaluation all use these functions, so that images are cropped in the same
way everywhere. Axes: H height, W width, 3 colours (red, green, blue).

How images that are not plain RGB are decoded:

    EXIF orientation      applied, in every file format that can store it; if the EXIF data is damaged, the
                          pixels are used as they are stored
    grayscale, 1 bit      copied to the three colours
    palette               converted to its colours
    CMYK, YCbCr           converted with Pillow's formula; an embedded ICC profile is ignored, as in the
                          official code
    16 bits per channel   the high byte is kept (v >> 8), for grayscale and colour; no value is clipped
    alpha                 composited on white
    MPO (phone JPEG)      the main image is used; previews and depth maps are ignored
    animated, many pages  skipped: no single frame represents the file
    32 bits, float        skipped: the range of the values is unknown
    truncated, damaged    skipped

    FIFO, device, folder  skipped without being opened for reading, which could wait forever
    over 1 GiB encoded    skipped

A function that finds a reason to skip a sample raises `Refused`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat
import struct
import threading
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from pixart_jax.errors import UserError, short, with_short_values
from pixart_jax.files import write_bytes

# An explicit list, because Pillow would run an external program for some formats (EPS), and would read
# formats with layers.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# Files with these suffixes are images of a source. Pillow cannot read HEIC and JPEG XL. They are included so
# that such files are reported as skipped instead of being ignored silently.
SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".avif", ".jp2", ".j2k", ".heic", ".heif", ".jxl",
)  # fmt: skip

# Codes of the reasons for skipping a sample, with their descriptions in the report.
REASONS = {
    "missing_image": "the image file does not exist",
    "unreadable": "the file could not be read",
    "format": "not an image in a supported format",
    "broken": "truncated or damaged image",
    "animated": "more than one frame or page",
    "depth": "32-bit or float values of unknown range",
    "colour": "colour space that cannot be converted",
    "too_large": "more pixels or bytes than the limit",
    "too_small": "shorter side below min_size",
    "missing_caption": "no caption",
    "emptied_caption": "caption that cleaning removes completely",
    "bad_caption": "caption that is not UTF-8 text, or too long",
    "bad_record": "entry of the list in the wrong format",
    "outside_root": "path outside the image folder",
    "duplicate_key": "a second entry with the same key",
    "bad_mask": "mask that does not fit its image, or cannot be used",
}

# The largest encoded image, in bytes. Larger files are not photos, and would fill the memory.
LARGEST_FILE = 2**30
# The largest side of an image after the resize and before the crop, in pixels; records store it as uint32.
_LARGEST_SIDE = 2**31 - 1

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
_SWAPS_SIDES = (5, 6, 7, 8)


# First bytes of files in `FORMATS`, and of HEIC and JPEG XL.
_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP", b"\xffO\xffQ",
    b"\0\0\0\x0cJXL", b"\xff\n", *(b"P%d" % kind + space for kind in range(1, 7) for space in (b" ", b"\n")),
)  # fmt: skip


class Refused(Exception):
    """Raised for a sample that cannot be used. The caller skips the sample and reports the reason.

    Attributes:
      reason: code of the reason, usually a key of `REASONS`.
      text: description of the problem in one line.
    """

    def __init__(self, reason: str, text: str):
        # Reasons are written to JSON. The name of a file may have bytes that are not UTF-8.
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")
        text = " ".join(with_short_values(text).split())
        super().__init__(reason, text)
        self.reason = reason
        self.text = text

    def __str__(self) -> str:
        return f"{self.reason}: {self.text}"


class View(NamedTuple):
    """What a sample shows of its image.

    Attributes:
      position: position of the crop along the side that is cropped, from 0 (top or left) to below 1 (bottom
        or right); None for the centre.
      flip: whether the crop is mirrored, so that left and right are exchanged.
    """

    position: float | None = None
    flip: bool = False


# The centre crop, not mirrored.
CENTRE = View()


@dataclasses.dataclass(frozen=True)
class Crop:
    """The result of `resize_and_crop`.

    Attributes:
      pixels: uint8 [height, width, 3], C-contiguous.
      original_size: (height, width) of the upright image before resizing, in pixels. This is the size
        condition of the model.
      resized_size: (height, width) after the resize, in pixels; one side equals the crop's.
      offset: (top, left) of the crop in the resized image, in pixels, before it is mirrored.
    """

    pixels: np.ndarray
    original_size: tuple[int, int]
    resized_size: tuple[int, int]
    offset: tuple[int, int]


def is_image(data: bytes) -> bool:
    """Whether data begins like an image file. At least the first 12 bytes are needed."""
    return data.startswith(_SIGNATURES) or data[4:8] == b"ftyp"  # AVIF and HEIC


def open_file(path: os.PathLike | str) -> BinaryIO:
    """Opens a file for reading. Never waits; opening a FIFO would, until another process writes to it.

    Raises:
      Refused: with reason "missing_image" or "unreadable".
    """
    try:
        # Before a device is opened: that can have an effect of its own.
        if stat.S_ISREG(os.stat(path).st_mode):
            file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
    except FileNotFoundError:
        link = " (a link to a file that does not exist)" if os.path.islink(path) else ""
        raise Refused("missing_image", f"no file '{path}'{link}") from None
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL
        raise Refused("unreadable", f"'{path}': {getattr(error, 'strerror', None) or error}") from None
    raise Refused("unreadable", f"'{path}' is a folder, a FIFO, a socket or a device, not a file")


def read_bytes(source: bytes | os.PathLike | str, limit: int = LARGEST_FILE) -> bytes:
    """Returns the bytes of a file, or `source` itself if it is bytes already.

    Args:
      source: bytes, or the path of the file.
      limit: largest number of bytes of a file.

    Raises:
      Refused: as `open_file`, or with reason "too_large".
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    try:
        with open_file(source) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise Refused("unreadable", f"'{source}': {error.strerror or error}") from None
    if len(data) > limit:
        raise Refused("too_large", f"'{source}' has more than {limit:,} bytes")
    return data


def decode_image(source: bytes | os.PathLike | str) -> np.ndarray:
    """Decodes an image to upright RGB, by the rules in the module docstring.

    Args:
      source: the encoded image as bytes, or the path of the file.

    Returns:
      uint8 [H, W, 3], C-contiguous and writable.

    Raises:
      Refused: with a reason of `REASONS`, if the image cannot be used.
    """
    data = read_bytes(source)
    with _open(data) as image:
        _refuse_frames(image)
        return to_pixels(image)


def to_pixels(image: Image.Image) -> np.ndarray:
    """The upright RGB pixels of an opened image, by the rules in the module docstring: uint8 [H, W, 3].

    Raises:
      Refused: it is damaged, or its colours or its bit depth cannot be used.
    """
    try:
        image.load()
        return _to_rgb(_turn_upright(image))
    except (Refused, MemoryError):
        raise
    # For damaged data, decoders raise many types of exception: OSError, SyntaxError, zlib.error,
    # struct.error and others. In all cases the image is skipped and reported.
    except Exception as error:
        raise Refused("broken", f"{image.format} image: {error or type(error).__name__}") from None


def read_size(source: bytes | os.PathLike | str | BinaryIO) -> tuple[int, int]:
    """Returns the upright (height, width) in pixels from the file's header, without decoding the image.

    For planning. It is the size that `decode_image` returns. If the data after the header is damaged, only
    `decode_image` finds out, except in a PNG, whose EXIF data may come after the pixels.

    Args:
      source: the encoded image as bytes, the path of the file, or a file that is open for reading.

    Raises:
      Refused: as in `decode_image`, for problems that the header shows.
    """
    if isinstance(source, (os.PathLike, str)):
        with open_file(source) as file:
            return read_size(file)
    with _open(source) as image:
        _refuse_frames(image)
        width, height = image.size
        # Pillow has applied the orientation to the size of a TIFF, but not in other formats.
        try:
            turned = image.format != "TIFF" and _orientation(image) in _SWAPS_SIDES
        except MemoryError:
            raise
        except Exception as error:  # as in `decode_image`: to find its EXIF data, Pillow decodes a PNG
            raise Refused("broken", f"{image.format} image: {error or type(error).__name__}") from None
        return (width, height) if turned else (height, width)


def read_area(source: bytes) -> int:
    """Returns the number of pixels that the header of an image states. Decodes nothing, unlike `read_size`.

    Raises:
      Refused: as in `decode_image`, for problems that the header shows.
    """
    with _open(source) as image:
        return image.width * image.height


def resize_and_crop(
    image: np.ndarray,
    height: int,
    width: int,
    *,
    min_size: int = 0,
    view: View = CENTRE,
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> Crop:
    """Resizes an image with its aspect ratio kept, so that it just covers the target, and crops it.

    With s = max(height / H, width / W), the resized sides are round(s H) and round(s W), but not less than
    the target's. The crop starts at (resized - target) // 2 on both axes or, if the view has a position p, at
    floor(p (resized - target + 1)). An image that is smaller than the target is enlarged. The support of
    Pillow's filters grows when an image is reduced, which avoids aliasing.

    Args:
      image: uint8 [H, W, 3].
      height: target height in pixels.
      width: target width in pixels.
      min_size: minimum length of the shorter side of the image, in pixels; 0 for no limit.
      view: position of the crop, and whether it is mirrored.
      resampling: filter of the resize, such as that of `planning.resampling` for training images.

    Returns:
      the crop, with its position in the image.

    Raises:
      Refused: with reason "too_small", if the image is smaller than `min_size`; with reason "too_large", if
        it is a strip of which a side would have more than 2^31 - 1 pixels after the resize.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")
    original_height, original_width = image.shape[:2]
    if min(original_height, original_width) < min_size:
        raise Refused("too_small", f"{original_height}x{original_width} (h x w), min_size is {min_size}")

    # Integer arithmetic, so that the side that determines the scale is exact and no rounding error of
    # floating point can change the other.
    if height * original_width >= width * original_height:
        resized_height = height
        resized_width = max(width, _divide_round(original_width * height, original_height))
    else:
        resized_width = width
        resized_height = max(height, _divide_round(original_height * width, original_width))

    if max(resized_height, resized_width) > _LARGEST_SIDE:
        raise Refused(
            "too_large",
            f"{original_height}x{original_width} (h x w) would have {resized_height}x{resized_width} pixels",
        )
    spare = resized_height - height, resized_width - width
    if view.position is None:
        top, left = spare[0] // 2, spare[1] // 2
    else:
        top, left = (int(view.position * (pixels + 1)) for pixels in spare)
    # Only the part of the original that the crop covers is resized. The result is the same as cropping the
    # resized image, but that could take gigabytes: a strip of 10 x 20000 would become 512 x 1024000.
    scale_y, scale_x = original_height / resized_height, original_width / resized_width
    box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    pixels = Image.fromarray(image).resize((width, height), resampling, box=box)
    if view.flip:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return Crop(
        pixels=np.array(pixels),
        original_size=(original_height, original_width),
        resized_size=(resized_height, resized_width),
        offset=(top, left),
    )


def _divide_round(numerator: int, denominator: int) -> int:
    """Returns numerator / denominator rounded to the nearest integer; halves are rounded up."""
    return (2 * numerator + denominator) // (2 * denominator)


def _open(source: bytes | bytearray | memoryview | BinaryIO) -> ImageFile.ImageFile:
    """Opens an image and reads its header."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not source:
            raise Refused("broken", "0 bytes")
        source = io.BytesIO(source)
    try:
        return Image.open(source, formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Refused("format", f"not one of {', '.join(FORMATS)}, or its header is damaged") from None
    except Image.DecompressionBombError as error:
        raise Refused("too_large", str(error).split(",")[0]) from None
    except MemoryError:
        raise
    # As in `decode_image`: for a damaged header, decoders raise many types of exception.
    except Exception as error:
        raise Refused("broken", f"header: {error or type(error).__name__}") from None


def _refuse_frames(image: Image.Image) -> None:
    """Raises `Refused` for animations and files with several pages."""
    if image.format == "MPO":
        return
    try:
        # Not `n_frames`, which reads all frames of a GIF or a TIFF; there may be millions.
        animated = getattr(image, "is_animated", False)
    except Exception as error:  # looking for a second frame decodes the first, which may be damaged
        raise Refused("broken", f"{image.format} image: {error or type(error).__name__}") from None
    if animated:
        raise Refused("animated", f"{image.format} with more than one frame; save one of them")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    # What Pillow and `int` raise for damaged EXIF data, which does not make the pixels unusable. Any other
    # exception is about the image itself.
    except (SyntaxError, struct.error, ValueError, TypeError):
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
        raise Refused(
            "depth", f"{image.format or 'PIL'} image of mode {image.mode}; save it with 8 or 16 bits"
        )
    if image.mode in _WITH_ALPHA or (transparency is not None and image.mode in _TO_RGB):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, rgba).convert("RGB"))
    if image.mode not in _TO_RGB:
        raise Refused("colour", f"{image.format or 'PIL'} image of mode {image.mode}; save it as RGB")
    return np.array(image.convert("RGB"))


def _gray16_to_rgb(image: Image.Image, transparency: int | None) -> np.ndarray:
    """Keeps the high byte of 16-bit grayscale values. Pillow's own conversion clips values above 255."""
    # TIFF can store 12-bit grayscale in 16 bits without scaling it. Tag 258 is BitsPerSample.
    bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]
    values = np.asarray(image).astype(np.int64)
    gray = (values >> (max(bits, 8) - 8)).clip(0, 255).astype(np.uint8)
    if isinstance(transparency, int):
        gray[values == transparency] = 255
    return np.repeat(gray[:, :, None], 3, axis=2)


class Refusal(NamedTuple):
    """One skipped sample, a line of refused.jsonl. `reason` and `text` are those of `Refused`."""

    key: str
    reason: str
    text: str


class RefusalReport:
    """Counts used and skipped samples, and raises an error if too many are skipped.

    Several threads may use it at the same time.

    Args:
      max_refused_share: largest share of skipped samples that is allowed, 0 to 1.
      minimum: number of samples before the share is checked for the first time; it means little for fewer.
    """

    def __init__(self, max_refused_share: float = 0.05, minimum: int = 200):
        if not 0 <= max_refused_share <= 1:
            raise UserError(
                f"max_refused_share {max_refused_share}: must be between 0 and 1, for example 0.05"
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
        """Records a skipped sample.

        Args:
          key: key of the sample.
          refused: why it was skipped.

        Raises:
          UserError: the share of skipped samples exceeds `max_refused_share`.
        """
        with self._lock:
            self.refused.append(Refusal(key, refused.reason, refused.text))
        if self.taken + len(self.refused) >= self.minimum:
            self.check()

    @property
    def share(self) -> float:
        """Number of skipped samples divided by the number of all samples so far."""
        return len(self.refused) / max(1, self.taken + len(self.refused))

    def counts(self) -> dict[str, int]:
        """Returns the number of skipped samples by reason, most frequent first, then by name."""
        counts: dict[str, int] = {}
        for refusal in list(self.refused):
            counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    def check(self) -> None:
        """Checks the share of skipped samples even below `minimum`. Call this at the end of a run.

        Raises:
          UserError: the share exceeds `max_refused_share`, or all samples were skipped.
        """
        if self.share > self.max_refused_share or (self.refused and not self.taken):
            reason, count = next(iter(self.counts().items()))
            first = min(refusal for refusal in list(self.refused) if refusal.reason == reason)
            seen = self.taken + len(self.refused)
            fix = "; --caption='TEXT' gives all images one caption" if reason == "missing_caption" else ""
            raise UserError(
                f"skipped {len(self.refused)} of {seen} samples ({self.share:.1%}), max_refused_share is "
                f"{self.max_refused_share:g}; most often {reason} ({count}), for example '{first.key}': "
                f"{first.text}; repair the samples or raise the limit{fix}"
            )

    def table(self) -> str:
        """Returns a table of the numbers of used and skipped samples, with an example for each reason."""
        lines = [("used", self.taken, "")]
        for reason, count in self.counts().items():
            first = min(refusal.key for refusal in list(self.refused) if refusal.reason == reason)
            lines.append((f"skipped: {REASONS.get(reason, reason)}", count, f"for example {short(first)}"))
        lines.append(("skipped in total", len(self.refused), f"{self.share:.2%}"))
        width = max(len(name) for name, _, _ in lines)
        return "\n".join(f"{name:{width}}  {count:>12,}  {note}".rstrip() for name, count, note in lines)

    def write(self, path: str | os.PathLike) -> None:
        """Writes refused.jsonl atomically: one {"key", "reason", "text"} per line, sorted by key."""
        lines = (json.dumps(refusal._asdict(), ensure_ascii=False) + "\n" for refusal in sorted(self.refused))
        write_bytes(path, "".join(lines).encode(errors="backslashreplace"))
