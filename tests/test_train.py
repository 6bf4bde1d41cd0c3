import dataclasses
import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_services
import feature_folders
import foreign
import jax
import numpy as np
import pytest
from command_line import parse
from digits_runs import make_features, metrics, tiny_config
from fake_services import calls_of
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, keys, make_record, write_folder
from PIL import Image
from safetensors.numpy import load_file, save_file

from pixart_jax import on_the_fly
from pixart_jax.config import (
    CheckpointConfig,
    CompileConfig,
    DataConfig,
    DivergenceConfig,
    FeaturesConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    OptimizerConfig,
    from_config_dict,
    from_file,
)
from pixart_jax.convert import convert
from pixart_jax.data.digits import DigitsSource
from pixart_jax.data.features import FeatureDataset
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import EXIT_DIVERGED, EXIT_PREEMPTED, RunStopped, UserError
from pixart_jax.models.configs import NULL_TEXT, PixArtConfig
from pixart_jax.train import Flags, train
from pixart_jax.training import sharding
from pixart_jax.training.checkpoints import Checkpoints
from pixart_jax.training.data import check_features, open_training_data
from pixart_jax.training.distributed import Cluster
from pixart_jax.training.initialization import initial_params
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.sharding import make_mesh
from pixart_jax.weights.checkpoints import read_weights
from pixart_jax.weights.loading import read_any
from pixart_jax.weights.snapshots import reconstruct

ROOT = Path(__file__).parent.parent


