import dataclasses
import importlib.util
import json

import jax
import pytest

from pixart_jax.benchmarking import compile
from pixart_jax.benchmarking.compile import Fit, check, largest_rows, summary
from pixart_jax.benchmarking.estimate import Chip, Estimate
from pixart_jax.benchmarking.flops import stage_flops
from pixart_jax.benchmarking.topology import CUDA_PLUGINS, topology_devices
from pixart_jax.config import (
    DataConfig,
    FeaturesConfig,
    MeshConfig,
    OptimizerConfig,
    RoutingConfig,
    TrainConfig,
)
from pixart_jax.errors import UserError
from pixart_jax.models.attention import target_platform
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import init_networks, new_state

STAGE = TrainConfig(
    name="tiny",
    model=PixArtConfig(
        size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5, base_size=4
    ),
    features=FeaturesConfig(image_size=64, text_length=5),
    data=DataConfig(batch_size=32),
    mesh=MeshConfig(data=-1, fsdp=-1, tensor=-1),
)


def with_accumulation(parts):
    return dataclasses.replace(STAGE, optimizer=OptimizerConfig(accumulation=parts))


@pytest.fixture(scope="module")
def report():
    return check(STAGE, "cpu:8", memory_gib=4, search=False)


def test_the_report_of_a_small_step(report):
    assert report["mesh"] == {"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}
    assert report["fits"] and 0 < report["peak"] < report["limit_bytes"]
    assert (report["batch_size"], report["rows"], report["accumulation"]) == (32, 4, 1)
    # Sharded parameters are gathered in the loop over two layers, forward and backward.
    assert report["collectives"]["all-gather"]["count"] > 4
    assert json.loads(json.dumps(report)) == report


def test_arguments_are_the_share_of_a_device_of_state_and_batch(report):
    optimizer = make_optimizer(STAGE.optimizer, 32)
    objective = make_objective(STAGE)
    state = jax.eval_shape(
        lambda: new_state(init_networks(objective, jax.random.key(0)), objective, optimizer)
    )
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    row = 2 * 8 * 8 * 4 * 4 + 5 * 8 * 2 + 5 + 4 + (0 if not STAGE.model.size_conditions else 12)
    share = whole / 8 + 4 * row
    # Some biases and the null caption are replicated.
    assert share < report["arguments"] < 1.5 * share


def test_the_summary_has_devices_mesh_memory_and_collectives(report):
    text = summary(report)
    memory = "of 4.00 GiB per device: fits"
    for part in ("tiny on cpu:8: 8 x cpu", "mesh fsdp=8", memory, "all-gather", "TFLOP per step"):
        assert part in text
    assert "DOES NOT FIT" in summary({**report, "fits": False})


def test_every_key_of_an_estimate_contains_the_word(monkeypatch):
    """4 images per device in 10 ms, on a chip of 1 TFLOP/s."""
    made = Estimate(0.01, {"matrix_products": 0.008, "other": 0.002}, {"tpu_custom_call": 3}, "nothing")
    monkeypatch.setattr(compile, "find_chip", lambda kind: Chip(1e12, clock=1e9))
    monkeypatch.setattr(compile, "estimate_step", lambda text, chip: made)
    stage = dataclasses.replace(STAGE, model=dataclasses.replace(STAGE.model, dtype="bfloat16"))
    report = check(stage, "cpu:8", memory_gib=4, search=False)
    found = {name: value for name, value in report.items() if name.startswith("estimate")}
    share = report["flops_per_step"] / 8 / 0.01 / 1e12
    assert found == {
        "estimated_seconds": 0.01,
        "estimated_seconds_by_group": {"matrix_products": 0.008, "other": 0.002},
        "estimated_images_per_second_and_device": pytest.approx(400),
        "estimated_share_of_datasheet_peak": pytest.approx(share),
        "estimate_assumes": "nothing",
        "estimate_leaves_out": {"tpu_custom_call": 3},
    }
    assert report["flops_per_step"] == 32 * stage_flops(stage)
    text = summary(report)
    assert (
        f"10.0 ms per step, 400.0 img/s per device, {share:.1%} of the datasheet's peak: estimated, not"
        in text
    )
    assert "matrix products 80%, other 20%" in text and "leaves out tpu_custom_call x 3" in text
    assert json.loads(json.dumps(report)) == report
    # The peak is for bfloat16, so there is no share in float32.
    assert check(STAGE, "cpu:8", search=False)["estimated_share_of_datasheet_peak"] is None


def test_a_cpu_has_no_estimate(report):
    assert not [name for name in report if name.startswith("estimate")]
    assert "estimate" not in summary(report)


def test_flops_of_a_report_depend_on_routing():
    routed = dataclasses.replace(STAGE, routing=RoutingConfig(rate=0.5, first_blocks=0, last_blocks=0))
    report = check(routed, "cpu:8", search=False)
    assert report["flops_per_step"] == 32 * stage_flops(routed) < 32 * stage_flops(STAGE)


def test_a_step_that_needs_too_much_memory_does_not_fit():
    report = check(STAGE, "cpu:8", memory_gib=1e-6, search=False)
    assert not report["fits"] and report["peak"] > report["limit_bytes"]


def test_a_search_finds_the_accumulation(monkeypatch):
    """The fake step needs 100 bytes plus 10 bytes per row, on devices with 200 bytes."""
    tried = []

    def measure(config, mesh, limit):
        rows = config.data.batch_size // 8 // config.optimizer.accumulation
        tried.append((rows, config.optimizer.accumulation))
        needed = 100 + 10 * rows
        return Fit(needed <= limit, needed, 1, 1, needed, 0.0, {})

    monkeypatch.setattr(compile, "try_fit", measure)
    stage = dataclasses.replace(STAGE, data=DataConfig(batch_size=8 * 24))
    report = check(stage, "cpu:8", memory_gib=200 / 2**30)
    assert not report["fits"] and report["needed"] == 340
    assert report["largest_rows"] == 10 and report["largest_batch"] == 80
    # 24 rows: 12 rows do not fit, 8 rows do.
    assert report["accumulation_needed"] == 3
    assert len(tried) < 6
    assert "accumulation  3 for a batch of 192" in summary(report)


@pytest.mark.parametrize("start", [1, 7, 64])
@pytest.mark.parametrize("truth", [0, 1, 2, 13, 500])
def test_the_largest_batch_is_found_to_within_an_eighth(start, truth):
    def measure(rows):
        # Not exactly linear.
        needed = 50 + rows * 10 + (rows % 3) * 2
        fits = rows <= truth
        return Fit(fits, needed, 0, 0, needed, 0.0, {})

    found, trials = largest_rows(measure, measure(start), start, limit=50 + 10 * truth)
    assert truth - max(1, truth // 8) <= found <= truth
    assert len(trials) < 12


def test_a_batch_that_cannot_be_divided_raises():
    stage = dataclasses.replace(STAGE, mesh=MeshConfig(data=1, fsdp=8), data=DataConfig(batch_size=12))
    with pytest.raises(UserError, match="12 cannot be divided among 8 devices"):
        check(stage, "cpu:8", search=False)


def test_the_batch_of_each_kind_of_model():
    from pixart_jax.training import sharding

    mesh = sharding.make_mesh(MeshConfig(), devices=topology_devices("cpu:8"))
    batch = compile.abstract_batch(STAGE, mesh)
    assert batch["latent_mean"].shape == (32, 8, 8, 4)
    assert batch["text"].shape == (32, 5, 8) and batch["text"].dtype == "bfloat16"
    model = DiTConfig(size="custom", depth=1, hidden_size=24, num_heads=2)
    features = dataclasses.replace(STAGE.features, text=False, codec="pixels", image_size=8)
    batch = compile.abstract_batch(dataclasses.replace(STAGE, model=model, features=features), mesh)
    assert batch["label"].shape == (32,) and "text" not in batch
    assert batch["latent_mean"].shape == (32, 8, 8, 4)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(22.17G) exceeds available HBM (15.75G).",
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
        "22.17G of 15.75G hbm. Exceeded hbm capacity by 6.42G.",
    ],
)
def test_the_needed_memory_is_parsed_from_the_message_of_the_compiler(message):
    assert compile._needed(message) == int(22.17 * 2**30)


