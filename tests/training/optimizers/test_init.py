import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pixart_jax.config import FeaturesConfig, OptimizerConfig, TrainConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.models.blocks import Blocks
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.layers import linear
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer, matrices, update_ema


def test_learning_rate_warms_up_and_scales_with_the_root_of_the_batch_size():
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, sqrt_scaling_batch=256)
    rate = learning_rate_schedule(config, batch_size=1024)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 5, 10, 999)], [0, 1e-3, 2e-3, 2e-3], rtol=1e-6
    )


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_adamw_matches_pytorch(clip):
    torch = pytest.importorskip("torch")
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, eps=1e-10, weight_decay=0.03, clip_norm=clip)
    start = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    gradients = np.random.default_rng(1).normal(size=(5, 4, 3)).astype(np.float32)

    theirs = torch.nn.Parameter(torch.tensor(start))
    reference = torch.optim.AdamW([theirs], lr=1e-2, eps=1e-10, weight_decay=0.03)
    optimizer = make_optimizer(config, batch_size=1)
    params = {"w": jnp.asarray(start)}
    state = optimizer.init(params)
    for gradient in gradients:
        theirs.grad = torch.tensor(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_([theirs], clip)
        reference.step()
        updates, state = optimizer.update({"w": jnp.asarray(gradient)}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["w"], theirs.detach().numpy(), rtol=2e-5, atol=1e-6)


def test_the_average_starts_from_the_weights_and_forgets_them():
    ema = {"w": jnp.asarray(1.0), "kept": jnp.asarray(5.0)}
    params = {"w": jnp.asarray(3.0), "kept": jnp.asarray(5.0)}
    # First update: decay (1 + 0) / (10 + 0) = 0.1, so 1 + 0.9 (3 - 1).
    first = update_ema(ema, params, 0.9999, jnp.asarray(0))
    np.testing.assert_allclose(first["w"], 2.8, rtol=1e-6)
    late = update_ema(ema, params, 0.9999, jnp.asarray(10**7))
    np.testing.assert_allclose(late["w"], 1.0002, rtol=1e-6)
    # Parameters that do not change stay the same, bit for bit.
    assert float(late["kept"]) == 5.0


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
    axes = found[NETWORK, "blocks", "stacked", "novel", "kernel"]
    assert (axes.reduction_axis, axes.output_axis) == ((1,), (3, 4))  # of [layers, 8, 2, 4, 3]
    assert found[NETWORK, "last", "kernel"] is None
    assert found[NETWORK, "blocks", "stacked", "novel", "bias"] is None
