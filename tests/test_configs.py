"""The configs of `configs/`."""

import re
from pathlib import Path

import jax
import pytest

from pixart_jax.config import InitConfig, from_file, to_dict, without_effect
from pixart_jax.denoiser import abstract_model
from pixart_jax.errors import UserError
from pixart_jax.training.optimizers import learning_rate_schedule

ROOT = Path(__file__).parents[1]
SIGMA = ("sigma-256", "sigma-512", "sigma-1024", "sigma-2048")
STAGES = [
    ("digits", "stage1"),
    ("digits", "stage2"),
    ("digits", "stage3"),
    ("stage1", None),
    ("stage2", None),
    ("stage3", "256"),
    ("stage3", "512"),
    ("stage3", "1024"),
    ("finetune", "256"),
    ("finetune", "512"),
    ("finetune", "1024"),
    *(("finetune", variant) for variant in SIGMA),
    *((name, size) for name in ("lora", "dreambooth") for size in ("256", "512", "1024", *SIGMA)),
    *(("dreambooth", f"full-{size}") for size in ("256", "512", "1024", *SIGMA)),
    *(("sigma", stage) for stage in ("vae-256", "256", "512", "1024", "1024-kv", "2048", "2048-kv")),
    *(("digits", stage) for stage in ("sigma-8px", "sigma-16px", "sigma")),
    *(("fast", stage) for stage in ("stage1", "256", "512", "1024")),
]


def load(name, argument):
    return from_file(f"{ROOT}/configs/{name}.py" + (f":{argument}" if argument else ""))


@pytest.mark.parametrize(("name", "argument"), STAGES)
def test_every_stage_builds(name, argument):
    config = load(name, argument)
    _, state = abstract_model(config.model)
    assert jax.tree.leaves(state)


# Trainable parameters: DiT-XL/2 without its fixed position embedding; PixArt as counted by the official code.
@pytest.mark.parametrize(
    ("name", "argument", "trainable"),
    [
        ("stage1", None, 675_129_632 - 256 * 1152),
        ("stage2", None, 610_856_096),
        ("stage3", "256", 610_856_096),
        ("stage3", "512", 611_349_152),
        ("stage3", "1024", 611_349_152),
        ("finetune", "256", 610_856_096),
        ("finetune", "512", 610_856_096),
        ("finetune", "1024", 611_349_152),
        *(("finetune", variant, 610_856_096) for variant in SIGMA),
        *(("sigma", stage, 610_856_096) for stage in ("vae-256", "256", "512", "1024", "2048")),
        # 7 x 1152 parameters in each of the 14 blocks that compress.
        *(("sigma", stage, 610_968_992) for stage in ("1024-kv", "2048-kv")),
    ],
)
def test_published_stages_have_the_published_size(name, argument, trainable):
    config = load(name, argument)
    _, state = abstract_model(config.model)
    frozen = 0 if name == "stage1" else config.model.text_length * 4096
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) - frozen == trainable


def test_stages_are_those_of_the_paper():
    stages = [load(name, argument) for name, argument in STAGES[3:8]]
    assert [(c.steps, c.data.batch_size) for c in stages] == [
        (300_000, 1024),
        (150_000, 11_392),
        (90_000, 11_392),
        (100_000, 2_560),
        (16_000, 384),
    ]
    assert all(c.optimizer.learning_rate == 2e-5 and c.optimizer.weight_decay == 0.03 for c in stages)
    # Each stage starts from the run of the previous one.
    assert [c.init.path for c in stages] == ["", *(f"runs/{c.name}" for c in stages[:-1])]
    assert [c.model.base_size / c.model.position_scale for c in stages] == [16, 16, 16, 32, 32]


