import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pixart_jax.config import (
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
)
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import UserError
from pixart_jax.models.blocks import Blocks
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.layers import PatchEmbed, SelfAttention, parameter
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import Checkpoints
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import (
    learning_rate_schedule,
    make_optimizer,
    update_averages,
    update_ema,
    update_power_average,
)
from pixart_jax.training.resuming import changes_on_resume
from pixart_jax.training.state import abstract_state, start_state
from pixart_jax.weights.power_averages import PowerAverage


def test_learning_rate_warms_up_and_scales_with_the_root_of_the_batch_size():
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, sqrt_scaling_batch=256)
    rate = learning_rate_schedule(config, batch_size=1024)
    np.testing.assert_allclose(
        [float(rate(step)) for step in (0, 5, 10, 999)], [0, 1e-3, 2e-3, 2e-3], rtol=1e-6
    )


def rates(steps=(0, 5, 10, 60, 110), total=110, **changes):
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, **changes)
    schedule = learning_rate_schedule(config, 1, total)
    return [float(schedule(step)) for step in steps]


def test_schedules_decay_after_the_warmup():
    """Peak 2, warm-up until step 10, end at step 110. Step 60 is the middle of linear and cosine."""
    assert rates() == [0, 1, 2, 2, 2]
    np.testing.assert_allclose(rates(schedule="linear", final_rate=0.1), [0, 1, 2, 1.1, 0.2], rtol=1e-6)
    cosine = rates((0, 5, 10, 35, 60, 110), schedule="cosine", final_rate=0.1)
    quarter = 2 * (0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2)
    np.testing.assert_allclose(cosine, [0, 1, 2, quarter, 1.1, 0.2], rtol=1e-6)
    wsd = rates((5, 10, 50, 82, 99, 110, 200), schedule="wsd", final_rate=0.5, decay_share=0.25, total=112)
    np.testing.assert_allclose(wsd, [1, 2, 2, 2, 2 - 15 / 28, 2 - 26 / 28, 1], rtol=1e-6)
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="linear")
    assert [float(learning_rate_schedule(config, 1, 4)(step)) for step in range(5)] == [2, 1.5, 1, 0.5, 0]
    with pytest.raises(ValueError, match="needs the number of steps"):
        learning_rate_schedule(config, 1)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_match_pytorch(schedule):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedulers = torch.optim.lr_scheduler
    decay = (
        schedulers.LinearLR(optimizer, 1.0, 0.25, total_iters=30)
        if schedule == "linear"
        else schedulers.CosineAnnealingLR(optimizer, 30, eta_min=0.5)
    )
    expected = []
    for _ in range(31):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        decay.step()
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule=schedule, final_rate=0.25)
    ours = learning_rate_schedule(config, 1, 30)
    np.testing.assert_allclose([float(ours(step)) for step in range(31)], expected, rtol=1e-5)


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


def test_power_averages_of_the_official_code():
    """The snapshots of EDM2's code, which the initial weights have no part in."""
    golden = np.load(Path(__file__).parents[2] / "data/posthoc_ema.npz")
    config = OptimizerConfig(power_ema="0.05,0.1")
    kinds = {average.name: average for average in map(PowerAverage, config.power_widths)}
    averages = {name: {"w": jnp.full(5, 123.0)} for name in kinds}
    update = jax.jit(lambda averages, w, k: update_averages(config, kinds, averages, {"w": w}, None, k))
    for k, theta in enumerate(golden["theta"]):
        averages = update(averages, theta, jnp.asarray(k))
        if k + 1 in (20, 40):
            name = "half" if k == 19 else "end"
            for width, found in zip(("005", "010"), averages.values()):
                np.testing.assert_allclose(found["w"], golden[f"snap_{name}_{width}"], rtol=1e-4)
    # b_t is what remains of the old average.
    kind = kinds["power_ema_0.05"]
    found = [
        update_power_average({"w": jnp.ones(())}, {"w": jnp.zeros(())}, kind, jnp.asarray(k))["w"]
        for k in range(40)
    ]
    np.testing.assert_allclose(found, golden["beta_005"], rtol=1e-4, atol=1e-7)


