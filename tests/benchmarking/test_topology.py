import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pixart_jax.benchmarking import topology
from pixart_jax.benchmarking.measuring import DATASHEET, chip_name
from pixart_jax.benchmarking.topology import GIB, GPUS, memory_limit, target, topology_devices
from pixart_jax.errors import UserError

# The CUDA plugin and its compiler take gigabytes, so they are in the extra 'cuda' and not in 'test'.
needs_cuda_plugin = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, topology.CUDA_PLUGINS)), reason="needs the extra 'cuda'"
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "pass v4, v5e, v5p or v6e with a shape"),
        ("v5:4x4", "Did you mean 'v5"),
        ("v5e:16", "a v5e slice has 2 dimensions, such as v5e:16x16"),
        ("v5p:4x4", "a v5p slice has 3 dimensions, such as v5p:4x4x4"),
        ("v5e:0x4", "2 dimensions"),
        ("cpu:64", "--xla_force_host_platform_device_count=64"),
        ("cpu:0", "is unknown"),
        ("h100:0", "a100, h100 or h200 with a number"),
        ("h100", "a100, h100 or h200 with a number"),
        ("h10:8", "Did you mean 'h100'"),
    ],
)
def test_invalid_topologies_raise(name, message):
    with pytest.raises(UserError, match=message):
        topology_devices(name)


def test_this_machine_is_a_topology():
    assert topology_devices("here") == jax.devices()
    assert len(topology_devices("cpu:3")) == 3


def test_a_missing_compiler_names_its_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'h100:8' needs the GPU compiler: pip install 'pixart_jax\[cuda\]'"):
        topology_devices("h100:8")
    with pytest.raises(UserError, match=r"'v5e:2x2' needs the TPU compiler: pip install 'pixart_jax\[tpu\]'"):
        topology_devices("v5e:2x2")


def test_the_platform_of_a_topology():
    names = ("v5p:2x2x1", "h200:8", "cpu:8", "here", None)
    assert [target(name) for name in names] == ["tpu", "gpu", None, None, None]


@pytest.mark.parametrize("kind", GPUS)
def test_every_gpu_has_a_datasheet_peak(kind):
    assert chip_name(GPUS[kind].name) == kind.upper() and kind.upper() in DATASHEET


@needs_cuda_plugin
@pytest.mark.parametrize("kind", GPUS)
def test_a_gpu_program_compiles_without_a_gpu(kind):
    devices = topology_devices(f"{kind}:2")
    gpu = GPUS[kind]
    assert [device.device_kind for device in devices] == [gpu.name] * 2
    assert memory_limit(devices[0]) == gpu.memory > 79 * GIB
    assert float(devices[0].compute_capability) == float("{}.{}".format(*gpu.capability))
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=SingleDeviceSharding(devices[0]))
    assert "ENTRY" in jax.jit(lambda x: jnp.tanh(x @ x)).lower(x).compile().as_text()
