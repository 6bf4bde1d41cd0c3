import pytest
from command_line import outside

from pixart_jax.config import (
    OptimizerConfig,
    TrainConfig,
    all_fields,
    from_dict,
    to_dict,
)
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig


def values_with(name, value):
    """The values of a config, as JSON has them, in which the field called `name` has another value."""
    model = DiTConfig() if name == "model.num_classes" else PixArtConfig()
    values = to_dict(TrainConfig(model=model))
    *sections, last = name.split(".")
    place = values
    for section in sections:
        place = place[section]
    assert last in place
    place[last] = value
    return values


NUMBERS = [name for name, info in all_fields().items() if info.kind in (int, float)]
# Fields for which 0 has a meaning. All other numbers must be above 0.
ZERO = {
    *(f"model.{name}" for name in ("depth", "hidden_size", "num_heads", "patch_size", "mup_base_width")),
    *("seed", "data.first_step", "features.image_size", "features.text_length", "features.text_encoder.seed"),
    *(f"diffusion.{name}" for name in ("min_snr_gamma", "condition_dropout", "unmasked_weight")),
    *(f"diffusion.{name}" for name in ("noise_offset", "input_perturbation", "timestep_mean")),
    "diffusion.change_weighting",
    *("guidance.scale", "diffusion.timestep_slope", "optimizer.final_rate", "optimizer.beta3"),
    *(f"optimizer.{name}" for name in ("momentum", "sqrt_scaling_batch", "warmup_steps", "beta1", "beta2")),
    *(f"optimizer.{name}" for name in ("weight_decay", "clip_norm", "ema_decay")),
    "optimizer.muon_learning_rate",
    *(f"routing.{name}" for name in ("rate", "first_blocks", "last_blocks", "finish")),
    "checkpoint.snapshot_every",
    *("checkpoint.keep_every", "checkpoint.keep_best", "divergence.spike_factor"),
    *("log.validate_every", "log.sample_every", "adapter.alpha", "adapter.dropout"),
    *("features.token_size", "alignment.stop_step"),
}
MINUS_ONE = {f"mesh.{name}" for name in ("data", "fsdp", "tensor", "sequence", "slices")}


# Fields whose upper bound is that of their type, int32 or float32, and why no smaller one is needed.
UNLIMITED = {
    **dict.fromkeys(("steps", "data.first_step", "optimizer.warmup_steps", "routing.finish"), "steps"),
    **dict.fromkeys((f"checkpoint.{name}" for name in ("every", "keep_every", "snapshot_every")), "steps"),
    "alignment.stop_step": "steps",
    **dict.fromkeys((f"log.{name}" for name in ("every", "validate_every", "sample_every")), "steps"),
    **dict.fromkeys(("divergence.spike_warmup", "divergence.patience"), "steps"),
    **dict.fromkeys(("checkpoint.keep", "checkpoint.keep_best"), "numbers of checkpoints"),
    "log.validation_samples": "at most all held-out samples are used",
    "optimizer.sqrt_scaling_batch": "only divides the batch size",
    **dict.fromkeys(MINUS_ONE, "compared with the number of devices"),
    **dict.fromkeys((f"watchdog.{name}_seconds" for name in ("connect", "dead", "hang")), "seconds"),
    **dict.fromkeys(("optimizer.clip_norm", "diffusion.min_snr_gamma"), "an upper bound of other numbers"),
    **dict.fromkeys(("optimizer.learning_rate", "optimizer.muon_learning_rate"), "a run that diverges ends"),
    "guidance.scale": "an image that is not finite is an error",
    "divergence.spike_factor": "a larger one detects nothing",
}


