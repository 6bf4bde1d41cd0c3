# shellcheck shell=bash
# The settings of XLA, libtpu and NCCL that matter, each with its reason. Sourced by the other scripts:
#
#     . launch/flags.sh tpu|gpu|cpu
#
# What the caller has set comes after ours, and the last of two equal flags wins. Every flag is known to the
# versions in requirements.txt (tests/test_launch.py asks the compilers). None was timed here: that takes
# the hardware, and `python -m pixart_jax.benchmark train` before and after.

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
  flags=(
    # Starts a collective as early and waits for it as late as the data allow, under the matrix products.
    --xla_gpu_enable_latency_hiding_scheduler=true
    # FSDP: gathers the weights of the next block one turn of the layer loop before they are used,
    --xla_gpu_enable_pipelined_all_gather=true
    # and scatters the gradients of a block one turn after they are computed.
    --xla_gpu_enable_pipelined_reduce_scatter=true
    # Two turns of the layer loop make one, so that what is gathered for one does not overwrite the other's.
    --xla_gpu_enable_while_loop_double_buffering=true
    # One message for the weights of a block (XL/2: 43 MB in bfloat16), not one for each of its arrays.
    --xla_gpu_all_gather_combine_threshold_bytes=134217728
    # Likewise its gradients where they are sharded (fsdp),
    --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
    # and where they are whole on every device (data).
    --xla_gpu_all_reduce_combine_threshold_bytes=134217728
    # Matrix products by cuBLAS: Triton finds no tiles for the full XL/2 step ('Couldn't find output tile sizes').
    --xla_gpu_enable_triton_gemm=false
    # A process whose peer is gone ends, and the scheduler starts all of them again; else it waits for ever.
    --xla_gpu_nccl_terminate_on_error=true
  )
  export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
  # JAX takes three quarters of a GPU unless told; the rest here is for NCCL's buffers and CUDA itself.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
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
