import dataclasses

import numpy as np
from stage_batches import CONFIG

from pixart_jax.config import DiffusionConfig
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
