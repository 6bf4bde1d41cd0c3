import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from digits_runs import losses, metrics, published_config, tiny_config
from flax import traverse_util
from stage_batches import CONFIG, make_batch
from tiny_image_encoders import save_image_encoder

from pixart_jax import evaluate
from pixart_jax.config import (
    AlignmentConfig,
    CheckpointConfig,
    DiffusionConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    RoutingConfig,
)
from pixart_jax.constants import IMAGE_FEATURES
from pixart_jax.convert import convert
from pixart_jax.data.planning import open_images
from pixart_jax.denoiser import NETWORK, Denoiser
from pixart_jax.encoders.image_features import ImageEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig
from pixart_jax.models.layers import activation_sharding
from pixart_jax.precompute import precompute, verify_command
from pixart_jax.train import train
from pixart_jax.training import sharding
from pixart_jax.training.data import held_out_batches, open_data, open_held_out
from pixart_jax.training.initialization import initial_params
from pixart_jax.training.objectives import make_objective, sample_keys
from pixart_jax.training.objectives.alignment import PROJECTOR, projection_loss
from pixart_jax.training.objectives.diffusion import draw_all, importance_weighted, predict
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import init_networks, new_state
from pixart_jax.training.step import make_gradient, make_train_step
from pixart_jax.weights.checkpoints import read_weights
from pixart_jax.weights.loading import read_any

E = 6
# The features of `make_batch`: 2 x 2 tokens of latents of 4 x 4.
ALIGNED = dataclasses.replace(
    CONFIG,
    objective="alignment",
    features=dataclasses.replace(CONFIG.features, image_encoder="dinov2"),
    alignment=AlignmentConfig(block=1, weight=0.7, width=8, target_width=E),
    # A large `eps` makes the first update depend smoothly on the gradient.
    optimizer=dataclasses.replace(CONFIG.optimizer, eps=1e-2),
)
ROUTED = RoutingConfig(rate=0.5, first_blocks=0, last_blocks=1)


def batch_of(step=0):
    features = np.random.default_rng(step + 50).normal(size=(16, 4, E))
    return make_batch(step) | {IMAGE_FEATURES: features.astype(ml_dtypes.bfloat16)}


def params_of(random_params, config):
    params = init_networks(make_objective(config), jax.random.key(0), {NETWORK: {"given": True}})
    return {**params, NETWORK: random_params(config.model)[1]}


def keys_of(batch):
    return sample_keys(jax.random.key(0), batch["index"])


def test_the_projection_loss_is_that_of_pytorch():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 3, 5, 7)).astype(np.float32)
    one[0, 0] = 0
    expected = -torch.nn.functional.cosine_similarity(*map(torch.tensor, (one, other)), dim=-1).mean(1)
    np.testing.assert_allclose(projection_loss(one, other), expected, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: projection_loss(x, other).sum())(jnp.asarray(one))).all()
    np.testing.assert_allclose(projection_loss(one[1:], 3 * one[1:]), -1, rtol=1e-6)


@pytest.mark.parametrize("routing", [RoutingConfig(), ROUTED])
def test_the_loss_is_the_diffusion_loss_plus_the_alignment(random_params, routing):
    """Computed with numpy from the tokens after the block; with routing, from the kept ones."""
    diffusion = DiffusionConfig(timestep_density="sigmoid", importance_weights=True)
    config = dataclasses.replace(ALIGNED, routing=routing, diffusion=diffusion)
    plain = dataclasses.replace(config, objective="diffusion")
    params, batch, denoiser = params_of(random_params, config), batch_of(), Denoiser.of(config)
    keys = keys_of(batch)
    drawn = draw_all(denoiser, params[NETWORK], batch, keys)

    @jax.jit
    def compute(params):
        losses = (make_objective(each).loss(params, batch, keys) for each in (config, plain))
        return *losses, predict(denoiser, params[NETWORK], drawn, tap=1)[1]

    found, expected, tokens = compute(params)
    assert found.keys() == expected.keys() | {"alignment", "diffusion_loss"}
    for name, term in expected.items():
        name = "diffusion_loss" if name == "loss" else name
        np.testing.assert_allclose(found[name], term, rtol=1e-5)
    total = found["diffusion_loss"] + 0.7 * found["alignment"]
    np.testing.assert_allclose(found["loss"], total, rtol=1e-5, atol=1e-6)
    target = batch[IMAGE_FEATURES].astype(np.float64)
    if routing.rate:
        target = np.take_along_axis(target, np.asarray(drawn.route.kept)[:, :, None], axis=1)
        assert target.shape[1] == 2
    h = np.asarray(tokens, np.float64)
    for name in ("fc1", "fc2", "fc3"):
        layer = params[PROJECTOR][name]
        h = h @ np.asarray(layer["kernel"], np.float64) + np.asarray(layer["bias"])
        h = h if name == "fc3" else h / (1 + np.exp(-h))
    cosine = (h * target).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(target, axis=-1)
    # The importance weights are those of the whole loss.
    weighted = importance_weighted(config, {"alignment": -cosine.mean(1)}, drawn.draws.timesteps)
    np.testing.assert_allclose(found["alignment"], weighted["alignment"], rtol=1e-3, atol=1e-5)


