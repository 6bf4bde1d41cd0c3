"""The images and masks that visitors of the web page send.

An upload is decoded once, when it arrives, by the code that reads the images of all commands. Its bytes are
kept as they are, under the hash of its content, in a temporary folder. When an image is generated from it, it
is copied beside that image.
"""

from __future__ import annotations

import base64
import binascii
import collections
import hashlib
import io
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pixart_jax.data.images import Refused, decode_image, read_area
from pixart_jax.errors import UserError
from pixart_jax.files import replacing

# Largest upload, in bytes and in pixels.
MAX_BYTES = 16 * 2**20
MAX_PIXELS = 2**25
# Maximum number of uploads, and of their bytes, that are kept in the temporary folder. The oldest is removed.
MAX_KEPT, MAX_KEPT_BYTES = 32, 256 * 2**20
# Largest mask that the page sends, in characters, and its longest side in pixels.
MAX_MASK, MASK_SIDE = 256 * 1024, 1024

# First bytes, suffix and media type of the formats that browsers show. Only these are accepted, so that no
# other decoder reads what visitors send.
_FORMATS = (
    (b"\x89PNG\r\n\x1a\n", ".png", "image/png"),
    (b"\xff\xd8\xff", ".jpg", "image/jpeg"),
    (b"RIFF", ".webp", "image/webp"),
)
_PNG_URL = "data:image/png;base64,"


class Upload(NamedTuple):
    """A file that a visitor has sent."""

    media_type: str
    # In pixels, upright.
    height: int
    width: int
    bytes: int


class Uploads:
    """The uploads of a page, by their paths. Its methods may be called in several threads."""

    def __init__(self, folder: Path, used: Path):
        """Takes two folders, which are made when they are needed.

        Args:
          folder: for uploads; temporary.
          used: for copies of those from which images were generated.
        """
        self._folder, self._used = folder, used
        self._known: collections.OrderedDict[str, Upload] = collections.OrderedDict()
        # Images are decoded one after the other, which bounds the memory that they take.
        self._decoding, self._changing = threading.Lock(), threading.Lock()
        self._closed = False

    def close(self) -> None:
        """From now on, nothing is written."""
        with self._changing:
            self._closed = True

    def find(self, path: str) -> Upload | None:
        """What is known of an upload; None if the path is not that of one."""
        return self._known.get(path)

    def require(self, path: str) -> Upload:
        """Like `find`, but raises a `UserError` if there is none."""
        found = self.find(path)
        if found is None:
            raise UserError("The image to start from has been removed from the server: upload it again.")
        return found

    def add(self, data: bytes) -> str:
        """Checks and stores an image.

        Args:
          data: the encoded image.

        Returns:
          The path of its file.

        Raises:
          UserError: not an image in an accepted format, damaged, animated, or too large.
          OutputError: it cannot be written.
        """
        if len(data) > MAX_BYTES:
            raise UserError(f"The image has {len(data):,} bytes: it may have at most {MAX_BYTES:,}.")
        known = next((each for each in _FORMATS if data.startswith(each[0])), None)
        if known is None:
            raise UserError("The file is not an image that this page reads: give a PNG, a JPEG or a WebP.")
        _, suffix, media_type = known
        with self._decoding:
            height, width, _ = _decoded(data).shape
        return self._store(data, suffix, Upload(media_type, height, width, len(data)))

    def add_mask(self, drawn: str, image: str) -> str | None:
        """Stores the mask that was drawn on an upload.

        Args:
          drawn: the URL of a PNG, data:image/png;base64,..., light where the image is regenerated. It has the
            proportions of the image; its longest side has at most `MASK_SIDE` pixels.
          image: path of the upload.

        Returns:
          The path of a PNG of the size of the upload; None if nothing is drawn.

        Raises:
          UserError: another text, or a mask of other proportions.
          OutputError: it cannot be written.
        """
        upload = self.require(image)
        if len(drawn) > MAX_MASK:
            raise UserError("The mask has too much detail: draw it with a larger brush.")
        damaged = UserError("The mask is damaged: clear it, and draw it again.")
        if not drawn.startswith(_PNG_URL):
            raise damaged
        try:
            data = base64.b64decode(drawn.removeprefix(_PNG_URL), validate=True)
        except (binascii.Error, ValueError):
            raise damaged from None
        if not data.startswith(_FORMATS[0][0]):
            raise damaged
        with self._decoding:
            mask = _decoded(data, MASK_SIDE**2).mean(axis=2) > 127.5
            height, width = mask.shape
            # One side is rounded to a whole number of pixels.
            scale = max(height, width) / max(upload.height, upload.width)
            sides = upload.height * scale - height, upload.width * scale - width
            if max(map(abs, sides)) > 1:
                raise UserError("The mask does not have the shape of the image: clear it, and draw it again.")
        if not mask.any():
            return None
        resized = Image.fromarray(mask).resize((upload.width, upload.height), Image.Resampling.NEAREST)
        file = io.BytesIO()
        resized.save(file, "PNG")
        stored = Upload("image/png", upload.height, upload.width, file.tell())
        return self._store(file.getvalue(), ".png", stored)

    def mask_url(self, path: str) -> str:
        """A mask that was drawn, as `add_mask` takes it; "" if there is no such file any longer."""
        upload = self.find(path)
        if upload is None:
            return ""
        scale = min(1, MASK_SIDE / max(upload.height, upload.width))
        size = max(round(upload.width * scale), 1), max(round(upload.height * scale), 1)
        try:
            mask = np.asarray(decode_image(path))[:, :, 0]
        except Refused:
            return ""
        file = io.BytesIO()
        Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).convert("1").save(file, "PNG")
        return _PNG_URL + base64.b64encode(file.getvalue()).decode()

    def use(self, path: str) -> str:
        """Copies an upload beside the images, and returns the path of the copy.

        Raises:
          UserError: it has been removed.
          OutputError: it cannot be written.
        """
        upload, source = self.require(path), Path(path)
        if source.parent == self._used:
            return path
        copy = self._used / source.name
        if not copy.exists():
            try:
                data = source.read_bytes()
            except FileNotFoundError:
                self.require("")  # another thread has removed it
                raise
            with replacing(copy) as temporary:
                temporary.write_bytes(data)
        with self._changing:
            self._known[str(copy)] = upload
        return str(copy)

    def _store(self, data: bytes, suffix: str, upload: Upload) -> str:
        path = self._folder / f"{hashlib.sha256(data).hexdigest()[:32]}{suffix}"
        with self._changing:
            if self._closed:
                raise UserError("The server has ended.")
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            self._known[str(path)] = upload
            self._known.move_to_end(str(path))
            own = [each for each in self._known if Path(each).parent == self._folder]
            size = sum(self._known[each].bytes for each in own)
            while len(own) > MAX_KEPT or size > MAX_KEPT_BYTES:
                oldest = own.pop(0)
                size -= self._known.pop(oldest).bytes
                Path(oldest).unlink(missing_ok=True)
        return str(path)


def _decoded(data: bytes, most: int = MAX_PIXELS) -> np.ndarray:
    """The upright pixels of an image, uint8 [H, W, 3].

    Raises:
      UserError: it cannot be read, or has more than `most` pixels.
    """
    try:
        # Before it takes memory.
        area = read_area(data)
        if not 0 < area <= most:
            raise UserError(f"The image has {area:,} pixels: it may have at most {most:,}. Reduce it.")
        return decode_image(data)
    except Refused as error:
        raise UserError(f"The image cannot be read ({error.text}): give a PNG, a JPEG or a WebP.") from None
