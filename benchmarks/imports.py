"""Measures how long `import pixart_jax` and the `--help` of each command take, as whole processes.

    python benchmarks/imports.py

Each is started nine times in turn, after one start that fills the cache of files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pixart_jax.cli import COMMANDS

REPEATS = 9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/imports.json"))
    arguments = parser.parse_args()
    programs = {
        "python": ["-c", "pass"],
        "import pixart_jax": ["-c", "import pixart_jax"],
        **{f"pixart-{name} --help": ["-m", "pixart_jax", name, "--help"] for name in COMMANDS},
        "import jax": ["-c", "import jax"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(1 + REPEATS):
        for name, program in programs.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *program], check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    result = {
        name: {
            "median_seconds": round(statistics.median(each[1:]), 3),
            "seconds": [round(value, 3) for value in each[1:]],
        }
        for name, each in seconds.items()
    }
    result["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version()}
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in programs:
        print(f"{name:28} {result[name]['median_seconds']:.2f} s")


if __name__ == "__main__":
    main()
