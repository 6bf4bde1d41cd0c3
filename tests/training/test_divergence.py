import json

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from pixart_jax.config import DivergenceConfig
from pixart_jax.errors import EXIT_DIVERGED, RunStopped
from pixart_jax.training.divergence import DivergenceGuard, StepRecord, refuse


def decide(step, loss, norm=1.0, average=1.0, **config):
    out = refuse(
        DivergenceConfig(**config), *(jnp.asarray(x, dt) for x, dt in ((step, "int32"), (loss, "float32"))),
        jnp.float32(norm), jnp.float32(average),
    )  # fmt: skip
    return bool(out[0]), float(out[1])


@pytest.mark.parametrize(
    ("step", "loss", "norm", "factor", "refused"),
    [
        (500, 2.9, 1.0, 3.0, False),
        (500, 3.1, 1.0, 3.0, True),
        (99, 3.1, 1.0, 3.0, False),  # during the warm-up
        (500, 1e9, 1.0, 0.0, False),  # spikes are not detected
        (0, np.nan, 1.0, 0.0, True),
        (0, np.inf, 1.0, 0.0, True),
        (0, 1.0, np.nan, 0.0, True),
    ],
)
def test_updates_with_nan_or_spikes_are_skipped(step, loss, norm, factor, refused):
    found, average = decide(step, loss, norm, spike_factor=factor)
    assert found == refused
    # The loss of a skipped update does not change the average.
    decay = min(0.99, (1 + step) / (10 + step))
    assert average == pytest.approx(1.0 if refused else 1.0 + (1 - decay) * (loss - 1.0), rel=1e-5)


def record(step, refused):
    metrics = {"loss": np.float32(np.nan if refused else step), "gradient_norm": np.float32(1)}
    return StepRecord(step, [f"image{step}"], metrics | {"refused": refused, "loss_average": np.float32(1)})


def guard(tmp_path, gathered=lambda name, value: [value, '["of the other process"]'], **config):
    return DivergenceGuard(DivergenceConfig(**config), epath.Path(tmp_path), gathered)


def test_a_skipped_update_stops_the_run_and_its_keys_are_logged(tmp_path):
    with pytest.raises(RunStopped, match="at step 8: the update was not applied") as stopped:
        guard(tmp_path).means([record(7, False), record(8, True), record(9, False)])
    assert stopped.value.status == EXIT_DIVERGED and stopped.value.everywhere
    (line,) = (tmp_path / "refused_updates.jsonl").read_text().splitlines()
    assert json.loads(line)["keys"] == ["image8", "of the other process"]


def test_means_leave_out_skipped_updates(tmp_path):
    means = guard(tmp_path, action="skip").means([record(7, False), record(8, True), record(9, False)])
    assert means["loss"] == 8.0 and means["refused"] == 1.0


def test_a_term_that_some_steps_lack_is_averaged_over_the_others(tmp_path):
    """The objective of a run may change between two lines of metrics."""
    steps = [record(step, False) for step in (1, 2, 3)]
    for step in steps[:2]:
        step.metrics["alignment"] = np.float32(-step.step)
    for order in (steps, steps[::-1]):
        means = guard(tmp_path).means(order)
        assert (means["alignment"], means["loss"]) == (-1.5, 2.0)


def test_patience_counts_skipped_updates_in_a_row(tmp_path):
    patient = guard(tmp_path, action="skip", patience=3)
    patient.means([record(1, True), record(2, True), record(3, False), record(4, True)])
    patient.means([record(5, True)])
    with pytest.raises(RunStopped, match="3 updates in a row were skipped"):
        patient.means([record(6, True)])
    assert len((tmp_path / "refused_updates.jsonl").read_text().splitlines()) == 5


def test_a_resumed_run_goes_on_counting_skipped_updates_in_a_row(tmp_path):
    """Otherwise a run that is interrupted often would never end."""
    guard(tmp_path, action="skip", patience=9).means([record(n, n != 2) for n in range(1, 6)])

    def resumed(step):
        config = DivergenceConfig(action="skip", patience=3)
        return DivergenceGuard(config, epath.Path(tmp_path), lambda _, value: [value], first_step=step)

    with pytest.raises(RunStopped, match="3 updates in a row were skipped"):
        resumed(4).means([record(5, True)])
    resumed(3).means([record(4, True)])
    # The lines of later steps do not count, nor do those before an update that was not skipped.
    resumed(2).means([record(3, True), record(4, True)])