# libtpu takes 660 MB, so it is in the extra 'tpu' and not in 'test'. These tests run if it is installed.
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra 'tpu'")


@needs_libtpu
def test_a_tpu_step_compiles_without_a_tpu():
    stage = dataclasses.replace(STAGE, model=dataclasses.replace(STAGE.model, dtype="bfloat16", remat="full"))
    report = check(stage, "v5e:2x2", search=False)
    assert report["device_kind"] == "TPU v5 lite" and report["devices"] == 4
    assert 15 * 2**30 < report["limit_bytes"] < 16 * 2**30
    assert report["fits"] and report["collectives"]
    groups = report["estimated_seconds_by_group"]
    assert (
        sum(groups.values()) == pytest.approx(report["estimated_seconds"]) and groups["matrix_products"] > 0
    )
    assert report["estimate_assumes"].startswith("the compiler's cycles at 1.5 GHz")


@needs_libtpu
def test_the_tpu_compiler_rejects_a_step_that_is_too_large():
    stage = dataclasses.replace(STAGE, data=DataConfig(batch_size=2**20))
    report = check(stage, "v5e:2x2", search=False)
    assert not report["fits"] and report["peak"] is None
    assert report["needed"] > report["limit_bytes"]
    assert "memory" in report["refusal"]


