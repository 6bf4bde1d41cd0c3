"""Checks the figures of docs/how-it-works.md: what they show, and that the stored files are up to date."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import mixture
import numpy as np
import pytest
from digits_runs import tiny_config
from PIL import Image

from pixart_jax.benchmarking.flops import forward_flops
from pixart_jax.config import PixArtConfig
from pixart_jax.denoiser import init_params

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "figures"
PAGE = (ROOT / "docs" / "how-it-works.md").read_text()
# On the page: the file of each figure, and the italic text below it.
SHOWN = dict(re.findall(r"!\[.*?\]\(figures/(\w+)\.png\)\n\n\*(.*?)\*\n\n", PAGE, re.DOTALL))
LARGEST_FILE = 150_000
# Those that need neither the demo nor compiled samplers.
CHEAP = ("forward", "schedule", "resolution", "positions", "block", "flops")


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("docs_figures", FOLDER / "make.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    module.plt.close("all")
    del sys.modules[spec.name]


def test_the_page_shows_every_figure_and_names_the_command_that_makes_it(figures):
    files = {path.stem for path in FOLDER.glob("*.png")}
    assert set(SHOWN) == set(figures.FIGURES) == files
    for name, below in SHOWN.items():
        assert f"`docs/figures/make.py {name}`" in below, name
        assert ("`make demo`" in below) == (name in figures.DEMO), name
        assert (FOLDER / f"{name}.png").stat().st_size <= LARGEST_FILE, name


@pytest.mark.parametrize("name", CHEAP)
def test_a_stored_figure_is_what_the_script_makes(figures, name, tmp_path):
    figures.main([name, f"--out={tmp_path}"])
    new, stored = (np.asarray(Image.open(folder / f"{name}.png"), float) for folder in (tmp_path, FOLDER))
    assert new.shape == stored.shape
    # Versions of matplotlib and FreeType draw letters differently.
    assert np.abs(new - stored).mean() < 2


def test_an_image_is_noised_as_by_the_closed_form(figures):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(2, 16, 16, 1)).astype(np.float32)
    steps = (0, 300, 999)
    signal = np.sqrt(figures.SCHEDULE.alphas_cumprod[list(steps)]).reshape(-1, 1, 1, 1)
    # The noise is the same, so that only the images differ.
    difference = figures.noisy(one, steps) - figures.noisy(other, steps)
    np.testing.assert_allclose(difference, signal * (one - other), atol=1e-6)
    rest = figures.noisy(one, steps) - signal * one
    np.testing.assert_allclose(rest.std(axis=(1, 2, 3)), np.sqrt(1 - signal.ravel() ** 2), rtol=0.1)


def test_averaging_pixels_divides_the_noise_by_the_factor(figures):
    noise = figures.noisy(np.zeros((64, 64, 1), np.float32), (999,))
    averaged = figures.averaged(noise, 8)
    np.testing.assert_allclose(averaged[0, 1, 2], noise[0, 8:16, 16:24].mean(axis=(0, 1)), rtol=1e-5)
    assert averaged.std() == pytest.approx(noise.std() / 8, rel=0.2)


def test_the_exact_path_leads_to_the_data_and_is_the_limit_of_ddim(figures):
    start = mixture.quantiles(*mixture.SCHEDULE.marginal(999), mixture.MIDPOINTS[::1000])
    steps = np.array([999, 500, -1])
    path = figures.exact_path(start, steps)
    np.testing.assert_allclose(path[0], start, atol=1e-3)
    np.testing.assert_allclose(path[2], mixture.quantiles()[::1000], atol=1e-3)

    x = jnp.asarray(start, jnp.float32).reshape(-1, 1, 1, 1)
    solver, _ = figures.SOLVERS["DDIM"]
    times, samples, clean = figures.recorded(solver, mixture.exact_model, x, mixture.SCHEDULE, steps=1000)
    np.testing.assert_array_equal(times, np.arange(999, -1, -1))
    assert samples.shape == (1001, *x.shape) and clean.shape == (1000, *x.shape)
    np.testing.assert_array_equal(samples[0], x)
    found = samples[[0, 499, 1000]].reshape(3, -1)
    assert np.abs(found - path).mean(axis=1).max() < 0.01


def test_the_errors_of_the_solvers_have_their_orders(figures):
    errors = figures.solver_errors(count=400, steps=(50, 100))
    assert 1.6 < errors["DDIM"][0] / errors["DDIM"][1] < 2.4
    assert 3 < errors["DPM-Solver++"][0] / errors["DPM-Solver++"][1] < 6


@pytest.fixture(scope="module")
def demo(figures, random_params):
    """Stage 3 of the demo with two narrow blocks and random weights."""
    config = tiny_config(ROOT, "stage3")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=2))
    return figures.Demo(random_params(config.model)[1], config)


def test_attention_maps_come_from_the_forward_pass_of_the_network(figures, demo):
    captions = ["the digit one", "a handwritten three"]
    conditions = demo.conditions(captions)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 1))
    t = jnp.array([300.0, 900.0])
    output, to_image, to_text = figures.attention_maps(demo, x, t, conditions)
    expected = demo.denoiser(demo.params, x, t, conditions)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(output, expected, atol=1e-4)
    assert to_image.shape == (2, 2, 2, 64, 64) and to_text.shape == (2, 2, 2, 64, 28)
    for weights in (to_image, to_text):
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)
    padding = ~np.asarray(conditions["text_mask"])
    assert padding.any() and not to_text.transpose(1, 4, 0, 2, 3)[padding].any()


def test_the_loss_of_a_network_that_answers_0_is_1_at_every_step(figures, demo):
    zero = figures.Demo(init_params(demo.config.model, 0), demo.config)  # its last layer is zero
    terms = figures.loss_by_step(zero, (10, 900))
    np.testing.assert_allclose(terms["mse"], 1, rtol=0.02)


def test_the_shares_add_up_to_the_flops_of_a_forward_pass(figures):
    parts = figures.flops_by_part()
    total = sum(parts.values())
    model = PixArtConfig(text_length=300)
    for side, found in zip(figures.SIDES, total):
        assert found == pytest.approx(forward_flops(model, side // 8, side // 8).total)
    shares = dict(zip(figures.SIDES, parts["self_attention"] / total))
    assert {side: round(100 * shares[side]) for side in (256, 1024, 2048)} == {256: 3, 1024: 33, 2048: 66}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nothing"], "no figure 'nothing'"), (["loss", "clean"], "loss, clean: need the weights in demo/")],
)
def test_wrong_arguments_are_refused_in_a_line(figures, monkeypatch, tmp_path, capsys, arguments, words):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        figures.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
