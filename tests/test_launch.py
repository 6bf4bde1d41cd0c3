"""Checks the syntax and behaviour of the launch scripts; small scripts replace the commands of a cluster."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import xla_flags
import yaml
from digits_runs import make_features

from pixart_jax import errors

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
KUBERNETES = "1.33"

# Exit statuses after which every script restarts the run, and those after which no script does.
AGAIN = (69, 75)
NEVER = (1, errors.EXIT_USAGE, 65, 74)


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + textwrap.dedent(text))
    path.chmod(0o755)
    return path


def run(command, folder, timeout=300, **environment):
    """Runs a command with `folder`/bin first in PATH."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        env={**os.environ, "PATH": path, "HOME": str(folder), "FOLDER": str(folder), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


# ------------------------------------------------------------------------------------------------- form


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [shellcheck, "--external-sources", "--source-path", ROOT, *SCRIPTS],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def jobsets():
    return list(yaml.safe_load_all((LAUNCH / "gke.yaml").read_text()))


@pytest.mark.parametrize("document", jobsets(), ids=lambda document: document["metadata"]["name"])
def test_jobsets_keep_to_the_schemas(document):
    jsonschema.validate(document, json.loads((ROOT / "tests" / "data" / "jobset.schema.json").read_text()))
    for replicated in document["spec"]["replicatedJobs"]:
        template = replicated["template"]
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **template}
        kubernetes_validate.validate(job, KUBERNETES, strict=True)
        # Kubernetes rejects a Job with a pod failure policy and any other restart policy.
        pod = template["spec"]["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        (rule,) = template["spec"]["podFailurePolicy"]["rules"]
        assert tuple(rule["onExitCodes"]["values"]) == NEVER
        assert rule["onExitCodes"]["containerName"] in [box["name"] for box in pod["containers"]]


def test_the_schemas_reject_invalid_files():
    schema = json.loads((ROOT / "tests" / "data" / "jobset.schema.json").read_text())
    document = jobsets()[0]
    document["spec"]["failurePolicy"]["maxRestart"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(document, schema)
    job = {"apiVersion": "batch/v1", "kind": "Job", **jobsets()[0]["spec"]["replicatedJobs"][0]["template"]}
    job["spec"]["template"]["spec"]["containers"][0]["imagePullpolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePullpolicy"):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_gpu_jobset_numbers_its_processes():
    document = jobsets()[1]
    (node,) = document["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]
    command = spec["template"]["spec"]["containers"][0]["args"][0]
    assert spec["parallelism"] == spec["completions"]
    assert spec["completionMode"] == "Indexed"
    assert f"--num_processes={spec['completions']} " in command
    name = document["metadata"]["name"]
    assert f"--coordinator={name}-{node['name']}-0-0.{name}:" in command


# ------------------------------------------------------------------------------------------------- flags


def flags(kind, name):
    done = subprocess.run(
        ["bash", "-c", f'. launch/flags.sh {kind} && printf %s "${name}"'],
        env={"PATH": os.environ["PATH"], "HOME": "/nowhere", name: "--own=1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_what_the_caller_has_set_wins():
    for name in ("NCCL_DEBUG", "NCCL_IB_TIMEOUT", "JAX_COMPILATION_CACHE_DIR"):
        assert flags("gpu", name) == "--own=1"


def test_the_flags_of_xla_have_one_place():
    """Only `pixart_jax.training.settings` sets them, with and without a launch script."""
    assert flags("gpu", "XLA_FLAGS") == flags("tpu", "LIBTPU_INIT_ARGS") == "--own=1"
    for path in LAUNCH.iterdir():
        assert "--xla_" not in path.read_text()


def test_an_unknown_accelerator_is_named(tmp_path):
    done = run(["bash", "launch/local.sh", "1"], tmp_path, ACCELERATOR="npu")
    assert done.returncode == 2
    assert "accelerator 'npu' is unknown: choose tpu, gpu or cpu" in done.stderr


# ------------------------------------------------------------------------------------------------- local.sh

# Replaces the Python interpreter: writes its arguments to a file, and exits with a status set by the test.
PROCESS = """
    if [[ $1 == -c ]]; then echo 12345; exit; fi
    for word in "$@"; do [[ $word == --process_id=* ]] && index=${word#*=}; done
    echo "$@" > "$FOLDER/process-$index"
    [[ ${STATUSES:-} ]] || { trap 'kill $!; exit 75' TERM; sleep 60 & wait; }
    statuses=($STATUSES)
    exit "${statuses[index]}"
"""


@pytest.mark.parametrize(("statuses", "expected"), [("0 0 0", 0), ("0 69 75", 69), ("2 2 2", 2)])
def test_local_starts_all_and_exits_with_the_first_failure(tmp_path, statuses, expected):
    python = script(tmp_path / "bin" / "python", PROCESS)
    command = ["launch/local.sh", "3", "--config=configs/digits.py:stage2", "--workdir=a b"]
    done = run(command, tmp_path, PYTHON=str(python), STATUSES=statuses)
    assert done.returncode == expected, done.stderr
    for index in range(3):
        assert (tmp_path / f"process-{index}").read_text().strip() == (
            "-m pixart_jax.train --coordinator=localhost:12345 --num_processes=3 "
            f"--process_id={index} --config=configs/digits.py:stage2 --workdir=a b"
        )


def test_local_passes_a_signal_on_and_waits(tmp_path):
    python = script(tmp_path / "bin" / "python", PROCESS)
    environment = {**os.environ, "PYTHON": str(python), "FOLDER": str(tmp_path), "HOME": str(tmp_path)}
    process = subprocess.Popen([LAUNCH / "local.sh", "2"], env=environment)
    deadline = time.monotonic() + 60
    while not all((tmp_path / f"process-{index}").exists() for index in range(2)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)  # the process sets its trap after it writes its file
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75


@pytest.mark.parametrize("words", [[], ["0"], ["two"], ["--config=x"]])
def test_local_needs_a_number(tmp_path, words):
    done = run(["launch/local.sh", *words], tmp_path)
    assert done.returncode == 2
    assert "usage: launch/local.sh PROCESSES" in done.stderr


# ------------------------------------------------------------------------------------------------- slurm


@pytest.mark.parametrize(
    ("status", "restarts", "again"),
    [
        (0, 0, False),
        *((n, 3, True) for n in (*AGAIN, 137, 143)),
        *((n, 0, False) for n in NEVER),
        (75, 100, False),
    ],
)
def test_slurm_queues_the_job_again(tmp_path, status, restarts, again):
    script(tmp_path / "bin" / "srun", f'echo "$@" > "$FOLDER/srun"; exit {status}')
    script(tmp_path / "bin" / "scontrol", 'echo "$@" > "$FOLDER/scontrol"')
    slurm = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "SLURM_SUBMIT_DIR": str(ROOT)}
    command = ["bash", "launch/slurm.sbatch", "--config=configs/stage2.py", "--workdir=runs/x"]
    done = run(command, tmp_path, PYTHON="python", **slurm)
    assert done.returncode == status, done.stderr
    assert (tmp_path / "srun").read_text().strip() == (
        "python -m pixart_jax.train --config=configs/stage2.py --workdir=runs/x"
    )
    queued = tmp_path / "scontrol"
    assert (queued.read_text().strip() == "requeue 7") if again else not queued.exists()


def test_slurm_waits_for_the_save_after_a_signal(tmp_path):
    script(
        tmp_path / "bin" / "srun",
        'trap "kill \\$!; sleep 0.5; exit 75" TERM; echo $$ > "$FOLDER/pid"; sleep 60 & wait',
    )
    script(tmp_path / "bin" / "scontrol", 'echo "$@" > "$FOLDER/scontrol"')
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        **{"FOLDER": str(tmp_path), "HOME": str(tmp_path)},
        **{"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT)},
    }
    process = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--config=c"], env=environment, cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # Slurm signals the script and its steps.
    process.send_signal(signal.SIGTERM)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "scontrol").exists()


def test_slurm_says_how_it_is_called(tmp_path):
    done = run(["bash", "launch/slurm.sbatch"], tmp_path, SLURM_SUBMIT_DIR=str(ROOT))
    assert done.returncode == 2
    assert "usage: sbatch launch/slurm.sbatch --config=CONFIG" in done.stderr


# ------------------------------------------------------------------------------------------------- tpu_vm.sh

# A fake cloud with one slice, whose state is a file. Each `ssh` that trains reads the next line of `runs`:
# its exit status, and the state of the slice afterwards.
GCLOUD = r"""
    echo "$@" >> "$FOLDER/calls"
    case "$*" in
    *" describe "*) [[ -e $FOLDER/state ]] && cat "$FOLDER/state" ;;
    *" queued-resources create "*) echo ACTIVE > "$FOLDER/state" ;;
    *" queued-resources delete "*) rm "$FOLDER/state" ;;
    *pixart_jax.train*)
      read -r status state < "$FOLDER/runs"
      sed -i 1d "$FOLDER/runs"
      echo "$state" > "$FOLDER/state"
      exit "$status"
      ;;
    esac
"""
TPU = dict(PROJECT="p", ZONE="z", TYPE="v5litepod-16", NAME="n", POLL_SECONDS="0")


def tpu_train(folder, runs, **environment):
    script(folder / "bin" / "gcloud", GCLOUD)
    (folder / "runs").write_text("\n".join(runs) + "\n")
    command = ["launch/tpu_vm.sh", "train", "--config=configs/stage2.py", "--workdir=gs://b/a b"]
    done = run(command, folder, **TPU, **environment)
    return done, (folder / "calls").read_text()


def test_a_slice_that_is_taken_away_is_made_again_and_the_run_goes_on(tmp_path):
    done, calls = tpu_train(tmp_path, ["75 ACTIVE", "255 SUSPENDED", "0 ACTIVE"])
    assert done.returncode == 0, done.stderr
    assert calls.count("queued-resources create") == 2
    assert calls.count("queued-resources delete") == 1
    assert calls.count("--worker=all --command=tar") == 3, "installed before every start"
    assert calls.count("pixart_jax.train '--config=configs/stage2.py' '--workdir=gs://b/a b'") == 3
    assert "--runtime-version=v2-alpha-tpuv5-lite --spot" in calls


@pytest.mark.parametrize("status", NEVER)
def test_what_would_only_be_repeated_is_not(tmp_path, status):
    done, calls = tpu_train(tmp_path, [f"{status} ACTIVE", "0 ACTIVE"])
    assert done.returncode == status
    assert calls.count("pixart_jax.train") == 1


def test_an_end_of_patience(tmp_path):
    done, calls = tpu_train(tmp_path, ["69 ACTIVE"] * 5, MAX_RESTARTS="2")
    assert done.returncode == 69
    assert calls.count("pixart_jax.train") == 3


# ------------------------------------------------------------------------------------------------- recipe.sh

# A fake trainer: each call exits with the status in the next line of `statuses`.
TRAINER = """
    echo "$@" >> "$FOLDER/calls"
    read -r status < "$FOLDER/statuses"
    sed -i 1d "$FOLDER/statuses"
    exit "$status"
"""


def recipe(folder, statuses, *words, **environment):
    trainer = script(folder / "bin" / "trainer", TRAINER)
    (folder / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
    (folder / "calls").unlink(missing_ok=True)
    command = ["launch/recipe.sh", f"--runs={folder / 'runs'}", *words]
    done = run(command, folder, LAUNCH=f"{trainer} --first", PYTHON=sys.executable, **environment)
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_stages_follow_each_other_and_each_starts_from_the_last(tmp_path):
    done, calls = recipe(tmp_path, [0] * 5, "--config.steps=2")
    assert done.returncode == 0, done.stderr
    runs = tmp_path / "runs"
    expected, before = [], ""
    for config in ("stage1.py", "stage2.py", "stage3.py:256", "stage3.py:512", "stage3.py:1024"):
        name = config.replace(".py", "").replace(":", "-")
        start = f"--config.init.path={runs / before} " if before else ""
        expected.append(f"--first --config=configs/{config} --workdir={runs / name} {start}--config.steps=2")
        before = name
    assert calls == expected


def test_the_fast_recipe_has_stages_of_its_own(tmp_path):
    done, calls = recipe(tmp_path, [0] * 4, "--recipe=fast")
    assert done.returncode == 0, done.stderr
    assert [call.split()[1] for call in calls] == [
        f"--config=configs/fast.py:{stage}" for stage in ("stage1", "256", "512", "1024")
    ]
    assert calls[-1].endswith(f"--config.init.path={tmp_path / 'runs' / 'fast-512'}")
    done, calls = recipe(tmp_path, [0], "--recipe=quick")
    assert done.returncode == 2 and not calls
    assert "--recipe=quick: choose paper or fast" in done.stderr


def test_an_interrupted_recipe_goes_on_where_it_was(tmp_path):
    done, calls = recipe(tmp_path, [0, 75])
    assert done.returncode == 75
    assert "stage2: ended with status 75; run the same command again to resume" in done.stderr
    done, calls = recipe(tmp_path, [69, 137, 0, 0, 0, 0])
    assert done.returncode == 0
    assert [re.search(r"/runs/([\w-]+)", call)[1] for call in calls] == [
        *["stage2"] * 3,
        *("stage3-256", "stage3-512", "stage3-1024"),
    ]
    done, calls = recipe(tmp_path, [1])
    assert done.returncode == 0 and not calls
    assert done.stdout.count(": done") == 5


def test_a_stage_that_fails_again_and_again_ends_the_recipe(tmp_path):
    done, calls = recipe(tmp_path, [69] * 9, MAX_RESTARTS="2")
    assert done.returncode == 69 and len(calls) == 3
    done, calls = recipe(tmp_path, [2, 0])
    assert done.returncode == 2 and len(calls) == 1


def test_a_plan_starts_nothing(tmp_path):
    rates = "stage1=110,stage2=88,stage3-256=88,stage3-512=21,stage3-1024=4"
    done, calls = recipe(tmp_path, [0], "--plan", "--hardware=v5e:256", f"--rates={rates}", "--price=1.2")
    assert done.returncode == 0, done.stderr
    assert not calls and not (tmp_path / "runs").exists()
    assert re.search(r"^sum .* 550\.8 +\$15,863 +1656$", done.stdout, re.MULTILINE)
    done, calls = recipe(tmp_path, [0], "--plan", "--hardware=v5e:256", "--rates=stage1=110")
    assert done.returncode == 2 and not calls
    assert "rates lack 'stage2'" in done.stderr
    done, _ = recipe(tmp_path, [0], "--plan")
    assert done.returncode == 2 and "--plan needs --hardware and --rates" in done.stderr


def test_the_recipe_trains_digits(tmp_path):
    """Two real stages; the second starts from the weights of the first."""
    environment = dict(XLA_FLAGS=xla_flags.ONE_DEVICE, PYTHON=sys.executable)
    features, runs = tmp_path / "features", tmp_path / "runs"
    make_features(features, "stage2")
    stages = "--stages=configs/digits.py:stage1 configs/digits.py:stage2"
    small = ["--config.data.validation=", "--config.steps=2", "--config.model.depth=1"]
    command = ["launch/recipe.sh", stages, f"--runs={runs}", f"--config.data.train={features}", *small]
    done = run(command, tmp_path, 900, **environment)
    assert done.returncode == 0, done.stderr
    assert f"reparameterize from {runs / 'digits-stage1'}" in done.stdout
    for stage in ("stage1", "stage2"):
        assert f"{runs}/digits-{stage} is complete at step 2" in done.stdout


# ------------------------------------------------------------------------------------------------- statuses


def test_the_statuses_are_those_of_the_trainer():
    """The scripts contain these statuses as numbers."""
    named = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert named == dict(
        EXIT_USAGE=2,
        EXIT_DIVERGED=65,
        EXIT_UNAVAILABLE=69,
        EXIT_STORAGE=74,
        EXIT_PREEMPTED=75,
        EXIT_INTERRUPTED=130,
    )
    for name in ("slurm.sbatch", "tpu_vm.sh"):
        assert re.search(r"\b75\b.*\b69\b", (LAUNCH / name).read_text(), re.DOTALL)
