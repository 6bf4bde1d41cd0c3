"""Kills a run at chosen system calls, and compares its result with that of an uninterrupted run.

    python tests/soak/kill_at.py --workdir=soak --out=soak_kill_at.json

A tiny stage 1 of the digits saves every second of its eight steps, keeps two checkpoints and skips some
updates, so that it writes, replaces and removes all kinds of files. The library `kill_library.c`, compiled
with `cc` and preloaded, sees every call of Python and TensorStore, and kills the process at one of them. For
every point in `POINTS`, and for `--random` others from the calls of the uninterrupted run, the script starts
a run, waits for the kill, and starts the run again until it is complete. It checks:

- every attempt but the last got SIGKILL, and the next resumed from the newest finished checkpoint;
- parameters, moving average, optimizer state, logged metrics (except times) and skipped updates are those of
  the uninterrupted run bit for bit; every step has one line of metrics;
- the run directory holds the same files: nothing is missing, incomplete or left over.

The attempts are forked from a process that has imported everything but has not used any device. A small form
of this is in the test suite.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from digits_runs import tiny_config
from kill import attempt, check, compare, fork, half_written, make_features_apart, newest, wait
from kill_library import compiled, killed_at

from pixart_jax.config import CheckpointConfig, DivergenceConfig, LogConfig, TrainConfig
from pixart_jax.weights.checkpoints import FOLDER

# A point is KIND NUMBER WHEN PATTERN, see kill_library.c; lines with "then" kill the attempts after that. The
# run saves at steps 2, 4, 6 and 8; it removes 2 when 6 is saved, and 4 when 8 is saved.
POINTS = """
rename 1 before parameters.txt
rename 1 after metrics.jsonl
rename 1 before config.json
rename 1 before summary.json
rename 1 before refused_updates.jsonl
fsync 1 before metrics.jsonl
rename 1 after checkpoints/2.*/trained.*/ocdbt.process_0/manifest.ocdbt
fsync 3 after checkpoints/2.*/ema.*/ocdbt.process_0/d/*
unlink 1 after checkpoints/2.*/optimizer.*/array_metadatas/process_0
rename 1 before checkpoints/2
rename 1 after checkpoints/2
fsync 2 after metrics.jsonl
fsync 1 before checkpoints/4.*/optimizer.*/manifest.ocdbt.__lock
unlink 1 before checkpoints/4.*/commit_success.txt
rename 1 after checkpoints/4.*/trained
rename 7 after summary.json
fsync 1 after checkpoints/6.*/trained.*/_sharding.__lock
rename 1 after checkpoints/6
rename 1 before checkpoints/removed.*/2
unlink 9 after checkpoints/removed.*/2/*
rename 1 before checkpoints/8
rename 1 after checkpoints/8
unlink 5 after checkpoints/removed.*/4/*
fsync 1 before checkpoints/4.*/ema.*/d
then unlink 1 after checkpoints/4.*/d/*
then rename 1 after metrics.jsonl
"""
POINTS = [lines.splitlines() for lines in re.split(r"\n(?!then)", POINTS.strip())]


def random_points(trace: list[str], count: int, rng: random.Random) -> list[list[str]]:
    """Chooses calls from the trace of a run, from all kinds and from all classes of files alike."""
    classes = collections.defaultdict(list)
    seen = collections.Counter()
    for line in trace:
        # The names of TensorStore's files and of temporary ones, and the time in the names of TensorBoard,
        # differ from run to run.
        pattern = re.sub(r"[0-9a-f]{32}|(?<=\.pixart-)[0-9a-f-]+(?=\.tmp)|(?<=tfevents\.).*", "*", line)
        pattern = pattern.replace(".orbax-checkpoint-tmp", ".*")
        seen[pattern] += 1
        kind, path = pattern.split(" ", 1)
        classes[kind, re.sub(r"\d+|(?<=/)(ema|trained|optimizer|loader|metadata)", "", path)].append(
            f"{kind} {seen[pattern]} {rng.choice(['before', 'half' if kind == 'write' else 'after'])} {path}"
        )
    chosen: list[list[str]] = []
    while len(chosen) < count:
        kind = rng.choice(sorted({kind for kind, _ in classes}))
        group = classes[rng.choice([name for name in sorted(classes) if name[0] == kind])]
        chosen.append([rng.choice(group)])
    return chosen


def leftovers(workdir: Path, alone: Path) -> list[str]:
    """The files that a run has too many or too few, in comparison with another run.

    It may have more checkpoints, if it was killed between saving the last one and removing another, but every
    checkpoint must be complete.
    """

    def files(folder: Path) -> set[str]:
        # The names of these differ from run to run.
        ours = r"^(tensorboard|checkpoints)/|/ocdbt\.process_0|/d/"
        names = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        return {name for name in names if not re.search(ours, name)}

    complete = files(alone / FOLDER / str(newest(alone)))
    differ = files(workdir) ^ files(alone)
    for folder in (workdir / FOLDER).iterdir():
        differ |= {f"{folder.name}/{name}" for name in files(folder) ^ complete}
    return sorted(differ)


def interrupt(config: TrainConfig, workdir: Path, point: list[str]) -> dict:
    """Starts a run until it is complete, with the kills of a point; returns what happened."""
    log, trace, start = workdir.with_suffix(".log"), workdir.with_suffix(".trace"), time.monotonic()
    killed = []
    for kill in [*point, ""]:
        before = newest(workdir)
        trace.unlink(missing_ok=True)
        work = killed_at(kill.removeprefix("then "), workdir, trace, attempt(config, workdir))
        status = wait(fork(work, log), 300)
        text, expected = log.read_text(), -signal.SIGKILL if kill else 0
        check(status == expected, f"{point}: an attempt ended with {status}, not {expected}", log)
        began = f"continuing {workdir} at step {before}" if before else "a fresh start"
        began = f"complete at step {before}" if before == config.steps else began
        check(began in text or (kill and "step/s" not in text), f"{point}: not {began}", log)
        if kill:
            (call,) = re.findall(r"^killed (.*)$", trace.read_text(), re.MULTILINE)
            left = bool(half_written(workdir / FOLDER))
            killed.append({"call": call, "newest_checkpoint": newest(workdir), "half_written": left})
    return {"point": point, "killed": killed, "seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", type=int, nargs="*", help="indices of the points, from 0")
    parser.add_argument("--random", type=int, default=0, help="number of further points")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workdir", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--out", type=Path, required=True, help="JSON with every point")
    options = parser.parse_args()
    if "LD_PRELOAD" not in os.environ:  # start again with the library
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | {"LD_PRELOAD": str(compiled(Path(folder)))}
            raise SystemExit(subprocess.call([sys.executable, *sys.argv], env=environment))
    options.workdir = options.workdir.absolute()
    options.workdir.mkdir(parents=True)
    make_features_apart(options.workdir / "features")
    config = tiny_config(
        options.workdir / "features",
        "stage1",
        steps=8,
        checkpoint=CheckpointConfig(every=2, keep=2),
        log=LogConfig(every=1, sample_every=0),
        divergence=DivergenceConfig(action="skip", spike_factor=1.2, spike_warmup=1, patience=9),
    )
    # Without validation and sample images, an attempt compiles only the step.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, validation=""))
    begun, alone = time.monotonic(), options.workdir / "alone"
    log, trace = options.workdir / "alone.log", options.workdir / "alone.trace"
    status = wait(fork(killed_at("", alone, trace, attempt(config, alone)), log))
    check(status == 0, "the uninterrupted run did not finish", log)
    calls = trace.read_text().splitlines()

    points = POINTS if options.only is None else [POINTS[index] for index in options.only]
    points = points + random_points(calls, options.random, random.Random(options.seed))
    results = []
    for number, point in enumerate(points):
        workdir = options.workdir / f"run{number}"
        results.append(interrupt(config, workdir, point))
        check(wait(fork(compare(config, workdir, alone), log)) == 0, f"{point}: the runs differ", log)
        refused = [(run / "refused_updates.jsonl").read_text() for run in (workdir, alone)]
        check(refused[0] == refused[1], f"{point}: the skipped updates differ", log)
        differ = leftovers(workdir, alone)
        check(not differ, f"{point}: missing or left over: {differ}", log)
        json.loads((workdir / "summary.json").read_text())
        shutil.rmtree(workdir)
        print(number, json.dumps(results[-1]), flush=True)

    summary = {
        "command": " ".join(["python tests/soak/kill_at.py", *sys.argv[1:]]),
        "points": {"chosen": len(points) - options.random, "random": options.random},
        "equal_bit_for_bit": len(results),
        "compared": ["parameters", "moving average", "optimizer", "metrics", "skipped updates", "file names"],
        "calls_of_an_uninterrupted_run": collections.Counter(line.split()[0] for line in calls),
        "steps": config.steps,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "versions": {name: __import__(name).__version__ for name in ("jax", "numpy")},
    }
    options.out.write_text(json.dumps({**summary, "results": results}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
