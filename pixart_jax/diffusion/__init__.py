"""Diffusion: noise schedule, training loss, guidance and samplers. Knows nothing of models."""

from pixart_jax.diffusion.guidance import guide
from pixart_jax.diffusion.multistep import Inpaint, draw_noise, initial_noise
from pixart_jax.diffusion.objective import diffusion_loss, p_mean_variance
from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.diffusion.schedule import NoiseSchedule, add_noise, linear_schedule, respace

__all__ = [
    "SAMPLERS",
    "Inpaint",
    "NoiseSchedule",
    "add_noise",
    "diffusion_loss",
    "draw_noise",
    "guide",
    "initial_noise",
    "linear_schedule",
    "p_mean_variance",
    "respace",
]
