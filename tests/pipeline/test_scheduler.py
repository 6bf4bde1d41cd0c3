import json

import pytest

from pixart_jax.pipeline.scheduler import read_solver

# As in the released pipelines.
RELEASED = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_schedule": "linear",
    "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000, "solver_order": 2,
    "prediction_type": "epsilon", "timestep_spacing": "linspace", "use_karras_sigmas": False,
}  # fmt: skip


def read(folder, **changes):
    file = folder / "scheduler" / "scheduler_config.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({**RELEASED, **changes}))
    return read_solver(folder)


def test_the_released_scheduler_is_the_default_solver(tmp_path):
    assert read_solver(tmp_path) == {}  # the folder has no scheduler
    assert read(tmp_path) == {"order": 2, "spacing": "linspace"}
    assert read(tmp_path, solver_order=3)["order"] == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(_class_name="EulerDiscreteScheduler"), "_class_name EulerDiscreteScheduler"),
        (dict(use_karras_sigmas=True), "use_karras_sigmas True"),
        (dict(solver_order="2"), "solver_order '2'"),
        (dict(_class_name=["x" * 900]), "_class_name ['x"),
        (
            dict(timestep_spacing="trailing", thresholding=True),
            "thresholding True, timestep_spacing 'trailing'",
        ),
    ],
)
def test_settings_that_dpm_solver_lacks_are_named(tmp_path, changes, words):
    """The folder can still be opened, because other samplers do not need these settings."""
    reason = read(tmp_path, **changes)
    assert words in reason and "sampler_options" in reason
