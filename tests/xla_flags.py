"""Flags of XLA with which programs compile fast. Tests run each program only a few times."""

import importlib.metadata

FAST = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
}
# The older code generator for CPUs takes half as long. JAX 0.11 does not have it, and rejects unknown flags.
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    FAST["--xla_cpu_use_fusion_emitters"] = "false"

# The value of XLA_FLAGS for commands that run on one device.
ONE_DEVICE = " ".join(f"{name}={value}" for name, value in FAST.items())