@pytest.mark.parametrize("name", NUMBERS)
def test_nonsense_values_of_every_number_are_rejected(name):
    kind, field = all_fields()[name].kind, all_fields()[name].field
    limits = field.metadata
    assert limits["minimum"] is not None or limits["above"] is not None
    limited = limits["maximum"] is not None or limits["below"] is not None
    assert limited != (name in UNLIMITED)
    if name in ZERO:
        from_dict(values_with(name, kind(0)))
    if name in MINUS_ONE | {"routing.rate"}:
        from_dict(values_with(name, -1))
    for number in [*outside(field, kind), *([] if name in ZERO else [0])]:
        # JSON and flags give whole numbers to fields that are whole numbers.
        value = float(number) if kind is float else number
        with pytest.raises(UserError) as raised:
            from_dict(values_with(name, value))
        message = str(raised.value)
        assert name in message and "must be" in message
        assert "\n" not in message and len(message) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer.beta2": 1.0}, r"optimizer.beta2 is 1.0: it must be in \[0, 1\)"),
        ({"divergence.spike_factor": 1.0}, "must be above 1, or 0"),
        ({"diffusion.beta_start": 0.5}, "beta_end is 0.02: it must be at least diffusion.beta_start"),
        ({"mesh.fsdp": -2}, "mesh.fsdp is -2: it must be at least 1, or -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"steps": 10**400}, "steps is 1000"),
        ({"watchdog.dead_seconds": 3}, "at least 4"),
        ({"data.weights": "1,-2"}, "data.weights is '1,-2': every weight must be a number above 0"),
        ({"data.weights": "1,nan"}, "above 0"),
        ({"data.weights": "1,x"}, "above 0"),
        ({"data.weights": "1,,2"}, "data.weights is '1,,2': every weight must be a number above 0"),
        ({"data.weights": "inf,1"}, "above 0"),
        ({"data.loss_weights": "1,0"}, "data.loss_weights is '1,0': every weight must be a number above 0"),
        ({"data.repeats": "1,2.5"}, "data.repeats is '1,2.5': every number must be a whole number from 1 to"),
        ({"data.repeats": "0"}, "whole number from 1 to 10000"),
        ({"data.repeats": "1,x"}, "whole number from 1 to 10000"),
        ({"diffusion.unmasked_weight": 1.5}, r"diffusion.unmasked_weight is 1.5: it must be in \[0, 1\]"),
        ({"model.mlp_ratio": 1e38}, r"model.mlp_ratio is 1e\+38: it must be in \(0, 1000\]"),
        ({"data.batch_size": 2**31 - 1}, r"data.batch_size is 2147483647: it must be in \[1, 1048576\]"),
        ({"data.weights": "1e308,1e308"}, r"above 0, from 1.1\d+e-38 to 3.4\d+e\+38"),
        ({"optimizer.eps": 1e-308}, r"optimizer.eps is 1e-308: it must be at least 1.1754944e-38\."),
        ({"optimizer.clip_norm": 1e-308}, r"it must be at least 1.1754944e-38, or 0\."),
        ({"model.mlp_ratio": 1e-6}, "leaves no hidden layer"),
        ({"log.tracker": "tensorbord"}, "log.tracker is 'tensorbord': choose .* Did you mean 'tensorboard'"),
        ({"log.tracker": "wandb,none"}, "log.tracker is 'none': choose one of tensorboard, wandb, trackio"),
        ({"log.tracker": ""}, "log.tracker is '': choose one of tensorboard, wandb, trackio, none"),
        ({"features.text_encoder.dtype": "fp16"}, "features.text_encoder.dtype is 'fp16': choose one of"),
    ],
)
def test_values_outside_their_range_raise_an_error(changes, message):
    ((name, value),) = changes.items()
    with pytest.raises(UserError, match=message):
        from_dict(values_with(name, value))


@pytest.mark.parametrize("widths", ["0.05,", "wide", "0.3", "0.005", "nan", "0.05,0.05", "0.05,0.0500000001"])
def test_widths_of_averages_are_different_numbers_in_a_range(widths):
    with pytest.raises(
        UserError, match=f"optimizer.power_ema is '{widths}': give different numbers from 0.01"
    ):
        OptimizerConfig(power_ema=widths)


def test_home_directories_are_expanded_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    paths = {name for name, info in all_fields().items() if info.field.metadata["path"]}
    assert paths == {
        *("features.vae", "features.text_encoder.tokenizer", "features.text_encoder.weights"),
        *("data.train", "data.validation", "compile.cache", "init.path", "init.adapter"),
        "features.image_encoder",
    }
    for name in paths:
        values = values_with(name, "~/a,~/b/~c")
        if name == "init.path":
            values["init"]["method"] = "weights"
        if name == "init.adapter":
            values["init"] |= {"method": "weights", "path": "weights"}
            values["adapter"] = {"kind": "lora"}
        config = from_dict(values)
        for part in name.split("."):
            config = getattr(config, part)
        assert config == "/home/someone/a,/home/someone/b/~c"
