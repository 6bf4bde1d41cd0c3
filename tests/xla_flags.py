"""Flags of XLA with which programs compile fast. Tests run each program only a few times."""

import importlib.metadata

FAST = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
# The older code generator for CPUs takes half as long. One module takes less than 32 compiled in parallel.
# JAX 0.11 and newer do not have the older one, and reject unknown flags.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FAST["--xla_cpu_use_fusion_emitters"] = "false"
    FAST["--xla_cpu_parallel_codegen_split_count"] = "1"

# The value of XLA_FLAGS for commands that run on one device.
ONE_DEVICE = " ".join(f"{name}={value}" for name, value in FAST.items())
