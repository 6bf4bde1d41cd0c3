import argparse
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import adapter_formats
import foreign
import jax
import numpy as np
import pytest
from adapter_formats import BASE, GOLDENS
from full_disk import largest_file
from safetensors.numpy import load_file, save_file

import pixart_jax
from pixart_jax.config import TrainConfig, from_dict, to_dict
from pixart_jax.convert import Flags, convert
from pixart_jax.denoiser import init_params
from pixart_jax.errors import OutputError, UserError
from pixart_jax.models.attention import target_platform
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.weights import loading
from pixart_jax.weights.adapter_files import read_adapter, read_adapters
from pixart_jax.weights.adapters import merge
from pixart_jax.weights.checkpoints import checkpoint_folder, read_config, read_weights, write_weights
from pixart_jax.weights.files import CARD
from pixart_jax.weights.loading import read_any

torch = foreign.torch
ROOT = Path(__file__).parents[1]


def numbers(size="small", sizes=False, **changes):
    return {**foreign.SIZES[size], "sizes": sizes, **changes}


def save_official(path: Path, **kwargs) -> dict[str, np.ndarray]:
    tensors = foreign.official_state_dict(**numbers(**kwargs))
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": {name: torch.from_numpy(value) for name, value in tensors.items()}}, path)
    return tensors


def run(*args, **kwargs) -> list[str]:
    lines = []
    convert(*args, say=lines.append, **kwargs)
    return lines


def refused(folder: Path, *args, **kwargs) -> str:
    """Checks that a conversion fails with a one-line error and changes no file; returns the message."""

    def listing():
        return sorted((str(p), p.stat().st_mtime_ns) for p in folder.rglob("*"))

    before = listing()
    with pytest.raises(UserError) as error:
        run(*args, **kwargs)
    assert listing() == before
    assert "\n" not in str(error.value)
    return str(error.value)


def our_output(path, arguments, **overrides) -> np.ndarray:
    model = pixart_jax.load_model(path, **overrides)
    return np.asarray(jax.jit(lambda arguments: model(**arguments))(arguments))


# --- Round trips ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("size, sizes", [("small", True), ("large", False)])
def test_official_to_checkpoint_to_diffusers(tmp_path, size, sizes, suffix):
    source = tmp_path / f"official{suffix}"
    save_official(source, size=size, sizes=sizes)
    heads = foreign.SIZES[size]["heads"]
    run(source, tmp_path / "checkpoint", "checkpoint", num_heads=heads)
    run(tmp_path / "checkpoint", tmp_path / "diffusers", "diffusers")
    diffusers = pytest.importorskip("diffusers")
    model, info = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "diffusers", output_loading_info=True
    )
    assert not any(info.values()), info
    arguments = foreign.inputs((10, 6), **numbers(size, sizes))
    expected = foreign.run_diffusers(model, arguments)
    np.testing.assert_allclose(our_output(tmp_path / "checkpoint", arguments), expected, rtol=0, atol=2e-5)
    # All three formats have the same parameters.
    stops = (
        read_any(source, num_heads=heads),
        read_any(tmp_path / "checkpoint"),
        read_any(tmp_path / "diffusers"),
    )
    for stop in stops:
        params = {name: value for name, value in stop.params.items() if name != "null_text"}
        first = {name: stops[0].params[name] for name in params}
        jax.tree.map(np.testing.assert_array_equal, params, first)