def test_the_fast_recipe_leaves_the_weights_of_a_plain_alpha():
    stages = [load(name, stage) for name, stage in STAGES if name == "fast"]
    plain = [load("stage1", None), load("stage2", None), load("stage3", "512"), load("stage3", "1024")]
    assert [config.model for config in stages] == [config.model for config in plain]
    assert [c.init.path for c in stages] == ["", *(f"runs/{c.name}" for c in stages[:-1])]
    assert [c.init.method for c in stages] == [c.init.method for c in plain]
    # Each option where the literature has it: alignment at 256 px, routing from 1,024 tokens on.
    assert [c.objective for c in stages] == ["alignment"] * 2 + ["diffusion"] * 2
    assert [c.token_routing.rate for c in stages] == [0, 0, 0.5, 0.5]
    # The stages that draw more timesteps of medium noise are followed by stages that draw all equally.
    assert [c.diffusion.timestep_density for c in stages] == ["logit_normal"] * 2 + ["uniform"] * 2
    for config in stages:
        last = config.at_step(config.steps - 1)
        assert last.objective == "diffusion" and last.token_routing.rate == 0
        assert not without_effect(config)


def test_the_stages_of_sigma_are_those_of_its_paper_and_its_official_configs():
    stages = {stage: load("sigma", stage) for name, stage in STAGES if name == "sigma"}
    assert {stage: c.steps for stage, c in stages.items()} == {
        **{"vae-256": 8_000, "256": 80_000, "512": 10_000, "1024": 5_000, "2048": 4_000},
        **{"1024-kv": 5_000, "2048-kv": 4_000},
    }
    # Each stage starts from the run of the one before it, the first one from α, whose VAE is another.
    chain = {"256": "vae-256", "512": "256", "1024": "512", "2048": "1024"}
    chain |= {"1024-kv": "1024", "2048-kv": "1024-kv"}
    for stage, config in stages.items():
        init = config.init
        if stage == "vae-256":
            assert init == InitConfig("weights", load("finetune", "256").init.path, new_vae=True)
        else:
            assert init == InitConfig("resize", f"runs/{stages[chain[stage]].name}")
        model, features, optimizer = config.model, config.features, config.optimizer
        pixels = int(re.search(r"\d+", stage)[0])
        assert (features.image_size, model.position_scale) == (pixels, pixels / 512)
        assert (model.text_length, features.text_length, features.latent_scale) == (300, 300, 0.13025)
        assert features.buckets == ("single" if pixels == 256 else "official")
        assert not features.text_encoder.clean_caption and not model.size_conditions
        assert model.kv_compression == ("conv" if stage.endswith("-kv") else "none")
        assert (optimizer.name, optimizer.learning_rate, optimizer.weight_decay) == ("came", 2e-5, 0)
        rate = learning_rate_schedule(optimizer, config.data.batch_size)
        peak = 2e-5 * (config.data.batch_size / 256) ** 0.5
        assert float(rate(optimizer.warmup_steps)) == pytest.approx(peak)
    assert stages["2048-kv"].model.compressed_layers == tuple(range(14, 28))


@pytest.mark.parametrize(
    # `sample_size` in transformer/config.json of the release, and the values that diffusers derives from it.
    ("size", "sample_size", "interpolation_scale", "use_additional_conditions"),
    [
        *(("256", 32, 1, False), ("512", 64, 1, False), ("1024", 128, 2, True)),
        *(("sigma-256", 32, 0.5, False), ("sigma-512", 64, 1, False)),
        *(("sigma-1024", 128, 2, False), ("sigma-2048", 256, 4, False)),
    ],
)
def test_finetuning_uses_the_released_models(
    size, sample_size, interpolation_scale, use_additional_conditions
):
    config = load("finetune", size)
    model = config.model
    assert (model.base_size * model.patch_size, model.position_scale, model.size_conditions) == (
        sample_size,
        interpolation_scale,
        use_additional_conditions,
    )
    release = "PixArt-Sigma-XL-2-" if size.startswith("sigma-") else "PixArt-XL-2-"
    release = f"hub:PixArt-alpha/{release}"
    assert config.init.method == "weights" and config.init.path.startswith(release)
    # With these conventions, an exported model generates the same images in diffusers.
    assert (config.guidance.null_text, config.guidance.null_mask) == ("t5_empty", "own")


def test_finetuning_uses_the_official_learning_rate():
    config = load("finetune", "512")
    rate = learning_rate_schedule(config.optimizer, config.data.batch_size)
    assert float(rate(0)) == pytest.approx(2e-5 * (32 / 256) ** 0.5)  # without warm-up


