import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pixart_jax.config import AdapterConfig, InitConfig, OptimizerConfig, TrainConfig
from pixart_jax.denoiser import NETWORK, Denoiser, abstract_model, init_params
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training.initialization import _starting_weights as starting_weights
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import split
from pixart_jax.weights.backbones import export_backbone
from pixart_jax.weights.checkpoints import read_weights, write_weights

BASE = 24


def stage(width, base=BASE, **changes):
    model = PixArtConfig(
        size="custom", depth=1, hidden_size=width, num_heads=width // 12, text_dim=8, text_length=5,
        base_size=4, size_conditions=True, mup_base_width=base,
    )  # fmt: skip
    return TrainConfig(model=model, **changes)


def expected(path, m):
    """(deviation, factor of the learning rate) of an array."""
    name, last = ".".join(path), path[-1]
    xavier = lambda inputs, outputs: math.sqrt(2 / (inputs + outputs))  # noqa: E731 - of the base width
    d = BASE
    matrices = {
        "attn.qkv": xavier(d, 3 * d), "attn.proj": xavier(d, d), "cross_attn.q": xavier(d, d),
        "cross_attn.kv": xavier(d, 2 * d), "cross_attn.proj": 0.0, "mlp.fc1": xavier(d, 4 * d),
        "mlp.fc2": xavier(d, 4 * d), "t_block": 0.02, "t_embedder.fc2": 0.02, "text_proj.fc2": 0.02,
        "size_embedder.fc2": 0.02, "ratio_embedder.fc2": 0.02,
    }  # fmt: skip
    inputs = dict.fromkeys(
        ("t_embedder.fc1", "text_proj.fc1", "size_embedder.fc1", "ratio_embedder.fc1"), 0.02
    ) | {"patch_embed.proj": xavier(16, 4 * d)}
    if last == "bias":
        return 0.0, 1.0
    if last == "scale_shift_table":
        return 0.02, 1.0
    module = name.removesuffix(".kernel").removeprefix("blocks.stacked.")
    if module == "final_layer.linear":
        return 0.0, 1.0
    return (inputs[module], 1.0) if module in inputs else (matrices[module] / math.sqrt(m), 1 / m)


@pytest.mark.parametrize("width", [24, 96])
def test_every_parameter_is_as_the_table_says(width):
    """Initial values, learning rates (the first update of Adam is the rate) and weight decay."""
    config = stage(width)
    objective, m = make_objective(config), width / BASE
    settings = dict(learning_rate=0.1, warmup_steps=0, clip_norm=0.0, eps=1e-12)

    @jax.jit
    def compute():
        params, _ = split({NETWORK: init_params(config.model, 0)}, objective.is_trained)
        out = [params]
        for decay, gradient in ((0.0, jnp.ones_like), (0.5, jnp.zeros_like)):
            optimizer = make_optimizer(OptimizerConfig(**settings, weight_decay=decay), 1, objective)
            out.append(optimizer.update(jax.tree.map(gradient, params), optimizer.init(params), params)[0])
        return [nnx.traversals.flatten_mapping(tree[NETWORK]) for tree in out]

    params, updates, decays = compute()
    for path, value in params.items():
        deviation, rate = expected(path, m)
        spread = 4 * deviation / math.sqrt(2 * value.size)
        np.testing.assert_allclose(float(jnp.sqrt(jnp.mean(value**2))), deviation, atol=spread, err_msg=path)
        np.testing.assert_allclose(updates[path], np.full(value.shape, -0.1 * rate), rtol=1e-5, err_msg=path)
        np.testing.assert_allclose(decays[path], -0.1 * 0.5 * value, rtol=1e-5, err_msg=path)


def arrays(config, seed=0):
    rng = np.random.default_rng(seed)
    batch = {name: rng.normal(size=(4, *shape)) for name, (shape, _) in config.model.conditions.items()}
    batch["text_mask"] = np.ones((4, 5), bool)
    batch = {
        name: jnp.asarray(value, bool if name == "text_mask" else "float32") for name, value in batch.items()
    }
    return jnp.asarray(rng.normal(size=(4, 8, 8, 4)), "float32"), jnp.array([1.0, 200, 500, 900]), batch