@pytest.mark.parametrize("size, sizes", [("small", False), ("large", True)])
def test_diffusers_to_checkpoint_to_official_is_the_same_bits(tmp_path, size, sizes):
    model = foreign.diffusers_model(**numbers(size, sizes))
    model.save_pretrained(tmp_path / "d", max_shard_size="100KB")
    assert (tmp_path / "d" / "diffusion_pytorch_model.safetensors.index.json").exists()
    run(tmp_path / "d", tmp_path / "c", "checkpoint", text_length=14)
    lines = run(tmp_path / "c", tmp_path / "o.safetensors", "official")
    assert any("y_embedder.y_embedding is zero" in line for line in lines)
    official = load_file(tmp_path / "o.safetensors")
    assert official.keys() == foreign.official_state_dict(**numbers(size, sizes)).keys()
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    d = model.config.num_attention_heads * model.config.attention_head_dim
    for i in range(model.config.num_layers):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        for kind in ("weight", "bias"):
            qkv = [state[f"{theirs}attn1.to_{part}.{kind}"] for part in "qkv"]
            np.testing.assert_array_equal(official[f"{ours}attn.qkv.{kind}"], np.concatenate(qkv))
            kv = [state[f"{theirs}attn2.to_{part}.{kind}"] for part in "kv"]
            np.testing.assert_array_equal(official[f"{ours}cross_attn.kv_linear.{kind}"], np.concatenate(kv))
            fc2 = state[f"{theirs}ff.net.2.{kind}"]
            np.testing.assert_array_equal(official[f"{ours}mlp.fc2.{kind}"], fc2)
    np.testing.assert_array_equal(official["x_embedder.proj.weight"], state["pos_embed.proj.weight"])
    assert official["final_layer.linear.weight"].shape == (32, d)
    # Converting back to diffusers gives the same bits.
    run(tmp_path / "o.safetensors", tmp_path / "again", "diffusers")
    again = load_file(tmp_path / "again" / "diffusion_pytorch_model.safetensors")
    assert again.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_what_official_files_cannot_contain_is_in_their_header(tmp_path):
    save_official(tmp_path / "o.safetensors", sizes=True)
    given = dict(num_heads=4, null_text="t5_empty", null_mask="own", guided_channels=3, aspect_ratio="true")
    run(
        tmp_path / "o.safetensors",
        tmp_path / "c",
        "checkpoint",
        latent_scale=0.5,
        licence="apache-2.0",
        **given,
    )
    for name in ("again.safetensors", "again.pth", "folder"):
        run(tmp_path / "c", tmp_path / name, "official")
        read = read_any(tmp_path / name)
        assert read.config.model.num_heads == 4 and read.licence == "apache-2.0"
        guidance = to_dict(read.config.guidance)
        assert guidance == {
            "null_text": "t5_empty",
            "null_mask": "own",
            "channels": 3,
            "aspect_ratio": "true",
            "scale": 4.5,
        }
        assert read.config.features.latent_scale == 0.5
    assert "num_heads=6 contradicts the notes" in refused(
        tmp_path, tmp_path / "again.pth", tmp_path / "x", "checkpoint", num_heads=6
    )
    assert "text_length=11 contradicts the file, which has 10" in refused(
        tmp_path, tmp_path / "again.pth", tmp_path / "x", "checkpoint", text_length=11
    )
    # The caller may override conventions, because they are not properties of the tensors.
    assert read_any(tmp_path / "again.pth", null_text="token").config.guidance.null_text == "token"


def test_defaults_of_each_format(tmp_path):
    save_official(tmp_path / "o.safetensors", sizes=False)
    read = read_any(tmp_path / "o.safetensors", num_heads=4)
    guidance = read.config.guidance
    assert (guidance.null_text, guidance.null_mask, guidance.aspect_ratio) == ("token", "caption", "bucket")
    assert read.licence == "openrail++" and read.config.features.image_size == 64
    foreign.diffusers_model(**numbers()).save_pretrained(tmp_path / "d")
    read = read_any(tmp_path / "d")
    guidance = read.config.guidance
    assert (guidance.null_text, guidance.null_mask, guidance.aspect_ratio) == ("t5_empty", "own", "true")
    assert read.config.model.text_length == 120 and not np.any(read.params["null_text"])
    assert from_dict(to_dict(read.config)) == read.config
    # A null caption that is all zeros counts as missing.
    with pytest.raises(UserError, match="holds no null caption"):
        read_any(tmp_path / "d", null_text="token")


def test_noise_schedule_and_cleaning_stay_with_the_weights(tmp_path, base):
    read = read_any(base)
    diffusion = dataclasses.replace(read.config.diffusion, num_timesteps=500, beta_end=0.03)
    encoder = dataclasses.replace(read.config.features.text_encoder, clean_caption=False)
    features = dataclasses.replace(read.config.features, text_encoder=encoder)
    write_weights(
        tmp_path / "c", read.params, dataclasses.replace(read.config, diffusion=diffusion, features=features)
    )
    for name in ("o.safetensors", "o.pth"):
        run(tmp_path / "c", tmp_path / name, "official")
        again = read_any(tmp_path / name).config
        assert again.diffusion == diffusion and not again.features.text_encoder.clean_caption
    for source in (tmp_path / "c", tmp_path / "o.pth"):
        lines = run(source, tmp_path / "p", "diffusers", pipeline=base, overwrite=True)
        assert any("num_train_timesteps 500, beta_start 0.0001, beta_end 0.03" in line for line in lines)
        assert any("clean_caption=False" in line for line in lines)
        assert read_any(tmp_path / "p").config.diffusion == diffusion
    # A transformer folder has no scheduler.
    lines = run(tmp_path / "c", tmp_path / "d", "diffusers")
    assert any("num_train_timesteps 500" in line and "--pipeline" in line for line in lines)
    # Weights that state no noise schedule have that of the pipeline.
    lines = run(tmp_path / "d", tmp_path / "again", "diffusers", pipeline=tmp_path / "p")
    assert not any("num_train_timesteps" in line for line in lines)
    assert read_any(tmp_path / "again").config.diffusion == diffusion