def gradients(config, params, batch):
    objective = make_objective(config)

    def total(params):
        return objective.loss(params, batch, keys_of(batch))["alignment"].sum()

    return jax.jit(jax.grad(total))(params)


@pytest.mark.parametrize(
    ("kind", "scan_layers", "remat"),
    [("pixart", True, "full"), ("pixart", False, "dots"), ("dit", True, "none")],
)
def test_the_alignment_trains_the_blocks_up_to_its_own(random_params, kind, scan_layers, remat):
    model = dataclasses.replace(ALIGNED.model, scan_layers=scan_layers, remat=remat)
    batch = batch_of()
    if kind == "dit":
        model = DiTConfig(size="custom", depth=2, hidden_size=24, num_heads=2, num_classes=10)
        batch["label"] = np.arange(16, dtype=np.int32) % 10
    config = dataclasses.replace(ALIGNED, model=model)
    found = traverse_util.flatten_dict(gradients(config, params_of(random_params, config), batch))
    for path, gradient in found.items():
        size = np.abs(gradient)
        if path[:2] == (NETWORK, "blocks"):
            each = size.reshape(2, -1).max(axis=1)
            assert each[1] == 0, path
            assert "bias" in path or each[0] > 0, path
        elif path[1] in ("final_layer", "null_text"):
            assert size.max() == 0, path
    assert all(np.abs(found[PROJECTOR, f"fc{n}", "kernel"]).max() > 0 for n in (1, 2, 3))
    assert np.abs(found[NETWORK, "patch_embed", "proj", "kernel"]).max() > 0


def test_micro_batches_and_meshes_do_not_change_the_gradient(random_params):
    config = dataclasses.replace(ALIGNED, model=dataclasses.replace(ALIGNED.model, depth=1))
    params, batch = params_of(random_params, config), batch_of()
    gradient, terms = jax.jit(make_gradient(config, make_objective(config)))(params, {}, batch)
    parts = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, accumulation=2))
    objective = make_objective(parts)
    mesh = sharding.make_mesh(MeshConfig(1, 2, 2), devices=jax.devices()[:4])
    placed = {
        name: jax.device_put(params[name], sharding.parameter_shardings(mesh, state))
        for name, state in objective.abstract_networks().items()
    }
    kernel = placed[PROJECTOR]["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (12, 4)
    with activation_sharding(sharding.activation_rule(mesh)):
        step = jax.jit(make_gradient(parts, objective))
        other, found = step(placed, {}, sharding.global_batch(mesh, batch))
    for name, term in terms.items():
        np.testing.assert_allclose(found[name], term, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), other, gradient)


def test_spikes_are_found_in_the_diffusion_loss(random_params):
    """The sum may be negative, and changes when the alignment stops."""
    objective = make_objective(ALIGNED)
    optimizer = make_optimizer(ALIGNED.optimizer, 16, objective)
    state = jax.eval_shape(lambda p: new_state(p, objective, optimizer), params_of(random_params, ALIGNED))
    seen = []

    def refuse(config, step, loss, norm, average):
        seen.append(loss)
        return jnp.asarray(False), average

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixart_jax.training.step.refuse", refuse)
        step = make_train_step(ALIGNED, objective, optimizer)

        def check(state, batch):
            _, metrics = step(state, batch)
            assert seen[0] is metrics["diffusion_loss"]
            return metrics

        jax.eval_shape(check, state, batch_of())


# --- Runs on the digits, whose features come from a tiny ViT


