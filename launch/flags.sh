# shellcheck shell=bash
# Settings of NCCL and gloo for runs on several devices, with the reason for each. The other scripts source
# this file:
#
#     . launch/flags.sh tpu|gpu|cpu
#
# Values that the caller has already set are kept. The effect on speed has not been measured. To measure it
# on your hardware, run `python -m pixart_jax.benchmark train` with and without a setting.

# Lets a restarted run load its compiled step instead of compiling it for minutes.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/pixart_jax}"

case "${1:?usage: . launch/flags.sh tpu|gpu|cpu}" in
tpu)
  # Nothing to set: pixart_jax/training/settings.py sets libtpu's flags, with or without this file.
  ;;
gpu)
  # pixart_jax/training/settings.py sets XLA's flags and the memory fraction, with or without this file.
  # With this, errors include the name of the host and the network card.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # InfiniBand timeout, as a power of two (22: about 17 s per try, longer than NCCL's default), so that a
  # short network failure does not end the run.
  export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
  ;;
cpu)
  # The processes of one machine communicate over sockets.
  export JAX_CPU_COLLECTIVES_IMPLEMENTATION="${JAX_CPU_COLLECTIVES_IMPLEMENTATION:-gloo}"
  export JAX_PLATFORMS=cpu
  ;;
*)
  echo "launch/flags.sh: accelerator '$1' is unknown: choose tpu, gpu or cpu" >&2
  return 2
  ;;
esac