def test_dit_prints_its_licence(tmp_path):
    model = foreign.TorchDiT(width=48, depth=2, heads=4, side=8, classes=5)
    torch.save(model.state_dict(), tmp_path / "dit.pt")
    lines = run(tmp_path / "dit.pt", tmp_path / "c", "checkpoint", num_heads=4)
    assert "CC-BY-NC" in lines[0] and "cc-by-nc-4.0" in lines[-1]
    assert "license: cc-by-nc-4.0" in (tmp_path / "c" / CARD).read_text()
    # The licence is kept in the checkpoint, and when converting back to DiT's own format.
    assert "cc-by-nc-4.0" in run(tmp_path / "c", tmp_path / "dit.safetensors", "official")[-1]
    back = load_file(tmp_path / "dit.safetensors")
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(back[name], value.numpy(), rtol=0, atol=2e-7, err_msg=name)
    run(tmp_path / "c", tmp_path / "dit.pth", "official")
    # DiT's own loader reads the key "ema".
    ema = torch.load(tmp_path / "dit.pth", weights_only=True)["ema"]
    foreign.TorchDiT(width=48, depth=2, heads=4, side=8, classes=5).load_state_dict(ema, strict=True)
    assert "a DiT, which has no text" in refused(tmp_path, tmp_path / "c", tmp_path / "x", "diffusers")


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "3", '{"num_heads": "4"}', '{"guidance": 1}', '{"guidance": {"channels": 7}}'),
        *("[" * 100_000, '{"num_heads": 0}', f'{{"num_heads": {"1" * 5000}}}', '{"latent_scale": "1"}'),
        *('{"diffusion": 1}', '{"diffusion": {"beta_end": NaN}}', '{"clean_caption": 1}'),
        *('{"kv_compression": ""}', '{"kv_compression": "none"}', '{"kv_compression": "ave"}'),
    ],
)
def test_notes_that_were_altered(tmp_path, text):
    metadata = {"pixart_jax.facts": text}
    save_file(foreign.official_state_dict(**numbers()), tmp_path / "o.safetensors", metadata)
    with pytest.raises(UserError, match="unreadable notes"):
        read_any(tmp_path / "o.safetensors", num_heads=4)


# --- EMA and raw ------------------------------------------------------------------------------------


def test_ema_or_raw_of_an_official_training_checkpoint(tmp_path):
    raw, ema = (foreign.official_state_dict(**numbers(side=side)) for side in (8, 8))
    rng = np.random.default_rng(0)
    ema = {name: value if name == "pos_embed" else value + 1 for name, value in ema.items()}
    # The official trainer copies the moving average before it loads weights, so its null caption is random.
    ema["y_embedder.y_embedding"] = rng.standard_normal(raw["y_embedder.y_embedding"].shape).astype(
        np.float32
    )
    content = {
        name: {key: torch.from_numpy(value) for key, value in tensors.items()}
        for name, tensors in (("state_dict", raw), ("state_dict_ema", ema))
    }
    torch.save({**content, "epoch": 3, "optimizer": {"state": {}}}, tmp_path / "epoch_3.pth")
    read = read_any(tmp_path / "epoch_3.pth", num_heads=4)
    np.testing.assert_array_equal(read.params["t_embedder"]["fc1"]["bias"], ema["t_embedder.mlp.0.bias"])
    np.testing.assert_array_equal(read.params["null_text"], raw["y_embedder.y_embedding"])
    assert len(read.notes) == 1 and "y_embedding" in read.notes[0]
    read = read_any(tmp_path / "epoch_3.pth", "raw", num_heads=4)
    np.testing.assert_array_equal(read.params["t_embedder"]["fc1"]["bias"], raw["t_embedder.mlp.0.bias"])
    assert not read.notes


def test_checkpoints_give_the_requested_weights(tmp_path):
    save_official(tmp_path / "o.safetensors")
    read = read_any(tmp_path / "o.safetensors", num_heads=4)
    write_weights(tmp_path / "c", read.params, read.config)
    model = pixart_jax.load_model(tmp_path / "c")
    assert model.config == read.config.model
    assert model.config.scan_layers is True  # also on GPUs, where the default of training is to unroll
    unrolled = pixart_jax.load_model(tmp_path / "c", scan_layers=False)
    assert len(unrolled.blocks.stacked) == model.config.depth
    assert "num_heads=2 contradicts the checkpoint" in refused(
        tmp_path, tmp_path / "c", tmp_path / "x", "official", num_heads=2
    )


