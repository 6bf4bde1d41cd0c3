import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import scripts
from flax import nnx

from pixart_jax.benchmark import Flags, main
from pixart_jax.benchmarking import fit
from pixart_jax.benchmarking.fit import Memory, Plan, fastest, plans, report, storages, summary
from pixart_jax.benchmarking.topology import GIB
from pixart_jax.config import (
    AlignmentConfig,
    DataConfig,
    FeaturesConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    to_config_dict,
)
from pixart_jax.errors import UserError
from pixart_jax.models.activations import projector_bytes
from pixart_jax.models.attention import target_platform
from pixart_jax.models.configs import AdapterConfig, PixArtConfig
from pixart_jax.models.projector import Projector
from pixart_jax.training.objectives.alignment import projection_loss

ROOT = Path(__file__).parents[2]
TINY = TrainConfig(
    name="tiny",
    model=PixArtConfig(
        size="custom", depth=2, hidden_size=32, num_heads=2, text_dim=8, text_length=5, base_size=4
    ),
    features=FeaturesConfig(image_size=64, text_length=5),
    data=DataConfig(batch_size=12),
    mesh=MeshConfig(data=1),
)
LORA = dataclasses.replace(
    TINY,
    adapter=AdapterConfig(kind="lora", rank=4, alpha=4.0, targets="attention+mlp"),
    init=InitConfig(method="weights", path="absent"),
)


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


# --- Memory of the state --------------------------------------------------------------------------


def test_the_state_on_the_device():
    """Float32 weights, average and two moments; what is on the host is not on the device."""
    whole = Memory.of(TINY)
    assert whole.frozen < 1000 and whole.rest == pytest.approx(3 * whole.trained, abs=100)
    assert (whole.fetched, whole.average, whole.ranks) == (0, 0, 0)
    low = dataclasses.replace(TINY, optimizer=OptimizerConfig(ema_device="host", offload=True))
    low = Memory.of(low)
    assert low.state == pytest.approx(whole.trained, rel=0.01)
    assert low.average == whole.trained
    assert low.fetched == pytest.approx(2 * whole.trained, abs=100)


def test_adapters_of_another_rank():
    """A block has ten adapters: three for query, key and value, two for those of the text, five others."""
    memory = Memory.of(LORA)
    assert memory.ranks == 10 * 4
    rank = dataclasses.replace(LORA, adapter=dataclasses.replace(LORA.adapter, rank=12, alpha=12.0))
    found, expected = memory.scaled(3), Memory.of(rank)
    assert (found.frozen, found.trained, found.ranks) == (expected.frozen, expected.trained, expected.ranks)
    assert found.rest == pytest.approx(expected.rest, abs=100)


# --- Memory of a step -----------------------------------------------------------------------------


@functools.cache
def benchmark():
    return scripts.imported("benchmarks/activation_memory.py")


PROGRAMS = json.loads((ROOT / "benchmarks/results/activation_memory.json").read_text())["programs"]


@functools.cache
def memory_of(name, pixels, fields):
    return Memory.of(benchmark().case_config(name, pixels, 1, 1, "dots", dict(fields)))


@pytest.mark.parametrize("case", PROGRAMS, ids=lambda case: "-".join(map(str, list(case.values())[:5])))
def test_the_estimates_are_those_of_the_compiler_for_an_h100(case):
    """The peak of a step of XL/2 in bfloat16 with cuDNN's attention, within 8 %."""
    with target_platform("gpu"):
        values = [case[name] for name in ("config", "pixels", "rows", "accumulation", "remat", "fields")]
        config = benchmark().case_config(*values)
        config = dataclasses.replace(config, log=dataclasses.replace(config.log, sample_every=0))
        memory = memory_of(case["config"], case["pixels"], tuple(case["fields"].items()))
        peak = memory.peak(config, case["rows"], case["accumulation"])
    assert 0.92 < peak / case["peak"] < 1.08


def test_the_projector_counts(capsys):
    """What its gradient keeps is what the compiler keeps, apart from its parameters and inputs."""
    aligned = dataclasses.replace(
        TINY,
        objective="alignment",
        features=dataclasses.replace(TINY.features, image_encoder="dinov2"),
        alignment=AlignmentConfig(block=1, width=64, target_width=32),
        log=LogConfig(sample_every=0),
    )
    plain = dataclasses.replace(aligned, objective="diffusion")
    memory = Memory.of(aligned)
    assert memory.trained - Memory.of(plain).trained == 4 * (33 * 64 + 65 * 64 + 65 * 32)
    projector = Projector(32, 64, 32, dtype=jnp.float32, rngs=nnx.Rngs(0))
    graph, state = nnx.split(projector)
    tokens, target = jnp.ones((2, 16, 32)), jnp.ones((2, 16, 32), jnp.bfloat16)
    jax.ad_checkpoint.print_saved_residuals(
        lambda tokens: projection_loss(nnx.merge(graph, state)(tokens), target).sum(), tokens
    )
    kept = sum(
        4 * math.prod(map(int, shape.split(",")))
        for shape in re.findall(r"^f32\[([\d,]+)\]", capsys.readouterr().out, re.MULTILINE)
        if shape.startswith("2,16")
    )
    assert projector_bytes(aligned.model, (8, 8), 2, 64, 32) == pytest.approx(kept, rel=0.3)
    assert memory.peak(aligned, 64, 1) > memory.peak(plain, 64, 1) + 16 * kept


