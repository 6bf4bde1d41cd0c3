import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pixart_jax.config import OptimizerConfig
from pixart_jax.training.optimizers import learning_rate_schedule, make_optimizer, update_ema


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
