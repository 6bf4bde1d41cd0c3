import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from feature_folders import SQUARE, keys, make_record, write_folder

from pixart_jax.benchmarking import throughput
from pixart_jax.benchmarking.flops import forward_flops, train_flops
from pixart_jax.config import DataConfig, FeaturesConfig, MeshConfig, TrainConfig
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig

SHAPE = dict(size="custom", depth=2, hidden_size=24, num_heads=2)
CONFIG = TrainConfig(
    name="tiny",
    model=PixArtConfig(**SHAPE, text_dim=8, text_length=5),
    features=FeaturesConfig(image_size=32, text_length=5),
    data=DataConfig(batch_size=8),
    mesh=MeshConfig(data=2, fsdp=4),
)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setattr(throughput, "matrix_peak", lambda dtype: {"flops_per_second": 1e12})


def check(result, flops_per_image):
    """Checks that the figures of a report are consistent, after a round trip through JSON."""
    result = json.loads(json.dumps(result))
    seconds = result["seconds"]
    assert 0 < seconds["fastest"] <= seconds["median"] <= seconds["slowest"]
    assert result["images_per_second"] == pytest.approx(8 / seconds["median"])
    assert result["model_tflop_per_image"] == pytest.approx(flops_per_image / 1e12)
    assert result["model_tflops"] == pytest.approx(flops_per_image * 8 / seconds["median"] / 1e12)
    expected = result["model_tflops"] / result["matrix_peak_tflops"]
    assert result["share_of_matrix_peak"] == pytest.approx(expected)
    assert result["memory"]["planned_temporary_GiB"] > 0
    assert result["share_of_datasheet"] is None
    return result


def test_a_training_step_is_measured_on_the_mesh(tmp_path):
    result = check(
        throughput.benchmark_train(CONFIG, rounds=2, calls=1, profile=str(tmp_path)),
        train_flops(CONFIG.model, 4, 4, text_tokens=5),
    )
    assert result["latent"] == [4, 4]
    assert result["matrix_peak_tflops"] == pytest.approx(8)
    assert sorted(result["parts"]) == ["ema", "gradient", "optimizer"]
    assert all(part["median"] > 0 for part in result["parts"].values())
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_class_conditional_stage_is_measured_on_shards(tmp_path):
    """First on batches of noise, then on those of a folder. A folder that does not fit the config raises."""
    config = dataclasses.replace(
        CONFIG,
        model=DiTConfig(**SHAPE, num_classes=10),
        features=dataclasses.replace(CONFIG.features, image_size=64, text=False),
    )
    records = [make_record(key) for key in keys(12)]
    folder = str(write_folder(tmp_path / "square", {SQUARE: records}, text=False))
    result = throughput.benchmark_train(config, rounds=2, calls=1, parts=False, data=folder)
    check(result, train_flops(config.model, 8, 8))
    assert result["parts"] == {}
    shards = result["shards"]
    assert shards["steps"] == 2
    assert 0 < shards["waiting_share"] + shards["host_to_device_share"] < 1
    assert shards["loader_alone_samples_per_second"] > 0
    batch = throughput.synthetic_batch(config, 8, 4, 4)
    with pytest.raises(UserError, match=r"has latent_mean \(\(8, 8, 8, 4\).*needs \(\(8, 4, 4, 4\)"):
        throughput._open_shards(config, folder, batch)


@pytest.mark.parametrize(("scale", "evaluations", "weights_dtype"), [(None, 4, "float32"), (1.0, 2, "int8")])
def test_guidance_doubles_the_flops_of_sampling(scale, evaluations, weights_dtype, monkeypatch):
    programs, measured = [], throughput.peak_memory
    monkeypatch.setattr(throughput, "peak_memory", lambda one: programs.append(one) or measured(one))
    result = throughput.benchmark_sample(CONFIG, steps=2, scale=scale, weights_dtype=weights_dtype, rounds=1)
    arguments = {str(leaf.dtype) for leaf in jax.tree.leaves(programs[0].args_info)}
    assert ("int8" in arguments) == (weights_dtype == "int8") and result["weights_dtype"] == weights_dtype
    result = check(result, evaluations * forward_flops(CONFIG.model, 4, 4, 5).total)
    assert result["matrix_peak_tflops"] == pytest.approx(1)  # that of one device


def test_the_summary_of_a_report():
    told = throughput.summary(
        {
            "images_per_second": 10.0,
            "batch_size": 8,
            "seconds": {"median": 0.8, "fastest": 0.7, "slowest": 0.9},
            "model_tflops": 2.0,
            "matrix_peak_tflops": 5.0,
            "share_of_matrix_peak": 0.4,
            "datasheet_tflops": 8.0,
            "share_of_datasheet": 0.25,
            "compilation": {"lowering_seconds": 1.0, "compile_seconds": 2.0, "from_cache": True},
            "memory": {"device_peak_GiB": 3.5, "process_peak_GiB": 1.0},
            "parts": {"ema": {"median": 0.01}},
            "shards": {"waiting_share": 0.0012},
        }
    )
    assert "10 img/s: 8 images in 0.8 s (0.7 to 0.9)" in told
    assert "40.0% of the 5 measured here, 25.0% of the datasheet's 8" in told
    assert "from the cache" in told and "3.50 GiB" in told and "0.12% of the time waiting" in told


def test_a_batch_that_cannot_be_divided_raises():
    config = dataclasses.replace(CONFIG, data=DataConfig(batch_size=6))
    with pytest.raises(UserError, match="batch size 6 cannot be divided among 8"):
        throughput.benchmark_train(config)


def test_it_imports_only_the_packages_of_a_bare_machine():
    """These are jax, flax, optax, einops, numpy, ml_collections and absl."""
    heavy = ["orbax", "grain", "array_record", "transformers", "torch", "tensorflow_datasets", "PIL", "tqdm"]
    heavy += ["safetensors", "tensorboardX", "sklearn", "ftfy", "pyarrow"]
    program = (
        "import sys, pixart_jax.benchmarking.throughput\n"
        f"sys.exit(' '.join(name for name in {heavy} if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
