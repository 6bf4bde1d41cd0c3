"""Adapters against the formulas of LoRA, rsLoRA and DoRA, computed in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from pixart_jax import config as configs
from pixart_jax.config import InitConfig, TrainConfig
from pixart_jax.denoiser import NETWORK, Denoiser, add_adapters, make_network, merge_adapters
from pixart_jax.errors import UserError
from pixart_jax.models.adapters import dropout, is_adapter
from pixart_jax.models.configs import AdapterConfig, PixArtConfig, adapter_targets
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.step import make_gradient

MODEL = PixArtConfig(
    size="custom",
    depth=2,
    hidden_size=24,
    num_heads=2,
    base_size=4,
    text_dim=8,
    text_length=6,
    size_conditions=True,
    scan_layers=True,
)


def stage(model=MODEL, **adapter):
    return TrainConfig(
        model=model,
        adapter=AdapterConfig(**{"kind": "lora", "rank": 3, **adapter}),
        init=InitConfig("weights", "x"),
    )


def randomized(params, seed=1):
    """Replaces the matrices B, which start at zero, and moves the magnitudes from where they start."""
    rng = np.random.default_rng(seed)
    flat = traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if path[-1] == "up":
            flat[path] = jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32)
        if path[-1] == "magnitude":
            flat[path] = leaf * jnp.asarray(rng.uniform(0.8, 1.2, leaf.shape), jnp.float32)
    return traverse_util.unflatten_dict(flat)


def inputs(batch=2):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    conditions = {
        "text": normal(batch, 6, 8),
        "text_mask": jnp.arange(6) < jnp.asarray([[6], [3]]),
        "image_size": jnp.full((batch, 2), 64.0),
        "aspect_ratio": jnp.ones((batch, 1)),
    }
    return normal(batch, 8, 8, 4), jnp.asarray([3, 700]), conditions


@pytest.fixture(scope="module")
def base(random_params):
    return random_params(MODEL)[1]


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_an_adapter_computes_its_formula(base, kind):
    config = stage(kind=kind, alpha=2.0, targets="official")
    plain = Denoiser.of(dataclasses.replace(config, adapter=AdapterConfig()))
    added = add_adapters(config, base, jax.random.key(0))
    np.testing.assert_allclose(Denoiser.of(config)(added, *inputs()), plain(base, *inputs()), atol=2e-5)

    trained = randomized(added)
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in traverse_util.flatten_dict(trained).items()}
    scale = 2.0 / (math.sqrt(3) if kind == "rslora" else 3)
    expected = {}
    for path, value in flat.items():
        if is_adapter(path):
            continue
        at = (*path[:-1], "adapter")
        if path[-1] == "kernel" and (*at, "down") in flat:
            stack = "i" if path[0] == "blocks" else ""
            down, up = flat[*at, "down"], flat[*at, "up"]
            inner = "ab"[: down.ndim - 2 - len(stack)]
            outer = "xyz"[: up.ndim - 2 - len(stack)]
            update = np.einsum(f"{stack}{inner}pr,{stack}rp{outer}->{stack}{inner}p{outer}", down, up)
            changed = value.reshape(update.shape) + scale * update
            if kind == "dora":
                axes = tuple(range(len(stack), len(stack) + len(inner)))
                norms = np.sqrt(np.sum(changed**2, axis=axes, keepdims=True))
                magnitude = flat[*at, "magnitude"]
                changed = changed / norms * np.expand_dims(magnitude, axes)
            value = changed.reshape(value.shape)
            assert not np.allclose(value, flat[path], atol=1e-3), path
        expected[path] = jnp.asarray(value, jnp.float32)
    expected = traverse_util.unflatten_dict(expected)
    wanted = plain(expected, *inputs())
    np.testing.assert_allclose(Denoiser.of(config)(trained, *inputs()), wanted, atol=5e-5)
    merged, plain_config = merge_adapters(config, trained)
    assert not plain_config.adapter
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), merged, expected)


def test_chosen_parts_of_a_layer(base):
    """With only to_q and to_v, the kernels of the keys stay as they are."""
    config = stage(targets="attn1.to_q,to_v")
    assert adapter_targets(config.adapter) == {
        "blocks.stacked.attn.qkv": (0, 2),
        "blocks.stacked.cross_attn.kv": (1,),
    }
    merged, _ = merge_adapters(config, randomized(add_adapters(config, base, jax.random.key(0))))
    before, after = (tree["blocks"]["stacked"]["attn"]["qkv"]["kernel"] for tree in (base, merged))
    changed = [not np.array_equal(before[:, :, part], after[:, :, part]) for part in range(3)]
    assert changed == [True, False, True]
    cross_before, cross_after = (
        tree["blocks"]["stacked"]["cross_attn"]["kv"]["kernel"] for tree in (base, merged)
    )
    np.testing.assert_array_equal(cross_before[:, :, 0], cross_after[:, :, 0])
    assert not np.array_equal(cross_before[:, :, 1], cross_after[:, :, 1])


@pytest.mark.parametrize("rank, sizes, count", [(4, False, 3_441_344), (16, True, 13_810_432)])
def test_number_of_parameters_of_the_official_layers(rank, sizes, count):
    """The numbers of trainable parameters that peft reports for the official scripts."""
    model = PixArtConfig(size_conditions=sizes)
    network = nnx.eval_shape(
        lambda: make_network(stage(model, rank=rank, targets="official"), rngs=nnx.Rngs(0))
    )
    leaves = nnx.to_flat_state(nnx.state(network))
    assert sum(math.prod(leaf.shape) for path, leaf in leaves if is_adapter(path)) == count


@pytest.mark.parametrize("dtype, error", [("bfloat16", 0.01), ("int8", 0.02)])
def test_base_dtype(base, dtype, error):
    config = stage(base_dtype=dtype, kind="dora")
    plain = Denoiser.of(dataclasses.replace(config, adapter=AdapterConfig()))
    params = add_adapters(config, base, jax.random.key(0))
    dtypes = {path: str(leaf.dtype) for path, leaf in traverse_util.flatten_dict(params).items()}
    assert {dtypes[path] for path in dtypes if is_adapter(path)} == {"float32"}
    assert dtypes["null_text",] == "float32"
    kernels = {dtypes[path] for path in dtypes if path[0] == "blocks" and path[-1] == "kernel"}
    assert kernels == {dtype}
    assert dtypes["t_block", "kernel"] == dtypes["blocks", "stacked", "mlp", "fc1", "bias"] == "bfloat16"
    exact, stored = plain(base, *inputs()), Denoiser.of(config)(params, *inputs())
    assert 0 < jnp.linalg.norm(stored - exact) < error * jnp.linalg.norm(exact)
    # Merging starts from the weights as they are stored.
    merged, _ = merge_adapters(config, params)
    np.testing.assert_allclose(plain(merged, *inputs()), stored, atol=2e-5)


def test_only_adapters_have_gradients_and_the_kernels_cost_none(base):
    """Without gradients of the kernels, a step takes 2/3 of the FLOPs, and the adapters a little more."""
    model = dataclasses.replace(MODEL, hidden_size=96, depth=4, size_conditions=False, scan_layers=False)
    flops = {}
    for kind in ("none", "lora"):
        config = stage(model, kind="lora", rank=1)
        if kind == "none":
            config = dataclasses.replace(config, adapter=AdapterConfig())
        objective = make_objective(config)
        params = {name: nnx.to_pure_dict(state) for name, state in objective.abstract_networks().items()}
        from pixart_jax.training.state import split

        trained, frozen = split(params, objective.is_trained)
        batch = {
            "latent_mean": jax.ShapeDtypeStruct((4, 16, 16, 4), jnp.float32),
            "latent_std": jax.ShapeDtypeStruct((4, 16, 16, 4), jnp.float32),
            "text": jax.ShapeDtypeStruct((4, 6, 8), jnp.float32),
            "text_mask": jax.ShapeDtypeStruct((4, 6), bool),
            "index": jax.ShapeDtypeStruct((4,), jnp.uint32),
        }
        program = jax.jit(make_gradient(config, objective)).lower(trained, frozen, batch).compile()
        flops[kind] = program.cost_analysis()["flops"]
        if kind == "lora":
            gradients, _ = jax.eval_shape(make_gradient(config, objective), trained, frozen, batch)
            assert all(map(is_adapter, traverse_util.flatten_dict(gradients)))
            optimizer = make_optimizer(config.optimizer, 4, objective)
            moments = jax.tree.leaves(jax.eval_shape(optimizer.init, trained))
            assert sum(leaf.size for leaf in moments) < 3 * sum(
                leaf.size for leaf in jax.tree.leaves(trained)
            )
    assert 0.6 < flops["lora"] / flops["none"] < 0.72


def test_dropout(base):
    config = stage(dropout=0.5)
    params = randomized(add_adapters(config, base, jax.random.key(0)))
    latents, _timesteps, conditions = inputs()
    same = (
        jnp.stack([latents[0]] * 2),
        jnp.asarray([3, 3]),
        {k: v[:1].repeat(2, 0) for k, v in conditions.items()},
    )
    keys = jax.random.split(jax.random.key(1), 2)

    def run(keys, **changes):
        model = dataclasses.replace(config.model, **changes)
        with dropout(keys):
            return Denoiser.of(dataclasses.replace(config, model=model))(params, *same)

    out = run(keys)
    assert jnp.abs(out[0] - out[1]).max() > 1e-3, "every sample has its own mask"
    np.testing.assert_allclose(run(keys[::-1]), out[::-1], atol=1e-6)
    np.testing.assert_allclose(run(keys, scan_layers=False), out, atol=1e-5)
    np.testing.assert_allclose(run(keys, remat="full"), out, atol=1e-5)


def test_dropout_keeps_the_mean():
    config = stage(dropout=0.25)
    layer = make_network(config, rngs=nnx.Rngs(0)).blocks.stacked.mlp.fc1.adapter
    x = jnp.ones((2000, 24))
    with dropout(jax.random.split(jax.random.key(0), 2000)):
        dropped = layer._dropped(x)
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs(dropped.mean() - 1) < 0.02
    np.testing.assert_array_equal(layer._dropped(x), x)


def test_dropout_differs_between_blocks(base):
    """If two blocks had the same mask, swapping their weights would swap what they drop, too."""
    config = stage(dropout=0.5, targets="attn1.to_q")
    keys = jax.random.split(jax.random.key(1), 2)
    seen = []

    def record(values):
        seen.append(np.asarray(values))

    params = randomized(add_adapters(config, base, jax.random.key(0)))
    flat = traverse_util.flatten_dict(params)
    flat = {
        path: jnp.stack([leaf[0]] * 2) if path[:2] == ("blocks", "stacked") else leaf
        for path, leaf in flat.items()
    }
    same_blocks = traverse_util.unflatten_dict(flat)
    from pixart_jax.models import adapters

    original = adapters.LowRank._dropped

    def spy(self, x):
        out = original(self, x)
        jax.debug.callback(record, (out != 0))
        return out

    adapters.LowRank._dropped = spy
    try:
        with dropout(keys):
            Denoiser.of(config)(same_blocks, *inputs())
        jax.effects_barrier()
    finally:
        adapters.LowRank._dropped = original
    first, second = seen
    assert 0.4 < first.mean() < 0.6
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    "values, words",
    [
        (dict(targets="to_p"), ("adapter.targets has 'to_p'", "Did you mean")),
        (dict(targets=""), ("adapter.targets",)),
        (dict(targets="attention+ml"), ("Did you mean", "attention+mlp")),
        (dict(rank=0), ("adapter.rank",)),
        (dict(kind="lokr"), ("adapter.kind", "lora")),
        (dict(dropout=1.0), ("adapter.dropout",)),
    ],
)
def test_invalid_values(values, words):
    with pytest.raises(UserError) as error:
        stage(**values)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_configs_in_which_an_adapter_makes_no_sense():
    with pytest.raises(UserError, match="adapters are for PixArt"):
        dataclasses.replace(stage(), model=configs.DiTConfig())
    with pytest.raises(UserError, match="needs trained weights"):
        dataclasses.replace(stage(), init=InitConfig())
    with pytest.raises(UserError, match=r"adapter\.kind is 'none'"):
        TrainConfig(init=InitConfig("weights", "x", adapter="y"))


def test_training_changes_only_adapters(base):
    objective = make_objective(stage())
    assert objective.is_trained((NETWORK, "blocks", "stacked", "attn", "qkv", "adapter", "up"))
    assert not objective.is_trained((NETWORK, "blocks", "stacked", "attn", "qkv", "kernel"))