def test_a_power_average_late_in_a_long_run():
    """1 - b has all its digits after a million steps; b of two steps is the product of both."""
    kind = PowerAverage(0.1)
    one, zero = {"w": jnp.ones(())}, {"w": jnp.zeros(())}
    for every in (1, 2):
        share = update_power_average(zero, one, kind, jnp.asarray(10**6 - 1), every)["w"]
        exact = -np.expm1((kind.exponent + 1) * np.log1p(-every / 10**6))
        np.testing.assert_allclose(share, exact, rtol=1e-5)
    left = [float(update_power_average(one, zero, kind, jnp.asarray(k))["w"]) for k in (8, 9)]
    both = update_power_average(one, zero, kind, jnp.asarray(9), 2)["w"]
    np.testing.assert_allclose(both, left[0] * left[1], rtol=1e-5)


class Block(nnx.Module):
    def __init__(self, rngs):
        config = PixArtConfig(**SMALL)
        self.attn = SelfAttention(config, rngs=rngs)
        self.table = parameter(jnp.ones((6, 24)), (None, "embed"))


class Network(nnx.Module):
    """A network with a parameter of each kind."""

    def __init__(self, rngs):
        config = PixArtConfig(**SMALL)
        self.patch_embed = PatchEmbed(config, bias_init=nnx.initializers.zeros, rngs=rngs)
        self.blocks = Blocks(config, Block, rngs=rngs)


SMALL = dict(size="custom", depth=2, hidden_size=24, num_heads=2, patch_size=2)
OBJECTIVE = make_objective(TrainConfig())._replace(
    networks={NETWORK: Network}, is_trained=lambda path: True, averages={"ema": 0.9}
)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {NETWORK: nnx.to_pure_dict(OBJECTIVE.abstract_networks()[NETWORK])}
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)


def updated(config, mesh, folder=None):
    """The state after two updates with random gradients; between them it is saved to `folder` and read."""
    optimizer = make_optimizer(config, 1, OBJECTIVE, steps=10, seed=3)
    target, shardings = abstract_state(OBJECTIVE, optimizer, mesh)

    def step(state, gradient):
        updates, new = optimizer.update(gradient, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        ema = update_averages(config, OBJECTIVE.averages, state.ema, trained, new, state.step)
        return dataclasses.replace(state, step=state.step + 1, trained=trained, ema=ema, optimizer=new)

    state = start_state(random_tree(0), OBJECTIVE, optimizer, shardings)
    step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    for seed in (1, 2):
        state = step(state, jax.device_put(random_tree(seed), shardings.trained))
        if folder and seed == 1:
            with Checkpoints(folder, CheckpointConfig()) as checkpoints:
                checkpoints.save(state, {}, TrainConfig(optimizer=config))
                checkpoints.wait()
                state, _, _ = checkpoints.restore(1, target)
    assert jax.tree.all(jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, state, target))
    return jax.device_get(state)


CONFIGS = {
    "came": dict(name="came"),
    "prodigy": dict(name="prodigy", learning_rate=1.0),
    "schedule_free": dict(name="schedule_free"),
    "lion-int8": dict(name="lion", moments="int8", schedule="wsd"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_optimizers_give_the_same_on_a_mesh_and_after_resuming(name, tmp_path):
    """The state has the shardings of its target, and is donated."""
    common = dict(learning_rate=1e-2, warmup_steps=1, eps=1e-8, clip_norm=1.0)
    config = OptimizerConfig(**common | CONFIGS[name])
    alone = updated(config, sharding.make_mesh(MeshConfig(1, 1, 1), devices=jax.devices()[:1]))
    mesh = sharding.make_mesh(MeshConfig(2, 2, 2))
    on_mesh = updated(config, mesh)
    resumed = updated(config, mesh, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, resumed, on_mesh)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), alone.trained, on_mesh.trained
    )
    changes = jax.tree.map(lambda a, b: np.any(a != b), alone.trained, jax.device_get(random_tree(0)))
    assert all(jax.tree.leaves(changes))
    if name == "schedule_free":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), alone.ema, on_mesh.ema)
        state = alone.optimizer[1]
        x = jax.tree.map(lambda y, z: (y - 0.1 * z) / 0.9, alone.trained, state.z)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone.ema["ema"], x)


