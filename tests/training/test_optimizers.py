import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixart_jax.config import OptimizerConfig
from pixart_jax.models.dit import DiTConfig
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer, matrices, update_ema


def test_rate_warms_up_and_scales_with_the_root_of_the_batch():
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, sqrt_scaling_batch=256)
    rate = learning_rate_schedule(config, batch_size=1024)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 5, 10, 999)], [0, 1e-3, 2e-3, 2e-3], rtol=1e-6
    )


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_adamw_equals_pytorch(clip):
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
    # What is not trained stays to the bit.
    assert float(late["kept"]) == 5.0


def test_muon_takes_the_matrices_of_the_blocks():
    """Its step has equal singular values, of AdamW's size; what is no matrix takes AdamW's step."""
    config = OptimizerConfig(name="muon", learning_rate=1.0, warmup_steps=0, eps=1e-8, weight_decay=0.0)
    adamw = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1e-8, weight_decay=0.0)
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def gradients():
        attn = {"qkv": {"kernel": leaf(2, 12, 3, 2, 6), "bias": leaf(2, 3, 2, 6)}}
        attn["proj"] = {"kernel": leaf(2, 2, 6, 12), "bias": leaf(2, 12)}
        return {"blocks": {"stacked": {"attn": attn}}, "t_block": {"kernel": leaf(12, 6, 12)}}

    params, gradient = gradients(), gradients()
    updates = {}
    for name, one in (("muon", config), ("adamw", adamw)):
        optimizer = make_optimizer(one, batch_size=1)
        updates[name], _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    muon, plain = (updates[name]["blocks"]["stacked"]["attn"] for name in ("muon", "adamw"))
    for matrix in (muon["qkv"]["kernel"][1, :, 2].reshape(12, 12), muon["proj"]["kernel"][0].reshape(12, 12)):
        values = np.linalg.svd(matrix, compute_uv=False) / (0.2 * np.sqrt(12))
        # Newton-Schulz brings all but the smallest near 1; those of the gradient itself range over decades.
        assert np.median(values) > 0.6 and values.max() < 1.3
    np.testing.assert_allclose(muon["qkv"]["bias"], plain["qkv"]["bias"], rtol=1e-6)
    np.testing.assert_allclose(updates["muon"]["t_block"]["kernel"], updates["adamw"]["t_block"]["kernel"])


def test_muon_is_for_every_matrix_of_the_blocks(random_params):
    shape = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
    for model in (PixArtConfig(**shape, text_dim=8, text_length=5), DiTConfig(**shape, num_classes=3)):
        _, params = random_params(model)
        found = matrices(params)
        block = found["blocks"]["stacked"]
        kernels = [
            block[part][layer]["kernel"]
            for part in ("attn", "cross_attn", "mlp")
            if part in block
            for layer in block[part]
        ]
        assert all(kernels) and len(kernels) == (7 if isinstance(model, PixArtConfig) else 4)
        total = jax.tree.leaves(found, is_leaf=lambda x: x is not None and not isinstance(x, dict))
        assert len(total) == len(kernels)
