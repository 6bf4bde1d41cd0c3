import jax
import numpy as np
import pytest

from pixart_jax.config import MeshConfig
from pixart_jax.training import sharding
from pixart_jax.training.compilation import compile_ahead, keep_compiled


def batch(side):
    return {"latent_mean": np.full((8, side, 2), side, np.float32), "index": np.arange(8, dtype=np.uint32)}


def test_each_shape_has_its_program_and_nothing_is_compiled_later():
    mesh = sharding.make_mesh(MeshConfig())
    traced = []

    @jax.jit
    def step(state, arrays):
        traced.append(arrays["latent_mean"].shape)
        return state + arrays["latent_mean"].sum() + arrays["index"].sum()

    state = jax.device_put(np.float32(1), sharding.replicated(mesh))
    ready = compile_ahead(step, state, [batch(4), batch(6)], mesh)
    assert traced == [(8, 4, 2), (8, 6, 2)]
    for side in (6, 4, 6):
        assert ready(state, sharding.global_batch(mesh, batch(side))) == 1 + 16 * side**2 + 28
    assert len(traced) == 2
    with pytest.raises(KeyError):
        ready(state, sharding.global_batch(mesh, batch(5)))


def test_compiled_programs_are_stored_on_disk(tmp_path):
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    try:
        keep_compiled(str(tmp_path))
        jax.jit(lambda x: x * 3 + 1)(np.arange(5.0)).block_until_ready()
        assert any(tmp_path.iterdir())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        jax.experimental.compilation_cache.compilation_cache.reset_cache()
