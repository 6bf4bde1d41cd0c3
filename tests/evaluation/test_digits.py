import numpy as np

from pixart_jax.data.digits import images_and_labels
from pixart_jax.evaluation.digits import train_reader


def test_the_reader_reads_scans_it_never_saw_and_not_noise():
    for size in (8, 16):
        reader = train_reader(size)
        assert 0.95 < reader.accuracy <= 1
        images, labels, _ = images_and_labels("test", size)
        assert np.mean(reader.read(images) == labels) == reader.accuracy
        noise = np.random.default_rng(0).integers(0, 256, (300, size, size, 1)).astype(np.uint8)
        assert np.mean(reader.read(noise) == labels[0]) < 0.9
        assert np.mean(reader.read(images) == np.roll(labels, 1)) < 0.5
