"""Compares one optimizer step of stages 1, 2 and 3 with stored numbers and with the published formulas.

The stored numbers depend on everything in a step, including its random numbers. After a change that is meant
to change them, write tests/data/golden_steps.json again:

    python tests/training/test_golden_steps.py
"""

import dataclasses
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from pixart_jax.config import (
    DataConfig,
    DiffusionConfig,
    FeaturesConfig,
    GuidanceConfig,
    OptimizerConfig,
    TrainConfig,
)
from pixart_jax.denoiser import NETWORK, abstract_model
from pixart_jax.models.configs import NULL_TEXT, DiTConfig, PixArtConfig
from pixart_jax.training.objectives import Stream, make_objective, sample_keys, stream_key
from pixart_jax.training.objectives.diffusion import draw
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import new_state
from pixart_jax.training.step import make_train_step

FILE = Path(__file__).parents[1] / "data" / "golden_steps.json"
BATCH = 8
SHAPE = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
TEXT = dict(text_dim=8, text_length=5)
# The learning rate is large enough that one update changes every sum. `eps` has the size of the clipped
# gradients, so that the update depends on it; with a small `eps`, Adam's first update is only their sign.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=0, eps=1e-2, weight_decay=0.03, clip_norm=0.5)
STAGES = {
    "stage1": TrainConfig(
        seed=1,
        model=DiTConfig(**SHAPE, num_classes=3),
        features=FeaturesConfig(latent_scale=0.5, text=False),
        diffusion=DiffusionConfig(condition_dropout=0.5),
    ),
    "stage2": TrainConfig(
        seed=2,
        model=PixArtConfig(**SHAPE, **TEXT),
        features=FeaturesConfig(latent_scale=0.5),
        diffusion=DiffusionConfig(condition_dropout=0.5, min_snr_gamma=1.0),
        guidance=GuidanceConfig(null_text="t5_empty", null_mask="caption"),
    ),
    "stage3": TrainConfig(
        seed=3,
        model=PixArtConfig(**SHAPE, **TEXT, size_conditions=True),
        features=FeaturesConfig(latent_scale=0.5),
        diffusion=DiffusionConfig(condition_dropout=0.5),
        guidance=GuidanceConfig(null_text="t5_empty", null_mask="own"),
        optimizer=OptimizerConfig(accumulation=2),
    ),
}
STAGES = {
    name: dataclasses.replace(
        config,
        data=DataConfig(batch_size=BATCH),
        optimizer=dataclasses.replace(OPTIMIZER, accumulation=config.optimizer.accumulation),
    )
    for name, config in STAGES.items()
}


def make_params(config):
    """Makes weights with NumPy. No array is zero, and each depends only on its path and shape."""
    _, state = abstract_model(config.model)

    def values(path, leaf):
        rng = np.random.default_rng(zlib.crc32("/".join(path).encode()))
        return (0.1 * rng.normal(size=leaf.shape)).astype(np.float32)

    flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    return traverse_util.unflatten_dict({path: values(path, leaf) for path, leaf in flat.items()})


def make_batch():
    rng = np.random.default_rng(0)
    batch = {
        "latent_mean": rng.normal(size=(BATCH, 4, 4, 4)),
        "latent_std": rng.uniform(0.1, 1, size=(BATCH, 4, 4, 4)),
        "text": rng.normal(size=(BATCH, 5, 8)),
        "image_size": rng.integers(20, 60, size=(BATCH, 2)),
        "aspect_ratio": rng.uniform(0.5, 2, size=(BATCH, 1)),
    }
    batch = {name: value.astype(np.float32) for name, value in batch.items()}
    batch["text_mask"] = np.arange(5) < rng.integers(1, 6, size=(BATCH, 1))
    batch["label"] = rng.integers(0, 3, BATCH).astype(np.int32)
    batch["index"] = np.arange(100, 100 + BATCH, dtype=np.uint32)
    return batch


def run_step(config):
    """Metrics and state after one update on one device."""
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, BATCH, objective)
    state = new_state({NETWORK: make_params(config)}, objective, optimizer)
    state, metrics = jax.jit(make_train_step(config, objective, optimizer))(state, make_batch())
    return jax.device_get(metrics), jax.device_get(state)


def summary(metrics, state):
    """Returns the metrics, and [sum, sum of squares] of every array, in float64."""

    def sums(tree):
        return {
            "/".join(path): [
                float(leaf.sum(dtype=np.float64)),
                float(np.square(leaf, dtype=np.float64).sum()),
            ]
            for path, leaf in sorted(traverse_util.flatten_dict(tree).items())
        }

    return {
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        "weights": sums(state.weights(None)[NETWORK]),
        "ema": sums(state.weights()[NETWORK]),
    }


@pytest.fixture(scope="module", params=STAGES)
def stage(request):
    config = STAGES[request.param]
    return request.param, config, *run_step(config)


def test_a_step_gives_the_stored_numbers(stage):
    name, config, metrics, state = stage
    expected, found = json.loads(FILE.read_text())[name], summary(metrics, state)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    sizes = {
        "/".join(path): leaf.size for path, leaf in traverse_util.flatten_dict(make_params(config)).items()
    }
    for tree in ("weights", "ema"):
        assert found[tree].keys() == expected[tree].keys()
        for path, (total, squares) in expected[tree].items():
            assert found[tree][path][1] == pytest.approx(squares, rel=1e-5), path
            # Positive and negative terms cancel, so the error of a sum is relative to its terms.
            scale = (sizes[path] * squares) ** 0.5
            assert found[tree][path][0] == pytest.approx(total, abs=1e-5 * scale), path


