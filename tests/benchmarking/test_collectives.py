import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pixart_jax.benchmarking.collectives import count_collectives
from pixart_jax.config import MeshConfig
from pixart_jax.training import sharding

# Like a program for a TPU: a loop without an annotated trip count, and one gather split over two fusions.
TPU = """
HloModule jit_step, is_scheduled=true

%fused.1 (p: bf16[8,16]) -> bf16[128,16] {
  ROOT %all-gather.1 = bf16[128,16]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%fused.2 (p: bf16[8,16]) -> bf16[128,16] {
  ROOT %all-gather.2 = bf16[128,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={0}
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %a = bf16[128,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.1
  %b = bf16[128,16]{1,0} fusion(%x), kind=kCustom, calls=%fused.2
  %r = (f32[4]{0}, /*index=1*/bf16[3]{0}) all-reduce(%y, %z), channel_id=8, to_apply=%add
}

%condition (state: (s32[], f32[4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (p0: f32[4]) -> f32[4] {
  %w = (s32[], f32[4]) while(%t), condition=%condition, body=%body
  %s = (f32[2,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) all-gather-start(%q), channel_id=9, dimensions={0}
  %d = f32[8,4]{1,0} all-gather-done(%s)
  %c = pred[6]{0} collective-permute(%m), source_target_pairs={{0,1}}
}
"""


def test_a_collective_counts_once_per_iteration_and_channel():
    assert count_collectives(textwrap.dedent(TPU)) == {
        "all-gather": {"count": 29, "bytes": 28 * 128 * 16 * 2 + 8 * 4 * 4},
        "all-reduce": {"count": 28, "bytes": 28 * (4 * 4 + 3 * 2)},
        "collective-permute": {"count": 1, "bytes": 6},
    }


def test_a_collective_in_a_loop_of_unknown_length_raises():
    endless = TPU.replace("constant(28)", "parameter(0)")
    with pytest.raises(ValueError, match=r"loop of unknown length: .*channel_id"):
        count_collectives(endless)
    # The length of a loop without collectives does not matter.
    assert "all-reduce" not in count_collectives(endless.replace("body=%body", "body=%condition"))


def test_text_that_is_not_hlo_raises():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        count_collectives("HloModule nothing")


def test_collectives_of_a_compiled_loop():
    """Three iterations that each gather a sharded matrix, and the sum of a scalar over all devices."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    whole = sharding.replicated(mesh)

    def run(x, w):
        def turn(x, w):
            return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

        return jnp.sum(jax.lax.scan(turn, x, w)[0])

    def abstract(shape, *axes):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, P(*axes)))

    weights = abstract((3, 8, 8), None, "fsdp", None)
    compiled = jax.jit(run, out_shardings=whole).lower(abstract((16, 8), "fsdp"), weights).compile()
    counts = count_collectives(compiled.as_text())
    assert counts["all-gather"] == {"count": 3, "bytes": 3 * 8 * 8 * 4}
    assert counts["all-reduce"] == {"count": 1, "bytes": 4}
