"""The configs of networks, which need no JAX."""

import subprocess
import sys

from pixart_jax.constants import SAMPLER_NAMES
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.models import configs, layers
from pixart_jax.weights.adapter_export import WRITERS
from pixart_jax.weights.files import ADAPTER_FORMATS


def test_configs_are_made_without_jax():
    program = """
import sys
from pixart_jax.models.configs import AdapterConfig, DiTConfig, PixArtConfig
PixArtConfig(kv_compression="conv", mup_base_width=288)
DiTConfig()
AdapterConfig(kind="lora", targets="official")
print("jax" in sys.modules)
"""
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "False\n"


def test_the_names_that_configs_allow_are_those_that_are_implemented():
    assert tuple(layers.REMAT_POLICIES) == configs.REMAT_POLICIES
    assert tuple(SAMPLERS) == SAMPLER_NAMES
    assert tuple(WRITERS) == ADAPTER_FORMATS
