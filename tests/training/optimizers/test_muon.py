import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from pixart_jax.config import FeaturesConfig, MeshConfig, OptimizerConfig, TrainConfig, without_effect
from pixart_jax.denoiser import NETWORK
from pixart_jax.models.blocks import Blocks
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.models.layers import linear
from pixart_jax.training import sharding
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.optimizers.muon import matrices
from pixart_jax.training.state import abstract_state

# Three blocks, so that eight devices divide no stack of matrices.
MODEL = PixArtConfig(size="custom", depth=3, hidden_size=12, num_heads=2, text_dim=8, text_length=5)
OBJECTIVE = make_objective(TrainConfig(model=MODEL))
CONFIG = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=0, eps=1e-8, clip_norm=0.0)


def random_trees(count):
    """Trees of the trained parameters with random values."""
    rng = np.random.default_rng(0)
    shapes = {NETWORK: nnx.to_pure_dict(OBJECTIVE.abstract_networks()[NETWORK])}
    del shapes[NETWORK]["null_text"]
    return [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        for _ in range(count)
    ]


def after_updates(config, params, gradients):
    optimizer = make_optimizer(config, 4, OBJECTIVE, steps=10)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_updates_and_states_are_those_of_optax():
    """The matrices have a learning rate of their own, with the same warm-up, schedule and scaling."""
    config = OptimizerConfig(
        name="muon", learning_rate=1e-3, muon_learning_rate=3e-3, warmup_steps=2, schedule="cosine",
        sqrt_scaling_batch=1, momentum=0.9, eps=1e-8, weight_decay=0.1, clip_norm=0.0,
    )  # fmt: skip
    params, *gradients = random_trees(4)
    ours, state = after_updates(config, params, gradients)

    def rate(peak):  # sqrt(4 / 1) = 2
        return optax.warmup_cosine_decay_schedule(0.0, 2 * peak, 2, 10)

    kernels = {
        path: kernel and optax.contrib.MuonDimensionNumbers(kernel.inputs, kernel.outputs)
        for path, kernel in matrices(OBJECTIVE).items()
    }
    muon = optax.contrib.muon(
        rate(3e-3),
        beta=0.9,
        weight_decay=0.1,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: kernels[tuple(key.key for key in path)], tree
        ),
        adam_learning_rate=rate(1e-3),
        adam_weight_decay=0.1,
    )
    theirs, expected = params, muon.init(params)
    for gradient in gradients:
        updates, expected = jax.jit(muon.update)(gradient, expected, theirs)
        theirs = optax.apply_updates(theirs, updates)
    moments = expected.inner_states["muon"].inner_state[0]
    nested = state.inner_states["muon"].inner_state.inner_states["muon"].inner_state[0]
    assert type(nested) is type(moments)
    ours, theirs = jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs)
    for (path, own), other in zip(ours, theirs, strict=True):
        if kernels[tuple(key.key for key in path)]:  # the AdamW of optax's Muon has Nesterov's look-ahead
            np.testing.assert_allclose(own, other, rtol=2e-5, atol=1e-7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        jax.tree.leaves(nested.mu),
        jax.tree.leaves(moments.mu),
    )