def test_a_checkpoint_in_a_folder_that_orbax_cannot_write(tmp_path):
    save_official(tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"cannot be written to '.*/x\[1\]', because Orbax reads \["):
        convert(tmp_path / "a.pth", tmp_path / "x[1]", to="checkpoint", num_heads=4, say=print)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_renamed_checkpoint_is_no_newer_one(tmp_path):
    read = read_any(save_tiny_checkpoint(tmp_path / "run"))
    (tmp_path / "run" / "checkpoints" / "0").rename(tmp_path / "run" / "checkpoints" / "900")
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "900"):
        assert "contains step 0: its folder was renamed" in refused(
            tmp_path, path, tmp_path / "out", "official"
        )
    # Outside of a run, a checkpoint may have any name.
    (tmp_path / "run" / "checkpoints" / "900").rename(tmp_path / "best")
    jax.tree.map(np.testing.assert_array_equal, read_any(tmp_path / "best").params, read.params)


def save_tiny_checkpoint(path: Path, change=lambda params: None) -> Path:
    save_official(path.parent / "tiny.safetensors")
    read = read_any(path.parent / "tiny.safetensors", num_heads=4)
    change(read.params)
    write_weights(path, read.params, read.config)
    return path


# --- Weights that are not finite, and other unusual files --------------------------------------------


