#!/usr/bin/env bash
# Trains on TPU VMs (all hosts of one slice) and restarts after preemptions.
#
#     export PROJECT=my-project ZONE=us-west4-a TYPE=v5litepod-256 NAME=pixart
#     launch/tpu_vm.sh train --config=configs/stage2.py --workdir=gs://my-bucket/runs/stage2
#
#   create            requests the slice and waits until it is ready
#   install           copies this folder to all hosts and installs it
#   run [flags]       trains on all hosts; exits with the status of the run
#   train [flags]     repeats create, install and run until the run is complete
#   delete            deletes the slice
#
# The run directory must be in a bucket: the hosts' disks are deleted with the slice. The same command resumes the run.
#
#   SPOT=1        use cheaper slices that can be preempted (default 1; 0 for on demand)
#   RUNTIME       image of the VMs (default: by TYPE)
#   MAX_RESTARTS  `train` gives up after this many restarts (default: 100)
set -uo pipefail
cd "$(dirname "$0")/.." || exit

: "${PROJECT:?}" "${ZONE:?}" "${TYPE:?such as v5litepod-16, v6e-64, v5p-128, v4-32}" "${NAME:=pixart}"
case $TYPE in
v6e-*) runtime=v2-alpha-tpuv6e ;;
v5p-*) runtime=v2-alpha-tpuv5 ;;
v5lite*) runtime=v2-alpha-tpuv5-lite ;;
*) runtime=tpu-ubuntu2204-base ;;
esac
runtime=${RUNTIME:-$runtime}
where=(--project="$PROJECT" --zone="$ZONE" --quiet)

state() { # state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, FAILED, …; NONE without one
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || echo NONE
}

delete() {
  # --force also deletes the VMs. A preempted slice must be deleted before a new one can be created.
  [[ $(state) == NONE ]] || gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force
}

create() {
  local spot=()
  [[ ${SPOT:-1} == 0 ]] || spot=(--spot)
  case $(state) in
  ACTIVE) return ;;
  SUSPEND* | FAILED) delete || return ;;
  esac
  if [[ $(state) == NONE ]]; then
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version="$runtime" "${spot[@]}" || return
  fi
  echo "waiting for $TYPE in $ZONE"
  while true; do
    case $(state) in
    ACTIVE) return ;;
    SUSPEND* | FAILED | NONE) return 69 ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

on_all() { # runs a command on all hosts at once
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

install() { # includes the packages that access a bucket: gcsfs for paths, google-cloud-storage for TensorBoard
  local archive
  archive=$(mktemp --suffix=.tgz) || return
  git archive --format=tgz --prefix=pixart_jax/ --output="$archive" HEAD &&
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:/tmp/pixart_jax.tgz" "${where[@]}" --worker=all &&
    on_all "tar -xzf /tmp/pixart_jax.tgz -C \$HOME && cd \$HOME/pixart_jax && python3 -m venv .venv && \
.venv/bin/pip install --quiet --editable '.[tpu]' gcsfs google-cloud-storage --constraint requirements.txt"
  local status=$?
  rm -f "$archive"
  return "$status"
}

run() {
  # On a TPU VM, JAX finds the other hosts by itself. launch/flags.sh explains its settings.
  on_all "cd \$HOME/pixart_jax && . launch/flags.sh tpu && .venv/bin/python -m pixart_jax.train ${*@Q}"
}

train() {
  local status=1 start
  for ((start = 0; start <= ${MAX_RESTARTS:-100}; start++)); do
    create && install && run "$@"
    status=$?
    case $status in
    # The run is complete, or another start would fail in the same way: an input error, a diverged loss, a full disk.
    # The same is true of status 1, a bug in this project, unless the slice is gone.
    0 | 2 | 65 | 74) return "$status" ;;
    1) [[ $(state) == ACTIVE ]] && return 1 ;;
    esac
    # 75: a host received a stop signal, and all hosts saved. 69: a host was lost. 255: the connection was lost.
    echo "status $status, slice $(state): starting again"
    sleep "${POLL_SECONDS:-30}"
  done
  return "$status"
}

case ${1:-} in
create | install | delete) "$1" ;;
run | train) "$@" ;;
*)
  sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
  exit 2
  ;;
esac
