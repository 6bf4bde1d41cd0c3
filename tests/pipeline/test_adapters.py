"""Adapters of a pipeline: their weights change, and 0 restores the bits."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from pixart_jax.errors import UserError
from pixart_jax.pipeline import Pipeline
from pixart_jax.pipeline.generation import Program
from pixart_jax.pipeline.memory import plan_memory
from pixart_jax.pipeline.requests import Request
from pixart_jax.pipeline.sizes import Size
from pixart_jax.weights.adapters import merge
from pixart_jax.weights.loading import Weights, build_model

CONFIG = dataclasses.replace(tiny.CONFIG, model=dataclasses.replace(tiny.MODEL, depth=2, scan_layers=True))
OPTIONS = dict(steps=2, seed=3, guidance_scale=1.0, output="latents")


@pytest.fixture(scope="module")
def params(random_params):
    return random_params(CONFIG.model)[1]


@pytest.fixture(scope="module")
def adapters():
    return tiny.make_adapter(1, CONFIG.model, name="a"), tiny.make_adapter(2, CONFIG.model, name="b")


def make_pipe(params, adapters=(), config=CONFIG):
    base = tiny.make_pipe(lambda _: nnx.split(build_model(Weights(params, config, "", ""))), config=config)
    devices = jax.devices()[:1]
    return Pipeline(base.model, config, base.text_encoder, base.codec, devices=devices, adapters=adapters)


@pytest.fixture(scope="module")
def pipe(params, adapters):
    """Every test sets its weights first."""
    return make_pipe(params, [(adapters[0], 0.5), (adapters[1], 0.0)])


def images(pipe, prompts="a fox"):
    return pipe(prompts, **OPTIONS)


def assert_same_params(pipe, expected):
    found = nnx.to_pure_dict(pipe.generator.params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_weights_change_without_compiling_again(pipe, params, adapters):
    first, second = adapters
    assert_same_params(pipe, merge(params, CONFIG.model, [(first, 0.5)]))
    some = images(pipe)

    pipe.set_adapter_weights({"a": 0})
    assert_same_params(pipe, params)
    for path, leaf in nnx.to_flat_state(nnx.state(pipe.model)):
        np.testing.assert_array_equal(leaf[...], nnx.traversals.flatten_mapping(params)[path])
    plain = images(pipe)
    assert np.abs(some - plain).max() > 0.1

    pipe.set_adapter_weights({"b": np.float32(-0.25), "a": 1})
    assert_same_params(pipe, merge(params, CONFIG.model, [(first, 1.0), (second, -0.25)]))
    assert pipe.adapters.weights == {"a": 1.0, "b": -0.25}
    pipe.set_adapter_weights({"a": 0.5, "b": 0})
    np.testing.assert_array_equal(images(pipe), some)
    program = Program.of((32, 32, 3), pipe.resolve(Request("", steps=2))[0])
    assert pipe.generator.compiled(program)._cache_size() == 1


def test_the_fingerprint_is_that_of_the_weights_and_adapters(params, adapters):
    base = make_pipe(params).fingerprint
    # An adapter of the last block alone does not change the first values of a stack.
    last = {m: f for m, f in adapters[0].modules.items() if m.startswith("transformer_blocks.1.")}
    pipe = make_pipe(params, [(dataclasses.replace(adapters[0], modules=last), 0.5)])
    half = pipe.fingerprint
    pipe.set_adapter_weights({"a": 0.25})
    quarter = pipe.fingerprint
    pipe.set_adapter_weights({"a": 0})
    assert len({base, half, quarter}) == 3 and pipe.fingerprint == base
    pipe.set_adapter_weights({"a": 0.5})
    assert pipe.fingerprint == half
    (record,) = pipe.adapters.record()
    digest = dataclasses.replace(adapters[0], modules=last).digest
    assert record == {"path": "a", "sha256": digest, "weight": 0.5}


def test_invalid_weights_change_nothing(params, adapters):
    pipe = make_pipe(params, [(adapters[0], 0.5)])
    before = nnx.to_pure_dict(pipe.generator.params)
    for weights, message in (
        ({"aa": 1.0}, "this pipeline has no adapter 'aa', only 'a'. Did you mean 'a'?"),
        ({"a": float("nan")}, "the weight of adapter 'a' is nan"),
        ({"a": "1"}, "the weight of adapter 'a' is '1': give a number"),
        ({"a": True}, "is True: give a number"),
        ({"a": 1e39}, "has values that are NaN or infinite"),
    ):
        with pytest.raises(UserError) as error:
            pipe.set_adapter_weights(weights)
        assert message in str(error.value)
    assert_same_params(pipe, before)
    assert pipe.adapters.weights == {"a": 0.5}
    with pytest.raises(UserError, match="this pipeline has no adapters"):
        make_pipe(params).set_adapter_weights({"a": 1.0})
    with pytest.raises(UserError, match="two adapters have the same name"):
        make_pipe(params, [(adapters[0], 0.5), (adapters[0], 0.5)])
    with pytest.raises(UserError, match="'wide' does not fit these weights of width 16"):
        wide = tiny.make_adapter(0, dataclasses.replace(CONFIG.model, hidden_size=32), name="wide")
        make_pipe(params, [(wide, 1.0)])


def test_a_call_that_runs_keeps_its_weights(pipe, monkeypatch):
    pipe.set_adapter_weights({"a": 0.5, "b": 0})
    expected, compiled = images(pipe, ["a fox", "two"]), pipe.generator.compiled

    def changing(program):
        def run(*arguments):
            out = compiled(program)(*arguments)
            pipe.set_adapter_weights({"a": pipe.adapters.weights["a"] + 1})  # as another thread might
            return out

        return run

    monkeypatch.setattr(pipe.generator, "compiled", changing)
    np.testing.assert_array_equal(images(pipe, ["a fox", "two"]), expected)  # in two batches
    assert pipe.adapters.weights == {"a": 2.5, "b": 0}


def test_blocks_with_arrays_of_their_own(params, adapters):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, scan_layers=False))
    pipe = make_pipe(params, [(adapters[0], 0.5)], config)
    expected = build_model(Weights(merge(params, CONFIG.model, [(adapters[0], 0.5)]), config, "", ""))
    assert_same_params(pipe, nnx.to_pure_dict(nnx.state(expected)))
    pipe.set_adapter_weights({"a": 0.0})
    assert_same_params(pipe, nnx.to_pure_dict(nnx.state(build_model(Weights(params, config, "", "")))))


def test_memory(params, adapters):
    size = Size(32, 32, 32, 32)
    base, pipe = (plan_memory(make_pipe(params, each), size, 1) for each in ((), [(adapters[0], 0.5)]))
    table = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path[-1])]
    kernels = sum(leaf.nbytes for leaf in table)
    factors = sum(f.down.nbytes + f.up.nbytes for f in adapters[0].modules.values())
    assert pipe == dataclasses.replace(base, adapting=kernels, host=base.host + kernels + factors)
    large = dataclasses.replace(pipe, adapting=10**12, keeps_text_encoder=False, limit=None)
    assert large.peak == large.backbone + large.vae + 10**12
    assert "changing weights of adapters" in str(large) and "adapters" not in str(base)


@pytest.mark.parametrize("scan_layers", [True, False])
def test_kernels_in_int8_are_quantized_after_merging(params, adapters, scan_layers):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, scan_layers=scan_layers))

    def build(params):
        return build_model(Weights(params, config, "", ""), "int8")

    base = tiny.make_pipe(lambda _: nnx.split(build(params)), config=config)
    pipe = Pipeline(
        base.model,
        config,
        base.text_encoder,
        base.codec,
        devices=jax.devices()[:1],
        adapters=[(adapters[0], 0.5)],
        params=params,
    )
    for weight in (0.5, 0.0, 1.0):
        pipe.set_adapter_weights({"a": weight})
        expected = build(merge(params, CONFIG.model, [(adapters[0], weight)]))
        assert_same_params(pipe, nnx.to_pure_dict(nnx.state(expected)))
