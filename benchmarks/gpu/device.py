"""Writes the device, the versions of the software, and the measured peak of matrix products as JSON.

    python benchmarks/gpu/device.py --out=FILE [--small]

Without a GPU the script prints one line and exits with status 2. With --small it uses the CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = re.compile(
    "jax.*|flax|optax|orbax-checkpoint|numpy|torch|triton|diffusers|transformers|nvidia-(cudnn|cublas|nccl)-.*",
    re.IGNORECASE,
)


def versions() -> dict[str, str]:
    """Returns the versions of installed packages that affect speed or numbers."""
    names = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {name: names[name] for name in sorted(names) if name and PACKAGES.fullmatch(name)}


def asked(*command: str) -> str:
    """Returns what a program prints, or '' if there is no such program."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def device(small: bool) -> dict[str, Any]:
    import jax

    from pixart_jax.benchmarking.measuring import datasheet_peak, machine, matrix_peak
    from pixart_jax.versions import git_revision

    first = jax.devices()[0]
    memory = first.memory_stats() or {}
    names = ("name", "driver_version", "memory.total", "clocks.max.sm", "power.limit")
    told = "" if small else asked("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    peak = matrix_peak("float32", size=512) if small else matrix_peak("bfloat16")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "small": small,
        "nvidia_smi": dict(zip(names, told.splitlines()[0].split(", "))) if told else {},
        "memory_limit_bytes": memory.get("bytes_limit"),
        "matrix_peak": peak,
        "datasheet_flops_per_second": datasheet_peak(first),
        "versions": versions(),
        "revision": git_revision(),
        "load_average": os.getloadavg(),
        **machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="use the CPU")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    from pixart_jax.training.settings import apply_settings

    # The cases run with these settings, which also decide how much memory JAX may use.
    apply_settings()
    if not arguments.small:
        import jax

        try:
            jax.devices("gpu")
        except RuntimeError:
            print(
                "needs one NVIDIA GPU (H100 or H200) and jax[cuda13] or jax[cuda12] in this Python; parts "
                "compare and sample also need PyTorch with CUDA and diffusers",
                file=sys.stderr,
            )
            return 2
    arguments.out.write_text(json.dumps(device(arguments.small), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
