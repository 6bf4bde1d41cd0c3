"""Trains the same steps twice, once without interruption and once stopped half-way and resumed by another
process, and compares weights, moving average and optimizer bit for bit.

    python benchmarks/gpu/resume.py --config=configs/digits.py:stage2 --steps=400
    python benchmarks/gpu/resume.py --config=configs/digits.py:stage1 --steps=1200 --images=digits

Without --images the batches are noise created in memory, because reading features as `pixart_jax.train` does
needs grain and array_record, which a bare machine may not have. The step, its compilation and the checkpoints
are those of `train`. With --images, features are computed from real images, and `pixart_jax.train` itself is
run.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.flags import CommandFlags, flag, run

SYNTHETIC = "noise in memory: the step and the checkpoints of `train`, without its loader"
REAL = "features of real images: `python -m pixart_jax.train` itself"


def train_until(config: TrainConfig, workdir: str, until: int) -> dict[str, Any]:
    """Trains on noise in memory from the newest checkpoint to step `until`, and saves a checkpoint there."""
    import jax
    import numpy as np

    from pixart_jax.benchmarking.measuring import compile_timed
    from pixart_jax.benchmarking.throughput import latent_size, synthetic_batch
    from pixart_jax.models.layers import activation_sharding
    from pixart_jax.training import sharding
    from pixart_jax.training.checkpoints import Checkpoints
    from pixart_jax.training.objectives import make_objective
    from pixart_jax.training.optimizers import make_optimizer
    from pixart_jax.training.settings import apply_settings
    from pixart_jax.training.state import abstract_state, init_networks, new_state
    from pixart_jax.training.step import make_train_step

    apply_settings(config.compile.deterministic)
    rows = config.data.batch_size
    data = synthetic_batch(config, rows, *latent_size(config.features))

    def batch(step: int) -> dict[str, Any]:
        # The order of the rows and the noise depend only on the step.
        order = np.random.default_rng([config.seed, step]).permutation(rows)
        arrays = {name: value[order] for name, value in data.items()}
        return arrays | {"index": np.arange(step * rows, (step + 1) * rows, dtype=np.uint32)}

    mesh = sharding.make_mesh(config.mesh, config)
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, rows, objective)
    target, shardings = abstract_state(objective, optimizer, mesh, config.mesh.strategy)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    first = checkpoints.latest_step() or 0
    if first:
        state, loader, _ = checkpoints.restore(first, target)
        assert loader["step"] == first, loader
    else:
        make = jax.jit(
            lambda: new_state(init_networks(objective, jax.random.key(config.seed)), objective, optimizer),
            out_shardings=shardings,
        )
        state = make()
    with activation_sharding(sharding.activation_rule(mesh)):
        program = jax.jit(
            make_train_step(config, objective, optimizer, shardings),
            donate_argnums=0,
            out_shardings=(shardings, sharding.replicated(mesh)),
        )
        placed = sharding.global_batch(mesh, batch(first))
        program, compilation = compile_timed(lambda: program.lower(target, placed))
        start = time.perf_counter()
        for step in range(first, until):
            state, metrics = program(state, sharding.global_batch(mesh, batch(step)))
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - start
    checkpoints.save(state, {"step": until}, config)
    checkpoints.wait()
    checkpoints.close()
    return {
        "steps": until - first,
        "seconds": seconds,
        "images_per_second": rows * (until - first) / seconds,
        "loss": loss,
        "compilation": compilation,
    }


def python(*command: str) -> None:
    subprocess.run([sys.executable, *command], check=True)


def run_synthetic(given: Flags, workdir: Path, until: int) -> dict[str, Any]:
    """Runs `train_until` in a separate process."""
    out = workdir.with_suffix(".json")
    again = [word for word in sys.argv[1:] if not word.startswith(("--out", "--expect_equal"))]
    python(__file__, *again, f"--until={until}", f"--workdir={workdir}", f"--out={out}")
    return json.loads(out.read_text())


def run_real(given: Flags, workdir: Path, until: int) -> dict[str, Any]:
    """Runs `pixart_jax.train` on features of `--images`."""
    overrides = [word for word in sys.argv[1:] if word.startswith("--config")]
    features = workdir.parent / "features"
    if not features.exists():
        python("-m", "pixart_jax.precompute", *overrides, f"--images={given.images}", f"--out={features}")
    # Without sample images and validation, which take time to compile and do not change the result.
    quiet = ("--config.data.validation=", "--config.log.sample_every=0", "--config.log.validate_every=0")
    changes = (f"--config.steps={until}", f"--config.data.train={features}", *quiet)
    start = time.perf_counter()
    python("-m", "pixart_jax.train", *overrides, *changes, f"--workdir={workdir}")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": time.perf_counter() - start,
        "images_per_second": max(line["images_per_second"] for line in lines),
        "loss": lines[-1]["loss"],
    }


def differences(one: Path, other: Path) -> dict[str, list[str]]:
    """Returns the arrays whose bits differ in the newest checkpoints of two runs, by item of the checkpoint.

    Weights and moving average are read and compared. For the optimizer, the checksums that each checkpoint
    stores are compared.
    """
    import jax
    import numpy as np

    from pixart_jax.weights.checkpoints import checkpoint_folder, read_weights

    found = {}
    for which in ("raw", "ema"):
        here, there = (
            jax.tree_util.tree_flatten_with_path(read_weights(run, which)[0])[0] for run in (one, other)
        )
        assert len(here) == len(there)
        found[which] = [
            jax.tree_util.keystr(path)
            for (path, left), (_, right) in zip(here, there)
            if np.asarray(left).tobytes() != np.asarray(right).tobytes()
        ]
    sums = [
        json.loads((checkpoint_folder(run) / "metadata" / "metadata").read_text())["checksums"]["optimizer"]
        for run in (one, other)
    ]
    found["optimizer"] = [name for name in sums[0] if sums[0][name] != sums[1].get(name)]
    return found


def compare(given: Flags) -> dict[str, Any]:
    steps, run = given.steps, run_real if given.images else run_synthetic
    with tempfile.TemporaryDirectory() as folder:
        whole, stopped = Path(folder, "whole"), Path(folder, "stopped")
        runs = [run(given, whole, steps)]
        for until in (steps // 2, steps):
            runs.append(run(given, stopped, until))
        found = differences(whole, stopped)
    different = sum(len(names) for names in found.values())
    return {
        "what": REAL if given.images else SYNTHETIC,
        "steps": steps,
        "runs": dict(zip(("whole", "first half", "second half"), runs)),
        "images_per_second": runs[0]["images_per_second"],
        "bits_equal": not different,
        "different_arrays": {name: len(names) for name, names in found.items()},
        "some_of_them": [name for names in found.values() for name in names][:5],
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flags(CommandFlags):
    config: ConfigDict | None = flag(None, "Stage, such as configs/digits.py:stage2.")
    steps: int = flag(400, "Updates of the whole run.")
    images: str = flag("", "Images to precompute, as for `precompute`; default: noise.")
    expect_equal: bool = flag(False, "Exit with status 1 if bits differ.")
    out: str = flag("", "JSON file for the result.")
    until: int = flag(0, "Train to this step in --workdir; used by the program itself.")
    workdir: str = flag("", "Run directory of --until.")


def main(given: Flags) -> int:
    config = configs.from_config_dict(given.config)
    if given.until:
        checkpoint = dataclasses.replace(config.checkpoint, every=given.until)
        config = dataclasses.replace(config, checkpoint=checkpoint)
        result = train_until(config, given.workdir, given.until)
    elif given.steps < 2:
        raise UserError(f"--steps is {given.steps}: it must be at least 2 to stop the run half-way.")
    else:
        result = compare(given)
        equal = "equal" if result["bits_equal"] else f"NOT equal: {result['different_arrays']}"
        print(f"{result['what']}\n{given.steps} steps against a stop at half of them: bits {equal}")
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1) + "\n")
    return 1 if given.expect_equal and not result["bits_equal"] else 0


if __name__ == "__main__":
    run(main, Flags)
