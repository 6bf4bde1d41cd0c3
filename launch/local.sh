#!/usr/bin/env bash
# Starts N processes of one run on this machine.
#
#     launch/local.sh 2 --config=configs/digits.py:stage2 --workdir=runs/stage2
#     ACCELERATOR=gpu launch/local.sh 8 --config=configs/stage3.py:512 --workdir=runs/stage3-512
#
# On a CPU, use this to try out what will run on a cluster. On GPUs, each process gets an equal share of the GPUs. A
# single process can also use all GPUs (plain `python -m pixart_jax.train`), but several use more cores to read data.
# The script exits with the status of the failed process with the lowest index. It passes SIGTERM and Ctrl-C on to all.
#
#   PYTHON       Python interpreter (default: python)
#   ACCELERATOR  cpu (default) or gpu
#   PORT         port on which the other processes reach process 0 (default: a free one)
set -uo pipefail
cd "$(dirname "$0")/.." || exit

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh PROCESSES [flags of pixart_jax.train]" >&2
  exit 2
fi
count=$1
shift
python=${PYTHON:-python}
accelerator=${ACCELERATOR:-cpu}
# Settings of NCCL and gloo, with the reason for each.
. launch/flags.sh "$accelerator" || exit
port=${PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])')}

gpus=()
if [[ $accelerator == gpu ]]; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader)
  if ((${#gpus[@]} == 0 || ${#gpus[@]} % count)); then
    echo "launch/local.sh: cannot divide ${#gpus[@]} GPUs evenly over $count processes" >&2
    exit 2
  fi
fi

pids=()
for ((i = 0; i < count; i++)); do
  if ((${#gpus[@]})); then
    share=$((${#gpus[@]} / count))
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:i * share:share}")
    export CUDA_VISIBLE_DEVICES
  fi
  "$python" -m pixart_jax.train --coordinator="localhost:$port" --num_processes="$count" --process_id="$i" "$@" &
  pids+=($!)
done

# A signal only interrupts `wait`: the script then waits again while the processes save.
trap 'signalled=1; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
status=0
for pid in "${pids[@]}"; do
  while true; do
    signalled=
    wait "$pid"
    ended=$?
    [[ $signalled ]] || break
  done
  ((status)) || status=$ended
done
exit "$status"
