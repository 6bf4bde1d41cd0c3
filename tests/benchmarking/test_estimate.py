"""Compares estimates of excerpts of compiled programs (tests/data/hlo) with sums computed by hand.

`tpu.txt`: two scanned blocks with the width of XL/2 and splash attention for v5e (jax 0.11.2, libtpu 0.0.52).
`gpu.txt`: a scan of 28 products, cuDNN attention and fusions of two blocks, and a cuBLAS call, for an H100
(jax 0.11.2). The instructions are those of the compilers, without the fields that the estimate does not use.
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from pixart_jax.benchmarking import hlo
from pixart_jax.benchmarking.estimate import attention_kernel, estimate_step, find_chip, traffic
from pixart_jax.benchmarking.topology import topology_devices

DATA = Path(__file__).parents[1] / "data" / "hlo"
TPU, GPU = ((DATA / name).read_text() for name in ("tpu.txt", "gpu.txt"))
V5E, H100 = find_chip("TPU v5 lite"), find_chip("NVIDIA H100 80GB HBM3")


def kernels(text):
    """Returns the attention kernels of a program by the name of their instruction."""
    program = hlo.parse(text)
    found = {one.name: attention_kernel(one) for one, _ in hlo.executed(program)}
    return {name: kernel for name, kernel in found.items() if kernel}


# --- TPU ---

# FLOPs of one product of queries and keys, with the head width 72 padded to 128 lanes.
SELF = 2 * 8 * 16 * 1024 * 1024 * 128
# `splash_attention` pads the 120 keys of a caption to 128.
CROSS = 2 * 8 * 16 * 1024 * 128 * 128


def test_groups_of_a_tpu_step():
    estimate = estimate_step(TPU, V5E)
    vector = 1.5e9 * 8 * 128 * 4
    # Softmax has eight operations per logit, and a product has 2 x 128 FLOPs per logit. Each of the two
    # backward kernels computes the softmax again.
    softmax = 8 / vector / (2 * 128)
    expected = {
        "matrix_products": 2 * 159_349 / 1.5e9,
        "self_attention": 2 * 537_760 / 1.5e9 + 2 * SELF * ((2 + 3 + 4) / 197e12 + 3 * softmax),
        "cross_attention": 2 * CROSS * (4 / 197e12 + softmax),
        # The forward pass, and its recomputation in the backward pass.
        "elementwise": 2 * (1_888 + 1_888) / 1.5e9,
        "reductions": (2 * 714_252 + 245_912) / 1.5e9,
        "update": 2_301 / 1.5e9,
        "data_movement": 96_943 / 1.5e9,
        "other": 1_825 / 1.5e9,
    }
    assert estimate.groups == pytest.approx(expected, rel=1e-12)
    assert estimate.seconds == pytest.approx(sum(expected.values()), rel=1e-12)
    assert estimate.left_out == {}
    assert "1.5 GHz" in estimate.assumptions
    assert "head width padded to 128, then 8 vector operations per logit" in estimate.assumptions


def test_a_loop_counts_once_per_iteration():
    """With 28 iterations, both loops take 14 times as long; the rest does not change."""
    once = (1_825 + 96_943 + 245_912 + 2_301) / 1.5e9
    two, many = (estimate_step(TPU.replace("constant(2)", f"constant({n})"), V5E).seconds for n in (2, 28))
    assert many - once == pytest.approx(14 * (two - once), rel=1e-12)


def test_time_in_a_loop_of_unknown_length_raises():
    with pytest.raises(ValueError, match=r"time in a loop of unknown length: %broadcast_multiply_fusion"):
        estimate_step(TPU.replace("constant(2)", "constant(x)"), V5E)


def test_instructions_inside_a_fusion_do_not_count_again():
    inner = "%convolution.226 = bf16[8,1024,2,288,1]"
    assert inner in TPU
    line = next(line for line in TPU.splitlines() if inner in line)
    counted = line + ', backend_config={"window_config":{"estimated_cycles":"1000000"}}'
    assert estimate_step(TPU.replace(line, counted), V5E) == estimate_step(TPU, V5E)


def test_a_kernel_other_than_attention_is_left_out_and_named():
    estimate = estimate_step(TPU.replace("splash_mha_dq", "layer_norm"), V5E)
    assert estimate.left_out == {"tpu_custom_call layer_norm_no_residuals": 2}
    less = 2 * SELF * (3 / 197e12 + 8 / (1.5e9 * 4096) / 256)
    assert estimate.seconds == pytest.approx(estimate_step(TPU, V5E).seconds - less, rel=1e-12)


def test_products_of_the_splash_kernels():
    found = {name: (kernel.flops, kernel.backward) for name, kernel in kernels(TPU).items()}
    assert found == {
        "splash_mha_fwd_residuals.2": (2 * SELF, False),
        "splash_mha_dq_no_residuals.1": (3 * SELF, True),
        "splash_mha_dkv_no_residuals.1": (4 * SELF, True),
        "splash_mha_dkv_segmented_no_residuals.1": (4 * CROSS, True),
    }


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("layout", ["HEAD_DIM_MINOR", "SEQ_MINOR"])
def test_products_of_the_splash_kernels_in_the_installed_jax(fused, layout):
    """Compiled for a TPU, with head width 72, 256 queries and 128 keys, 2 heads and 3 rows."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    side, blocks = getattr(splash.QKVLayout, layout), ("block_q", "block_kv", "block_kv_compute")
    blocks += ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    blocks += () if fused else ("block_q_dq", "block_kv_dq")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.FullMask((256, 128))] * 2),
        block_sizes=splash.BlockSizes(
            **dict.fromkeys(blocks, 128),
            use_fused_bwd_kernel=fused,
            q_layout=side,
            k_layout=side,
            v_layout=side,
        ),
    )
    place = SingleDeviceSharding(topology_devices("v5e:2x2")[0])
    query, key = (jax.ShapeDtypeStruct((3, 2, n, 72), jnp.bfloat16, sharding=place) for n in (256, 128))
    gradient = jax.grad(lambda *args: jax.vmap(kernel)(*args).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    text = jax.jit(gradient).lower(query, key, key).compile().as_text()
    product = 2 * 3 * 2 * 256 * 128 * 128
    found = sorted(kernel.flops / product for kernel in kernels(text).values())
    assert found == ([2, 5] if fused else [2, 3, 4])


# --- GPU ---

BANDWIDTH = 3_352_320_000_000
# Bytes of [4096, 1152] tokens and of the [1152, 1152] weights of a layer, in bfloat16.
TOKENS, WEIGHTS = 4096 * 1152 * 2, 1152 * 1152 * 2


def test_groups_of_a_gpu_step():
    estimate = estimate_step(GPU, H100)
    product = 0.7 * 989e12
    turns = {
        # The scan writes residuals into a stack in place and reads the weights from a stack.
        "data_movement": (TOKENS + 4 + TOKENS) + 2 * (2 * WEIGHTS + 4 + WEIGHTS) + 2 * TOKENS,
        # The derivative of tanh, written into its stack, and the loop counter.
        "other": (TOKENS + 4 + TOKENS) + 8,
    }
    expected = {name: 28 * size / BANDWIDTH for name, size in turns.items()}
    expected |= {
        "matrix_products": 2 * (28 * 4096 * 1152 * 1152 + 8192 * 1152 * 4608 + 4096 * 1152 * 4608) / product,
        # cuDNN does not pad the head width of 72.
        "self_attention": 2 * 2 * 8 * 16 * 1024 * 1024 * 72 / (0.4 * 989e12),
        "cross_attention": 5 * 2 * 8 * 16 * 1024 * 120 * 72 / (0.35 * 989e12),
        # Only one of the two layers' float32 biases is read.
        "elementwise": (2 * 8192 * 1152 * 2 + 2 * 1152 * 4) / BANDWIDTH,
        "reductions": (8 * 1024 * 1152 + 8 * 1152) * 4 / BANDWIDTH,
    }
    assert estimate.groups == pytest.approx(expected, rel=1e-12)
    assert estimate.left_out == {}
    assert "matrix products at 70% of the peak, other instructions at 3.35 TB/s" in estimate.assumptions


def test_a_memory_bound_product_takes_as_long_as_its_bytes():
    """With one contracted channel, the bytes of the result take longer than the arithmetic."""
    text = GPU.replace("bf16[8192,1152]", "bf16[8192,1]").replace("bf16[4608,1152]", "bf16[4608,1]")
    program = hlo.parse(text)
    product = program.computations[program.entry]["gemm_fusion_dot.42"]
    moved = (8192 + 4608 + 8192 * 4608) * 2
    assert traffic(program, product) == moved
    less = 2 * 8192 * 1152 * 4608 / (0.7 * 989e12) - moved / BANDWIDTH
    before, after = (estimate_step(one, H100).groups["matrix_products"] for one in (GPU, text))
    assert before - after == pytest.approx(less, rel=1e-9)


def test_a_product_without_a_name_belongs_to_the_group_of_its_neighbors():
    """For example, a cuBLAS call for the logits has no name, but the softmax after it has one."""
    named = 'custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(<lambda>)/dot_general"}'
    reader = 'get-tuple-element(%custom-call.1), index=0, metadata={op_name="jit(<lambda>)/dot_general"}'
    softmax = '  %softmax = bf16[4096,4608]{1,0} negate(%get-tuple-element.1), metadata={op_name="NAME"}\n}'
    assert named in GPU and reader in GPU and GPU.endswith("}\n")
    text = GPU.replace(named, 'custom_call_target="__cublas$lt$matmul"').replace(
        reader, reader.split(", m")[0]
    )
    text = text.removesuffix("}\n") + softmax.replace(
        "NAME", "jit(step)/jvp(block)/cross_attention/attend/sub"
    )
    product = 2 * 4096 * 1152 * 4608 / (0.7 * 989e12)
    before, after = (estimate_step(one, H100).groups for one in (GPU, text))
    assert before["matrix_products"] - after["matrix_products"] == pytest.approx(product, rel=1e-9)
    read = 2 * 4096 * 4608 * 2 / BANDWIDTH
    assert after["cross_attention"] - before["cross_attention"] == pytest.approx(product + read, rel=1e-9)


def test_a_library_call_other_than_a_product_is_left_out_and_named():
    estimate = estimate_step(GPU.replace("__cublas$lt$matmul", "__cudnn$convForward"), H100)
    assert estimate.left_out == {"__cudnn$convForward": 1}


def test_chips_that_cannot_be_estimated():
    assert find_chip("cpu") is None and find_chip("TPU v3") is None and find_chip("Tesla V100") is None
    assert find_chip("TPU v5").clock == 1.75e9 and find_chip("NVIDIA A100-SXM4-80GB").peak == 312e12


@pytest.mark.parametrize(
    ("kind", "units", "side"), [("v4", 8, 128), ("v5 lite", 4, 128), ("v5", 8, 128), ("v6 lite", 4, 256)]
)
def test_clock_and_peak_of_a_tpu_are_consistent(kind, units, side):
    chip = find_chip(f"TPU {kind}")
    assert chip.peak == pytest.approx(units * side**2 * 2 * chip.clock, rel=2e-3)
