from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.dtypes import check_dtype, default_dtype, product_dtype


@pytest.fixture
def backend(monkeypatch):
    """Makes `jax` report another backend."""

    def pretend(platform, capability=None):
        device = SimpleNamespace(compute_capability=capability, device_kind="card")
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        monkeypatch.setattr(jax, "devices", lambda: [device])

    return pretend


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32 (the backend is cpu)"),
        ("tpu", None, "bfloat16 (the backend is tpu)"),
        ("gpu", "gfx942", "bfloat16 (the backend is gpu)"),
        ("gpu", "8.0", "bfloat16 (the backend is gpu)"),
        ("gpu", "12.0", "bfloat16 (the backend is gpu)"),
        ("gpu", "7.5", "float16 (the GPU has compute capability 7.5, bfloat16 needs 8.0 (Ampere))"),
    ],
)
def test_the_default_dtype_suits_the_device(backend, platform, capability, expected):
    backend(platform, capability)
    assert str(default_dtype()) == expected
    # The device supports the default.
    check_dtype("model.dtype", default_dtype().dtype)


def test_bfloat16_on_an_older_gpu_raises_when_the_network_is_built(backend):
    config = PixArtConfig(dtype="bfloat16")
    backend("gpu", "7.0")
    for dtype in ("float32", "float16"):
        check_dtype("model.dtype", dtype)
    # Any machine can open the config; the dtype is checked when the network is built.
    with pytest.raises(UserError, match=r"model\.dtype is 'bfloat16', but the GPU has .* 7\.0"):
        config.attention_choice()
    assert PixArtConfig(dtype="float16").attention_choice().implementation == "xla"


def test_only_products_in_float16_are_returned_in_float32():
    assert [product_dtype(jnp.dtype(n)) for n in ("float32", "bfloat16", "float16")] == [
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    ]
