"""Training on images without precomputed features: the encoders run in the loop, for small sets.

To the loader the dataset below is what a folder of features is, so the order of the samples and how a run
resumes are those of precomputed features. Images are decoded and encoded again in every pass, captions again
once more than `MAX_TEXTS` different ones are met. With many passes, `precompute` is cheaper.
"""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax import config as configs
from pixart_jax.config import FeaturesConfig
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.planning import ahead, make_plan, open_images
from pixart_jax.data.records import FeatureBucket, Record
from pixart_jax.encoders.samples import SampleEncoder, Text
from pixart_jax.errors import UserError
from pixart_jax.files import sha256_of_json

# Encoded captions that are kept, the last used ones: at most 2 GB with T5-XXL in bfloat16.
MAX_TEXTS = 2048


class OnTheFlyDataset:
    """A source as a `Dataset` of the loader; records are made when they are read.

    Args:
      path: what `precompute --images` takes; the kind of source is told by its content.
      config: what the features are.
      min_bucket: buckets with fewer images are merged into their neighbour.
      max_refused_share: of the samples, 0 to 1, beyond which the source is not used.
      workers: threads that read and decode images.
      say: takes lines of progress.

    Raises:
      UserError: no such source, or too many refused samples.
    """

    def __init__(
        self,
        path: str,
        config: FeaturesConfig,
        *,
        min_bucket: int = 32,
        max_refused_share: float = 0.05,
        workers: int = 8,
        say: Callable[[str], None] = print,
    ):
        source = open_images("auto", path, config, {})
        self.path, self.config = Path(path), configs.to_dict(config)
        self._encoder = SampleEncoder(source, config)
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._texts: collections.OrderedDict[str, Text] = collections.OrderedDict()
        plan = make_plan(
            source,
            config,
            shard_mb=2**40,  # a bucket is one shard
            min_bucket=min_bucket,
            workers=workers,
            channels=self._encoder.channels,
        )
        report = RefusalReport(max_refused_share)
        for key, *why in plan.refused:
            report.refuse(key, Refused(*why))
        # Every image is decoded once before training begins: what is broken is known now, not at step 1000.
        self.buckets, self._indices = [], []
        for shard in plan.shards:
            kept = []
            looked = ahead(
                self._pool, self._refusal_of, ((shard.bucket, i) for i in shard.indices), 4 * workers
            )
            for index, refused in zip(shard.indices.tolist(), looked):
                if refused is None:
                    kept.append(index)
                    report.take()
                else:
                    report.refuse(source.key(index), refused)
            if kept:
                shape = self._encoder.latent_shape(shard.bucket)
                self.buckets.append(FeatureBucket(shard.bucket, shape, len(kept)))
                self._indices.append(kept)
        say(report.table())
        report.check()
        self.text_length = config.text_length if config.text else 0
        self.text_width = self._encoder.text.width if config.text else 0
        self.extras = ()
        self._null = self._encoder.text.null_text()[0] if config.text else None
        fields = [self.config, plan.fingerprint, self._indices]
        self.fingerprint = sha256_of_json(fields)

    def __len__(self) -> int:
        return sum(bucket.count for bucket in self.buckets)

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """Key of a record and its row in the source."""
        index = self._indices[bucket][position]
        return self._encoder.source.key(index), index

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Decodes and encodes samples of one bucket, in the order asked.

        Raises:
          UserError: an image that could be read before no longer can.
        """
        size, indices = self.buckets[bucket].bucket, [self._indices[bucket][at] for at in positions]
        samples, images = [], []
        for index, item in zip(indices, self._pool.map(lambda i: self._encoder.read(size, i), indices)):
            if isinstance(item, Refused):
                key = self._encoder.source.key(index)
                raise self.refusal(key, index, f"{item.reason}: {item.text}")
            samples.append(item[0])
            images.append(item[1])
        # The loader reads on several threads, the devices take one batch after the other.
        with self._lock:
            stored = list(self._encoder.encode_images(images))
            texts = self._encoded([caption.text for sample in samples for caption in sample.captions])
        return [self._encoder.record(sample, pair, size, texts) for sample, pair in zip(samples, stored)]

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """The error for a sample that cannot be used."""
        return UserError(
            f"'{self.path}' sample '{file}': {fault}; restore the file, or start again without it"
        )

    def null_text(self) -> np.ndarray:
        """The text encoder's output for "", float32 [S, D] over all positions.

        Raises:
          UserError: no text is encoded.
        """
        if self._null is None:
            raise UserError("features.text is False: there is no null caption; set it to True.")
        return self._null

    def _refusal_of(self, item: tuple[Any, int]) -> Refused | None:
        found = self._encoder.read(*item)
        return found if isinstance(found, Refused) else None

    def _encoded(self, captions: Sequence[str]) -> dict[str, Text]:
        wanted = dict.fromkeys(captions)
        texts = {text: self._texts[text] for text in wanted if text in self._texts}
        new = [text for text in wanted if text not in texts]
        if new:
            texts |= self._encoder.encode_texts(new)
        for text in wanted:
            self._texts[text] = texts[text]
            self._texts.move_to_end(text)
        while len(self._texts) > MAX_TEXTS:
            self._texts.popitem(last=False)
        return texts
