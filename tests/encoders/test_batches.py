import jax
import numpy as np

from pixart_jax.encoders.batches import local_sharding, round_up


def test_rows_are_spread_and_weights_are_replicated():
    rows, replicated = local_sharding()
    batch = jax.device_put(np.zeros((16, 3)), rows)
    weights = jax.device_put(np.zeros((16, 3)), replicated)
    assert batch.sharding.device_set == weights.sharding.device_set == set(jax.local_devices())
    assert {shard.data.shape for shard in batch.addressable_shards} == {(16 // jax.local_device_count(), 3)}
    assert weights.is_fully_replicated


def test_round_up():
    assert [round_up(count, 8) for count in (1, 8, 9, 16)] == [8, 8, 16, 16]
