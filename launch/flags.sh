# shellcheck shell=bash
# The settings of NCCL and gloo for runs on several devices, each with its reason. Sourced by the other
# scripts:
#
#     . launch/flags.sh tpu|gpu|cpu
#
# What the caller has set is left as it is. None was timed here: that takes the hardware, and
# `python -m pixart_jax.benchmark train` before and after.

# A restarted run loads its compiled step instead of waiting minutes for it.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/pixart_jax}"

case "${1:?usage: . launch/flags.sh tpu|gpu|cpu}" in
tpu)
  # pixart_jax/training/settings.py sets libtpu's flags with or without this file.
  ;;
gpu)
  # XLA's flags and the memory fraction: pixart_jax/training/settings.py sets them with or without this file.
  # Errors come with the name of the host and the network card.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # A lost link is given up after seconds times this power of two (22: about 17 s a try), not tried for hours.
  export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
  ;;
cpu)
  # The processes of one machine talk over sockets.
  export JAX_CPU_COLLECTIVES_IMPLEMENTATION="${JAX_CPU_COLLECTIVES_IMPLEMENTATION:-gloo}"
  export JAX_PLATFORMS=cpu
  ;;
*)
  echo "launch/flags.sh: '$1' is unknown: tpu, gpu or cpu" >&2
  return 2
  ;;
esac
