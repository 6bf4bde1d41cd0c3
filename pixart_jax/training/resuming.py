"""What may change in the config of a run that resumes from a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from pixart_jax import config as configs
from pixart_jax.config import TrainConfig, all_fields, to_dict
from pixart_jax.flags import expand_user
from pixart_jax.weights.checkpoints import FOLDER, finished_steps, read_metadata

# What a field may do that differs from the checkpoint when a run resumes. Every field has one line here:
#   free      it says where or how the same run is computed, and may change
#   reported  it may change, and the run prints "was ..., now ..."
#   rejected  it defines the model, the data or the sequence of updates: another value makes another run
ON_RESUME = {
    "free": """
        model: size remat scan_layers attention
        data: threads prefetch
        mesh: data fsdp tensor sequence slices strategy
        compile: ahead cache deterministic
        optimizer: ema_device offload
        watchdog: connect_seconds dead_seconds hang_seconds
    """,
    # `steps` must not be below the step of the checkpoint. `optimizer.clip_norm` must not change from or to
    # 0, because clipping is part of the optimizer's state. Other data than that of the checkpoint is rejected
    # by its fingerprint, not by the name of its folder.
    "reported": """
        : name steps
        data: train weights repeats loss_weights validation on_the_fly first_step
        diffusion: min_snr_gamma condition_dropout unmasked_weight normalize_masks
        diffusion: loss huber_c noise_offset input_perturbation
        diffusion: timestep_density timestep_mean timestep_std timestep_slope importance_weights
        diffusion: timestep_suppression timestep_convergence change_weighting noise_candidates
        guidance: channels scale
        optimizer: momentum learning_rate sqrt_scaling_batch warmup_steps schedule final_rate decay_share
        optimizer: muon_learning_rate
        optimizer: beta1 beta2 beta3 eps weight_decay clip_norm ema_decay ema_every
        routing: rate first_blocks last_blocks finish
        alignment: weight stop_step
        adapter: dropout
        init: method path adapter new_vae
        checkpoint: every keep keep_every keep_best snapshot_every
        divergence: action spike_factor spike_warmup patience
        log: every validate_every validation_samples sample_every samples sample_steps prompts tracker
    """,
    "rejected": """
        : objective seed
        model: kind depth hidden_size num_heads patch_size mlp_ratio in_channels learn_sigma base_size
        model: position_scale dtype text_dim text_length size_conditions num_classes
        model: mup_base_width
        model: qk_norm kv_compression kv_compression_layers kv_compression_factor
        features: image_size buckets codec vae latent_scale text text_length text_dtype latent_dtype
        features: image_encoder token_size
        features.text_encoder: tokenizer tokenizer_subfolder weights d_model d_ff d_kv num_heads num_layers
        features.text_encoder: seed dtype weights_dtype scale clean_caption lower_case
        data: batch_size
        diffusion: num_timesteps beta_start beta_end
        guidance: null_text null_mask aspect_ratio
        alignment: block width target_width
        adapter: kind rank alpha targets base_dtype
        optimizer: name moments accumulation power_ema
    """,
}


def with_pinned_paths(config: TrainConfig, workdir: epath.Path) -> TrainConfig:
    """The config of a run with the commits of its paths of the hub; those of its newest checkpoint, if any.

    Raises:
      UserError: see `hub.local`.
    """
    steps = finished_steps(workdir / FOLDER)
    before = read_metadata(workdir / FOLDER / str(max(steps)))["config"] if steps else None
    return configs.with_pinned_paths(config, before)


def resume_rules() -> dict[str, str]:
    """Returns the rule in `ON_RESUME` of each field, by name."""
    out: dict[str, str] = {}
    for rule, table in ON_RESUME.items():
        for line in table.strip().splitlines():
            section, _, names = line.strip().partition(":")
            for name in names.split():
                path = f"{section}.{name}" if section else name
                assert path not in out, path
                out[path] = rule
    return out


def changes_on_resume(now: TrainConfig, saved: TrainConfig, step: int) -> tuple[list[str], list[str]]:
    """Compares the config of a run with that of the checkpoint from which it resumes.

    Args:
      now: the config of the run.
      saved: the config in the checkpoint.
      step: step of the checkpoint.

    Returns:
      One text for each field that changed and may change ("x was 1, now 2"), and one for each field that
      changed and must not ("x is 2, the checkpoint has 1").
    """
    rules, declared = resume_rules(), all_fields()
    before, after = dict(_leaves(to_dict(saved))), dict(_leaves(to_dict(now)))
    reported, rejected = [], []
    for name in after:
        value, then = after[name], before.get(name)
        if name not in before or value == then or rules[name] == "free":
            continue
        if name == "adapter.alpha" and now.adapter.scale == saved.adapter.scale:
            continue  # 0 stands for the rank
        if name in declared and declared[name].field.metadata["path"] and _same_paths(value, then):
            continue
        shorter = name == "steps" and value < step
        unclipped = name == "optimizer.clip_norm" and not (value and then)
        if shorter:
            rejected.append(f"steps is {value}, the checkpoint has done {step}")
        elif unclipped or rules[name] == "rejected":
            rejected.append(f"{name} is {value!r}, the checkpoint has {then!r}")
        else:
            note = " (read only at step 0)" if name.startswith("init.") else ""
            if name == "steps" and now.optimizer.schedule != "constant":
                note = f" (the schedule '{now.optimizer.schedule}' of the learning rate is stretched to it)"
            reported.append(f"{name} was {then!r}, now {value!r}{note}")
    return reported, rejected


def _leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _same_paths(a: str, b: str) -> bool:
    """Whether two values name the same existing files: a link to a folder is the folder."""
    pairs = [[os.path.realpath(path) for path in expand_user(text).split(",")] for text in (a, b)]
    return pairs[0] == pairs[1] and all(map(os.path.exists, pairs[0]))
