#!/usr/bin/env bash
# The whole recipe: stage 1, 2, 3 at 256, 512 and 1024 px, each from the weights of the one before.
#
#     launch/recipe.sh --hardware=v5e:256 --rates=rates --price=1.2 --plan     # what it will take, and no more
#     launch/recipe.sh --runs=/shared/runs                                     # on the accelerators of this machine
#     LAUNCH="launch/local.sh 2" launch/recipe.sh
#     LAUNCH="sbatch --wait launch/slurm.sbatch" launch/recipe.sh --runs=/shared/runs
#     LAUNCH="launch/tpu_vm.sh train" launch/recipe.sh --runs=gs://my-bucket/runs
#
# Stop it anywhere and start it again: stages that are done are left out, the one that was not goes on from its
# newest checkpoint. Features come first: see docs/own-images.md, and --config.data.train of each config.
#
#   --plan             print the projection and stop
#   --hardware=KIND:N  chips, such as v5e:256 or h100:64; with --rates, prints days and cost beside the paper's
#   --rates=RATES      images a second and chip, stage1=110,stage2=88,…; or a folder with what
#                      `python -m pixart_jax.benchmark train --out=FOLDER/STAGE.json` measured
#   --price=DOLLARS    for a chip and hour
#   --runs=FOLDER      where the runs go (runs); a folder for each stage
#   --stages="A B …"   other configs, such as "configs/digits.py:stage1 configs/digits.py:stage2"
#   anything else      goes to every stage's training, such as --config.model.attention=splash
#
# Environment: LAUNCH (command that takes the flags of pixart_jax.train; default: one process here), PYTHON,
# MAX_RESTARTS (10 starts of a stage after which the recipe gives up).
set -uo pipefail
cd "$(dirname "$0")/.." || exit

python=${PYTHON:-python}
read -ra launch <<<"${LAUNCH:-$python -m pixart_jax.train}"
stages="configs/stage1.py configs/stage2.py configs/stage3.py:256 configs/stage3.py:512 configs/stage3.py:1024"
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
  --plan) plan=1 ;;
  --hardware=* | --rates=* | --price=*) projection+=("$word") ;;
  --runs=*) runs=${word#*=} ;;
  --stages=*) stages=${word#*=} ;;
  *) flags+=("$word") ;;
  esac
done
read -ra stages <<<"$stages"

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

# What is done is noted here, beside the runs or, for runs in a bucket, on this machine.
notes=$runs/.recipe
[[ $runs == *://* ]] && notes=.recipe/${runs//[:\/]/_}
mkdir -p "$notes" || exit

# A signal ends `wait`, not this script: the run saves, and it waits again.
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
    # 69: a process died or hangs. 137: one was killed. Both continue from the newest checkpoint. 75 is the wish
    # of whoever sent the signal, and ends the recipe, too.
    if [[ $status != 69 && $status != 137 ]] || ((attempt >= ${MAX_RESTARTS:-10})); then break; fi
  done
  if ((status)); then
    echo "$name: ended with status $status; the same command continues" >&2
    exit "$status"
  fi
  : >"$notes/$name"
done