def size_of_outputs(width, base):
    """Root mean square of the outputs after a few updates towards random noise."""
    config = stage(width, base)
    denoiser, objective = Denoiser.of(config), make_objective(config)
    params = jax.jit(lambda: init_params(config.model, 1))()
    params, frozen = split({NETWORK: params}, objective.is_trained)
    optimizer = make_optimizer(
        OptimizerConfig(learning_rate=1e-2, warmup_steps=0, clip_norm=0.0, weight_decay=0.0), 4, objective
    )
    x, t, conditions = arrays(config)
    null = frozen[NETWORK]["null_text"]

    def output(params):
        return denoiser({**params[NETWORK], "null_text": null}, x, t, conditions)[..., :4]

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda params: jnp.mean(jnp.square(output(params) - x)))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=3)
        return jnp.sqrt(jnp.mean(jnp.square(output(params))))

    return float(train(params))


def test_activations_do_not_grow_with_the_width():
    """The coordinate check of Yang et al.: without muP, the ratio is 3.6."""
    assert 0.7 < size_of_outputs(96, BASE) / size_of_outputs(24, BASE) < 1.4


def test_weights_are_plain_outside_of_training(tmp_path):
    """Read and exported weights compute without muP what the run computes with it; another run restores m."""
    config = stage(96)
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf + 0.1, init_params(config.model, 0)))()
    write_weights(tmp_path / "run", params, config)
    read, plain = read_weights(tmp_path / "run")
    assert plain == dataclasses.replace(config, model=dataclasses.replace(config.model, mup_base_width=0))
    kernel = params["final_layer"]["linear"]["kernel"]
    np.testing.assert_array_equal(read["final_layer"]["linear"]["kernel"], kernel / 4)
    read["final_layer"]["linear"]["kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, read, params)  # nothing else has changed

    read, _ = read_weights(tmp_path / "run")
    inputs = arrays(config)
    np.testing.assert_allclose(
        Denoiser.of(plain)(read, *inputs), Denoiser.of(config)(params, *inputs), rtol=1e-5, atol=1e-5
    )
    exported = dict(export_backbone("diffusers", read, plain.model)[1])
    np.testing.assert_allclose(exported["proj_out.weight"], np.transpose(kernel)[:] / 4, rtol=1e-6)

    for base, m in ((24, 4), (48, 2), (0, 1)):
        init = InitConfig("resize", str(tmp_path / "run"))
        now = stage(96, base, init=init, features=config.features)
        fresh = jax.tree.map(jnp.zeros_like, params)
        started = starting_weights(now, fresh, lambda text: None, lambda text: None)
        np.testing.assert_allclose(started["final_layer"]["linear"]["kernel"], kernel / 4 * m, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stage(96, 36), "mup_base_width is 36: it must be a multiple of the head width 12"),
        (lambda: stage(96, 20), "mup_base_width is 20: it must be a multiple"),
        (
            lambda: stage(96, optimizer=OptimizerConfig(name="muon")),
            "mup_base_width is 24 and optimizer.name",
        ),
        (
            lambda: stage(96, adapter=AdapterConfig("lora"), init=InitConfig("weights", "x")),
            "mup_base_width is 24 and adapter.kind 'lora': muP is for",
        ),
    ],
)
def test_what_does_not_fit_together(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_a_dit_may_have_mup():
    config = DiTConfig(size="custom", depth=1, hidden_size=48, num_heads=4, num_classes=3, mup_base_width=24)
    rates = {
        path: v.get_metadata().get("rate", 1) for path, v in nnx.to_flat_state(abstract_model(config)[1])
    }
    assert rates["blocks", "stacked", "modulation", "kernel"] == rates["t_embedder", "fc2", "kernel"] == 0.5
    assert rates["label_table",] == rates["final_layer", "linear", "kernel"] == 1
    out = config.make(rngs=nnx.Rngs(0))(jnp.ones((1, 4, 4, 4)), jnp.ones(1), jnp.zeros(1, int))
    assert out.shape == (1, 4, 4, 8)