def test_sample_images_count():
    """At 1024 px the VAE needs more than the step of a small network."""
    quiet = dataclasses.replace(TINY, log=LogConfig(sample_every=0))
    large = {"features": dataclasses.replace(TINY.features, image_size=1024)}
    memory = Memory.of(TINY)
    peaks = [memory.peak(dataclasses.replace(config, **large), 1, 1) for config in (quiet, TINY)]
    assert peaks[1] - peaks[0] > 4e9


# --- Plans ----------------------------------------------------------------------------------------


def test_storages_add_up_and_do_not_repeat_the_config():
    names = [settings for settings, _ in storages(TINY)]
    host = {"optimizer.ema_device": "host"}
    assert names == [{}, host, {**host, "optimizer.offload": True}]
    for settings, config in storages(TINY):
        assert config.optimizer.on_host == ("ema", "optimizer")[: len(settings)]
    int8 = {"adapter.base_dtype": "int8"}
    assert [settings for settings, _ in storages(LORA)] == [{}, int8]
    done = dataclasses.replace(LORA, adapter=dataclasses.replace(LORA.adapter, base_dtype="int8"))
    assert [settings for settings, _ in storages(done)] == [{}]


@pytest.mark.parametrize("stage", [TINY, LORA])
def test_a_plan_is_the_largest_that_fits(stage):
    stage = dataclasses.replace(stage, log=LogConfig(sample_every=0))
    limit = Memory.of(stage).peak(stage, 3, 4)
    for plan, config in plans(stage, limit):
        memory = Memory.of(config)
        assert memory.state == plan.state
        assert config.optimizer.accumulation == plan.settings["optimizer.accumulation"] == (plan.parts or 12)
        assert config.model.remat == plan.settings["model.remat"]
        assert memory.peak(config, plan.largest, 1) <= limit < memory.peak(config, plan.largest + 1, 1)
        rows = 12 // plan.parts
        assert plan.peak == memory.peak(config, rows, plan.parts) <= limit
        fewer = max((parts for parts in (1, 2, 3, 4, 6, 12) if parts < plan.parts), default=None)
        assert fewer is None or memory.peak(config, 12 // fewer, fewer) > limit
        if stage is LORA:
            scaled = memory.scaled(plan.largest_rank / 4)
            assert scaled.peak(config, rows, plan.parts) <= limit
    assert all(plan.parts is None and plan.largest == 0 for plan, _ in plans(stage, 1000))


def test_the_fastest_plan_fits_the_batch_or_keeps_a_gpu_busy(monkeypatch):
    def plan(parts):
        return Plan({}, 0, 0, parts, 0)

    monkeypatch.setattr(fit, "ENOUGH_TOKENS", 16 * 6)  # 6 of 12 images of 4 x 4 tokens
    assert fastest([plan(3), plan(2), plan(1)], TINY) == 1
    assert fastest([plan(None), plan(12), plan(3)], TINY) == 2
    assert fastest([plan(None), plan(4), plan(4)], TINY) == 1
    assert fastest([plan(None), plan(None)], TINY) is None


# --- Reports --------------------------------------------------------------------------------------


def test_the_report_names_the_flags_and_what_sampling_needs():
    result = report(LORA, memory_gib=1)
    assert json.loads(json.dumps(result)) == result
    assert result["limit_bytes"] == int(0.9 * GIB) and result["fits"]
    text = summary(result)
    assert "train with --config.model.remat=none --config.optimizer.accumulation=1" in text
    assert "--config.adapter.base_dtype=int8" in text and "largest rank" in text
    kinds = {(plan["weights_dtype"], plan["text_weights_dtype"]): plan for plan in result["sampling"]}
    xxl = kinds["float32", "auto"]["text_encoder"]
    assert xxl == pytest.approx(9.52e9, rel=0.01)
    assert kinds["float32", "int8"]["text_encoder"] == pytest.approx(5.9e9, rel=0.02)
    assert kinds["float32", "auto"]["peak"] > xxl and kinds["float32", "auto"]["largest_batch"] == 0


def test_the_chosen_plan_is_compiled():
    result = report(TINY, memory_gib=1, topology="cpu:1")
    compiled = result["compiled"]
    assert compiled["fits"] and 0 < compiled["needed"] < result["limit_bytes"]
    assert "compiled for cpu:1" in summary(result)
    with pytest.raises(UserError, match="has 8 devices: fit plans for one"):
        report(TINY, memory_gib=1, topology="cpu:8")


def test_the_command(capsys, tmp_path):
    config = to_config_dict(TINY)
    with pytest.raises(UserError, match="--memory_gib is missing: give the memory of the GPU"):
        main(Flags(words=("fit",), config=config))
    assert main(Flags(words=("fit",), config=config, memory_gib=1.0, out=str(tmp_path / "a.json"))) == 0
    assert json.loads((tmp_path / "a.json").read_text())["stage"] == "tiny"
    assert main(Flags(words=("fit",), config=config, memory_gib=1e-3)) == 1
    assert "does not fit: use a smaller image size, adapters" in capsys.readouterr().out