def run(module, *arguments, status=0):
    done = subprocess.run(
        [sys.executable, "-m", f"pixart_jax.{module}", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of the held-out digits, for stages 1 and 2."""
    out = tmp_path_factory.mktemp("features")
    for stage in ("stage1", "stage2"):
        make_features(out / stage, stage)
    return out


def tiny(features, stage="stage1", **changes):
    """A stage of the digits that trains in seconds. One of its four updates is a spike and is skipped."""
    values = dict(
        checkpoint=CheckpointConfig(every=2, keep=3),
        divergence=DivergenceConfig(action="skip", spike_factor=1.02, spike_warmup=1),
    )
    return tiny_config(features / stage, stage, **{**values, **changes})


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(features, tmp_path_factory):
    """The folder and the final state of a run of four steps without interruption."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, train(tiny(features, "stage2"), workdir)


def test_files_of_a_run(straight):
    workdir, state = straight
    assert int(state.step) == 4
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {"loss", "mse", "vb", "gradient_norm", "learning_rate", "steps_per_second"} <= lines[0].keys()
    assert {"validation_loss", *(f"validation_loss_part_{part}" for part in range(8))} <= lines[3].keys()
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert any((workdir / "tensorboard").iterdir())
    metadata = json.loads((workdir / "checkpoints/4/metadata/metadata").read_text())
    assert metadata["step"] == 4 and metadata["versions"]["jax"] == jax.__version__
    text = (workdir / "config.json").read_text()
    assert json.loads(text) == metadata["config"] and text.endswith("\n}\n")


def test_resuming_gives_the_same_bits(features, straight, tmp_path):
    """A run that is resumed after 2 steps has the same state and losses as one of 4 steps."""
    workdir, uninterrupted = straight
    config = tiny(features, "stage2")
    # The run was stopped after step 2: there is no second checkpoint, but there are later lines of metrics.
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    # A folder that Orbax leaves if the process is killed while it saves.
    (tmp_path / "run/checkpoints/4.orbax-checkpoint-tmp-1/params").mkdir(parents=True)
    resumed = train(config, tmp_path / "run")
    equal(resumed, uninterrupted)
    before, after = (
        (path / "metrics.jsonl").read_text().splitlines() for path in (workdir, tmp_path / "run")
    )
    assert [json.loads(line)["loss"] for line in after] == [json.loads(line)["loss"] for line in before]


def test_training_choices_resume_to_the_same_bits(features, tmp_path):
    """Sampling and export read the average of schedule-free AdamW, not the parameters that it trains."""
    config = tiny(features, divergence=DivergenceConfig())
    diffusion = dataclasses.replace(
        config.diffusion,
        loss="huber",
        timestep_density="speed",
        importance_weights=True,
        min_snr_gamma=0.0,
        change_weighting=0.6,
        noise_candidates=3,
        noise_offset=0.1,
        input_perturbation=0.1,
    )
    optimizer = dataclasses.replace(config.optimizer, name="schedule_free", warmup_steps=1)
    config = dataclasses.replace(config, optimizer=optimizer, diffusion=diffusion)
    uninterrupted = train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    before = metrics(tmp_path / "run")
    equal(train(config, tmp_path / "run"), uninterrupted)
    assert metrics(tmp_path / "run") == before and "huber" in before[0]

    def kernel(params):
        return np.asarray(params["t_embedder"]["fc1"]["kernel"])

    y, z = kernel(uninterrupted.trained[NETWORK]), kernel(uninterrupted.optimizer[-1].z[NETWORK])
    found = kernel(read_weights(tmp_path / "run")[0])
    np.testing.assert_allclose(found, (y - (1 - optimizer.beta1) * z) / optimizer.beta1, atol=1e-6)
    assert np.any(found != y)


@pytest.mark.parametrize(
    "accelerators",
    [
        dict(
            optimizer=dict(name="muon", muon_learning_rate=3e-3),
            diffusion=dict(timestep_density="logit_normal"),
            routing=dict(rate=0.5, first_blocks=0, last_blocks=0),
        ),
        # The last kernel is multiplied by the ratio of the widths at the start of a run, not when it resumes.
        dict(model=dict(mup_base_width=12)),
    ],
    ids=["muon-routing", "mup"],
)
def test_accelerators_resume_to_the_same_bits(features, tmp_path, accelerators):
    config = tiny(features, divergence=DivergenceConfig())
    changes = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in accelerators.items()
    }
    config = dataclasses.replace(config, **changes)
    uninterrupted = train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    equal(train(config, tmp_path / "run"), uninterrupted)


def test_a_host_average_resumes_to_the_same_bits(features, tmp_path):
    """The run is resumed after step 2, between the first and the second update of the average (3 and 6).

    Power-function averages are kept in the same way, and have the same snapshots.
    """
    checkpoint = CheckpointConfig(every=2, keep=3, snapshot_every=3)
    config = tiny(features, steps=6, divergence=DivergenceConfig())
    optimizer = dataclasses.replace(
        config.optimizer, ema_every=3, ema_device="host", offload=True, power_ema="0.05,0.2"
    )
    log = dataclasses.replace(config.log, sample_every=6, samples=2, sample_steps=2)
    config = dataclasses.replace(config, optimizer=optimizer, log=log, checkpoint=checkpoint)
    uninterrupted = train(config, tmp_path / "run")
    before, reconstructed = metrics(tmp_path / "run"), reconstruct(tmp_path / "run", 0.15)[0]
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/{step}")
    shutil.rmtree(tmp_path / "run/ema/3")
    (tmp_path / "run/ema/6").rename(tmp_path / "run/ema/5")  # of another history
    resumed = train(config, tmp_path / "run")
    equal(resumed, uninterrupted)
    assert sorted(path.name for path in (tmp_path / "run/ema").iterdir()) == ["3", "6"]
    again, _, fit = reconstruct(tmp_path / "run", 0.15)
    equal(again, reconstructed)
    assert len(fit.weights) == 4
    assert metrics(tmp_path / "run") == before and "validation_loss" in before[-1]
    assert (tmp_path / "run/samples/00000006.png").exists()
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(resumed.ema)} == {"pinned_host"}
    equal(read_weights(tmp_path / "run")[0], resumed.weights()[NETWORK])
    # Where the state is kept may change when a run resumes.
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    optimizer = dataclasses.replace(optimizer, ema_device="device", offload=False)
    moved = train(dataclasses.replace(config, optimizer=optimizer), tmp_path / "run")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved.ema, resumed.ema)