def test_lion_is_the_sign_of_an_interpolation():
    config = OptimizerConfig(
        name="lion", learning_rate=0.1, warmup_steps=0, beta1=0.9, beta2=0.99, weight_decay=0.5, clip_norm=0.0
    )
    rng = np.random.default_rng(0)
    params = expected = rng.normal(size=6).astype(np.float32)
    optimizer = make_optimizer(config, 1)
    state, moment = optimizer.init(params), np.zeros(6)
    for gradient in rng.normal(size=(4, 6)).astype(np.float32):
        expected = expected - 0.1 * (np.sign(0.9 * moment + 0.1 * gradient) + 0.5 * expected)
        moment = 0.99 * moment + 0.01 * gradient
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, expected, rtol=1e-5)


def test_schedule_free_averages_the_iterates_of_adamw():
    """Compares x, y and z with the equations of the paper (arXiv 2405.15682, section 2 and appendix)."""
    config = OptimizerConfig(
        name="schedule_free", learning_rate=0.1, warmup_steps=0, beta1=0.8, beta2=0.99, eps=1e-8,
        weight_decay=0.2, clip_norm=0.0,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    start = rng.normal(size=5)
    optimizer = make_optimizer(config, 1)
    params = {"w": jnp.asarray(start, jnp.float32)}
    state, ema = optimizer.init(params), {"ema": params}
    x, y, z, second = start, start, start, np.zeros(5)
    for k, gradient in enumerate(rng.normal(size=(4, 5))):
        second = 0.99 * second + 0.01 * gradient**2
        z = z - 0.1 * (gradient / (np.sqrt(second / (1 - 0.99 ** (k + 1))) + 1e-8) + 0.2 * y)
        x = (1 - 1 / (k + 1)) * x + z / (k + 1)
        y = 0.2 * z + 0.8 * x
        updates, state = optimizer.update({"w": jnp.asarray(gradient, jnp.float32)}, state, params)
        params = optax.apply_updates(params, updates)
        ema = update_averages(config, {"ema": 0.9}, ema, params, state, jnp.asarray(k))
    np.testing.assert_allclose(params["w"], y, rtol=1e-4)
    np.testing.assert_allclose(ema["ema"]["w"], x, rtol=1e-4)


def test_prodigy_finds_its_learning_rate():
    """It starts from an estimate of 1e-6 and reaches a distance of 1 to the minimum within 200 updates."""
    config = OptimizerConfig(
        name="prodigy", learning_rate=1.0, warmup_steps=0, weight_decay=0.0, eps=1e-8, clip_norm=0.0
    )
    optimizer = make_optimizer(config, 1)
    target = jnp.asarray(np.random.default_rng(0).normal(size=20), jnp.float32)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params - target, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = jnp.zeros(20)
    (params, state), _ = jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), length=200))(start)
    assert 0.02 < state.estim_lr < 2
    assert jnp.abs(params - target).max() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(name="came", moments="int8"), "is 'int8', which 'came' does not support: set it to 'float32'"),
        (dict(name="muon", moments="bfloat16"), "'muon' does not support.*'adamw' or 'lion'"),
        (dict(name="schedule_free", schedule="cosine"), "schedule 'cosine' and .* it needs 'constant'"),
        (dict(name="schedule_free", beta1=0.0), "beta1 0.0: it needs"),
    ],
)
def test_what_does_not_fit_together(changes, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**changes)


@pytest.mark.parametrize(
    ("steps", "changes", "fits"),
    [
        (1000, dict(schedule="cosine"), False),  # the default warm-up is as long
        (1000, dict(schedule="wsd", warmup_steps=900), False),
        (1000, dict(schedule="wsd", warmup_steps=800), True),
        (1000, dict(schedule="linear", warmup_steps=999), True),
        (1000, dict(), True),
    ],
)
def test_a_schedule_must_fit_into_the_run(steps, changes, fits):
    optimizer = OptimizerConfig(**changes)
    if fits:
        TrainConfig(steps=steps, optimizer=optimizer)
    else:
        with pytest.raises(
            UserError, match=r"leaves no steps to decay: .* Lower them, or raise config\.steps"
        ):
            TrainConfig(steps=steps, optimizer=optimizer)


def test_resuming_with_other_steps_says_that_the_schedule_changes():
    optimizer = OptimizerConfig(schedule="cosine", warmup_steps=1)
    saved, now = (TrainConfig(steps=steps, optimizer=optimizer) for steps in (100, 200))
    reported, rejected = changes_on_resume(now, saved, 50)
    assert not rejected
    assert reported == [
        "steps was 100, now 200 (the schedule 'cosine' of the learning rate is stretched to it)"
    ]
