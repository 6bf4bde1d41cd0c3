"""PixArt-α and PixArt-Σ in JAX: training, sampling, evaluation, conversion of weights from and to PyTorch.

    import pixart_jax

    model = pixart_jax.load_model("PixArt-XL-2-512x512.pth")
    out = model(latents, timesteps, text, text_mask)

    pipe = pixart_jax.load_pipeline("PixArt-XL-2-512x512")
    images = pipe(["a corgi reading"], seed=0, steps=20, guidance_scale=4.5, height=512, width=512)

The names below are the public API, which docs/python.md describes. The commands are described by
`python -m pixart_jax.NAME --help`. The functions that they call are in the modules of the same names, such as
`pixart_jax.train.train`.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
from typing import TYPE_CHECKING, Any


def _end_interrupted(*_: object) -> None:
    os.write(2, b"interrupted: the same command continues\n")
    os._exit(130)


def end_on_interrupt() -> None:
    """Until a command has imported its first modules, Ctrl-C ends it at once.

    An exception would be printed with a traceback, and an import could swallow it. The line and the status
    are those of `errors.run_command`, which replaces the handler.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_interrupted)


# The console scripts call it too (`cli.py`).
if any(
    flag == "-m" and name.partition(".")[0] == "pixart_jax"
    for flag, name in zip(sys.orig_argv, sys.orig_argv[1:])
):
    end_on_interrupt()

if TYPE_CHECKING:  # for editors and type checkers; the same names as in _HOMES and _MODULES
    from pixart_jax import convert as convert
    from pixart_jax import precompute as precompute
    from pixart_jax import train as train
    from pixart_jax.config import FeaturesConfig as FeaturesConfig
    from pixart_jax.config import GuidanceConfig as GuidanceConfig
    from pixart_jax.config import TextEncoderConfig as TextEncoderConfig
    from pixart_jax.config import TrainConfig as TrainConfig
    from pixart_jax.denoiser import Denoiser as Denoiser
    from pixart_jax.diffusion.guidance import guide as guide
    from pixart_jax.diffusion.multistep import initial_noise as initial_noise
    from pixart_jax.diffusion.sa_solver import sa_solver as sa_solver
    from pixart_jax.diffusion.samplers import SAMPLERS as SAMPLERS
    from pixart_jax.diffusion.samplers import ddim as ddim
    from pixart_jax.diffusion.samplers import dpm_solver as dpm_solver
    from pixart_jax.diffusion.samplers import iddpm as iddpm
    from pixart_jax.diffusion.samplers import lcm as lcm
    from pixart_jax.diffusion.schedule import linear_schedule as linear_schedule
    from pixart_jax.encoders.images import VAECodec as VAECodec
    from pixart_jax.encoders.images import make_codec as make_codec
    from pixart_jax.encoders.text import TextEncoder as TextEncoder
    from pixart_jax.errors import UserError as UserError
    from pixart_jax.evaluation.clip import Clip as Clip
    from pixart_jax.evaluation.clip import clip_score as clip_score
    from pixart_jax.evaluation.fid import Inception as Inception
    from pixart_jax.evaluation.fid import frechet_distance as frechet_distance
    from pixart_jax.evaluation.fid import image_statistics as image_statistics
    from pixart_jax.evaluation.protocol import Protocol as Protocol
    from pixart_jax.models.configs import DiTConfig as DiTConfig
    from pixart_jax.models.configs import PixArtConfig as PixArtConfig
    from pixart_jax.models.dit import DiT as DiT
    from pixart_jax.models.pixart import PixArt as PixArt
    from pixart_jax.models.t5 import T5Config as T5Config
    from pixart_jax.models.t5 import T5Encoder as T5Encoder
    from pixart_jax.models.vae import VAE as VAE
    from pixart_jax.models.vae import VAEConfig as VAEConfig
    from pixart_jax.pipeline import Pipeline as Pipeline
    from pixart_jax.pipeline import load_pipeline as load_pipeline
    from pixart_jax.sampling import image_keys as image_keys
    from pixart_jax.training.objectives import Objective as Objective
    from pixart_jax.weights.checkpoints import read_weights as read_weights
    from pixart_jax.weights.checkpoints import write_weights as write_weights
    from pixart_jax.weights.loading import load_model as load_model

__version__ = "0.2.0.dev0"

# Simulated CPU devices share one pool of threads, and a device that waits in a collective blocks a thread.
# XLA may run independent collectives of a program in any order. With one thread per device, some devices can
# wait in one collective while the others wait in another, which is a deadlock, so we ask for more threads.
# The backend reads this variable when it starts.
_simulated = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
if _simulated and int(_simulated[1]) > 1:
    os.environ.setdefault("PJRT_NPROC", str(16 * int(_simulated[1])))

# The module that defines each public name. It is imported on first use, so that models also work on machines
# without the packages for files and tokenizers.
_HOMES = {
    "config": ("FeaturesConfig", "GuidanceConfig", "TextEncoderConfig", "TrainConfig"),
    "denoiser": ("Denoiser",),
    "diffusion.guidance": ("guide",),
    "diffusion.multistep": ("initial_noise",),
    "diffusion.sa_solver": ("sa_solver",),
    "diffusion.samplers": ("SAMPLERS", "ddim", "dpm_solver", "iddpm", "lcm"),
    "diffusion.schedule": ("linear_schedule",),
    "encoders.images": ("VAECodec", "make_codec"),
    "encoders.text": ("TextEncoder",),
    "errors": ("UserError",),
    "evaluation.clip": ("Clip", "clip_score"),
    "evaluation.fid": ("Inception", "frechet_distance", "image_statistics"),
    "evaluation.protocol": ("Protocol",),
    "models.configs": ("DiTConfig", "PixArtConfig"),
    "models.dit": ("DiT",),
    "models.pixart": ("PixArt",),
    "models.t5": ("T5Config", "T5Encoder"),
    "models.vae": ("VAE", "VAEConfig"),
    "pipeline": ("Pipeline", "load_pipeline"),
    "sampling": ("image_keys",),
    "training.objectives": ("Objective",),
    "weights.checkpoints": ("read_weights", "write_weights"),
    "weights.loading": ("load_model",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
# These names are modules. A function `pixart_jax.train` would be replaced by the module as soon as anything
# imports it, because importing a submodule sets an attribute of its package.
_MODULES = ("convert", "precompute", "train")

__all__ = [*_HOME_OF, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pixart_jax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'pixart_jax' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"pixart_jax.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
