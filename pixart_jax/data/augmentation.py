"""Augmentation: several records of one image, with different crops and mirrored.

The views of an image are samples with keys of their own:

    a/b.jpg             the centre crop
    a/b.jpg#crop2       the second of several random crops
    a/b.jpg#crop2#flip  its mirror image

All of them have the image key of the original, so that they are held out for validation together with it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

from pixart_jax.data.images import View
from pixart_jax.data.sources.base import Example, Source, WrappedSource


class AugmentedSource(WrappedSource):
    """The samples of another source, each in several views.

    Args:
      source: the images.
      flip: whether each crop has a mirror image (left and right exchanged).
      crops: number of crops of an image. 1 is the centre crop; of several, all are at random positions.
      seed: the position of a crop depends on this number, the key of the sample and the number of the crop.
    """

    def __init__(self, source: Source, flip: bool, crops: int, seed: int):
        super().__init__(source)
        self._crops, self._seed = crops, seed
        self._views = list(itertools.product(range(crops), (False, True) if flip else (False,)))
        own = {"flip": flip} if flip else {}
        if crops > 1:
            own |= {"crops": crops, "crop_seed": seed}
        self.job_options = {**source.job_options, **own}
        what = [f"{crops} random crops"] * (crops > 1) + ["mirror images"] * flip
        self.notes = (
            *source.notes,
            f"{len(source):,} images have {len(self):,} samples: {' and '.join(what)}",
        )

    def __len__(self) -> int:
        return len(self._source) * len(self._views)

    def key(self, index: int) -> str:
        sample, (crop, flip) = self._sample(index)
        crop_suffix = f"#crop{crop + 1}" if self._crops > 1 else ""
        return self._source.key(sample) + crop_suffix + ("#flip" if flip else "")

    def image_key(self, index: int) -> str:
        return self._source.image_key(self._sample(index)[0])

    def __getitem__(self, index: int) -> Example:
        sample, (crop, flip) = self._sample(index)
        view = View(self._position(self._source.key(sample), crop), flip)
        return dataclasses.replace(self._source[sample], key=self.key(index), view=view)

    def _sample(self, index: int) -> tuple[int, tuple[int, bool]]:
        """Returns the position of the sample in the source, the crop, and whether to flip it."""
        sample, view = divmod(index, len(self._views))
        return sample, self._views[view]

    def _position(self, key: str, crop: int) -> float | None:
        """The position of a crop, uniformly distributed in [0, 1); None for the centre."""
        if self._crops == 1:
            return None
        text = f"{self._seed} {crop} {key}".encode("utf-8", "surrogatepass")
        return (int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 11) / 2**53