@pytest.mark.parametrize("to", ["checkpoint", "diffusers", "official"])
def test_weights_that_are_not_finite_are_named(tmp_path, to):
    tensors = foreign.official_state_dict(**numbers())
    tensors["blocks.0.attn.qkv.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "o.safetensors")
    message = refused(tmp_path, tmp_path / "o.safetensors", tmp_path / "out", to, num_heads=4)
    assert "blocks.0.attn.qkv.weight" in message and "NaN or infinite in 1 of 6912 values" in message


def test_checkpoints_that_are_not_finite_are_named(tmp_path):
    def damage(params):
        params["t_block"]["bias"][3] = np.inf

    source = save_tiny_checkpoint(tmp_path / "run", damage)
    message = refused(tmp_path, source, tmp_path / "out", "official")
    assert "array network.t_block.bias has values that are NaN or infinite" in message


@pytest.mark.parametrize("given", [{}, dict(null_text="t5_empty", text_length=10)])
def test_an_official_file_without_a_null_caption_is_read_as_diffusers(tmp_path, given):
    """Trainers with diffusers' conventions export such files."""
    tensors = foreign.official_state_dict(**numbers())
    del tensors["y_embedder.y_embedding"]
    save_file(tensors, tmp_path / "o.safetensors")
    lines = run(tmp_path / "o.safetensors", tmp_path / "d", "diffusers", num_heads=4, **given)
    assert "holds no null caption (y_embedder.y_embedding)" in lines[0]
    found = read_any(tmp_path / "o.safetensors", num_heads=4, **given)
    expected = read_any(tmp_path / "d", text_length=given.get("text_length"))
    assert found.config.guidance == expected.config.guidance
    assert found.config.model == expected.config.model
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert "holds no null caption" in refused(
        tmp_path, tmp_path / "o.safetensors", tmp_path / "x", "checkpoint", num_heads=4, null_text="token"
    )


def test_prefixes_are_removed_in_each_set_of_weights(tmp_path):
    """Also where the null caption of the raw weights replaces that of the moving average."""
    tensors = foreign.official_state_dict(**numbers())
    raw = {f"module.{name}": torch.from_numpy(value) for name, value in tensors.items()}
    ema = {**raw, "module.y_embedder.y_embedding": torch.zeros(10, 24)}
    torch.save({"state_dict": raw, "state_dict_ema": ema}, tmp_path / "o.pth")
    lines = run(tmp_path / "o.pth", tmp_path / "c", "checkpoint", num_heads=4)
    assert lines[0] == f"removed the prefix module. from the names in '{tmp_path / 'o.pth'}'."
    found = read_weights(tmp_path / "c")[0]
    np.testing.assert_array_equal(found["null_text"], tensors["y_embedder.y_embedding"])


def test_the_checkpoint_of_a_dit_trainer(tmp_path):
    model = foreign.TorchDiT(width=48, depth=2, heads=4, side=8, classes=5)
    content = {"model": model.state_dict(), "ema": model.state_dict(), "opt": {}}
    torch.save({**content, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "0000100.pt")
    run(tmp_path / "0000100.pt", tmp_path / "c", "checkpoint", num_heads=4)
    assert read_weights(tmp_path / "c")[1].model.num_classes == 5


def test_a_variant_of_a_whole_pipeline(tmp_path, base):
    """All parts as `save_pretrained(variant="fp16", max_shard_size=…)` writes them, and JSON with a BOM."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(base, torch_dtype=torch.float16)
    pipeline.save_pretrained(tmp_path / "p", variant="fp16", max_shard_size="30KB")
    assert list((tmp_path / "p" / "transformer").glob("*.index.fp16.json"))
    assert list((tmp_path / "p" / "text_encoder").glob("*.index.fp16.json"))
    for part in ("transformer", "vae", "text_encoder"):
        file = tmp_path / "p" / part / "config.json"
        file.write_text(file.read_text(), encoding="utf-8-sig")
    found, expected = (pixart_jax.load_pipeline(folder) for folder in (tmp_path / "p", base))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-6),
        *(read_any(folder).params for folder in (tmp_path / "p", base)),
    )
    text = [pipe.encode(["a corgi"]).text for pipe in (found, expected)]
    np.testing.assert_allclose(*text, rtol=0, atol=1e-2)
    latents = np.random.default_rng(0).standard_normal((1, 4, 4, 4))
    images = [pipe.decode(latents).astype(int) for pipe in (found, expected)]
    np.testing.assert_allclose(*images, rtol=0, atol=2)


# --- Diffusers and its pipeline ---------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "official", "checkpoint"])
def test_an_output_that_cannot_be_written_leaves_nothing(tmp_path, to):
    source, out = tmp_path / "o.safetensors", tmp_path / "out"
    out = out.with_suffix(".safetensors") if to == "official" else out
    save_official(source)
    before = sorted(tmp_path.rglob("*"))
    for size in (0, 300, 5_000):  # the first file, the list of arrays, the arrays
        with (
            largest_file(size),
            pytest.raises(OutputError, match=f"^'{out}' cannot be written .File too large"),
        ):
            run(source, out, to, num_heads=4)
        assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "notes").write_text("not a folder")
    for path, message in (
        (tmp_path / "notes" / "x", "a file is where"),
        (tmp_path / ("x" * 256), "too long"),
    ):
        with pytest.raises(OutputError, match=message):
            run(source, path.with_suffix(out.suffix), to, num_heads=4)


@pytest.mark.parametrize(
    ("platform", "attention"), [("gpu", "cudnn"), ("tpu", "splash"), ("gpu", "auto"), ("tpu", "auto")]
)
def test_a_run_of_an_accelerator_opens_on_a_cpu(tmp_path, platform, attention):
    """The checkpoint keeps the attention of the run; the weights are opened with one that a CPU supports."""
    model = PixArtConfig(
        **dict(size="custom", depth=1, hidden_size=48, num_heads=2, text_dim=8, text_length=5),
        **dict(attention=attention, dtype="bfloat16"),
    )
    with target_platform(platform):
        params = init_params(model, 0)
        write_weights(tmp_path / "run", params, TrainConfig(model=model))
    assert read_config(checkpoint_folder(tmp_path / "run")).model == model
    found, config = read_weights(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert config.model == dataclasses.replace(model, attention="auto")
    opened = pixart_jax.load_model(tmp_path / "run")
    assert opened.config.attention_choice().implementation == "xla"
    kernel = "cudnn" if platform == "gpu" else "splash"
    with pytest.raises(UserError, match=f"attention '{kernel}' cannot run: the backend is cpu"):
        pixart_jax.load_model(tmp_path / "run", attention=kernel)
    run(tmp_path / "run", tmp_path / "official.safetensors", "official")
    run(tmp_path / "official.safetensors", tmp_path / "again", "checkpoint", num_heads=2)
    assert read_config(checkpoint_folder(tmp_path / "again")).model.attention == "auto"


def test_size_conditions_of_512_px_are_folded(tmp_path):
    """Latent side 64 means 512 px; the pipeline of diffusers passes size conditions only at 1024 px."""
    save_official(tmp_path / "o.safetensors", sizes=True, side=64)
    lines = run(tmp_path / "o.safetensors", tmp_path / "d", "diffusers", num_heads=4)
    assert any("folded for 512x512 px" in line for line in lines)
    assert "folded for 512x512 px" in (tmp_path / "d" / CARD).read_text()
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["use_additional_conditions"] is False and config["sample_size"] == 64
    arguments = foreign.inputs((8, 8), **numbers(sizes=True))
    arguments |= {"image_size": np.full((3, 2), 512, np.float32), "aspect_ratio": np.ones((3, 1), np.float32)}
    expected = our_output(tmp_path / "o.safetensors", arguments, num_heads=4)
    model = pytest.importorskip("diffusers").PixArtTransformer2DModel.from_pretrained(tmp_path / "d")
    plain = {k: v for k, v in arguments.items() if k not in ("image_size", "aspect_ratio")}
    np.testing.assert_allclose(foreign.run_diffusers(model, plain), expected, rtol=0, atol=2e-5)

    run(tmp_path / "o.safetensors", tmp_path / "kept", "diffusers", num_heads=4, size_conditions="keep")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["use_additional_conditions"] is True


def test_size_conditions_of_1024_px_are_kept(tmp_path):
    save_official(tmp_path / "o.safetensors", sizes=True, side=128)
    lines = run(tmp_path / "o.safetensors", tmp_path / "d", "diffusers", num_heads=4)
    assert not any("size conditions" in line for line in lines)
    assert json.loads((tmp_path / "d" / "config.json").read_text())["use_additional_conditions"] is True


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "pipeline"
    foreign.save_pipeline(folder, foreign.diffusers_model(**numbers()))
    return folder


def test_a_whole_pipeline_folder(tmp_path, base):
    diffusers = pytest.importorskip("diffusers")
    save_official(tmp_path / "o.safetensors", sizes=True)
    lines = run(tmp_path / "o.safetensors", tmp_path / "p", "diffusers", num_heads=4, pipeline=base)
    assert any("folded for 64x64" in line for line in lines)
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(tmp_path / "p")
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        "two red foxes", num_inference_steps=2, output_type="np", use_resolution_binning=False
    ).images
    assert images.shape == (1, 64, 64, 3)
    pipe = pixart_jax.load_pipeline(tmp_path / "p")
    assert pipe(["two red foxes"], steps=2).shape == (1, 64, 64, 3)
    # A pipeline folder can also be converted: its transformer is found in it.
    run(base, tmp_path / "c", "checkpoint")
    assert read_weights(tmp_path / "c")[1].features.latent_scale == 0.18215


def test_a_pipeline_that_does_not_fit(tmp_path, base):
    source, out = tmp_path / "o.safetensors", tmp_path / "out"
    save_official(source, text=32)
    arguments = (tmp_path, source, out, "diffusers")
    assert "d_model 24, but the model's text width is 32" in refused(*arguments, num_heads=4, pipeline=base)
    assert "no model_index.json" in refused(*arguments, num_heads=4, pipeline=tmp_path)
    for index, message in (
        ({"_class_name": "StableDiffusionPipeline"}, "is a StableDiffusionPipeline"),
        ({"_class_name": "PixArtAlphaPipeline", "../evil": ["a", "b"]}, "'../evil'"),
        ({"_class_name": "PixArtAlphaPipeline", "vae": ["diffusers", "AutoencoderKL"]}, "'vae'"),
    ):
        (tmp_path / "index").mkdir(exist_ok=True)
        (tmp_path / "index" / "model_index.json").write_text(json.dumps(index))
        assert message in refused(*arguments, num_heads=4, pipeline=tmp_path / "index")
    assert "--pipeline only works with" in refused(
        tmp_path, source, out, "official", num_heads=4, pipeline=base
    )


def test_a_text_encoder_that_diffusers_cannot_hold(tmp_path, base):
    """The transformer alone is exported, and a line says what a user must pass to the pipeline."""
    save_official(tmp_path / "o.safetensors")
    read = read_any(tmp_path / "o.safetensors", num_heads=4)
    (tmp_path / "minilm").mkdir()
    (tmp_path / "minilm" / "config.json").write_text('{"model_type": "bert"}')
    encoder = dataclasses.replace(read.config.features.text_encoder, weights=str(tmp_path / "minilm"))
    features = dataclasses.replace(read.config.features, text_encoder=encoder)
    write_weights(tmp_path / "c", read.params, dataclasses.replace(read.config, features=features))
    arguments = (tmp_path / "c", tmp_path / "p", "diffusers")
    message = refused(tmp_path, *arguments, pipeline=base)
    assert "text encoder 'minilm' (bert), and a PixArtAlphaPipeline has a T5" in message
    lines = run(*arguments)
    assert any("'minilm' (bert)" in line and "prompt_embeds" in line for line in lines)
    assert "'minilm' (bert)" in (tmp_path / "p" / "README.md").read_text()
    (tmp_path / "minilm" / "config.json").write_text('{"model_type": "mt5"}')
    assert not any("minilm" in line for line in run(tmp_path / "c", tmp_path / "q", "diffusers"))
    run(tmp_path / "c", tmp_path / "r", "diffusers", pipeline=base)


# --- Input errors -----------------------------------------------------------------------------------


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    """Makes invalid files; returns them with a part of the expected error message."""
    good = foreign.official_state_dict(**numbers())

    def save(name, tensors):
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / name)
        return folder / name

    qkv = "blocks.1.attn.qkv.weight"
    many = save("many.safetensors", {**good, "blocks.0.extra": np.zeros(2, np.float32)})
    few = save("few.safetensors", {k: v for k, v in good.items() if k != qkv})
    transposed = save("transposed.safetensors", {**good, qkv: good[qkv].T})
    truncated = save("truncated.safetensors", good)
    truncated.write_bytes(truncated.read_bytes()[:-100])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "pwned"),)

    torch.save({"state_dict": {"x": Evil()}}, folder / "evil.pth")
    (folder / "shards").mkdir()
    index = {"weight_map": {"pos_embed.proj.bias": "../many.safetensors"}}
    (folder / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "shards" / "config.json").write_text("{}")
    return {
        "pickle with code": (folder / "evil.pth", "tensors and plain containers only"),
        "truncated": (truncated, "not a complete safetensors file"),
        "a key too many": (many, "unknown: blocks.0.extra"),
        "a key too few": (few, f"missing: {qkv} (ours: blocks.stacked.attn.qkv.kernel[1])"),
        "a transposed shape": (transposed, f"{qkv} 48x144 for 144x48"),
        "a path that leaves the folder": (folder / "shards", "plain name"),
    }


@pytest.mark.parametrize("to", ["checkpoint", "diffusers", "official"])
@pytest.mark.parametrize(
    "kind",
    [
        "pickle with code",
        "truncated",
        "a key too many",
        "a key too few",
        "a transposed shape",
        "a path that leaves the folder",
    ],
)
def test_malicious_and_broken_files(tmp_path, kind, to):
    source, message = broken(tmp_path)[kind]
    assert message in refused(tmp_path, source, tmp_path / "out", to, num_heads=4)
    assert not (tmp_path / "pwned").exists()


def test_input_errors_in_the_call(tmp_path):
    source = tmp_path / "o.safetensors"
    save_official(source)
    out = tmp_path / "out"
    for kwargs, message in (
        (dict(to="diffuser"), "--to is 'diffuser': choose one of diffusers"),
        (dict(to="diffusers", size_conditions="foldd"), "Did you mean 'fold'"),
        (dict(to="diffusers", num_head=4), "Did you mean 'num_heads'"),
        (dict(to="diffusers"), "--num_heads"),
        (dict(to="diffusers", num_heads=5), "model.num_heads 5"),
        (dict(to="diffusers", num_heads="4"), "num_heads='4' is not of the right type: give an integer"),
        (dict(to="diffusers", num_heads=0), "argument num_heads is 0: it must be at least 1"),
        (
            dict(to="diffusers", num_heads=4, latent_scale=np.nan),
            "argument latent_scale is nan: it must",
        ),
        (dict(to="diffusers", num_heads=4, position_scale=-1.0), "argument position_scale is -1.0: it must"),
        (dict(to="diffusers", num_heads=4, null_text="tokn"), "guidance.null_text"),
        (dict(to="diffusers", num_heads=4, weights="emma"), "'emma'"),
        (dict(to="checkpoint", num_heads=4, licence="mit"), "--licence is 'mit'"),
    ):
        assert message in refused(tmp_path, source, out, **kwargs)
    assert ".safetensors or .pth" in refused(tmp_path, source, tmp_path / "x.bin", "official", num_heads=4)
    assert "would replace" in refused(tmp_path, source, source, "official", num_heads=4, overwrite=True)
    assert "exists" in refused(tmp_path, source, source, "official", num_heads=4)
    assert "do not exist" in refused(tmp_path, tmp_path / "gone", out, "checkpoint")


# --- Adapters ---------------------------------------------------------------------------------------


def test_adapters_are_merged(tmp_path):
    """All three formats have the kernels of the formula, and say what was merged."""
    kohya = adapter_formats.save_kohya(tmp_path / "kohya.safetensors", adapter_formats.draw())
    lora = GOLDENS / "lora"
    adapters = read_adapters([f"{kohya}:0.5", lora])
    expected = merge(read_any(BASE).params, read_any(BASE).config.model, adapters)
    for to, name in (("checkpoint", "c"), ("diffusers", "d"), ("official", "o.safetensors")):
        lines = run(BASE, tmp_path / name, to, adapter=[f"{kohya}:0.5", str(lora)])
        assert {
            "merged the adapter kohya.safetensors with weight 0.5.",
            "merged the adapter lora with weight 1.",
        } <= set(lines)
        read = read_any(tmp_path / name, num_heads=None if to != "official" else 4)
        jax.tree.map(np.testing.assert_array_equal, read.params, expected)
        if to != "checkpoint":  # its manifest is that of a checkpoint
            merged = [(each["name"], each["weight"]) for each in read.manifest["adapters"]]
            assert merged == [("kohya.safetensors", 0.5), ("lora", 1.0)]
        card = tmp_path / (f"{name}.md" if to == "official" else f"{name}/{CARD}")
        assert adapters[0][0].digest in card.read_text()


def test_adapters_are_converted(tmp_path):
    lora = GOLDENS / "lora"
    run(lora, tmp_path / "k.safetensors", "kohya")
    run(tmp_path / "k.safetensors", tmp_path / "c.safetensors", "comfyui")
    lines = run(tmp_path / "c.safetensors", tmp_path / "p", "peft")
    assert lines == [f"wrote {tmp_path / 'p'}: adapter -> peft, 27 modules of rank 4"]
    assert read_adapter(tmp_path / "p").digest == read_adapter(lora).digest
    run(lora, tmp_path / "p", "peft", overwrite=True)
    second = GOLDENS / "pytorch_lora_weights_unet.safetensors"
    run(second, tmp_path / "second", "peft", adapter_alpha=8)
    assert read_adapter(tmp_path / "second").digest == read_adapter(lora).digest
    assert "norm of W in place of" in run(GOLDENS / "dora", tmp_path / "d.safetensors", "comfyui")[0]


def test_invalid_adapters(tmp_path):
    lora, out = GOLDENS / "lora", tmp_path / "x.safetensors"
    save_official(tmp_path / "o.safetensors", size="large")
    write_weights(tmp_path / "c", read_any(BASE).params, read_any(BASE).config)
    for source, to, kwargs, message in (
        (lora, "kohya", dict(num_heads=4), "--num_heads has no effect on an adapter (--to=kohya)"),
        (lora, "kohya", dict(adapter=[lora]), "--adapter has no effect on an adapter"),
        (lora, "kohya", dict(size_conditions="fold"), "--size_conditions has no effect on an adapter"),
        (lora, "kohya", dict(adapter_alpha=8.0), "states its scale, so --adapter_alpha has no effect"),
        (lora / "adapter_model.safetensors", "official", {}, "is an adapter, not the weights of a network"),
        (BASE, "kohya", {}, "tensors that no adapter of a PixArt has"),
        (tmp_path / "c", "kohya", {}, "holds the weights of a whole network"),
        (BASE, "official", dict(adapter=f"{lora}:big"), "'big' after the ':' is not a number"),
        (BASE, "official", dict(adapter_alpha=8.0), "--adapter_alpha has no effect without --adapter"),
        (
            tmp_path / "o.safetensors",
            "official",
            dict(adapter=lora, num_heads=6),
            "lora' does not fit these weights of width 96 and depth 3",
        ),
    ):
        assert message in refused(tmp_path, source, out, to, **kwargs)
    assert "must end in .safetensors" in refused(tmp_path, lora, tmp_path / "x", "comfyui")
    assert not out.exists()


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    save_official(tmp_path / "o.safetensors")
    monkeypatch.setattr("pixart_jax.convert.to_diffusers_config", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "o.safetensors", tmp_path / "out", "diffusers", num_heads=4)
    assert os.listdir(tmp_path) == ["o.safetensors"]


# --- Command ----------------------------------------------------------------------------------------


def command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pixart_jax.convert", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def test_the_command(tmp_path):
    save_official(tmp_path / "o.safetensors")
    to = ["--to=checkpoint", f"--output={tmp_path / 'c'}"]
    done = command(f"--input={tmp_path / 'o.safetensors'}", "--num_heads=4", *to)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"wrote {tmp_path / 'c'}: official -> checkpoint")
    assert pixart_jax.load_model(tmp_path / "c").config.num_heads == 4
    failed = command(f"--input={tmp_path / 'o.safetensors'}", *to)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ") and "exists" in failed.stderr
    assert command("--to=checkpoint").stderr.strip() == "error: --input, --output are missing: see --help."


def test_help():
    text = command("--help").stdout
    assert all(f"--{name}:" in text for name in ("input", "output", "to", "weights", "pipeline", "num_heads"))
    assert "--[no]overwrite:" in text


def test_every_argument_has_a_flag():
    names = {
        name
        for name, parameter in inspect.signature(convert).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    }
    assert {*Flags().arguments, "say"} == names | {*loading.FACTS, *loading.CONVENTIONS}
