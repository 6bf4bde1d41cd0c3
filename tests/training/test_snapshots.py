import dataclasses

import jax
import numpy as np
import pytest
from stage_batches import CONFIG, MODEL

from pixart_jax.config import CheckpointConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import EXIT_STORAGE, OutputError, RunStopped
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.snapshots import Snapshots
from pixart_jax.training.state import new_state
from pixart_jax.weights.checkpoints import read_metadata, saved_arrays

STAGE = dataclasses.replace(
    CONFIG,
    steps=50,
    optimizer=dataclasses.replace(CONFIG.optimizer, power_ema="0.05,0.1"),
    checkpoint=CheckpointConfig(every=10, snapshot_every=20),
)


def test_when_snapshots_are_due(tmp_path):
    snapshots = Snapshots(tmp_path, STAGE, 0)
    assert [step for step in range(1, 51) if snapshots.due(step)] == [20, 40, 50]
    rarely = dataclasses.replace(STAGE, optimizer=dataclasses.replace(STAGE.optimizer, ema_every=20))
    assert not Snapshots(tmp_path, rarely, 0).due(50)  # its averages are those of step 40
    assert not any(map(Snapshots(tmp_path, CONFIG, 0).due, range(1, CONFIG.steps + 1)))


def test_snapshots_are_written_again_and_later_ones_removed(random_params, tmp_path):
    objective = make_objective(STAGE)
    assert objective.averages == {"ema": 0.9999, "power_ema_0.05": (0.05,), "power_ema_0.1": (0.1,)}
    state = new_state({NETWORK: random_params(MODEL)[1]}, objective, make_optimizer(STAGE.optimizer, 8))
    snapshots = Snapshots(tmp_path, STAGE, 0)
    for step in (20, 40, 40):
        snapshots.save(state, step)
    folder = tmp_path / "ema/40"
    assert {path.name for path in folder.iterdir()} >= {"power_ema_0.05", "power_ema_0.1", "metadata"}
    metadata = read_metadata(snapshots._root / "40")
    assert metadata["step"] == 40 and metadata["config"]["optimizer"]["power_ema"] == "0.05,0.1"
    paths = {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(state.trained)}
    saved = saved_arrays(snapshots._root / "40", "power_ema_0.1")
    assert saved.keys() == paths and {leaf.dtype for leaf in saved.values()} == {np.dtype("float32")}
    # A run that continues from step 30 writes the one of step 40 again; other processes remove nothing.
    (tmp_path / "ema/60.orbax-checkpoint-tmp-1/power_ema_0.1").mkdir(parents=True)  # of a killed run
    Snapshots(tmp_path, STAGE, 30, active=False)
    assert folder.exists()
    Snapshots(tmp_path, STAGE, 30)
    assert [path.name for path in (tmp_path / "ema").iterdir()] == ["20"]
    (tmp_path / "ema").rename(tmp_path / "other")
    (tmp_path / "ema").write_text("not a folder")
    with pytest.raises(OutputError, match="ema"):
        Snapshots(tmp_path, STAGE, 30)
    with pytest.raises(
        RunStopped, match=r"snapshot .*ema/40 could not be written \(.*free disk space"
    ) as raised:
        snapshots.save(state, 40)
    assert raised.value.status == EXIT_STORAGE