def test_a_spike_after_the_resumed_checkpoint(straight):
    """The resumed run above must skip the same update.

    The spike is after the checkpoint, so it is detected only if the running average of the loss is restored.
    """
    lines = [json.loads(line) for line in (straight[0] / "metrics.jsonl").read_text().splitlines()]
    refused = [line["step"] for line in lines if line["refused"]]
    assert refused and max(refused) > 2
    keys = [json.loads(line) for line in (straight[0] / "refused_updates.jsonl").read_text().splitlines()]
    assert [line["step"] for line in keys] == refused and len(keys[0]["keys"]) == 16


def test_a_kill_right_after_a_checkpoint_loses_no_metrics(features, straight, tmp_path, monkeypatch):
    """The resumed run does not repeat the step of the checkpoint, so its line must already be there."""

    class Killed(BaseException):
        pass

    def save(checkpoints, *arguments):
        saved(checkpoints, *arguments)
        checkpoints.wait()
        raise Killed

    saved = Checkpoints.save
    config = tiny(features, "stage2")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save)
        train(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["2"]
    equal(train(config, tmp_path / "run"), straight[1])
    assert metrics(tmp_path / "run") == metrics(straight[0])
    refused, expected = (path / "refused_updates.jsonl" for path in (tmp_path / "run", straight[0]))
    assert refused.read_text() == expected.read_text()


def test_a_stopped_run_saves_and_can_be_resumed(features, straight, tmp_path):
    cluster = Cluster()
    config = tiny(features, "stage2")

    def stop_requested(steps):
        if steps == 1:
            # Meanwhile, no other run can use the directory; see also `lock_run`.
            with pytest.raises(UserError, match=f"used by another run .process {os.getpid()} on host"):
                train(config, tmp_path / "run")
        return steps == 3

    cluster.stop_requested = stop_requested
    with pytest.raises(RunStopped, match="step 3 of 4 is saved") as stopped:
        train(config, tmp_path / "run", cluster=cluster)
    assert stopped.value.status == EXIT_PREEMPTED
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["2", "3"]
    equal(train(config, tmp_path / "run"), straight[1])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["starts"] == 2 and summary["step"] == 4
    assert sum(summary["share"].values()) == pytest.approx(1, abs=1e-4)
    assert all(summary["seconds"][phase] > 0 for phase in ("step", "compile", "checkpoint", "restart"))


def test_a_finished_run_is_not_changed(features, straight, capsys):
    workdir, state = straight
    before = (workdir / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    config = tiny(features, "stage2")
    slower = dataclasses.replace(config.optimizer, learning_rate=1e-5)
    equal(train(dataclasses.replace(config, optimizer=slower), workdir), state)
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert "config: optimizer.learning_rate was 0.001, now 1e-05\n" in capsys.readouterr().out


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_kernels_on_gpus(features, straight, monkeypatch, capsys, deterministic):
    """Settings are applied before any device is used; without them, a note about resuming is printed."""
    applied = []
    monkeypatch.setattr(
        "pixart_jax.training.settings.apply_settings", lambda *given: applied.append(given[0])
    )
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(
        "pixart_jax.training.sharding.make_mesh", lambda *given: applied and make_mesh(*given)
    )
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    # The devices are in fact CPUs, which do not have the compute capability of an NVIDIA GPU.
    monkeypatch.setattr("pixart_jax.models.dtypes.cuda_capability", lambda: None)
    monkeypatch.setattr("pixart_jax.models.attention.cuda_capability", lambda: None)
    train(tiny(features, "stage2", compile=CompileConfig(deterministic=deterministic)), straight[0])
    assert applied == [deterministic]
    assert ("compile.deterministic is False: on GPUs" in capsys.readouterr().out) != deterministic


def test_resuming_on_another_mesh(features, straight, tmp_path):
    workdir, uninterrupted = straight
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    moved = train(tiny(features, "stage2", mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path / "run")
    for a, b in zip(jax.tree.leaves(moved.ema), jax.tree.leaves(uninterrupted.ema)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_resuming_a_mixed_run_over_buckets(features, tmp_path):
    """With two folders of different weight, two buckets and two captions per image, the bits are the same."""
    folders = [
        write_folder(
            tmp_path / name,
            {
                SQUARE: [make_record(key, captions=2) for key in keys(square, f"{name}/square")],
                WIDE: [make_record(key, WIDE, captions=2) for key in keys(wide, f"{name}/wide")],
            },
        )
        for name, square, wide in (("one", 30, 23), ("two", 21, 11))
    ]
    base = tiny(features, "stage2")
    config = dataclasses.replace(
        base,
        steps=6,
        model=PixArtConfig(
            size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=WIDTH, text_length=TEXT_LENGTH,
            base_size=4, size_conditions=True,
        ),
        features=FeaturesConfig(text_length=TEXT_LENGTH),
        data=DataConfig(train=",".join(map(str, folders)), weights="1,3", batch_size=8, threads=2),
        checkpoint=CheckpointConfig(every=3),
    )  # fmt: skip
    loader, datasets = open_training_data(config, "", make_objective(config), make_mesh(MeshConfig()))
    steps_per_epoch = sum(loader.order.draws) / 8
    assert 3 < steps_per_epoch < 11 and steps_per_epoch % 3  # the run is resumed within an epoch
    for half in (range(3), range(3, 6)):  # both halves use both buckets and both folders
        met = [loader.positions(step) for step in half]
        assert {place.dataset for rows in met for place in rows} == {0, 1}
        assert {datasets[rows[0].dataset].buckets[rows[0].bucket].bucket for rows in met} == {SQUARE, WIDE}

    uninterrupted = train(config, tmp_path / "straight")
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    # Compiling the steps of all buckets ahead of time must not change the result, either.
    ahead = dataclasses.replace(config, compile=CompileConfig(ahead=True))
    equal(train(ahead, tmp_path / "run"), uninterrupted)


def test_training_on_the_fly_equals_training_on_features(features, straight, tmp_path, monkeypatch):
    """With `data.on_the_fly` the losses are the same as with the features of the digits."""
    monkeypatch.setattr(on_the_fly, "open_images", lambda *_: DigitsSource("test"))
    config = tiny(features, "stage2", steps=2)
    data = dataclasses.replace(config.data, train="digits", validation="", on_the_fly=True)
    train(dataclasses.replace(config, data=data), tmp_path)
    before, after = (path / "metrics.jsonl" for path in (straight[0], tmp_path))
    first = [json.loads(line)["loss"] for line in before.read_text().splitlines()]
    second = [json.loads(line)["loss"] for line in after.read_text().splitlines()]
    np.testing.assert_allclose(second, first[:2], rtol=1e-5)


def test_stage_2_starts_from_stage_1(features, tmp_path, capsys):
    log = LogConfig(every=1, validate_every=0, sample_every=2, samples=4, sample_steps=2)
    train(tiny(features, "stage1", steps=2, log=log), tmp_path / "stage1")
    with Image.open(tmp_path / "stage1/samples/00000002.png") as picture:
        assert picture.width == picture.height > 2 * 64
    init = InitConfig(method="reparameterize", path=str(tmp_path / "stage1"))
    state = train(tiny(features, "stage2", steps=1, init=init), tmp_path / "stage2")
    printed = capsys.readouterr().out
    assert printed.count("attention: xla (auto: the backend is cpu)") == 2  # once per run
    assert "reparameterize from" in printed and "copied" in printed and "left out" in printed
    # The console gets totals, and files get one line per array.
    assert "blocks.stacked" not in printed
    assert "label_table" in (tmp_path / "stage2/initialization.txt").read_text()
    assert "network.blocks.stacked.attn.proj.bias" in (tmp_path / "stage2/parameters.txt").read_text()
    params, config = read_weights(tmp_path / "stage2")
    assert config.name == "stage2"
    equal(params, state.weights()[NETWORK])
    null = np.load(features / "stage2" / "null_text.npy")
    np.testing.assert_array_equal(params[NULL_TEXT], null)


def test_prompts_without_held_out_data(features, straight, tmp_path, monkeypatch, capsys):
    """Their images are beside those of the weights that the run starts from, also after it is resumed."""
    (service,) = fake_services.install(monkeypatch, tmp_path, "trackio")
    config = tiny(
        features,
        "stage2",
        data=DataConfig(train=str(features / "stage2"), batch_size=16, threads=1),
        init=InitConfig(method="weights", path=str(straight[0])),
        log=LogConfig(every=1, sample_every=2, sample_steps=2, prompts="a three|a five", tracker="trackio"),
    )
    workdir = tmp_path / "run"
    uninterrupted = train(config, workdir)
    assert "data.validation is empty: this run has no validation loss. To get one" in capsys.readouterr().out
    samples = workdir / "samples"
    names = ["00000000", "00000002", "00000004"]
    assert sorted(path.name for path in samples.glob("*.*")) == [
        name for step in names for name in (f"{step}.png", f"{step}.txt")
    ]
    sizes = [Image.open(samples / f"{name}.png").size for name in names]
    assert sizes[1] == sizes[2] and sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        assert line["seconds_left"] >= 0 and "gradient_norm" in line and "learning_rate" in line
    assert line["seconds_left"] == 0
    images = [given["step"] for given in calls_of(service, "log") if "samples" in given["values"]]
    assert images == [0, 2, 4] and not (workdir / "tensorboard").exists()

    shutil.rmtree(workdir / "checkpoints/4")
    before = {path: path.read_bytes() for path in samples.rglob("*.*")}
    (samples / "00000004.png").unlink()
    equal(train(config, workdir), uninterrupted)
    assert {path: path.read_bytes() for path in samples.rglob("*.*")} == before
    first, second = calls_of(service, "init")
    assert first["name"] == second["name"] and len(calls_of(service, "finish")) == 2


def test_a_run_that_fails_ends_its_services(features, tmp_path, monkeypatch):
    (service,) = fake_services.install(monkeypatch, tmp_path, "wandb")
    log = LogConfig(every=1, validate_every=0, sample_every=0, tracker="wandb")
    cluster = Cluster()
    cluster.stop_requested = lambda steps: steps == 1
    with pytest.raises(RunStopped):
        train(tiny(features, "stage1", log=log), tmp_path / "run", cluster=cluster)
    assert len(calls_of(service, "log")) == len(calls_of(service, "finish")) == 1


def finetuning(folder, weights):
    """The config of `configs/finetune.py`, with a tiny model."""
    base = from_file("finetune:512")
    tokens = feature_folders.TEXT_LENGTH
    return dataclasses.replace(
        base,
        steps=2,
        model=PixArtConfig(
            size="custom",
            depth=2,
            hidden_size=48,
            num_heads=4,
            base_size=4,
            text_dim=feature_folders.WIDTH,
            text_length=tokens,
        ),
        features=dataclasses.replace(base.features, image_size=64, text_length=tokens),
        data=DataConfig(train=str(folder), batch_size=16, threads=1),
        init=InitConfig(method="weights", path=str(weights)),
        optimizer=dataclasses.replace(base.optimizer, accumulation=1),
        log=LogConfig(every=1, sample_every=0),
    )


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A random model in both formats of the release, and a feature folder that matches it."""
    root = tmp_path_factory.mktemp("released")
    records = [feature_folders.make_record(key) for key in feature_folders.keys(16)]
    feature_folders.write_folder(root / "features", {feature_folders.SQUARE: records})
    numbers = {**foreign.SIZES["small"], "text": feature_folders.WIDTH, "tokens": feature_folders.TEXT_LENGTH}
    official = root / "official.safetensors"
    save_file(foreign.official_state_dict(**numbers, sizes=False), official)
    convert(official, root / "diffusers", "diffusers", num_heads=4, say=lambda line: None)
    return root


def test_finetuning_released_weights_in_both_formats(released, tmp_path, capsys):
    official, diffusers = released / "official.safetensors", released / "diffusers"
    config = finetuning(released / "features", official)
    state = train(config, tmp_path / "official")
    assert f"weights from {official}" in capsys.readouterr().out
    null = np.load(released / "features" / "null_text.npy")
    np.testing.assert_array_equal(state.frozen[NETWORK][NULL_TEXT], null)  # the null caption of the features
    # In each of two steps, Adam changes a number by at most the learning rate, plus the weight decay.
    bound = 2.5 * config.optimizer.learning_rate * (16 / 256) ** 0.5
    weights = read_any(official, num_heads=4).params
    for path, value in jax.tree_util.tree_leaves_with_path(state.trained[NETWORK]):
        before = functools.reduce(lambda tree, key: tree[key.key], path, weights)
        assert 0 < np.abs(np.asarray(value) - before).max() < bound, jax.tree_util.keystr(path)
    equal(train(finetuning(released / "features", diffusers), tmp_path / "diffusers"), state)


def test_the_first_stage_of_sigma_starts_from_a_released_alpha(tmp_path):
    """With another VAE, other positions and longer captions."""
    records = [feature_folders.make_record(key) for key in feature_folders.keys(16)]
    its_features = {"latent_scale": 0.13025, "text_encoder": {"clean_caption": False, "lower_case": False}}
    feature_folders.write_folder(
        tmp_path / "features", {feature_folders.SQUARE: records}, config=its_features
    )
    numbers = {**foreign.SIZES["small"], "text": feature_folders.WIDTH, "tokens": 5}
    save_file(foreign.official_state_dict(**numbers, sizes=False), tmp_path / "alpha.safetensors")
    stage, tiny = from_file("sigma:vae-256"), finetuning(tmp_path / "features", "alpha")
    config = dataclasses.replace(
        stage,
        steps=2,
        model=dataclasses.replace(tiny.model, position_scale=stage.model.position_scale),
        features=dataclasses.replace(stage.features, image_size=64, text_length=feature_folders.TEXT_LENGTH),
        init=dataclasses.replace(stage.init, path=str(tmp_path / "alpha.safetensors")),
        data=tiny.data,
        mesh=tiny.mesh,
        log=tiny.log,
    )
    dataset, said = FeatureDataset(tmp_path / "features"), []
    check_features(config, dataset)
    params = initial_params(config, make_objective(config), dataset, said.append)
    assert "a new VAE: features.latent_scale unknown in the weights, 0.13025 here" in said
    assert "position embedding: position_scale 1.0 in the weights, 0.5 here" in said
    null = np.load(tmp_path / "features" / "null_text.npy")
    np.testing.assert_array_equal(params[NETWORK][NULL_TEXT], null)
    undeclared = dataclasses.replace(config, init=dataclasses.replace(config.init, new_vae=False))
    with pytest.raises(UserError, match=r"model\.position_scale 1\.0 \(here 0\.5\)"):
        initial_params(undeclared, make_objective(undeclared), dataset, said.append)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("official.safetensors", dict(position_scale=2.0), r"model\.position_scale 1\.0 \(here 2\.0\)"),
        ("diffusers", dict(position_scale=2.0), r"model\.position_scale 1\.0 \(here 2\.0\)"),
        ("diffusers", dict(num_heads=2), "num_heads 4 -> 2"),
        ("diffusers", dict(learn_sigma=False), "out_channels 8 -> 4"),
    ],
)
def test_weights_that_contradict_the_config(released, tmp_path, file, changes, message):
    """Every fact that the file states is compared, before the first step."""
    config = finetuning(released / "features", released / file)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")


def test_weights_without_what_the_config_needs(released, tmp_path):
    """Files that state less: the config decides, except for a null caption that must come from the file."""
    tensors = load_file(released / "official.safetensors")
    del tensors["pos_embed"], tensors["y_embedder.y_embedding"]
    save_file(tensors, tmp_path / "less.safetensors")
    config = finetuning(released / "features", tmp_path / "less.safetensors")
    config = dataclasses.replace(config, steps=1)
    train(config, tmp_path / "run")
    token = dataclasses.replace(config, guidance=dataclasses.replace(config.guidance, null_text="token"))
    with pytest.raises(UserError, match=r"null_text is 'token', and .* holds no null caption"):
        train(token, tmp_path / "other")


def broken(features, tmp_path, change):
    folder = tmp_path / "features"
    shutil.copytree(features / "stage1", folder)
    shard = next(folder.glob("*.arrayrecord"))
    change(shard)
    return str(folder)


def test_input_errors_are_one_line_and_status_2(features, straight, tmp_path, monkeypatch):
    """Runs the command, as a user does, checks what it prints; those of `train` itself in this process."""
    base = "--config=configs/digits.py:stage1"
    truncated = broken(features, tmp_path, lambda path: path.write_bytes(path.read_bytes()[:-100]))
    data = [f"--config.data.train={features / 'stage1'}", "--config.data.validation="]
    cases = [
        (["--config=configs/digits.py:stage2", "--config.optimizr.learning_rate=1"], "optimizer"),
        ([base, "--config.data.train=nowhere"], "python -m pixart_jax.precompute --config=configs/digits.py"),
        ([], "--config is missing"),
    ]
    for arguments, message in cases:
        done = run("train", f"--workdir={tmp_path / 'new'}", *arguments, status=2)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0], done.stderr
        assert "Traceback" not in done.stderr
    monkeypatch.chdir(ROOT)
    cases = [
        ([f"--config.data.train={truncated}"], "8x8-00000.arrayrecord"),
        ([*data, f"--workdir={straight[0]}"], "is of another model"),
        ([*data, "--config.log.tracker=wandbb"], "log.tracker is 'wandbb': choose one of"),
    ]
    for arguments, message in cases:
        words = [base, f"--workdir={tmp_path / 'new'}", *arguments]
        monkeypatch.setattr(sys, "argv", ["train", *words])  # where ml_collections looks for --config.NAME
        given = parse(Flags, *words)
        with pytest.raises(UserError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
            train(from_config_dict(given.config), given.workdir)
    assert not (tmp_path / "new").exists()


def test_an_unreadable_checkpoint_raises_an_error(features, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    for file in (tmp_path / "run/checkpoints/4/ema").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(UserError, match="exists but cannot be read"):
        train(tiny(features, "stage2"), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(seed=1), "seed is 1, the checkpoint has 0"),
        (dict(data=dict(batch_size=32)), "data.batch_size is 32"),
        (dict(optimizer=dict(clip_norm=0.0)), "optimizer.clip_norm is 0.0, the checkpoint has 1.0"),
        (dict(optimizer=dict(name="muon")), "optimizer.name is 'muon'"),
        (dict(steps=3), "steps is 3, the checkpoint has done 4"),
    ],
)
def test_a_run_cannot_be_resumed_with_another_config(features, straight, tmp_path, change, message):
    shutil.copytree(straight[0], tmp_path / "run")
    config = tiny(features, "stage2", steps=6)
    change = {
        name: dataclasses.replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in change.items()
    }
    with pytest.raises(UserError, match=message) as raised:
        train(dataclasses.replace(config, **change), tmp_path / "run")
    assert "emove" not in str(raised.value)


def test_a_run_continues_with_more_data(features, straight, tmp_path):
    """A second folder joins after 4 steps; the run is resumed once more, and its data is checked again."""
    shutil.copytree(straight[0], tmp_path / "run")
    shutil.copytree(features / "stage2", tmp_path / "more")
    config = tiny(features, "stage2", steps=8)
    both = f"{config.data.train},{tmp_path / 'more'}"

    def with_data(**changes):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, train=both, **changes))

    with pytest.raises(UserError, match=r"data.first_step=4"):
        train(with_data(), tmp_path / "run")
    state = train(dataclasses.replace(with_data(first_step=4), steps=6), tmp_path / "run")
    assert int(state.step) == 6
    with pytest.raises(UserError, match=r"has 4 with the same data: set --config.data.first_step=4"):
        train(with_data(), tmp_path / "run")
    assert int(train(with_data(first_step=4), tmp_path / "run").step) == 8


def test_divergence_stops_the_run(features, tmp_path):
    optimizer = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=0.0, ema_decay=0.9)
    with pytest.raises(RunStopped, match="at step 2: the update was not applied") as stopped:
        config = tiny(features, "stage1", optimizer=optimizer, divergence=DivergenceConfig())
        train(config, tmp_path / "run")
    assert stopped.value.status == EXIT_DIVERGED
    (line,) = (tmp_path / "run/refused_updates.jsonl").read_text().splitlines()
    line = json.loads(line)
    assert line["step"] == 2 and len(line["keys"]) == 16 and line["keys"][0].startswith("digits/")
