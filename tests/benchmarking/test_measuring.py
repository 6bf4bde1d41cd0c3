import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from pixart_jax.benchmarking import measuring


@pytest.mark.parametrize(
    ("kind", "peak"),
    [("NVIDIA H100 80GB HBM3", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("cpu", None)],
)
def test_the_datasheet_peak_is_found_by_the_name_of_the_device(kind, peak):
    assert measuring.datasheet_peak(type("Device", (), {"device_kind": kind})) == peak


def test_the_measured_matrix_peak_is_plausible():
    peak = measuring.matrix_peak("float32", size=64, seconds=0.01)
    assert 1e6 < peak["flops_per_second"] < 1e13


def test_compilations_from_the_cache_are_reported(tmp_path):
    values = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    try:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        found = []
        for _ in range(2):
            jax.clear_caches()
            function = jax.jit(lambda x: jnp.sin(x) @ x)
            lower = functools.partial(function.lower, jnp.ones((4, 4)))
            found.append(measuring.compile_timed(lower)[1]["from_cache"])
        assert found == [False, True]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
