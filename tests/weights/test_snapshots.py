import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_batches import CONFIG, MODEL

from pixart_jax.config import CheckpointConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import UserError
from pixart_jax.training.checkpoints import Checkpoints
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.snapshots import Snapshots
from pixart_jax.training.state import new_state
from pixart_jax.weights.power_averages import Profile, fit_profile
from pixart_jax.weights.snapshots import reconstruct, stored_profiles

STAGE = dataclasses.replace(
    CONFIG,
    optimizer=dataclasses.replace(CONFIG.optimizer, power_ema="0.05,0.1"),
    checkpoint=CheckpointConfig(snapshot_every=10),
)


@pytest.fixture(scope="module")
def run(random_params, tmp_path_factory):
    """A run directory with snapshots of steps 10, 20 and 30, whose averages are multiples of one tree."""
    workdir = tmp_path_factory.mktemp("run")
    params = random_params(MODEL)[1]
    state = new_state({NETWORK: params}, make_objective(STAGE), make_optimizer(STAGE.optimizer, 8))
    snapshots = Snapshots(workdir, STAGE, 0)
    for step in (10, 20, 30):
        scaled = {
            name: jax.tree.map(lambda leaf, factor=step + k: factor * leaf, tree)
            for k, (name, tree) in enumerate(state.ema.items())
        }
        state = dataclasses.replace(state, step=jnp.int32(step), ema=scaled | {"ema": state.ema["ema"]})
        snapshots.save(state, step)
        state = dataclasses.replace(state, ema=dict.fromkeys(state.ema, state.trained))
    with Checkpoints(workdir, STAGE.checkpoint) as checkpoints:
        checkpoints.save(state, {"fingerprint": "f"}, STAGE)
    return workdir, params


def check(found, params, factor):
    for name, leaf in params.items():
        if name == "null_text":  # is frozen
            np.testing.assert_array_equal(found[name], leaf)
        else:
            close = lambda a, b: np.testing.assert_allclose(a, factor * b, rtol=1e-5)  # noqa: E731
            jax.tree.map(close, found[name], leaf)


def test_the_sum_of_the_stored_averages(run):
    """The averages of step t are t + 1 and t + 2 times the parameters."""
    workdir, params = run
    stored = [Profile(step, width) for step in (10, 20, 30) for width in (0.05, 0.1)]
    assert stored_profiles(workdir) == stored and stored_profiles(workdir, 20) == stored[:4]
    factors = np.array([step + k for step in (10, 20, 30) for k in (1, 2)])
    for step, count in ((None, 6), (20, 4)):
        found, config, fit = reconstruct(workdir, 0.075, step)
        np.testing.assert_array_equal(
            fit.weights, fit_profile(stored[:count], Profile(step or 30, 0.075)).weights
        )
        check(found, params, fit.weights @ factors[:count])
        assert config.optimizer.power_ema == "0.05,0.1"
    check(reconstruct(workdir, 0.05, 20)[0], params, 21)


def test_what_cannot_be_reconstructed_is_an_error_in_one_line(run, tmp_path):
    workdir, _ = run
    with pytest.raises(UserError, match=r"holds no snapshots of power-function averages: give a run"):
        reconstruct(tmp_path, 0.05)
    with pytest.raises(UserError, match=r"--step is 15: .* holds snapshots of the steps 10, 20, 30\."):
        reconstruct(workdir, 0.05, 15)
    with pytest.raises(
        UserError, match=r"width 0\.25 cannot .* \(steps: 3, widths: 0\.05, 0\.1\) has an error of 52%"
    ):
        reconstruct(workdir, 0.25)
    shutil.copytree(workdir / "ema/10", tmp_path / "ema/11")
    with pytest.raises(UserError, match=r"ema/11 is of step 10: its folder was renamed"):
        reconstruct(tmp_path, 0.05)


def test_a_damaged_snapshot_is_named(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "run")
    data = max((tmp_path / "run/ema/20").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(UserError, match=r"ema/20/.* exists but cannot be read"):
        reconstruct(tmp_path / "run", 0.075)