# --- The formulas of the papers, implemented independently


def published_loss(config, params, batch, draws):
    """Mean of L_simple (with min-SNR weights, if set) + L_vb in bits; L_vb has no gradient through the mean.

    arXiv 2006.11239, equations 4, 7, 14; arXiv 2102.09672, equations 15, 16; arXiv 2303.09556, section 3.4.
    """
    betas = np.linspace(1e-4, 0.02, 1000)
    alphas = np.cumprod(1 - betas)
    before = np.append(1.0, alphas[:-1])
    t = np.asarray(draws.timesteps)
    assert t.min() > 0  # L_0 has a different formula

    def at(table):
        return jnp.asarray(table[t].reshape(-1, 1, 1, 1), jnp.float32)

    x0, noise = draws.x0, draws.noise
    x_t = at(np.sqrt(alphas)) * x0 + at(np.sqrt(1 - alphas)) * noise
    model = nnx.merge(abstract_model(config.model)[0], params)
    output = model(x_t, draws.timesteps, *published_conditions(config, params, batch, draws.dropped))
    predicted, v = jnp.split(output, 2, axis=-1)

    gamma = config.diffusion.min_snr_gamma
    snr = alphas / (1 - alphas)
    weight = at(np.minimum(snr, gamma) / snr) if gamma else 1.0
    mse = jnp.mean(weight * (noise - predicted) ** 2)

    def posterior_mean(x0):
        return (at(np.sqrt(before) * betas) * x0 + at(np.sqrt(1 - betas) * (1 - before)) * x_t) / at(
            1 - alphas
        )

    true_log_variance = at(np.log(np.maximum(betas * (1 - before) / (1 - alphas), 1e-20)))
    log_variance = (v + 1) / 2 * at(np.log(betas)) + (1 - v) / 2 * true_log_variance
    detached = jax.lax.stop_gradient(predicted)
    guess = (x_t - at(np.sqrt(1 - alphas)) * detached) / at(np.sqrt(alphas))
    squared = (posterior_mean(x0) - posterior_mean(guess)) ** 2
    # KL(N(m1, v1) || N(m2, v2)) = (log v2 / v1 + (v1 + (m1 - m2)^2) / v2 - 1) / 2
    ratio = (jnp.exp(true_log_variance) + squared) / jnp.exp(log_variance)
    vb = jnp.mean(0.5 * (log_variance - true_log_variance + ratio - 1)) / np.log(2)
    return mse + vb, {"loss": mse + vb, "mse": mse, "vb": vb}


def published_conditions(config, params, batch, dropped):
    """The arguments of the network; dropped samples have the null class or the null caption."""
    dropped = np.asarray(dropped)
    if isinstance(config.model, DiTConfig):
        return (np.where(dropped, config.model.num_classes, batch["label"]),)
    text = jnp.where(dropped[:, None, None], params[NULL_TEXT], batch["text"])
    mask = batch["text_mask"]
    if config.guidance.null_mask == "own":  # "" is one token
        mask = np.where(dropped[:, None], np.arange(5) < 1, mask)
    sizes = (batch["image_size"], batch["aspect_ratio"]) if config.model.size_conditions else ()
    return text, mask, *sizes


def test_a_step_is_the_published_one(stage):
    """Compares loss, clipping, AdamW (arXiv 1711.05101, algorithm 2) and average for equal random numbers."""
    _, config, metrics, state = stage
    params, batch = make_params(config), make_batch()
    keys = sample_keys(stream_key(config.seed, Stream.SAMPLES), batch["index"])
    draws = draw(config, batch, keys)
    assert 0 < np.asarray(draws.dropped).sum() < BATCH  # both kinds of samples occur
    gradient, terms = jax.jit(
        jax.grad(lambda params: published_loss(config, params, batch, draws), has_aux=True)
    )(params)
    for name, value in terms.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name
    null = gradient.pop(NULL_TEXT, None)
    assert null is None or np.any(null)  # it has a gradient, but it is not trained
    norm = np.sqrt(sum(np.square(leaf, dtype=np.float64).sum() for leaf in jax.tree.leaves(gradient)))
    assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5) and norm > OPTIMIZER.clip_norm

    rate, eps, decay = OPTIMIZER.learning_rate, OPTIMIZER.eps, OPTIMIZER.weight_decay
    flat = traverse_util.flatten_dict(gradient)
    for tree, keeps in ((state.weights(None), 0.0), (state.weights(), 0.1)):  # d = (1 + 0) / (10 + 0)
        found = traverse_util.flatten_dict(tree[NETWORK])
        for path, before in traverse_util.flatten_dict(params).items():
            after = before
            if path in flat:
                g = np.asarray(flat[path], np.float64) * OPTIMIZER.clip_norm / norm
                # In the first update, the bias-corrected moments are g and g^2.
                after = before - rate * (g / (np.abs(g) + eps) + decay * before)
            expected = keeps * before + (1 - keeps) * after
            np.testing.assert_allclose(found[path], expected, rtol=1e-5, atol=1e-5, err_msg=str(path))


if __name__ == "__main__":
    FILE.write_text(
        json.dumps({name: summary(*run_step(config)) for name, config in STAGES.items()}, indent=1) + "\n"
    )
    print(f"wrote {FILE}")
