import dataclasses

import jax
import numpy as np
import pytest
from feature_folders import TEXT_LENGTH, WIDTH, three_shards

from pixart_jax.config import LogConfig, MeshConfig, TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.denoiser import NETWORK
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.training import sharding
from pixart_jax.training.data import held_out_batches
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.validation import make_validation

CONFIG = TrainConfig(
    model=PixArtConfig(
        size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=WIDTH, text_length=TEXT_LENGTH
    ),
)


def test_the_loss_is_the_mean_over_all_records_whatever_the_batches(random_params, tmp_path):
    held_out = FeatureDataset(three_shards(tmp_path))  # 10 square and 5 wide records
    params = {NETWORK: random_params(CONFIG.model)[1]}
    mesh = sharding.make_mesh(MeshConfig())

    def validate(batch_size, samples=100):
        data = dataclasses.replace(CONFIG.data, batch_size=batch_size)
        config = dataclasses.replace(CONFIG, data=data, log=LogConfig(validation_samples=samples))
        placed = jax.device_put(params, sharding.replicated(mesh))
        return config, make_validation(config, make_objective(config), mesh, held_out)(placed)

    config, values = validate(8)
    step = jax.jit(make_objective(config).validation)
    sums = [step(params, batch.arrays) for batch in held_out_batches(config, held_out)]
    loss, count = (np.sum(part, axis=0) for part in zip(*sums))
    assert count.sum() == 15
    assert values["validation_loss"] == pytest.approx(loss.sum() / 15, rel=1e-5)
    for part in range(8):
        assert values[f"validation_loss_part_{part}"] == pytest.approx(loss[part] / count[part], rel=1e-5)
    assert validate(16)[1]["validation_loss"] == pytest.approx(values["validation_loss"], rel=1e-5)


def test_parts_without_records_have_no_loss(random_params, tmp_path):
    held_out = FeatureDataset(three_shards(tmp_path))
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, batch_size=8),
        log=LogConfig(validation_samples=3),
    )
    mesh = sharding.make_mesh(MeshConfig())
    params = jax.device_put({NETWORK: random_params(CONFIG.model)[1]}, sharding.replicated(mesh))
    values = make_validation(config, make_objective(config), mesh, held_out)(params)
    assert len(values) == 1 + 3 and "validation_loss" in values