@needs_libtpu
def test_data_spans_tpu_slices():
    stage = dataclasses.replace(STAGE, mesh=MeshConfig(data=-1, fsdp=4, slices=2))
    devices = topology_devices("v5e:2x2", 2)
    mesh = compile.sharding.make_mesh(stage.mesh, stage, devices)
    assert mesh.shape["data"] == 2
    assert [{device.slice_index for device in grid.flat} for grid in mesh.devices] == [{0}, {1}]


@needs_libtpu
def test_a_tpu_step_with_splash_attention_compiles_on_a_cpu():
    with target_platform("tpu"):
        model = dataclasses.replace(STAGE.model, hidden_size=144, attention="splash", dtype="bfloat16")
        report = check(dataclasses.replace(STAGE, model=model), "v5e:2x2", search=False)
    assert report["fits"] and report["attention"] == "splash"
    assert "splash attention: products at the peak" in report["estimate_assumes"]
    assert not report["estimate_leaves_out"]


needs_cuda_plugin = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, CUDA_PLUGINS)), reason="needs the extra 'cuda'"
)


@needs_cuda_plugin
def test_a_gpu_step_with_cudnn_attention_compiles_on_a_cpu():
    with target_platform("gpu"):
        model = dataclasses.replace(STAGE.model, hidden_size=144, attention="cudnn", dtype="bfloat16")
        report = check(dataclasses.replace(STAGE, model=model), "h100:1", search=False)
    assert report["fits"] and report["limit_bytes"] == 84_942_979_072
    assert "cudnn attention at 40% of the peak" in report["estimate_assumes"]
    assert not report["estimate_leaves_out"]
    assert report["estimated_seconds_by_group"]["cross_attention"] > 0


@needs_cuda_plugin
def test_a_gpu_step_without_cudnn_compiles_on_a_cpu():
    """With the width of XL/2, for which Triton cannot tile some products before jaxlib 0.11."""
    shape = dict(size="custom", depth=1, hidden_size=1152, num_heads=16, remat="dots")
    stage = dataclasses.replace(
        STAGE,
        model=PixArtConfig(**shape, dtype="bfloat16"),
        features=FeaturesConfig(image_size=512),
        data=DataConfig(batch_size=16),
    )
    report = check(stage, "h100:1", search=False)
    assert report["fits"] and not report["estimate_leaves_out"]
    # Matrix products alone are assumed to take longer than at the full peak.
    assert report["estimated_share_of_datasheet_peak"] < 0.7
