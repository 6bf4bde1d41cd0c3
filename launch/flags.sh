# shellcheck shell=bash
# The settings of libtpu, NCCL and gloo for runs on several devices, each with its reason. Sourced by the other
# scripts:
#
#     . launch/flags.sh tpu|gpu|cpu
#
# What the caller has set comes after ours, and the last of two equal flags wins. None was timed here: that
# takes the hardware, and `python -m pixart_jax.benchmark train` before and after.

# A restarted run loads its compiled step instead of waiting minutes for it.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/pixart_jax}"

case "${1:?usage: . launch/flags.sh tpu|gpu|cpu}" in
tpu)
  flags=(
    # Sums the gradients of replicas (mesh.data) while the backward pass of earlier blocks runs, instead of after it;
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    # and does so although our arrays differ in size (kernels, biases, tables).
    --xla_tpu_data_parallel_opt_different_sized_ops=true
    # FSDP: gathers the weights of the next products while the present ones are computed.
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
    # Lets those gathers and the matrix unit run at the same time.
    --xla_tpu_overlap_compute_collective_tc=true
  )
  export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
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
unset flags
