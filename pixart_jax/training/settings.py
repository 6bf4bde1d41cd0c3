"""Settings of XLA, libtpu and JAX for NVIDIA GPUs and TPUs. All of them are in this file.

XLA reads its flags once, when the backend starts, so `apply_settings` must be called before anything uses a
device. Settings that are already in the environment are kept. The effect of the settings on speed has not
been measured: `python -m pixart_jax.benchmark train` with and without them would show it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points

import jax
from jax._src import hardware_utils, xla_bridge

from pixart_jax.errors import UserError

# XLA flags for GPUs. XLA ends the process on an unknown flag; JAX 0.10 to 0.12 know all of these.
GPU_FLAGS = (
    # Only `model.remat` should decide what the backward pass recomputes. XLA's own pass would silently
    # recompute more if a program needs more than about three quarters of the memory, and slow the step down.
    "--xla_disable_hlo_passes=rematerialization",
    # The remaining flags have no effect on a single GPU. FSDP: gather the weights of a block in one message
    # (43 MB for XL/2 in bfloat16). By default XLA combines messages only up to 30 MiB.
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    # Likewise, reduce and scatter the gradients of a block in one message.
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
    # Likewise, sum the gradients of a block over replicas (`mesh.data`) in one message.
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    # End a process if one of its peers has died, so that the launcher can restart all; by default it waits.
    "--xla_gpu_nccl_terminate_on_error=true",
)

# Added for `compile.deterministic`. XLA then excludes kernels whose result depends on the order of threads.
# For a matrix product it takes the first algorithm that compiles instead of timing several, because the next
# start could choose a different one. Attention is computed by XLA (`models/attention.py` says why).
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"

# Share of a GPU's memory that JAX allocates. The default of 0.75 leaves a quarter unused; CUDA, cuDNN and
# NCCL need some memory outside. JAX still accepts the older name of the variable, but raises if both are set.
MEMORY_FRACTION = "0.9"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# At this level XLA overlaps collectives with computation: it schedules them as early as the data allow,
# starts those of the loop over blocks one iteration ahead, and runs two iterations as one so that their
# buffers do not collide. It does not change the code of a program without collectives.
OPTIMIZATION_LEVEL = "O1"


# Flags of libtpu, which reads them from LIBTPU_INIT_ARGS; libtpu 0.0.42, 0.0.50 and 0.0.52 know all of them.
TPU_FLAGS = (
    # Sum gradients over replicas (`mesh.data`) while the backward pass of earlier blocks is running.
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    # Do so even though the arrays differ in size (kernels, biases, tables).
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    # FSDP: gather the weights of the next matrix products during the current ones.
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    # Let these gathers run at the same time as the matrix unit.
    "--xla_tpu_overlap_compute_collective_tc=true",
    # FSDP: disable collective matmul, which splits each product among the devices that hold its weights. The
    # parts cannot be fused with layer norm, gates and reductions. By the compiler's estimate a step would
    # take a fifth longer (docs/performance.md); in this model weights are small compared to activations.
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)


def apply_tpu_flags() -> str:
    """Sets the flags of libtpu, which must not be loaded yet, and returns the resulting LIBTPU_INIT_ARGS."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    added = [flag for flag in TPU_FLAGS if _value_of(flag, given) is None]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*added, given]).strip()
    return os.environ["LIBTPU_INIT_ARGS"]


def apply_settings(deterministic: bool = False, say: Callable[[str], None] = print) -> None:
    """Sets flags and variables if JAX will use a TPU or look for an NVIDIA GPU, and prints the result.

    Args:
      deterministic: the value of `compile.deterministic`, with which a program gives the same bits at every
        start.
      say: prints a line.

    Raises:
      UserError: if determinism is impossible, because JAX has already started on a GPU without it or
        XLA_FLAGS disables it.
    """
    if uses_tpu() and not xla_bridge.backends_are_initialized():
        say(f"TPU settings: LIBTPU_INIT_ARGS='{apply_tpu_flags()}'")
    if not uses_nvidia_gpu():
        return
    given = os.environ.get("XLA_FLAGS", "")
    wanted = [*GPU_FLAGS, *([DETERMINISTIC_FLAG] if deterministic else [])]
    added = [flag for flag in wanted if _value_of(flag, given) is None]
    flags = " ".join([*added, given]).strip()
    if deterministic and _value_of(DETERMINISTIC_FLAG, flags) not in ("", "1", "true"):
        raise UserError(
            f"compile.deterministic is True, but XLA_FLAGS is '{given}': remove the flag that turns it off, "
            "or set compile.deterministic to False."
        )
    if xla_bridge.backends_are_initialized():
        if DETERMINISTIC_FLAG in added and jax.default_backend() == "gpu":
            raise UserError(
                "compile.deterministic is True, but JAX has already started without it: call "
                "pixart_jax.training.settings.apply_settings before anything uses a device, or start the "
                f"process with XLA_FLAGS={DETERMINISTIC_FLAG}."
            )
        if added:
            say(f"XLA settings: not applied, because JAX has already started: {' '.join(added)}")
        return
    os.environ["XLA_FLAGS"] = flags
    fraction = next((name for name in _MEMORY_VARIABLES if name in os.environ), _MEMORY_VARIABLES[0])
    os.environ.setdefault(fraction, MEMORY_FRACTION)
    # JAX read the environment variable of this option when it was imported. The option applies to each
    # compilation, so it can still be changed through jax.config.
    if jax.config.jax_optimization_level == "UNKNOWN":
        jax.config.update("jax_optimization_level", OPTIMIZATION_LEVEL)
    say(
        f"XLA settings: XLA_FLAGS='{flags}' {fraction}={os.environ[fraction]} "
        f"JAX_OPTIMIZATION_LEVEL={jax.config.jax_optimization_level}"
    )


def uses_tpu() -> bool:
    """Whether JAX will use TPU chips of this machine."""
    platforms = jax.config.jax_platforms
    allowed = not platforms or "tpu" in platforms.split(",")
    return allowed and hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0


def uses_nvidia_gpu() -> bool:
    """Whether JAX will look for an NVIDIA GPU: its CUDA plugin is installed and JAX_PLATFORMS allows it."""
    platforms = jax.config.jax_platforms
    allowed = not platforms or not {"cuda", "gpu"}.isdisjoint(platforms.split(","))
    return allowed and any(plugin.name.startswith("xla_cuda") for plugin in entry_points(group="jax_plugins"))


def say_how_a_run_resumes(deterministic: bool, say: Callable[[str], None]) -> None:
    """Prints a line if a resumed run may differ from an uninterrupted one. Initializes the JAX backend."""
    if jax.default_backend() == "gpu" and not deterministic:
        say(
            "compile.deterministic is False: on GPUs a resumed run may differ from an uninterrupted one in "
            "the last bits"
        )


def _value_of(flag: str, text: str) -> str | None:
    """Returns the last value, in lower case, of a flag in `text`, which has the syntax of XLA_FLAGS.

    Returns None if the flag is not in `text`.
    """
    name = flag.partition("=")[0]
    words = [word.partition("=") for word in text.split()]
    return next((value.lower() for key, _, value in reversed(words) if key == name), None)