def digits_config(folder, stage, **changes):
    config = tiny_config(folder / stage, stage)
    features = dataclasses.replace(published_config(stage).features, image_encoder=str(folder / "vit"))
    changes = {"objective": "alignment"} | changes
    return dataclasses.replace(
        config,
        steps=4,
        features=features,
        alignment=AlignmentConfig(block=1, width=12, target_width=16, stop_step=2),
        checkpoint=CheckpointConfig(every=1, keep=5),
        log=LogConfig(every=1, validate_every=4, validation_samples=16, sample_every=0, tracker="none"),
        **changes,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, the config and the state of a run whose alignment stops after two of four steps."""
    folder = tmp_path_factory.mktemp("aligned")
    save_image_encoder(folder / "vit", "vit", classes=10, num_channels=1, image_size=16, patch_size=2)
    config = digits_config(folder, "stage1")
    source = open_images("digits", "digits", config.features, {"split": "test"})
    precompute(source, config.features, folder / "stage1", say=lambda line: None)
    return folder, config, train(config, folder / "run")


def test_a_run_whose_alignment_stops(run):
    folder, config, state = run
    assert verify_command(str(folder / "stage1")) == 0
    assert set(losses(folder / "run", "alignment")) == {1, 2}
    assert set(losses(folder / "run")) == {1, 2, 3, 4}
    assert set(state.trained) == set(state.ema["ema"]) == {NETWORK, PROJECTOR}
    assert [each.objective for each in config.phases().values()] == ["alignment", "diffusion"]


def test_it_resumes_to_the_same_bits(run, tmp_path):
    """From a checkpoint before the alignment stops."""
    folder, config, uninterrupted = run
    shutil.copytree(folder / "run", tmp_path / "run")
    for later in (2, 3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/{later}")
    resumed = train(config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)
    assert metrics(tmp_path / "run") == metrics(folder / "run")


def test_exports_and_other_runs_have_no_projector(run, tmp_path, capsys):
    folder, config, state = run
    network = state.weights()[NETWORK]
    weights, _ = read_weights(folder / "run")
    jax.tree.map(np.testing.assert_array_equal, weights, network)
    convert(folder / "run", tmp_path / "exported", "checkpoint", say=lambda line: None)
    jax.tree.map(np.testing.assert_array_equal, read_any(tmp_path / "exported").params, network)
    evaluate.main(
        evaluate.Flags(
            words=("val-loss",),
            checkpoint=str(folder / "run"),
            features=str(folder / "stage1"),
            out=str(tmp_path / "loss"),
            samples=16,
        )
    )
    stored = json.loads((tmp_path / "loss/val_loss.json").read_text())
    assert stored["validation_loss"] == pytest.approx(losses(folder / "run", "validation_loss")[4], rel=1e-5)
    # A run without alignment starts from it, and one with alignment from its exported weights.
    for objective, path in (("diffusion", folder / "run"), ("alignment", tmp_path / "exported")):
        start = InitConfig(method="resize", path=str(path))
        stage = dataclasses.replace(config, objective=objective, init=start)
        params = initial_params(stage, make_objective(stage), None, lambda line: None)
        assert set(params) == {NETWORK, PROJECTOR} - ({PROJECTOR} if objective == "diffusion" else set())
        jax.tree.map(np.testing.assert_array_equal, params[NETWORK], network)
    other = dataclasses.replace(config, objective="diffusion")
    with pytest.raises(UserError, match="objective is 'diffusion', the checkpoint has 'alignment'"):
        train(other, folder / "run")


def test_a_run_encodes_images_on_the_fly(run):
    folder, config, _ = run
    data = dataclasses.replace(config.data, train="digits", validation="digits", on_the_fly=True)
    fly = dataclasses.replace(config, data=data)
    dataset = open_data("digits", fly, "CONFIG", (IMAGE_FEATURES,))
    (record,) = dataset.read(0, [3])
    encoder = ImageEncoder(str(folder / "vit"), 1, 16)
    expected = encoder.encode(record.mean[None], (4, 4))
    np.testing.assert_array_equal(record.extras[IMAGE_FEATURES], expected[0])
    assert open_held_out(fly, "CONFIG", lambda line: None).extras == ()


def test_features_that_do_not_fit_have_one_line(run, tmp_path):
    folder, config, _ = run
    wide = dataclasses.replace(config, alignment=dataclasses.replace(config.alignment, target_width=768))
    with pytest.raises(UserError, match=r"target_width is 768, but the image features in .* have 16: set"):
        train(wide, tmp_path / "run")
    source = open_images("digits", "digits", config.features, {"split": "test"})
    plain = dataclasses.replace(config.features, image_encoder="", token_size=0)
    with pytest.raises(UserError, match=r"was started with features.image_encoder=.*vit, now ;"):
        precompute(source, plain, folder / "stage1", say=lambda line: None)
    precompute(source, plain, tmp_path / "plain", say=lambda line: None)
    data = dataclasses.replace(config.data, train=str(tmp_path / "plain"))
    with pytest.raises(
        UserError, match=r"objective is 'alignment', but the features in .* have no 'image_fea"
    ):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    # Validation needs no image features.
    data = dataclasses.replace(config.data, validation=str(tmp_path / "plain"))
    held_out = open_held_out(dataclasses.replace(config, data=data), "CONFIG", lambda line: None)
    batch = next(held_out_batches(config, held_out, arrays=make_objective(config).arrays))
    assert IMAGE_FEATURES not in batch.arrays
    shutil.copytree(folder / "stage1", tmp_path / "same")
    shutil.copytree(folder / "vit", tmp_path / "vit")
    manifest = json.loads((tmp_path / "same/manifest.json").read_text())
    manifest["config"]["image_encoder"] = str(tmp_path / "vit")
    (tmp_path / "same/manifest.json").write_text(json.dumps(manifest))
    data = dataclasses.replace(config.data, train=f"{folder / 'stage1'},{tmp_path / 'same'}")
    with pytest.raises(
        UserError, match=r"the feature folders of data.train differ in features.image_encoder"
    ):
        train(dataclasses.replace(config, data=data), tmp_path / "mixed")
    save_image_encoder(folder / "vit", "vit", num_channels=1, image_size=16, patch_size=2, hidden_size=20)
    with pytest.raises(UserError, match=r"other files in the folder of features.image_encoder"):
        precompute(source, config.features, folder / "stage1", say=lambda line: None)
