"""What importing the package does."""

import os
import subprocess
import sys

import pytest

import pixart_jax
from pixart_jax.pipeline import load_pipeline


def test_public_names_are_found_when_first_used():
    assert all(getattr(pixart_jax, name) for name in pixart_jax.__all__)
    assert pixart_jax.load_pipeline is load_pipeline and set(pixart_jax.__all__) <= set(dir(pixart_jax))
    with pytest.raises(AttributeError, match="load_modell"):
        _ = pixart_jax.load_modell


def test_simulated_devices_have_threads_for_their_collectives():
    """XLA has one thread a device otherwise, and programs with two independent collectives stand still."""

    def threads(**environment):
        kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PJRT_NPROC")}
        program = "import os, pixart_jax; print(os.environ.get('PJRT_NPROC'))"
        return subprocess.check_output(
            [sys.executable, "-c", program], env=kept | environment, text=True
        ).strip()

    assert threads() == "None"
    assert threads(XLA_FLAGS="--xla_force_host_platform_device_count=1") == "None"
    assert threads(XLA_FLAGS="--a=1 --xla_force_host_platform_device_count=8") == "128"
    assert threads(XLA_FLAGS="--xla_force_host_platform_device_count=8", PJRT_NPROC="20") == "20"
