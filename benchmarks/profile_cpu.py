"""Profiles a training step on a CPU by the operations of the compiled program.

    JAX_PLATFORMS=cpu python benchmarks/profile_cpu.py      # 8 blocks of width 384, 32x32 latents, batch 8

Writes benchmarks/results/profile_cpu.json with the time of operations by kind. Operations that contain matrix
products are also listed by shape, with the time that the same product takes when it is repeated alone on the
same arrays. Operations overlap: their times add up to more than the step, and parallel products take longer
than alone.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import re
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

DUMP = tempfile.TemporaryDirectory(prefix="profile")
GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([GIVEN, f"--xla_dump_to={DUMP.name}", "--xla_dump_hlo_as_text"]).strip()

import jax  # noqa: E402

from pixart_jax.benchmarking.measuring import machine  # noqa: E402
from pixart_jax.benchmarking.throughput import synthetic_batch  # noqa: E402
from pixart_jax.config import DataConfig, FeaturesConfig, PixArtConfig, TrainConfig  # noqa: E402
from pixart_jax.training.objectives import make_objective  # noqa: E402
from pixart_jax.training.optimizers import make_optimizer  # noqa: E402
from pixart_jax.training.state import init_networks, new_state  # noqa: E402
from pixart_jax.training.step import make_train_step  # noqa: E402


def products(program: str) -> dict[str, str]:
    """Finds fusions with a matrix product: name of the instruction -> 'shapes of the inputs -> output'."""
    bodies: dict[str, list[str]] = {}
    body: list[str] = []
    for line in program.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = bodies.setdefault(found[1], [])
        else:
            body.append(line.strip())

    def dot(lines: list[str]) -> str:
        shapes = {
            found[1]: found[2]
            for line in lines
            if (found := re.match(r"(?:ROOT )?%?([\w.\-]+) = (\w+\[[\d,]*\])", line))
        }
        for line in lines:
            if found := re.search(r"= (\w+\[[\d,]*\])\S* dot\(([^)]*)\)", line):
                inputs = [shapes.get(name.split("%")[-1].strip(), "?") for name in found[2].split(", ")]
                sides = re.findall(r"contracting_dims=\{([\d,]*)\}", line)
                return f"{' x '.join(inputs)} -> {found[1]}, over axes {' and '.join(sides)}"
        return ""

    named = {}
    for lines in bodies.values():
        for line in lines:
            if found := re.match(r"(?:ROOT )?%?([\w.\-]+) = .* fusion\(.*calls=%?([\w.\-]+)", line):
                named[found[1]] = dot(bodies.get(found[2], []))
    return {name: text for name, text in named.items() if text}


def alone(product: str, calls: int = 15) -> float:
    """Returns the median seconds of a product that `products` describes, when nothing else runs."""
    shapes = [tuple(map(int, text.split(","))) for text in re.findall(r"f32\[([\d,]+)\]", product)][:2]
    axes = [[int(axis) for axis in text.split(",")] for text in re.findall(r"([\d,]+)(?= and |$)", product)]
    batch = tuple(range(len(shapes[0]) - 2))
    keys = jax.random.split(jax.random.key(0))
    arrays = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]
    dot = jax.jit(lambda one, other: jax.lax.dot_general(one, other, (axes[-2:], (batch, batch))))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        dot(*arrays).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def events(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    with gzip.open(path) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/profile_cpu.json"))
    arguments = parser.parse_args()

    shape = dict(size="custom", depth=arguments.depth, hidden_size=384, num_heads=6, base_size=16)
    config = TrainConfig(
        model=PixArtConfig(**shape, dtype="float32", scan_layers=False),
        features=FeaturesConfig(image_size=256),
        data=DataConfig(batch_size=arguments.batch),
    )
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, arguments.batch, objective)
    state = jax.jit(lambda: new_state(init_networks(objective, jax.random.key(0)), objective, optimizer))()
    batch = jax.device_put(synthetic_batch(config, arguments.batch, 32, 32))
    step = (
        jax.jit(make_train_step(config, objective, optimizer), donate_argnums=0).lower(state, batch).compile()
    )
    state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))
    seconds, cpu, faults = [], [], []
    for _ in range(arguments.rounds):
        start, used = time.perf_counter(), time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        state, metrics = step(state, batch)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
        found = events(Path(folder))
    # Small programs are dumped too, such as the one that creates the state.
    programs = Path(DUMP.name).glob("*after_optimizations.txt")
    program = max(programs, key=lambda path: path.stat().st_size).read_text()
    known = products(program)
    instructions = set(re.findall(r"%?([\w.\-]+) = ", program))
    kinds, shapes = collections.Counter(), collections.Counter()
    counts: collections.Counter = collections.Counter()
    for event in found:
        name = event["name"]
        if name not in instructions:
            continue  # an event of Python or of the runtime
        kind = "matrix products" if name in known or name.startswith("dot") else re.sub(r"[.\d]+$", "", name)
        kinds[kind] += event["dur"] / 1e6
        if name in known:
            shapes[known[name]] += event["dur"] / 1e6
            counts[known[name]] += 1
    report = {
        "depth": arguments.depth,
        "batch": arguments.batch,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "cpu_seconds": cpu,
        "page_faults": faults,
        "temporary_GiB": step.memory_analysis().temp_size_in_bytes / 2**30,
        "seconds_by_kind": {name: round(value, 4) for name, value in kinds.most_common(15)},
        "seconds_by_product": {
            name: {
                "calls": counts[name],
                "seconds": round(value, 4),
                "seconds_if_alone": round(counts[name] * alone(name), 4),
            }
            for name, value in shapes.most_common(15)
        },
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_average": os.getloadavg(),
        "machine": machine() | {"XLA_FLAGS": GIVEN},
    }
    text = json.dumps(report, indent=1)
    print(text)
    arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
