"""Training on images without precomputed features: the encoders run during training. For small data sets.

The dataset below has the interface of a feature folder, so that the order of the samples and resuming are the
same as with precomputed features. Images are decoded and encoded again in every epoch. Captions are encoded
only once if there are at most `MAX_TEXTS` distinct ones. For many epochs, `precompute` is cheaper.
"""

from __future__ import annotations

import collections
import concurrent.futures
import hashlib
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pixart_jax import config as configs
from pixart_jax.config import FeaturesConfig
from pixart_jax.constants import IMAGE_FEATURES
from pixart_jax.data.captions import CleanedCaption, cleaning_summary
from pixart_jax.data.features import MANIFEST, without_new_fields
from pixart_jax.data.images import RefusalReport, Refused
from pixart_jax.data.masks import labelled
from pixart_jax.data.planning import (
    MAX_CROP,
    MIN_BUCKET,
    ahead,
    describe_bucket,
    make_plan,
    open_images,
    survey,
)
from pixart_jax.data.records import Record
from pixart_jax.encoders.identity import encoder_files
from pixart_jax.encoders.samples import Sample, SampleEncoder, Text
from pixart_jax.encoders.text import cut_summary, unknown_summary
from pixart_jax.errors import UserError
from pixart_jax.files import sha256_of_json

# Size of the LRU cache of encoded captions: at most 2 GB for T5-XXL in bfloat16.
MAX_TEXTS = 2048


