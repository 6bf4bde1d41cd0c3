"""Tells how far the work on feature shards is, and how long the rest will take."""

from __future__ import annotations

import time
from collections.abc import Callable

# Seconds between lines of progress within a shard.
PROGRESS_SECONDS = 30.0


class Progress:
    """Prints how far the work on the shards is, and when it will be done.

    Args:
      images: number of images in all shards.
      text: whether they have captions to encode.
      say: prints a line.
    """

    def __init__(self, images: int, text: bool, say: Callable[[str], None]):
        self._images, self._text, self._say = images, text, say
        self._begin = self._printed = time.monotonic()
        self._encoded = 0
        # Seconds spent on captions, and the images that they belong to.
        self._caption_seconds, self._captioned = 0.0, 0

    def images(self, file: str, done: int, total: int, new: int) -> None:
        """Counts images that were encoded; `done` of `total` in this shard."""
        self._encoded += new
        if done < total:
            self._line(f"{file}: {done:,} of {total:,} images")

    def captions(self, file: str, done: int, total: int) -> None:
        """Counts a caption that was encoded: the number `done` of `total` in this shard."""
        if done < total:
            self._line(f"{file}: all images and {done:,} of {total:,} captions")

    def captioned(self, images: int, seconds: float) -> None:
        """Counts the time for the captions of some images."""
        self._captioned += images
        self._caption_seconds += seconds

    def left(self) -> str:
        """Describes the time that is left, or "" if nothing is known yet."""
        if not self._encoded:
            return ""
        elapsed = time.monotonic() - self._begin
        image = max(0.0, elapsed - self._caption_seconds) / self._encoded
        seconds = image * (self._images - self._encoded)
        if self._captioned:
            seconds += self._caption_seconds / self._captioned * (self._images - self._captioned)
        unknown = " without the captions" if self._text and not self._captioned else ""
        return f"about {duration(seconds)} left{unknown}"

    def _line(self, text: str) -> None:
        now = time.monotonic()
        if now - self._printed >= PROGRESS_SECONDS:
            self._printed = now
            rate = self._encoded / max(now - self._begin, 1e-9)
            self._say(", ".join(filter(None, (text, f"{rate:,.1f}/s", self.left()))))


def duration(seconds: float) -> str:
    """Writes a time in the two largest units: "2 h 5 min", "5 min 10 s" or "10 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
