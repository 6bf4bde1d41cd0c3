"""Loads pipelines from files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from pixart_jax.config import TextEncoderConfig
from pixart_jax.encoders.images import Codec, VAECodec, make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError, one_of
from pixart_jax.hub import is_hub
from pixart_jax.models.configs import TEXT_WEIGHTS_DTYPES, WEIGHTS_DTYPES
from pixart_jax.models.dtypes import default_dtype
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.scheduler import read_solver
from pixart_jax.readers import read_json
from pixart_jax.weights.adapter_files import Specs, read_adapters
from pixart_jax.weights.configs import check_factor
from pixart_jax.weights.families import INDEX, PIPELINES, SIGMA, family_of, family_of_pipeline
from pixart_jax.weights.files import COPY
from pixart_jax.weights.hub import ALPHA_PIPELINE, SIGMA_PIPELINE, local_pipeline, pipeline_for
from pixart_jax.weights.loading import Weights, adapter_notes, build_model, read_any


def load_pipeline(
    path: str | Path,
    *,
    weights: str | None = None,
    pipeline: str | Path | None = None,
    text_dtype: str | None = None,
    dtype: str | None = None,
    text_weights_dtype: str | None = None,
    weights_dtype: str | None = None,
    devices: Sequence[jax.Device] | None = None,
    keep_text_encoder: bool = True,
    adapters: Specs = (),
    adapter_alpha: float | None = None,
    **overrides: Any,
) -> Pipeline:
    """Loads a network with its text encoder, VAE, tokenizer and scheduler settings.

        pipe = load_pipeline("PixArt-XL-2-512x512")                              # a diffusers pipeline folder
        pipe = load_pipeline("hub:PixArt-alpha/PixArt-XL-2-512x512")             # one of the hub, downloaded
        pipe = load_pipeline("runs/finetune", pipeline="PixArt-XL-2-512x512")    # own weights, its encoders
        pipe = load_pipeline("PixArt-XL-2-512x512", adapters={"pixel-art": 0.8})

    Args:
      path: the folder of a diffusers pipeline, or anything that `pixart_jax.weights.loading.read_any` takes.
      weights: 'ema' or 'raw', if there are both.
      pipeline: the pipeline folder that provides text encoder, VAE, tokenizer and scheduler; None for `path`
        itself or, if that is not a pipeline, for the text encoder and VAE that its config names; for releases
        on the hub without them, that of another release (`weights.hub.pipeline_for`). The noise
        schedule of the weights and whether they know cleaned captions come from `path` if it says so.
      text_dtype, dtype: compute dtypes of the text encoder and of the network; None for
        the default of the device: float32 on a CPU, float16 on NVIDIA GPUs without bfloat16 (T4, V100),
        otherwise bfloat16. The text encoder of a run keeps the dtype of its config if the device supports it.
        The VAE computes in float32.
      text_weights_dtype: 'auto' (in its compute dtype) or 'int8', how the weights of the text encoder are
        kept in memory; None for that of the config of a run, and 'auto' for released weights.
      weights_dtype: 'float32' (None) or 'int8', how those of the network are.
      devices: devices to distribute the images over; None for all local devices.
      keep_text_encoder: False frees its memory once the texts of a call are encoded.
      adapters: LoRA or DoRA files to merge into the network: {path: weight}; or 'PATH' or 'PATH:WEIGHT', or a
        list of these. `Pipeline.set_adapter_weights` changes the weights.
      adapter_alpha: alpha of adapters that do not state their scale.
      overrides: see `pixart_jax.weights.loading.read_any`.

    Raises:
      UserError: `pixart_jax.weights.loading.read_any` raises it; an adapter is broken or does not fit; the
        folder is not a pipeline, or its parts do not fit together.
    """
    if pipeline is not None and not is_hub(pipeline):
        _check_pipeline(pipeline)
    weights_dtype = weights_dtype or "float32"
    one_of("weights_dtype", weights_dtype, WEIGHTS_DTYPES)
    if text_weights_dtype is not None:
        one_of("text_weights_dtype", text_weights_dtype, TEXT_WEIGHTS_DTYPES)
    default = default_dtype().dtype
    chosen = read_adapters(adapters, adapter_alpha)
    text_bytes = 1 if text_weights_dtype == "int8" else np.dtype(text_dtype or default).itemsize
    network_bytes = 1 if weights_dtype == "int8" else 4
    itemsizes = {"transformer": network_bytes, "text_encoder": text_bytes, "vae": 4}
    path, pipeline = local_pipeline(path, pipeline_for(path, pipeline), itemsizes)
    if pipeline is not None:
        _check_pipeline(pipeline)
    read = read_any(path, weights, pipeline=pipeline, dtype=dtype or default, **overrides)
    for note in (*read.notes, *adapter_notes(read, chosen)):
        logging.warning("%s", note)
    model = read.config.model
    if "text" not in model.conditions:
        raise UserError(
            f"'{path}' is a DiT, which is conditioned on classes, not on text: train stage 2 from it."
        )
    assemble = functools.partial(
        _assemble,
        read,
        weights_dtype,
        devices=devices,
        keep_text_encoder=keep_text_encoder,
        adapters=chosen,
    )
    text_encoder = read.config.features.text_encoder
    if text_weights_dtype is not None:
        text_encoder = dataclasses.replace(text_encoder, weights_dtype=text_weights_dtype)
    folder = Path(pipeline) if pipeline is not None else Path(path)
    if pipeline is None and not (folder / INDEX).is_file():
        features = read.config.features
        if not text_encoder.weights:
            raise UserError(
                f"'{path}' holds a network without its text encoder and VAE: also give --pipeline, the "
                f"folder of a {PIPELINES} that has them (load_pipeline(…, pipeline=…)), such as "
                f"{SIGMA_PIPELINE if family_of(model.text_length) is SIGMA else ALPHA_PIPELINE}."
            )
        run_dtype = text_encoder.dtype
        run_dtype = default if (run_dtype, default) == ("bfloat16", "float16") else run_dtype
        encoder = dataclasses.replace(text_encoder, dtype=text_dtype or run_dtype)
        return assemble(encoder, make_codec(features, batch_size=1), {})
    if family_of_pipeline(folder) is None:
        kind = read_json(folder / INDEX, COPY).get("_class_name")
        raise UserError(f"'{folder}' is a {kind}: give the folder of a {PIPELINES}.")
    encoder = dataclasses.replace(
        text_encoder,
        tokenizer=str(folder / "tokenizer"),
        tokenizer_subfolder="",
        weights=str(folder / "text_encoder"),
        dtype=text_dtype or default,
    )
    if "latent_scale" not in overrides:
        _check_scale(folder / "vae", read.config.features.latent_scale)
    codec = VAECodec(str(folder / "vae"), read.config.features.latent_scale, batch_size=1)
    return assemble(encoder, codec, read_solver(folder))


def _check_pipeline(pipeline: str | Path) -> None:
    if not (Path(pipeline) / INDEX).is_file():
        what = f"has no {INDEX}" if Path(pipeline).is_dir() else "is not a folder"
        raise UserError(
            f"--pipeline={pipeline} {what}: give the folder of a {PIPELINES}, such as {ALPHA_PIPELINE}, "
            "which is downloaded."
        )


def _check_scale(vae: Path, scale: float) -> None:
    """Compares the scaling factor of a VAE with that of the weights."""
    stated = read_json(vae / "config.json", COPY).get("scaling_factor")
    if stated is not None:
        check_factor(f"'{vae}' has the scaling factor", stated)
    if stated not in (None, scale):
        raise UserError(
            f"'{vae}' has the scaling factor {stated}, and the weights {scale}: give the pipeline with the "
            f"VAE that they were trained with, or convert the weights with --latent_scale={stated}."
        )


def _assemble(
    read: Weights,
    weights_dtype: str,
    encoder: TextEncoderConfig,
    codec: Codec,
    solver: Mapping[str, Any] | str,
    **kwargs: Any,
) -> Pipeline:
    config = read.config.model
    text_encoder = TextEncoder(encoder, config.text_length, batch_size=1, sharded=True, load=False)
    if text_encoder.width != config.text_dim:
        raise UserError(
            f"the text encoder gives {text_encoder.width} features, the model takes {config.text_dim}: use "
            "the encoder it was trained with."
        )
    model = build_model(read, weights_dtype)
    # With adapters, float32 kernels stay in host memory, so that their weights can be changed.
    params = read.params if weights_dtype == "int8" and kwargs["adapters"] else None
    return Pipeline(model, read.config, text_encoder, codec, solver, params=params, **kwargs)
