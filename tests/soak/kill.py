"""Kills a run many times at random moments, and compares its result with that of an uninterrupted run.

    python tests/soak/kill.py --kills=100 --terms=20 --workdir=soak --out=soak.json

A tiny stage 1 of the digits saves every third step. Each attempt runs in its own process. It gets SIGKILL at
a random moment (during start, restore, compilation, steps or saving), or SIGTERM during the steps. After
every attempt, the script checks:

- the attempt resumed from the newest finished checkpoint, or from step 0 if there was none (not checked if it
  was killed during start-up);
- incomplete checkpoints of earlier attempts are gone once the attempt has saved one itself;
- after SIGTERM, the status is 75 and the newest checkpoint is that of the last logged step.

At the end the run is completed, and its parameters, moving average, optimizer state and logged metrics
(except times) are compared bit for bit with those of one uninterrupted process. Every step has one line.

The attempts are forked from a process that has imported everything but has not used any device. This only
saves the seconds that the imports take. The script is not part of the test suite.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from digits_runs import ENVIRONMENT, losses, make_features, metrics, tiny_config

os.environ.update(ENVIRONMENT)

import jax
import numpy as np

from pixart_jax.config import CheckpointConfig, LogConfig
from pixart_jax.errors import EXIT_PREEMPTED, RunStopped
from pixart_jax.train import train
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import Checkpoints
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.preemption import stop_requests
from pixart_jax.training.state import abstract_state
from pixart_jax.weights.checkpoints import FOLDER, absolute, finished_steps


def fork(work, log: Path) -> int:
    """Runs `work` in a separate process, with its output in `log`; returns the process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        with log.open("w", buffering=1) as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            work()
        status = 0
    except RunStopped as stopped:
        print(f"stopped: {stopped}", flush=True)
        status = stopped.status
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def make_features_apart(folder: Path) -> None:
    """Computes the features of stage 1 in a separate process, because this one must not use any device."""
    log = folder.with_suffix(".log")
    check(wait(fork(lambda: make_features(folder, "stage1"), log)) == 0, "the features were not made", log)


