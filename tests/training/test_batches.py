import dataclasses

import ml_dtypes
import numpy as np
from stage_batches import CONFIG

from pixart_jax.config import AlignmentConfig, DiffusionConfig
from pixart_jax.training.batches import batch_shapes


def test_masks_and_weights_are_in_the_batch_if_the_loss_has_them():
    plain = batch_shapes(CONFIG, 4, 6)
    assert not plain.keys() & {"mask", "weight"}
    data = dataclasses.replace(CONFIG.data, loss_weights="1,0.5")
    config = dataclasses.replace(CONFIG, data=data, diffusion=DiffusionConfig(unmasked_weight=0.5))
    added = {name: spec for name, spec in batch_shapes(config, 4, 6).items() if name not in plain}
    assert {name: (spec.shape, spec.dtype) for name, spec in added.items()} == {
        "mask": ((16, 4, 6), np.uint8),
        "weight": ((16,), np.float32),
    }
    ones = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, loss_weights="1,1"))
    assert batch_shapes(ones, 4, 6) == plain


def test_image_features_have_a_vector_for_each_token():
    features = dataclasses.replace(CONFIG.features, image_encoder="dinov2")
    config = dataclasses.replace(
        CONFIG, objective="alignment", features=features, alignment=AlignmentConfig(block=1, target_width=10)
    )
    found = batch_shapes(config, 4, 6)["image_features"]
    assert (found.shape, found.dtype) == ((16, 2 * 3, 10), ml_dtypes.bfloat16)
    assert "image_features" not in batch_shapes(dataclasses.replace(config, objective="diffusion"), 4, 6)
