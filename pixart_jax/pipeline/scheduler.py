"""The noise schedule and the solver settings of a diffusers pipeline folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixart_jax.config import DiffusionConfig, TrainConfig
from pixart_jax.weights.configs import read_noise_schedule
from pixart_jax.weights.files import read_json

# Settings of a DPM-Solver++ scheduler in a pipeline folder that `dpm_solver` can follow.
_SOLVER_VALUES = {
    "algorithm_type": ("dpmsolver++",),
    "beta_schedule": ("linear",),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "prediction_type": ("epsilon",),
    "rescale_betas_zero_snr": (False,),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_spacing": ("linspace",),
    "trained_betas": (None,),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
}


def read_scheduler(folder: Path, config: TrainConfig) -> tuple[DiffusionConfig, dict[str, Any] | str]:
    """Reads the scheduler settings of a pipeline folder.

    Returns:
      The noise schedule; and the arguments of `dpm_solver`, or an error message if it cannot follow the
      settings.
    """
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return config.diffusion, {}
    values = read_json(file)
    kind = values.get("_class_name", "DPMSolverMultistepScheduler")
    diffusion = read_noise_schedule(folder, config.diffusion)
    if kind != "DPMSolverMultistepScheduler":
        wrong = [f"_class_name {kind}"]
    else:
        wrong = [
            f"{name} {values[name]!r}"
            for name, known in _SOLVER_VALUES.items()
            if values.get(name, known[0]) not in known
        ]
    if wrong:
        return diffusion, (
            f"the scheduler of '{folder}' has {', '.join(wrong)}, which dpm_solver does not support: give "
            f"sampler_options ({{}} for the defaults of dpm_solver) or another sampler."
        )
    return diffusion, {"order": values.get("solver_order", 2), "spacing": "linspace"}