def test_the_devices_share_the_matrices():
    """Eight devices get the result that one device has alone, and each does an eighth of the work."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer, alone = (make_optimizer(CONFIG, 1, OBJECTIVE, mesh=each) for each in (mesh, None))
    _, shardings = abstract_state(OBJECTIVE, optimizer, mesh)
    params, gradient = random_trees(2)
    arguments = gradient, optimizer.init(params), params
    placed = shardings.ema["ema"], shardings.optimizer, shardings.trained
    step = jax.jit(optimizer.update, in_shardings=placed, out_shardings=placed[:2])
    program = step.lower(*arguments).compile()
    updates, state = program(*jax.device_put(arguments, program.input_shardings[0]))
    one = jax.jit(alone.update).lower(*arguments).compile()
    expected, expected_state = one(*arguments)
    for ours, theirs in ((updates, expected), (state, expected_state)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), jax.device_get(ours), theirs)
    # Three blocks have 9, 6 and 3 matrices of a kind, and each device gets 2 or 1 of them.
    kinds = {(12, 12): (9, 3, 3, 6, 3), (12, 48): (3, 3)}
    padded, all_of_them = (
        sum(count(n) * 5 * 2 * r * r * (2 * c + r) for (r, c), many in kinds.items() for n in many)
        for count in (lambda n: -(-n // 8), lambda n: n)
    )
    flops, whole = (each.cost_analysis()["flops"] for each in (program, one))
    assert whole > all_of_them and flops < padded + (whole - all_of_them)


def test_a_learning_rate_of_muon_without_muon_is_reported():
    config = TrainConfig(optimizer=OptimizerConfig(muon_learning_rate=1e-4))
    assert any("muon_learning_rate has no effect" in line for line in without_effect(config))


def test_muon_trains_the_matrices_of_the_blocks():
    """The singular values of its update are similar and of the size of AdamW's; AdamW trains the rest."""
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, eps=1e-8, weight_decay=0.0)
    adamw = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1e-8, weight_decay=0.0)
    rng = np.random.default_rng(0)

    shape = dict(size="custom", depth=2, hidden_size=12, num_heads=2)
    objective = make_objective(TrainConfig(model=PixArtConfig(**shape, text_dim=8, text_length=5)))
    params, gradient = (
        jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
            {NETWORK: nnx.to_pure_dict(objective.abstract_networks()[NETWORK])},
        )
        for _ in range(2)
    )
    for tree in (params, gradient):
        del tree[NETWORK]["null_text"]
    updates = {}
    for name, one in (("muon", config), ("adamw", adamw)):
        optimizer = make_optimizer(one, 1, objective)
        updates[name], _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
        updates[name] = updates[name][NETWORK]
    muon, plain = (updates[name]["blocks"]["stacked"]["attn"] for name in ("muon", "adamw"))
    for matrix in (muon["qkv"]["kernel"][1, :, 2].reshape(12, 12), muon["proj"]["kernel"][0].reshape(12, 12)):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(12))
        # Newton-Schulz brings all but the smallest close to 1; those of the gradient span several decades.
        assert np.median(values) > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(muon["qkv"]["bias"], plain["qkv"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(updates["muon"]["t_block"]["kernel"], updates["adamw"]["t_block"]["kernel"])


def test_muon_trains_every_matrix_of_the_blocks():
    shape = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
    for model in (PixArtConfig(**shape, text_dim=8, text_length=5), DiTConfig(**shape, num_classes=3)):
        found = matrices(make_objective(TrainConfig(model=model, features=FeaturesConfig())))
        assert (NETWORK, "null_text") not in found
        taken = {path[3:] for path, axes in found.items() if axes}
        kernels = {("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")}
        if model.kind == "pixart":
            kernels |= {("cross_attn", "q"), ("cross_attn", "kv"), ("cross_attn", "proj")}
        assert taken == {(*kernel, "kernel") for kernel in kernels}


def test_muon_trains_a_new_kernel_in_a_block():
    """Whether Muon trains a kernel depends on its metadata from `linear`, not on its name."""

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.novel = linear(8, (2, 4, 3), ("embed", None, None, None), matrices=2, rngs=rngs)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.blocks = Blocks(PixArtConfig(size="custom", depth=2), Block, rngs=rngs)
            self.last = linear(8, 4, (None, None), rngs=rngs)

    objective = make_objective(TrainConfig())._replace(
        networks={NETWORK: Network}, is_trained=lambda path: True
    )
    found = matrices(objective)
    kernel = found[NETWORK, "blocks", "stacked", "novel", "kernel"]
    assert (kernel.inputs, kernel.outputs) == ((1,), (3, 4))  # of [layers, 8, 2, 4, 3]
    assert found[NETWORK, "last", "kernel"] is None
    assert found[NETWORK, "blocks", "stacked", "novel", "bias"] is None