class OnTheFlyDataset:
    """A `Dataset` of the loader that encodes the samples of a source when they are read.

    All images are decoded once when the dataset is opened, so that unusable samples are known before training
    starts.

    Args:
      path: the images, as for `precompute --images`; the kind of source is detected.
      config: the features config.
      masks: whether to read the masks NAME-masklabel.png beside the images, if there are any.
      min_bucket, max_crop: as for `planning.make_plan`.
      max_refused_share: largest share of skipped samples that is allowed, 0 to 1.
      workers: number of threads that read and decode images.
      say: prints progress; it is called with one or more lines of text.

    Raises:
      UserError: the source does not exist, or too many samples are skipped.
    """

    def __init__(
        self,
        path: str,
        config: FeaturesConfig,
        *,
        masks: bool = False,
        min_bucket: int = MIN_BUCKET,
        max_crop: float = MAX_CROP,
        max_refused_share: float = 0.05,
        workers: int = 8,
        say: Callable[[str], None] = print,
    ):
        source = _open(path, config, masks)
        self.path, self.config = Path(path), configs.to_dict(config)
        self._encoder = SampleEncoder(source, config)
        self._encoder.codec  # noqa: B018 (loads it, so that a missing VAE is reported first)
        self._encoder.image_encoder  # noqa: B018
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        self._lock = threading.Lock()
        self._texts: collections.OrderedDict[str, Text] = collections.OrderedDict()
        found = survey(source, config, workers)
        plan = make_plan(
            found,
            config,
            shard_mb=2**40,  # so large that each bucket is one shard
            min_bucket=min_bucket,
            max_crop=max_crop,
            channels=self._encoder.channels,
        )
        report = RefusalReport(minimum=sys.maxsize)  # checked below
        for key, *why in found.refused.values():
            report.refuse(key, Refused(*why))
        # Decode every image once now. Otherwise a damaged one would stop the run at some later step.
        self.buckets, self._indices = [], []
        # As they were then; a sample that changes during the run stops it.
        self._samples: dict[int, Sample] = {}
        cleaned: dict[str, CleanedCaption] = {}
        texts: dict[str, None] = {}
        for shard in plan.shards:
            kept = []
            results = ahead(
                self._pool, self._without_pixels, ((shard.bucket, i) for i in shard.indices), 4 * workers
            )
            for index, sample in zip(shard.indices.tolist(), results):
                if isinstance(sample, Refused):
                    report.refuse(source.key(index), sample)
                else:
                    kept.append(index)
                    self._samples[index] = sample
                    cleaned |= {line.caption: line for line in sample.cleaned}
                    texts |= dict.fromkeys(caption.text for caption in sample.captions)
                    report.take()
            if kept:
                self.buckets.append(self._encoder.feature_bucket(shard.bucket, len(kept)))
                self._indices.append(kept)
        say(report.table())
        for note in (*found.notes, *plan.notes):
            say(note)
        for entry in self.buckets:
            say(describe_bucket(entry.bucket, entry.count, plan.merged, plan.shards, found))
        if cleaned:
            say(cleaning_summary(list(cleaned.values())))
        if report.share > max_refused_share or not report.taken:
            reason, count = next(iter(report.counts().items()))
            first = min(refusal for refusal in report.refused if refusal.reason == reason)
            raise UserError(
                f"data.on_the_fly: skipped {len(report.refused)} of {len(source)} samples of '{path}' "
                f"({report.share:.1%}, at most {max_refused_share:.1%} may be skipped); most often {reason} "
                f"({count}), for example '{first.key}': {first.text}; repair or remove them, or compute the "
                "features with precompute, which has a flag for this limit."
            )
        if texts:
            self._encoder.text.tokenize(list(texts))
            cut, unknown = self._encoder.text.cut, self._encoder.text.unknown
            if cut:
                say(cut_summary(cut, config.text_length))
            if unknown:
                say(unknown_summary(unknown))
        self.text_length = config.text_length if config.text else 0
        self.text_width = self._encoder.text.width if config.text else 0
        extras = {"mask": self._encoder.masked, IMAGE_FEATURES: self._encoder.image_encoder}
        self.extras = tuple(name for name, present in extras.items() if present)
        self._null = self._encoder.text.null_text()[0] if config.text else None
        fields = [without_new_fields(self.config), found.fingerprint, self._indices]
        # Version 0.1 did not compare images and encoders; its runs can still be resumed.
        self.earlier_fingerprint = sha256_of_json(fields)
        contents = hashlib.sha256(b"".join(self._samples[i].content for kept in self._indices for i in kept))
        self.fingerprint = sha256_of_json([*fields, contents.hexdigest(), encoder_files(config)])

    def __len__(self) -> int:
        return sum(bucket.count for bucket in self.buckets)

    def where(self, bucket: int, position: int) -> tuple[str, int]:
        """Returns the key of a record and its position in the source."""
        index = self._indices[bucket][position]
        return self._encoder.source.key(index), index

    def read(self, bucket: int, positions: Sequence[int]) -> list[Record]:
        """Decodes and encodes samples of one bucket, in the given order.

        Args:
          bucket: index into `buckets`.
          positions: positions in the bucket.

        Raises:
          UserError: an image cannot be read, although it could be read when the dataset was opened; or it, or
            its captions, have changed since.
        """
        size, indices = self.buckets[bucket].bucket, [self._indices[bucket][at] for at in positions]
        samples, images = [], []
        for index, item in zip(indices, self._pool.map(lambda i: self._encoder.read(size, i), indices)):
            if isinstance(item, Refused):
                key = self._encoder.source.key(index)
                raise self.refusal(key, index, f"{item.reason}: {item.text}")
            if item[0] != self._samples[index]:
                what = "the image has" if item[0].content != self._samples[index].content else "captions have"
                raise self.refusal(item[0].key, index, f"{what} changed since the start of the run")
            samples.append(item[0])
            images.append(item[1])
        # Several threads of the loader call this method, but the devices run one batch at a time. The lock
        # also protects the encoded captions in memory.
        with self._lock:
            stored = list(self._encoder.encode_images(images))
            texts = self._encoded([caption.text for sample in samples for caption in sample.captions])
        return [self._encoder.record(sample, each, size, texts) for sample, each in zip(samples, stored)]

    def refusal(self, file: str, row: int, fault: str, key: str | None = None) -> UserError:
        """Returns the error to raise for a sample that cannot be used."""
        return UserError(
            f"'{self.path}' sample '{file}': {fault}; restore the file, or start a new run without it"
        )

    def null_text(self) -> np.ndarray:
        """Returns the text encoder's output for the null caption "", float32 [S, D], including padding.

        Raises:
          UserError: `features.text` is False.
        """
        if self._null is None:
            raise UserError("features.text is False: there is no null caption; set it to True.")
        return self._null

    def _without_pixels(self, item: tuple[Any, int]) -> Refused | Sample:
        found = self._encoder.read(*item)
        return found if isinstance(found, Refused) else found[0]

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


def _open(path: str, config: FeaturesConfig, masks: bool) -> Any:
    """Opens the images. Error messages name only what a training run can set."""
    if (Path(path) / MANIFEST).is_file():
        raise UserError(
            f"data.on_the_fly: '{path}' is a folder of features, but with this option data.train and "
            "data.validation name images: give folders of images, or set --config.data.on_the_fly=False."
        )
    try:
        if masks and next(labelled(path), None):
            return open_images("auto", path, config, {}, masks=path)
        return open_images("auto", path, config, {})
    except UserError as error:
        # The rest of the message is about options of the source, which are flags of precompute.
        fault = str(error).split("; ")[0].split(": add captions")[0].rstrip(".")
        raise UserError(
            f"data.on_the_fly: {fault}. Training on images reads only sources that need no options; for any "
            "other, compute the features with `python -m pixart_jax.precompute` and set "
            "--config.data.on_the_fly=False."
        ) from None
