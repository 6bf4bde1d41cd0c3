import numpy as np
import pytest
from source_files import crops, write_folder

from pixart_jax.data.augmentation import AugmentedSource
from pixart_jax.data.images import CENTRE, View
from pixart_jax.data.sources import open_source


@pytest.fixture
def source(tmp_path):
    return open_source("folder", write_folder(tmp_path, crops()))


def test_views_have_their_own_keys_and_share_captions(source):
    views = AugmentedSource(source, flip=True, crops=2, seed=0)
    assert len(views) == 4 * len(source) and views.kind == "folder"
    first = source.key(0)
    ends = ("#crop1", "#crop1#flip", "#crop2", "#crop2#flip")
    assert [views.key(i) for i in range(4)] == [first + end for end in ends]
    keys = [views.key(i) for i in range(len(views))]
    assert len(set(keys)) == len(keys)
    for i in range(len(views)):
        example, original = views[i], source[i // 4]
        assert (example.key, views.image_key(i)) == (keys[i], original.key)
        assert example.captions == original.captions and example.image == original.image
        assert example.view.flip == (i % 2 == 1)
    # A crop and its mirror image are at the same position.
    assert all(views[i].view.position == views[i + 1].view.position for i in range(0, len(views), 2))
    assert views.job_options == {"flip": True, "crops": 2, "crop_seed": 0}
    assert "6 images have 24 samples: 2 random crops and mirror images" in views.notes


def test_only_mirror_images_keep_the_centre_crop(source):
    views = AugmentedSource(source, flip=True, crops=1, seed=0)
    assert [views.key(i) for i in range(2)] == [source.key(0), source.key(0) + "#flip"]
    assert (views[0].view, views[1].view) == (CENTRE, View(None, True))
    assert views.job_options == {"flip": True}


def test_positions_depend_on_seed_key_and_number(source):
    def positions(seed, crops=50):
        views = AugmentedSource(source, flip=False, crops=crops, seed=seed)
        return np.array([views[i].view.position for i in range(len(views))]).reshape(len(source), crops)

    found = positions(0)
    np.testing.assert_array_equal(positions(0), found)
    # More crops add to those that there were.
    np.testing.assert_array_equal(positions(0, 60)[:, :50], found)
    assert not np.isin(positions(1), found).any() and len(np.unique(found)) == found.size
    assert found.min() >= 0 and found.max() < 1 and abs(found.mean() - 0.5) < 0.06
    assert abs(found.var() - 1 / 12) < 0.02
