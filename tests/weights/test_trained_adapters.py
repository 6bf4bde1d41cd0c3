"""Adapters of runs and of files: peft's goldens computed beside the kernels, and continued training."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from pixart_jax.config import InitConfig, TrainConfig
from pixart_jax.denoiser import Denoiser, add_adapters
from pixart_jax.errors import UserError
from pixart_jax.models.configs import AdapterConfig
from pixart_jax.weights.adapter_files import read_adapter
from pixart_jax.weights.loading import read_any
from pixart_jax.weights.trained_adapters import extract, insert

DATA = Path(__file__).parents[1] / "data/lora"


@pytest.fixture(scope="module")
def base():
    read = read_any(DATA / "base")
    return read.params, read.config


def stage(base, adapter, kind, **changes):
    """The config in which a golden adapter would have been trained."""
    first = next(iter(adapter.modules.values()))
    settings = dict(
        kind=kind, rank=first.rank, alpha=adapter.alpha(next(iter(adapter.modules))), targets="official"
    )
    return dataclasses.replace(
        base[1], adapter=AdapterConfig(**settings | changes), init=InitConfig("weights", "base", "golden")
    )


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_the_layers_compute_what_peft_computes(base, kind):
    adapter = read_adapter(DATA / kind)
    config = stage(base, adapter, kind)
    params = insert(adapter, add_adapters(config, base[0], jax.random.key(0)), config)
    io = np.load(DATA / "io.npz")
    conditions = {"text": io["y"], "text_mask": io["mask"].astype(bool)}
    latents = io["x"].transpose(0, 2, 3, 1)
    out = Denoiser.of(config)(params, latents, io["t"], conditions)
    np.testing.assert_allclose(np.asarray(out).transpose(0, 3, 1, 2), io[f"out_{kind}"], atol=2e-5)
    back = extract(params, config)
    assert back.rslora == (kind == "rslora") and set(back.modules) == set(adapter.modules)
    for name, factors in adapter.modules.items():
        for ours, theirs in zip(back.modules[name], factors):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6) if theirs is not None else None
        assert (back.modules[name].magnitude is None) == (factors.magnitude is None)


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("rslora", {}, "adapter.kind is 'rslora', the adapter's is 'lora'"),
        ("dora", {}, "adapter.kind is 'dora', the adapter's is 'lora'"),
        ("lora", {"rank": 2}, "adapter.rank is 2, the adapter's is 4"),
        ("lora", {"rank": 2, "alpha": 0.0}, "adapter.rank is 2, the adapter's is 4"),
        ("lora", {"alpha": 3.0}, "adapter.alpha gives the scale 0.75, the adapter's is"),
        ("lora", {"targets": "attention"}, "adapter.targets is 'attention', the adapter has"),
    ],
)
def test_an_adapter_that_cannot_be_continued(base, kind, changes, words):
    adapter = read_adapter(DATA / "lora")
    config = stage(base, adapter, kind, **changes)
    params = add_adapters(config, base[0], jax.random.key(0))
    with pytest.raises(UserError, match=r"init\.adapter cannot be continued") as error:
        insert(adapter, params, config)
    assert words in str(error.value) and "\n" not in str(error.value)
    # With the flags that the message names, it can be continued.
    flags = dict(re.findall(r"--config\.adapter\.(\w+)=(\S+?)\.?(?=\s|$)", str(error.value)))
    assert flags
    for name, value in flags.items():
        flags[name] = type(getattr(config.adapter, name))(value)
    config = dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, **flags))
    insert(adapter, add_adapters(config, base[0], jax.random.key(0)), config)


def test_an_adapter_that_no_settings_fit(base):
    adapter = read_adapter(DATA / "lora")
    config = stage(base, adapter, "lora")
    params = add_adapters(config, base[0], jax.random.key(0))
    name = next(name for name in adapter.modules if name.startswith("transformer_blocks."))
    modules = dict(adapter.modules)
    modules[name] = modules[name]._replace(scale=9.0)
    with pytest.raises(UserError, match="Train a new adapter"):
        insert(dataclasses.replace(adapter, modules=modules), params, config)
    del modules[name]
    with pytest.raises(UserError, match="Train a new adapter"):
        insert(dataclasses.replace(adapter, modules=modules), params, config)


def test_an_adapter_of_another_width(base, random_params):
    adapter = read_adapter(DATA / "lora")
    config = stage(base, adapter, "lora")
    model = dataclasses.replace(config.model, hidden_size=2 * config.model.hidden_size, num_heads=4)
    config = TrainConfig(model=model, adapter=config.adapter, init=config.init)
    params = add_adapters(config, random_params(model)[1], jax.random.key(0))
    with pytest.raises(UserError, match="does not fit the network"):
        insert(adapter, params, config)
