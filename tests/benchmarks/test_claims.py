import importlib
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pixart_jax.data.shapes import DENSITIES, SPLITS, all_scenes
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training.state import abstract_model

FOLDER = Path(__file__).parents[2] / "benchmarks" / "claims"


@pytest.fixture
def claims(monkeypatch):
    """Imports a module of benchmarks/claims by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("adaln", "captions", "run", "cost", "report")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_adaln_with_equal_layers_is_adaln_single(claims, random_params):
    """W_i = T, b_i = b_T + table_i: adaLN-single is adaLN whose layers share their matrix."""
    AdaLNPixArt = claims("adaln").AdaLNPixArt
    config = PixArtConfig(size="custom", depth=3, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
    graph, params = random_params(config)
    abstract = nnx.eval_shape(lambda: AdaLNPixArt(config, rngs=nnx.Rngs(0)))
    other_graph, _ = nnx.split(abstract)
    shared = {name: value for name, value in params.items() if name != "t_block"}
    blocks = dict(shared["blocks"]["stacked"])
    table = blocks.pop("scale_shift_table")
    kernel, bias = params["t_block"]["kernel"], params["t_block"]["bias"]
    blocks["modulation"] = {"kernel": jnp.stack([kernel] * 3), "bias": bias + table}
    shared["blocks"] = {"stacked": blocks}

    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(rng.normal(size=(2, 4, 6, 4)), jnp.float32),
        jnp.asarray([3.0, 700.0]),
        jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32),
        jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    )
    expected = jax.jit(nnx.merge(graph, params))(*arguments)
    np.testing.assert_allclose(jax.jit(nnx.merge(other_graph, shared))(*arguments), expected, atol=1e-5)
    blocks["modulation"]["bias"] = bias + 2 * table
    assert jnp.abs(jax.jit(nnx.merge(other_graph, shared))(*arguments) - expected).max() > 1e-3
    # As the paper's Figure 5 says of XL/2: a quarter of the parameters are the blocks' modulation layers.
    xl = PixArtConfig()
    single, adaln = (
        sum(leaf.size for leaf in jax.tree.leaves(state))
        for state in (
            abstract_model(xl)[1],
            nnx.state(nnx.eval_shape(lambda: AdaLNPixArt(xl, rngs=nnx.Rngs(0)))),
        )
    )
    assert 0.73 < single / adaln < 0.75


def test_captions_tell_the_order_of_words(claims):
    captions = claims("captions").Captions()
    scenes = [scene for split in SPLITS for part in all_scenes(split) for scene in part[:3]]
    for density in DENSITIES:
        text, mask = captions.features([scene.caption(density) for scene in scenes])
        assert text.shape == (len(scenes), captions.length, captions.width)
        words = [len(scene.caption(density).split()) for scene in scenes]
        np.testing.assert_array_equal(mask.sum(axis=1), np.add(words, 1))
        assert not text[~mask].any()
        # As strong as T5-XXL's features.
        np.testing.assert_allclose(np.linalg.norm(text[mask], axis=-1), 64, rtol=1e-3)
    swapped = ("a small red plus left of a large cyan square", "a small cyan plus left of a large red square")
    (one, other), _ = captions.features(swapped)
    differ = np.linalg.norm(one - other, axis=-1) > 1
    assert np.flatnonzero(differ).tolist() == [2, 8]
    # The same word at another place has another feature.
    assert np.linalg.norm(one[2] - other[8]) > 10
    assert captions.null.shape == (captions.length, captions.width)
