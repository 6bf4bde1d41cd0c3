"""The solver settings of a diffusers pipeline folder. `weights.configs` reads its noise schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pixart_jax.errors import short
from pixart_jax.weights.configs import SCHEDULER, read_scheduler

# Settings of a DPM-Solver++ scheduler in a pipeline folder that `dpm_solver` can follow.
_SOLVER_VALUES = {
    "algorithm_type": ("dpmsolver++",),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "euler_at_final": (False,),
    "solver_order": (2, 1, 3),
    "solver_type": ("midpoint",),
    "thresholding": (False,),
    "timestep_spacing": ("linspace",),
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "use_karras_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
}


def read_solver(folder: Path) -> dict[str, Any] | str:
    """The arguments of `dpm_solver` for a pipeline folder, or an error message if it lacks their settings."""
    if not (folder / SCHEDULER).is_file():
        return {}
    values = read_scheduler(folder)
    kind = values.get("_class_name", "DPMSolverMultistepScheduler")
    if kind != "DPMSolverMultistepScheduler":
        wrong = [f"_class_name {short(kind)}"]
    else:
        wrong = [
            f"{name} {short(values[name], quote=True)}"
            for name, known in _SOLVER_VALUES.items()
            if values.get(name, known[0]) not in known
        ]
    if wrong:
        return (
            f"the scheduler of '{folder}' has {', '.join(wrong)}, which dpm_solver does not support: give "
            f"sampler_options ({{}} for the defaults of dpm_solver) or another sampler."
        )
    return {"order": values.get("solver_order", 2), "spacing": "linspace"}