def attempt(config, workdir: Path):
    """Returns a function that does what the training command does after its imports."""

    def work():
        jax.config.update("jax_compilation_cache_dir", str(workdir.parent / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        cluster = Cluster()
        with stop_requests(cluster):
            train(config, workdir, cluster=cluster)

    return work


def wait(child: int, seconds: float | None = None) -> int | None:
    """Returns the exit status of a process, negative for a signal; None if it still runs after `seconds`."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            return None
        time.sleep(0.005)


def half_written(root: Path, before: float = float("inf")) -> list[str]:
    """Returns the temporary folders among checkpoints that have not changed since the time `before`.

    Names and inodes cannot identify old folders, because a later save may reuse both.
    """
    names = []
    for path in root.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # renamed in the meantime
            names += [path.name] * (path.stat().st_ctime < before)
    return names


def newest(workdir: Path) -> int:
    return max(finished_steps(absolute(workdir) / FOLDER), default=0)


def check(condition: object, what: str, log: Path) -> None:
    if not condition:
        raise SystemExit(f"FAILED: {what}\n--- {log}\n{log.read_text()}")


def interrupt(config, workdir: Path, number: int, kill: bool, rng: random.Random, seen: dict) -> dict:
    """Runs one attempt, interrupts it, and returns what happened."""
    log = workdir.parent / "attempt.log"
    before, begun_at = newest(workdir), time.time()
    file = workdir / "metrics.jsonl"
    old = file.stat().st_ino if file.exists() else 0
    start = time.monotonic()
    child = fork(attempt(config, workdir), log)
    early = kill and rng.random() < 0.3
    status = None
    if early:
        # At a random moment before the first step.
        status = wait(child, rng.uniform(0, seen["startup"]))
    else:
        # When an attempt starts, it replaces the file with one without the lines after its checkpoint.
        while not file.exists() or file.stat().st_ino == old or max(losses(workdir), default=0) <= before:
            status = wait(child, 0.02)
            check(status is None, f"attempt {number} ended with {status}", log)
        seen["startup"] = 0.7 * seen["startup"] + 0.3 * (time.monotonic() - start)
        # The start-up time shows how fast the machine currently is.
        status = wait(child, rng.uniform(0, seen["startup"]))
    check(status is None, f"attempt {number} ended with {status}", log)
    os.kill(child, signal.SIGKILL if kill else signal.SIGTERM)
    status = wait(child, 300)
    text = log.read_text()
    expected = -signal.SIGKILL if kill else EXIT_PREEMPTED
    check(status == expected, f"attempt {number} ended with {status}, not {expected}", log)
    after = newest(workdir)
    begun = f"continuing {workdir} at step {before}" if before else "a fresh start"
    check(begun in text or early, f"attempt {number} did not begin at step {before}", log)
    if after > before:
        left = half_written(workdir / FOLDER, begun_at)
        check(not left, f"{left} of an earlier attempt is still there after attempt {number} saved", log)
    if not kill:
        check(after == max(losses(workdir)), f"step {max(losses(workdir))} was logged, {after} saved", log)
    return {
        "signal": "KILL" if kill else "TERM",
        "moment": "start-up" if early else "steps",
        "from_step": before,
        "to_step": after,
        "half_written": bool(half_written(workdir / FOLDER)),
        "seconds": round(time.monotonic() - start, 2),
    }


def compare(config, one: Path, other: Path):
    """Returns a function that raises unless two finished runs are equal bit for bit."""

    def work():
        target, _ = abstract_state(
            make_objective(config),
            make_optimizer(config.optimizer, config.data.batch_size),
            sharding.make_mesh(config.mesh),
        )
        states = []
        for workdir in (one, other):
            checkpoints = Checkpoints(workdir, config.checkpoint)
            states.append(checkpoints.restore(config.steps, target)[0])
            checkpoints.close()
        jax.tree.map(np.testing.assert_array_equal, *states)
        logged = metrics(one)
        assert [line["step"] for line in logged] == list(range(1, config.steps + 1)), "a line is missing"
        assert logged == metrics(other)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--terms", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=35, help="no new attempt after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--out", type=Path, required=True, help="JSON with every attempt")
    options = parser.parse_args()
    options.workdir.mkdir(parents=True)
    make_features_apart(options.workdir / "features")
    config = tiny_config(
        options.workdir / "features",
        "stage1",
        steps=10**6,
        checkpoint=CheckpointConfig(every=3, keep=2),
        log=LogConfig(every=1, sample_every=0),
    )
    # Without validation and sample images, an attempt compiles only the step.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=""))
    run, alone = options.workdir / "run", options.workdir / "alone"
    rng, seen, begun = random.Random(options.seed), {"startup": 10.0}, time.monotonic()
    plan = [True] * options.kills + [False] * options.terms
    rng.shuffle(plan)
    attempts = []
    for number, kill in enumerate(plan):
        if time.monotonic() - begun > 60 * options.minutes:
            break
        attempts.append(interrupt(config, run, number, kill, rng, seen))
        print(number, json.dumps(attempts[-1]), flush=True)

    config = dataclasses.replace(config, steps=newest(run) + 10)
    log = options.workdir / "last.log"
    check(wait(fork(attempt(config, run), log)) == 0, "the last attempt did not finish", log)
    check(not half_written(run / FOLDER), "a temporary folder is left at the end", log)
    rarely = dataclasses.replace(config, checkpoint=CheckpointConfig(every=10**6))
    check(wait(fork(attempt(rarely, alone), log)) == 0, "the uninterrupted run did not finish", log)
    check(wait(fork(compare(config, run, alone), log)) == 0, "the runs differ", log)

    summary = {
        "command": " ".join(["python tests/soak/kill.py", *sys.argv[1:]]),
        "planned": {"KILL": options.kills, "TERM": options.terms},
        "done": {kind: sum(a["signal"] == kind for a in attempts) for kind in ("KILL", "TERM")},
        "while_saving": sum(a["half_written"] for a in attempts),
        "steps": config.steps,
        "equal_bit_for_bit": ["parameters", "moving average", "optimizer", "metrics"],
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "versions": {name: __import__(name).__version__ for name in ("jax", "numpy")},
    }
    options.out.write_text(json.dumps({**summary, "attempts": attempts}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
