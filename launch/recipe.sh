#!/usr/bin/env bash
# Trains all stages of a recipe, each from the weights of the previous one.
#
#     launch/recipe.sh --hardware=v5e:256 --rates=rates --price=1.2 --plan     # only prints time and cost
#     launch/recipe.sh --runs=/shared/runs                                     # on the accelerators of this machine
#     launch/recipe.sh --recipe=fast                                           # at a quarter of the FLOPs
#     LAUNCH="launch/local.sh 2" launch/recipe.sh
#     LAUNCH="sbatch --wait launch/slurm.sbatch" launch/recipe.sh --runs=/shared/runs
#     LAUNCH="launch/tpu_vm.sh train" launch/recipe.sh --runs=gs://my-bucket/runs
#
# You can stop it at any time and start it again: finished stages are skipped, and the unfinished one resumes from its
# newest checkpoint. Compute the features first: see docs/own-images.md, and data.train in each config for the folders.
#
#   --recipe=NAME      paper (default; stage 1, stage 2, and stage 3 at 256, 512 and 1024 px) or fast (configs/fast.py,
#                      see docs/cost.md)
#   --plan             print the projection and stop
#   --hardware=KIND:N  chips, such as v5e:256 or h100:64; with --rates, prints days and cost next to the paper's
#   --rates=RATES      images per second per chip, stage1=110,stage2=88,…; or a folder with the results of
#                      `python -m pixart_jax.benchmark train --out=FOLDER/STAGE.json`
#   --price=DOLLARS    price per chip-hour
#   --runs=FOLDER      where the runs are written, with a folder for each stage (default: runs)
#   --stages="A B …"   other configs, such as "configs/digits.py:stage1 configs/digits.py:stage2"
#   other flags        are passed to the training of every stage, such as --config.model.attention=splash
#
# Environment: LAUNCH (command that takes the flags of pixart_jax.train; default: one process on this machine), PYTHON,
# MAX_RESTARTS (the recipe gives up after this many restarts of a stage; default: 10).
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python}
read -ra launch <<<"${LAUNCH:-$python -m pixart_jax.train}"
recipe=paper
stages=
runs=runs
plan=
projection=()
flags=()
for word in "$@"; do
  case $word in
  --help)
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0"
    exit
    ;;
  --recipe=*) recipe=${word#*=} ;;
  --plan) plan=1 ;;
  --hardware=* | --rates=* | --price=*) projection+=("$word") ;;
  --runs=*) runs=${word#*=} ;;
  --stages=*) stages=${word#*=} ;;
  *) flags+=("$word") ;;
  esac
done
case $recipe in
paper)
  default="configs/stage1.py configs/stage2.py configs/stage3.py:256 configs/stage3.py:512 configs/stage3.py:1024"
  ;;
fast) default="configs/fast.py:stage1 configs/fast.py:256 configs/fast.py:512 configs/fast.py:1024" ;;
*)
  echo "launch/recipe.sh: --recipe=$recipe: choose paper or fast" >&2
  exit 2
  ;;
esac
read -ra stages <<<"${stages:-$default}"

if ((${#projection[@]})); then
  listed=$(IFS=, && echo "${stages[*]}")
  JAX_PLATFORMS=cpu "$python" -m pixart_jax.benchmark recipe --stages="$listed" "${projection[@]}" \
    --out="${TMPDIR:-/tmp}/recipe-$$.json" || exit
  rm -f "${TMPDIR:-/tmp}/recipe-$$.json"
elif [[ $plan ]]; then
  echo "launch/recipe.sh: --plan needs --hardware and --rates" >&2
  exit 2
fi
[[ $plan ]] && exit

# Finished stages are recorded here: next to the runs or, for runs in a bucket, on this machine.
notes=$runs/.recipe
[[ $runs == *://* ]] && notes=.recipe/${runs//[:\/]/_}
mkdir -p "$notes" || exit

# A signal only interrupts `wait`: the script then waits again while the run saves.
trap 'signalled=1; kill -TERM "$training" 2>/dev/null' TERM INT
before=
for stage in "${stages[@]}"; do
  file=${stage%%:*}
  name=$(basename "$file" .py)
  [[ $stage == *:* ]] && name+=-${stage#*:}
  start=()
  [[ $before ]] && start=(--config.init.path="$runs/$before")
  before=$name
  if [[ -e $notes/$name ]]; then
    echo "$name: done"
    continue
  fi
  for ((attempt = 0; ; attempt++)); do
    echo "$name: start $((attempt + 1))"
    "${launch[@]}" --config="$stage" --workdir="$runs/$name" "${start[@]}" "${flags[@]}" &
    training=$!
    while true; do
      signalled=
      wait "$training"
      status=$?
      [[ $signalled ]] || break
    done
    # 69: a process died or hangs. 137: a process was killed. In both cases, start again from the newest checkpoint.
    # 75: a signal asked the run to stop, so the recipe stops, too.
    if [[ $status != 69 && $status != 137 ]] || ((attempt >= ${MAX_RESTARTS:-10})); then break; fi
  done
  if ((status)); then
    echo "$name: ended with status $status; run the same command again to resume" >&2
    exit "$status"
  fi
  : >"$notes/$name"
done
