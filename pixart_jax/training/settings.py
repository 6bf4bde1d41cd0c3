"""What a run tells XLA and JAX before they start on NVIDIA GPUs and TPUs: the only list of these settings.

XLA reads its flags once, when the backend starts, so `apply_settings` comes before anything that touches a
device. What the environment already sets is left as it is. None was timed: that takes the hardware, and
`python -m pixart_jax.benchmark train` before and after.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import entry_points

import jax
from jax._src import hardware_utils, xla_bridge

from pixart_jax.errors import UserError

# XLA ends the process on a flag that it does not know: each is known to JAX 0.10 and 0.11.
GPU_FLAGS = (
    # `model.remat` alone decides what the backward pass computes again. XLA's own pass would add to it once a
    # program needs more than about three quarters of the memory, and only the step time would tell.
    "--xla_disable_hlo_passes=rematerialization",
    # The rest does nothing on a single GPU. FSDP: the weights of a block arrive in one message (XL/2: 43 MB
    # in bfloat16; by default messages are combined up to 30 MiB),
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    # its gradients leave in one,
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=134217728",
    # and so do gradients that are summed over replicas (`mesh.data`).
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    # A process whose peer has died ends, and the launcher starts all of them again; by default it waits.
    "--xla_gpu_nccl_terminate_on_error=true",
)

# Added for `compile.deterministic`. Kernels whose result depends on the order of threads are excluded (the
# backward pass of cuDNN attention has a deterministic variant), and XLA takes the first algorithm that
# compiles for a matrix product, not the fastest that it measured: the next start may measure another one.
DETERMINISTIC_FLAG = "--xla_gpu_deterministic_ops=true"

# Share of a GPU's memory that JAX takes. The default, 0.75, leaves a quarter unused; CUDA, cuDNN and NCCL
# need some of it. The older name of the variable still works, but JAX raises where both are set.
MEMORY_FRACTION = "0.9"
_MEMORY_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

# Collectives overlap with computation: XLA schedules them as early as the data allow, starts those of the
# loop over blocks one iteration ahead, and runs two iterations as one so that their buffers do not collide. A
# program without collectives compiles to the same code as without it.
OPTIMIZATION_LEVEL = "O1"


# Of libtpu, which reads them from LIBTPU_INIT_ARGS; each is known to libtpu 0.0.42 and 0.0.52.
TPU_FLAGS = (
    # Sums the gradients of replicas (`mesh.data`) while the backward pass of earlier blocks runs,
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    # and does so although the arrays differ in size (kernels, biases, tables).
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    # FSDP: gathers the weights of the next products while the present ones are computed.
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    # Lets those gathers and the matrix unit run at the same time.
    "--xla_tpu_overlap_compute_collective_tc=true",
    # FSDP: no collective matmul, which splits each product by the devices that hold its weights. The parts
    # cannot be fused with layer norm, gates and reductions: by the compiler's estimate a step takes a fifth
    # longer (docs/performance.md), and weights are small beside activations here.
    "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000",
)


def apply_tpu_flags() -> str:
    """Sets the flags of libtpu, which must not have been loaded yet, and returns all that hold."""
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    added = [flag for flag in TPU_FLAGS if _value_of(flag, given) is None]
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([*added, given]).strip()
    return os.environ["LIBTPU_INIT_ARGS"]


def apply_settings(deterministic: bool = False, say: Callable[[str], None] = print) -> None:
    """Sets flags and variables where JAX will find a TPU or look for an NVIDIA GPU, and prints what holds.

    Args:
      deterministic: `compile.deterministic`: the same program gives the same bits at every start.
      say: takes the line.

    Raises:
      UserError: `deterministic` cannot hold: JAX has already started on a GPU without it, or XLA_FLAGS says
        the opposite.
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
    # An option of each compilation, so that JAX takes it after its import, too.
    if jax.config.jax_optimization_level == "UNKNOWN":
        jax.config.update("jax_optimization_level", OPTIMIZATION_LEVEL)
    say(
        f"XLA settings: XLA_FLAGS='{flags}' {fraction}={os.environ[fraction]} "
        f"JAX_OPTIMIZATION_LEVEL={jax.config.jax_optimization_level}"
    )


def uses_tpu() -> bool:
    """Whether JAX will start on TPU chips of this machine."""
    platforms = jax.config.jax_platforms
    allowed = not platforms or "tpu" in platforms.split(",")
    return allowed and hardware_utils.num_available_tpu_chips_and_device_id()[0] > 0


def uses_nvidia_gpu() -> bool:
    """Whether JAX will look for an NVIDIA GPU: its plugin is installed, and JAX_PLATFORMS allows it."""
    platforms = jax.config.jax_platforms
    allowed = not platforms or not {"cuda", "gpu"}.isdisjoint(platforms.split(","))
    return allowed and any(plugin.name.startswith("xla_cuda") for plugin in entry_points(group="jax_plugins"))


def say_how_a_run_resumes(deterministic: bool, say: Callable[[str], None]) -> None:
    """Prints that a resumed run may differ from an uninterrupted one, where that is so. Starts JAX."""
    if jax.default_backend() == "gpu" and not deterministic:
        say(
            "compile.deterministic is False: on GPUs a resumed run may differ from an uninterrupted one in "
            "the last bits"
        )


def _value_of(flag: str, text: str) -> str | None:
    """The last value, in lower case, that `text`, written as XLA_FLAGS, gives to a flag; None for none."""
    name = flag.partition("=")[0]
    words = [word.partition("=") for word in text.split()]
    return next((value.lower() for key, _, value in reversed(words) if key == name), None)