def test_the_configs_for_released_weights_of_sigma_are_those_of_alpha_with_its_differences():
    for name in ("finetune", "lora", "dreambooth"):
        alpha, sigma = (to_dict(load(name, variant)) for variant in ("512", "sigma-512"))
        assert {key for key in alpha if alpha[key] != sigma[key]} == {
            *("name", "model", "features", "init"),
            *(["optimizer"] if name == "finetune" else []),
        }
        assert {key for key in alpha["model"] if alpha["model"][key] != sigma["model"][key]} == {
            "text_length"
        }
        features = sigma["features"]
        assert {key for key in features if alpha["features"][key] != features[key]} == {
            *("buckets", "vae", "latent_scale", "text_length", "text_encoder"),
        }
        encoder = features["text_encoder"]
        assert (features["latent_scale"], encoder["clean_caption"], encoder["lower_case"]) == (
            0.13025,
            False,
            False,
        )
    assert load("finetune", "sigma-512").optimizer.name == "came"
    assert load("lora", "sigma-1024").features.vae == "hub:PixArt-alpha/PixArt-Sigma-XL-2-1024-MS/vae"
    # The others are released as transformers alone.
    for size, name in (("256", "256x256"), ("512", "512-MS"), ("2048", "2K-MS")):
        config = load("lora", f"sigma-{size}")
        assert config.features.vae == "hub:PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers/vae"
        assert config.init.path == f"hub:PixArt-alpha/PixArt-Sigma-XL-2-{name}/transformer"


@pytest.mark.parametrize("size", ["256", "512", "1024", *SIGMA])
def test_dreambooth_is_built_on_the_other_configs(size):
    """Everything but the data, the length of the run, and what is trained is as in the base config."""
    for base, variant, changed in (
        ("lora", size, {"learning_rate", "warmup_steps"}),
        (
            *("finetune", f"full-{size}"),
            # AdamW, as for α, which is also what the rate is from.
            {"learning_rate", "sqrt_scaling_batch"}
            | ({"name", "weight_decay", "warmup_steps"} if size in SIGMA else set()),
        ),
    ):
        before, config = to_dict(load(base, size)), load("dreambooth", variant)
        after = to_dict(config)
        assert {name for name in after if after[name] != before[name]} == {
            *("name", "steps", "data", "optimizer", "checkpoint", "log"),
            *(["adapter"] if base == "lora" else []),
        }
        optimizer = after["optimizer"]
        different = {name for name in optimizer if optimizer[name] != before["optimizer"][name]}
        assert different - {"accumulation"} == changed - {"accumulation"}
        # A micro-batch has at most as many samples as in the base config.
        assert (
            4 // optimizer["accumulation"]
            <= before["data"]["batch_size"] // before["optimizer"]["accumulation"]
        )
        data = config.data
        assert len(data.train.split(",")) == 2 and data.batch_size == 4
        assert data.folder_numbers("weights") == data.folder_numbers("loss_weights") == [1, 1]
    # The official rates are used as they are.
    for variant, expected in ((size, 1e-3), (f"full-{size}", 5e-6)):
        config = load("dreambooth", variant)
        assert float(learning_rate_schedule(config.optimizer, 4)(0)) == pytest.approx(expected)
    assert load("dreambooth", size).adapter.scale == 0.5  # rank 16, alpha 8


def test_unknown_stages_raise_an_error():
    with pytest.raises(UserError, match=r"no variant 'full-128': choose 256.*sigma-2048, full-256"):
        load("dreambooth", "full-128")
    with pytest.raises(UserError, match=r"no stage '4096': choose vae-256, 256, 512, .*2048-kv"):
        load("sigma", "4096")
    with pytest.raises(UserError, match=r"no variant 'sigma-2K': choose 256.*sigma-1024, sigma-2048"):
        load("lora", "sigma-2K")
    with pytest.raises(UserError, match="Did you mean 'stage"):
        load("digits", "stage")
    for name in ("stage3", "finetune"):
        with pytest.raises(UserError, match="choose 256, 512, 1024"):
            load(name, "128")
