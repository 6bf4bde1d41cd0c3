import itertools

import jax
import numpy as np

from pixart_jax.sampling import image_keys
from pixart_jax.training.objectives import Stream, sample_keys, stream_key


def data(keys):
    return [tuple(row) for row in np.asarray(jax.random.key_data(keys)).reshape(-1, 2).tolist()]


def test_streams_share_no_key():
    """Compares the root keys of a seed, the keys of samples, and the keys of an image with the same seed."""
    index = np.arange(100, dtype=np.uint32)
    image = image_keys(np.asarray([7]))[0]
    found = [data(image), data(sample_keys(image, index))]
    for stream in Stream:
        root = stream_key(7, stream)
        found += [data(root), data(sample_keys(root, index))]
    found = list(itertools.chain(*found))
    assert len(set(found)) == len(found) == (1 + len(Stream)) * 101


def test_a_key_depends_on_the_index_and_not_on_the_row():
    root = stream_key(0, Stream.SAMPLES)
    keys = data(sample_keys(root, np.asarray([3, 1, 2], np.uint32)))
    assert keys == [data(sample_keys(root, np.asarray([i], np.uint32)))[0] for i in (3, 1, 2)]
    assert keys != data(sample_keys(stream_key(1, Stream.SAMPLES), np.asarray([3, 1, 2], np.uint32)))
