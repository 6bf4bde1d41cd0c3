"""A LoRA of the digits, from training to peft and back: the whole way of a user, with a few steps."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from command_line import parse
from digits_runs import losses, make_features, tiny_config
from flax import traverse_util

from pixart_jax import evaluate
from pixart_jax.config import InitConfig
from pixart_jax.convert import convert
from pixart_jax.errors import UserError
from pixart_jax.models.adapters import is_adapter
from pixart_jax.models.configs import AdapterConfig
from pixart_jax.train import train
from pixart_jax.weights.adapter_files import read_adapter, read_adapters
from pixart_jax.weights.adapters import merge
from pixart_jax.weights.checkpoints import read_network, read_weights, write_weights
from pixart_jax.weights.loading import licence_of, read_any, with_adapters


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)))


def adapters(params):
    flat = traverse_util.flatten_dict(params)
    return {path: np.asarray(leaf) for path, leaf in flat.items() if is_adapter(path)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, random_params):
    """Features of digits, and weights to adapt."""
    folder = tmp_path_factory.mktemp("lora")
    make_features(folder / "features", "stage2")
    config = tiny_config(folder / "features", "stage2")
    write_weights(folder / "base", random_params(config.model)[1], config)
    return folder


def lora(folder, **changes):
    config = tiny_config(folder / "features", "stage2")
    optimizer = dataclasses.replace(config.optimizer, accumulation=2, moments="int8", power_ema="0.05,0.2")
    adapter = AdapterConfig("dora", rank=2, alpha=3.0, dropout=0.1, base_dtype="bfloat16")
    init = InitConfig("weights", str(folder / "base"))
    checkpoint = dataclasses.replace(config.checkpoint, snapshot_every=2)
    return dataclasses.replace(
        config,
        **{"checkpoint": checkpoint, "optimizer": optimizer, "adapter": adapter, "init": init, **changes},
    )


@pytest.fixture(scope="module")
def run(folder):
    train(lora(folder), folder / "run")
    return folder / "run"


def test_a_killed_run_continues_to_the_same_bits(folder, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    state = train(lora(folder), tmp_path / "run")
    (ours, _), (theirs, _) = (read_network(tmp_path / "run", which) for which in ("ema", "raw"))
    for which, found in (("ema", ours), ("raw", theirs)):
        assert equal(found, read_network(run, which)[0])
    assert losses(tmp_path / "run") == losses(run)
    assert all(is_adapter(path) for path in traverse_util.flatten_dict(state.trained))


def test_averages_of_other_widths(run, tmp_path, capsys):
    """They hold the base of the run and other adapters, and are read and exported like a run."""
    flags = (f"--checkpoint={run}", "--widths=0.15,0.2", f"--out={tmp_path}")
    evaluate.main(parse(evaluate.Flags, "ema", *flags))
    assert "width 0.15 from 4 averages, error " in capsys.readouterr().out
    raw = traverse_util.flatten_dict(read_network(run, "raw")[0])
    for width in ("0.15", "0.2"):
        found, config = read_network(tmp_path / width)
        assert config.adapter.rank == 2
        for path, leaf in traverse_util.flatten_dict(found).items():
            assert is_adapter(path) or np.array_equal(leaf, raw[path])
    convert(tmp_path / "0.15", tmp_path / "peft", "peft", say=lambda line: None)
    digests = [
        read_adapter(path).digest for path in (tmp_path / "peft", tmp_path / "0.15", tmp_path / "0.2", run)
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3
    with pytest.raises(UserError, match=r"0\.15 exists: remove it or choose another"):
        evaluate.main(parse(evaluate.Flags, "ema", *flags))


def test_only_the_adapter_is_trained(folder, run):
    (trained, config), (base, _) = read_network(run, "raw"), read_weights(folder / "base")
    assert config.adapter.rank == 2
    flat = traverse_util.flatten_dict(trained)
    for path, leaf in traverse_util.flatten_dict(base).items():
        if path == ("null_text",):  # that of the features
            continue
        np.testing.assert_array_equal(flat[path].astype(np.float32), leaf.astype(flat[path].dtype))
    assert all(np.abs(leaf).max() > 0 for leaf in adapters(trained).values())


def test_a_run_is_its_base_with_its_adapter(folder, run):
    """Sampling reads the merged network; the adapter alone gives the same on the base."""
    merged, config = read_weights(run)
    assert not config.adapter and {str(leaf.dtype) for leaf in jax.tree.leaves(merged)} == {"float32"}
    read = read_any(run)
    assert read.config == dataclasses.replace(read.config, adapter=AdapterConfig()) and equal(
        read.params, merged
    )
    base, _ = read_weights(folder / "base")
    stored = jax.tree.map(lambda leaf: leaf.astype("bfloat16").astype("float32"), base)
    stored["null_text"] = merged["null_text"]
    again = merge(stored, config.model, [(read_adapter(run), 1.0)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)


def test_export_and_continuation(folder, run, tmp_path):
    convert(run, tmp_path / "peft", "peft", say=lambda line: None)
    adapter = read_adapter(run)
    assert read_adapter(tmp_path / "peft").digest == adapter.digest
    assert read_adapter(run, weights="raw").digest != adapter.digest
    convert(run, tmp_path / "kohya.safetensors", "kohya", say=lambda line: None)
    # Continues the exported adapter: at step 0 it is the adapter of the run.
    init = InitConfig("weights", str(folder / "base"), str(tmp_path / "peft"))
    train(lora(folder, init=init, steps=1), tmp_path / "more")
    first, _ = read_network(tmp_path / "more", "raw")
    own, _ = read_network(run, "ema")
    start, end = adapters(own), adapters(first)
    rate = lora(folder).optimizer.learning_rate
    for path, leaf in start.items():
        # One update of AdamW changes a value by about the learning rate at most.
        np.testing.assert_allclose(end[path], leaf, atol=3 * rate)


def test_merging_a_run_with_a_rounded_base_says_so(folder, run, tmp_path):
    said = []
    convert(run, tmp_path / "merged", "diffusers", say=said.append)
    (line,) = (line for line in said if "bfloat16" in line)
    assert "the base rounded to bfloat16" in line and "--input=BASE --adapter=RUN" in line
    assert line in (tmp_path / "merged/README.md").read_text()
    said.clear()
    convert(folder / "base", tmp_path / "better", "diffusers", adapter=str(run), say=said.append)
    assert not any("bfloat16" in line for line in said)
    assert read_any(tmp_path / "better").adapter.kind == "none"


def test_adding_an_adapter_to_its_own_run_says_so(folder, run, tmp_path):
    adapters = read_adapters(str(run))
    (note,) = with_adapters(read_any(run), adapters).notes
    assert "already part of its weights" in note
    assert with_adapters(read_any(folder / "base"), adapters).notes == ()


def test_exports_of_a_run_have_the_licence_of_its_base_and_no_local_paths(folder, run, tmp_path):
    # The licence of the base is in its card.
    based = tmp_path / "licensed"
    convert(folder / "base", based, "checkpoint", licence="openrail++", say=lambda line: None)
    train(lora(folder, init=InitConfig("weights", str(based)), steps=1), tmp_path / "run")
    for to in ("peft", "diffusers"):
        convert(tmp_path / "run", tmp_path / to, to, say=lambda line: None)
        card = (tmp_path / to / "README.md").read_text()
        assert "license: openrail++" in card and card.count("\n") < 200
        for file in (tmp_path / to).iterdir():
            assert str(tmp_path).encode() not in file.read_bytes()
    assert read_adapter(tmp_path / "peft").base == "licensed" == read_adapter(tmp_path / "run").base
    assert licence_of(run) == "other"
    shutil.rmtree(based)
    assert licence_of(tmp_path / "run") == "other"


def test_invalid_uses(folder, run, tmp_path):
    with pytest.raises(UserError, match=r"adapter\.rank is 3, the checkpoint has 2"):
        train(lora(folder, adapter=dataclasses.replace(lora(folder).adapter, rank=3)), run)
    with pytest.raises(UserError, match="holds the weights of a whole network"):
        convert(folder / "base", tmp_path / "out", "peft")
    with pytest.raises(UserError, match="--adapter_alpha has no effect"):
        read_adapter(run, alpha=2.0)
    with pytest.raises(UserError, match="--weights=raw has no effect"):
        convert(run, tmp_path / "peft", "peft", say=lambda line: None)
        read_adapter(tmp_path / "peft", weights="raw")
