"""An objective that is defined outside of the package trains with the public `train()`."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digits_runs import losses, tiny_config
from feature_folders import SQUARE, TEXT_LENGTH, WIDTH, keys, make_record, write_folder
from flax import nnx

from pixart_jax.config import FeaturesConfig
from pixart_jax.denoiser import NETWORK
from pixart_jax.errors import UserError
from pixart_jax.models.configs import NULL_TEXT, PixArtConfig
from pixart_jax.models.layers import linear
from pixart_jax.train import train
from pixart_jax.training.objectives import diffusion
from pixart_jax.weights.checkpoints import read_weights

# Width of the extra array of a record, one vector per image.
EXTRA = 6
FROZEN = "cross_attn"


class Projector(nnx.Module):
    """Predicts the extra array from the mean of the clean latents."""

    def __init__(self, rngs):
        self.out = linear(4, EXTRA, (None, None), rngs=rngs)

    def __call__(self, latents):
        return self.out(latents.mean(axis=(1, 2)))


def aligned(config):
    """The diffusion loss with frozen cross-attention, plus a projector that predicts an extra array."""
    base = diffusion.make_objective(config)
    graph = nnx.graphdef(nnx.eval_shape(lambda: Projector(nnx.Rngs(0))))

    def loss(params, batch, keys):
        terms = base.loss(params, batch, keys)
        predicted = nnx.merge(graph, params["projector"])(batch["latent_mean"])
        alignment = jnp.mean(jnp.square(predicted - batch["tokens"].astype(jnp.float32)), axis=1)
        return terms | {"alignment": alignment, "loss": terms["loss"] + 10 * alignment}

    def after_update(state, batch, keys):
        # Keep the bias of the projector at zero.
        projector = state.trained["projector"]["out"]
        projector = {"out": {**projector, "bias": jnp.zeros_like(projector["bias"])}}
        return dataclasses.replace(state, trained={**state.trained, "projector": projector})

    return base._replace(
        networks={**base.networks, "projector": Projector},
        is_trained=lambda path: base.is_trained(path) and FROZEN not in path,
        loss=loss,
        arrays=("tokens",),
        averages={"ema": 0.5, "slow": 0.99},
        after_update=after_update,
    )


def stage(folder, **changes):
    model = PixArtConfig(
        size="custom",
        depth=1,
        hidden_size=24,
        num_heads=2,
        base_size=4,
        text_dim=WIDTH,
        text_length=TEXT_LENGTH,
    )
    return tiny_config(folder, "stage2", steps=3, model=model, features=FeaturesConfig(), **changes)


def write(folder, extras=True):
    rng = np.random.default_rng(0)
    records = [
        make_record(key, extras={"tokens": rng.normal(size=EXTRA).astype(np.float16)} if extras else {})
        for key in keys(24)
    ]
    return write_folder(folder, {SQUARE: records})


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The config, the folder and the final state of a run without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    config = stage(write(folder / "features"))
    return config, folder / "run", train(config, folder / "run", make_objective=aligned)


def test_a_new_objective_trains_with_train(straight):
    _, workdir, state = straight
    assert int(state.step) == 3
    assert set(state.trained) == {NETWORK, "projector"} and set(state.ema) == {"ema", "slow"}
    # Frozen parameters have neither averages nor moments, and do not change.
    block = state.frozen[NETWORK]["blocks"]["stacked"]
    assert set(block) == {FROZEN} and NULL_TEXT in state.frozen[NETWORK]
    assert not np.any(block[FROZEN]["proj"]["kernel"])  # initially zero
    assert FROZEN not in state.trained[NETWORK]["blocks"]["stacked"]
    assert not np.any(state.trained["projector"]["out"]["bias"])
    alignment = losses(workdir, "alignment")
    assert alignment[3] < alignment[1]
    assert "validation_loss" in (workdir / "metrics.jsonl").read_text()
    # Sampling reads only the network.
    weights, _ = read_weights(workdir)
    jax.tree.map(np.testing.assert_array_equal, weights, state.weights()[NETWORK])


def test_it_resumes_to_the_same_bits(straight, tmp_path):
    config, workdir, uninterrupted = straight
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/3")
    resumed = train(config, tmp_path / "run", make_objective=aligned)
    jax.tree.map(np.testing.assert_array_equal, resumed, uninterrupted)


def test_an_array_that_the_features_lack_is_named(tmp_path):
    config = stage(write(tmp_path / "features", extras=False))
    with pytest.raises(UserError, match="'tokens'"):
        train(config, tmp_path / "run", make_objective=aligned)
