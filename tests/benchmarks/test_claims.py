import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from pixart_jax.config import TrainConfig
from pixart_jax.data.shapes import DENSITIES, SPLITS, all_scenes
from pixart_jax.denoiser import NETWORK, abstract_model
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.training.objectives import make_objective

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
    """W_i = T, b_i = b_T + table_i: adaLN-single is adaLN in which all layers share one matrix."""
    AdaLNPixArt = claims("adaln").AdaLNPixArt
    config = PixArtConfig(size="custom", depth=2, hidden_size=24, num_heads=2, text_dim=8, text_length=5)
    graph, params = random_params(config)
    abstract = nnx.eval_shape(lambda: AdaLNPixArt(config, rngs=nnx.Rngs(0)))
    other_graph, _ = nnx.split(abstract)
    shared = {name: value for name, value in params.items() if name != "t_block"}
    blocks = dict(shared["blocks"]["stacked"])
    table = blocks.pop("scale_shift_table")
    kernel, bias = params["t_block"]["kernel"], params["t_block"]["bias"]
    blocks["modulation"] = {"kernel": jnp.stack([kernel] * 2), "bias": bias + table}
    shared["blocks"] = {"stacked": blocks}

    rng = np.random.default_rng(0)
    arguments = (
        jnp.asarray(rng.normal(size=(2, 4, 6, 4)), jnp.float32),
        jnp.asarray([3.0, 700.0]),
        jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32),
        jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]),
    )
    expected = jax.jit(nnx.merge(graph, params))(*arguments)
    other = jax.jit(lambda params: nnx.merge(other_graph, params)(*arguments))
    np.testing.assert_allclose(other(shared), expected, atol=1e-5)
    blocks["modulation"]["bias"] = bias + 2 * table
    assert jnp.abs(other(shared) - expected).max() > 1e-3
    # The paper gives 833M and 611M for XL/2: a quarter of the parameters are in the modulation layers.
    xl = PixArtConfig()
    single, adaln = (
        sum(leaf.size for leaf in jax.tree.leaves(state))
        for state in (
            abstract_model(xl)[1],
            nnx.state(nnx.eval_shape(lambda: AdaLNPixArt(xl, rngs=nnx.Rngs(0)))),
        )
    )
    assert 0.73 < single / adaln < 0.75


def test_captions_depend_on_the_order_of_words(claims):
    scenes = [scene for split in SPLITS for part in all_scenes(split) for scene in part[:3]]
    texts = {scene.caption(density) for scene in scenes for density in DENSITIES}
    swapped = ("a small red plus left of a large cyan square", "a small cyan plus left of a large red square")
    captions = claims("captions").Captions(texts | set(swapped))
    for density in DENSITIES:
        text, mask = captions.features([scene.caption(density) for scene in scenes])
        assert text.shape == (len(scenes), captions.length, captions.width)
        words = [len(scene.caption(density).split()) for scene in scenes]
        np.testing.assert_array_equal(mask.sum(axis=1), np.add(words, 1))
        assert not text[~mask].any()
        # The norm is that of T5-XXL's features.
        np.testing.assert_allclose(np.linalg.norm(text[mask], axis=-1), 64, rtol=1e-3)
    (one, other), _ = captions.features(swapped)
    differ = np.linalg.norm(one - other, axis=-1)
    # The features of the shape words depend on the colours before them, far more than rounding could explain.
    assert differ[3] > 5 and differ[9] > 5
    assert captions.null.shape == (captions.length, captions.width)


def test_a_killed_run_goes_on_where_it_was_last_looked_at(claims, tmp_path, monkeypatch):
    run = claims("run")
    monkeypatch.setattr(run, "EVALUATE_EVERY", 2)
    optimizer = optax.sgd(0.1)

    def step(state, batch):
        trained = {NETWORK: {"w": 0.5 * state.trained[NETWORK]["w"] + batch}}
        return dataclasses.replace(state, step=state.step + 1, trained=trained), {
            "loss": trained[NETWORK]["w"]
        }

    objective = make_objective(TrainConfig())
    program = run.Program("single", None, objective, optimizer, step, 1.0, None)
    params = {NETWORK: {"w": jnp.ones(())}}
    seen = []

    def look(at, state, loss):
        seen.append(at)
        return {"step": at, "w": float(state.trained[NETWORK]["w"]), "loss": loss}

    def killed(at):
        if at == 5:
            raise KeyboardInterrupt
        return float(at)

    _, expected = run.train(program, params, float, 7, tmp_path / "whole.npz", look)
    assert seen == [2, 4, 6, 7]
    with pytest.raises(KeyboardInterrupt):
        run.train(program, params, killed, 7, tmp_path / "killed.npz", look)
    seen.clear()
    state, notes = run.train(program, params, float, 7, tmp_path / "killed.npz", look)
    assert seen == [6, 7] and notes == expected and int(state.step) == 7
    assert run.train(program, params, float, 7, tmp_path / "killed.npz", look)[1] == expected


def result(run, seed, steps, **levels):
    """The contents of a run's file, with curve points at 2,000 steps and at the last step."""
    names = ("colour", "shape", "number", "relation", "scene", "noun")
    points = []
    for step in (2000, steps):
        values = dict.fromkeys(names, levels[f"at_{step}"])
        points.append({"step": step, "flops": float(step), **values, "test": values, "novel": values})
    return {"run": run, "seed": seed, "steps": steps, "curve": points}


def test_report(claims, tmp_path, monkeypatch):
    report = claims("report")
    folder, page, figure = tmp_path / "results", tmp_path / "page.md", tmp_path / "figure.png"
    for name, path in (("RESULTS", folder), ("PAGE", page), ("FIGURE", figure)):
        monkeypatch.setattr(report, name, path)
    folder.mkdir()
    for seed in range(3):
        levels = {
            "single": (3000, 0.5, 0.7),
            "adaln": (3000, 0.5, 0.71),
            "noun": (3000, 0.4, 0.8 if seed else 0.6),
            "staged": (2000, 0.6, 0.6),
        }
        for name, (steps, first, last) in levels.items():
            values = result(name, seed, steps, at_2000=first, at_3000=last)
            (folder / f"{name}-{seed}.json").write_text(json.dumps(values))
    page.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.main()
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    assert figure.stat().st_size > 1000
    rows = {line.split(" | ")[1]: line for line in text.splitlines() if line.count(" | ") == 5}
    # In points: −1 is within the margin of 2; −10 at equal compute; +10 at equal steps; noun: +10, −10, −10.
    assert rows["adaLN-single − adaLN"].endswith("| 3 | -1.0 (-1.0 … -1.0) | held |")
    assert rows["stages − from scratch, equal compute"].endswith("| -10.0 (-10.0 … -10.0) | did not hold |")
    assert rows["from DiT − random, equal steps"].endswith("| +10.0 (+10.0 … +10.0) | held |")
    assert rows["full − noun, equal steps"].endswith("| -3.3 (-10.0 … +10.0) | unclear |")
    assert rows["full − attributes, equal steps"].endswith("| 0 | – | open: 0 of 3 seeds |")
    assert "**not reached** after 3,000 steps (colour 70.0 % and shape 70.0 %; 3 seeds)" in text


def test_costs_of_other_models_are_not_shown(claims, tmp_path, monkeypatch):
    report = claims("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    runs = {kind: {0: {"parameters": 10, "flops_per_step": 5.0}} for kind in ("single", "adaln")}
    assert "not measured yet" in report.costs(runs)
    small = {"flops_per_step": 5.0, "arguments_MiB": 1.0, "temporary_MiB": 2.0, "ms_per_step": 3.0}
    small |= {"all_ms_per_step": [3.0], "XL/2": {**small, "parameters": 7}}
    cost = {kind: {**small, "parameters": 10} for kind in runs}
    cost["adaln_times_single"] = {"median": 1.25, "quartiles": [1.2, 1.3]}
    for parameters, shown in ((10, "1.25 times as long"), (11, "measured on other models")):
        cost["adaln"]["parameters"] = parameters
        (tmp_path / "cost.json").write_text(json.dumps(cost))
        assert shown in report.costs(runs)


def test_verdicts(claims):
    verdict = claims("report").verdict
    assert (
        verdict([1, 2, 3]) == "held"
        and verdict([0, 2, 3]) == "unclear"
        and verdict([-1, 0, 0]) == "did not hold"
    )
    assert verdict([1, 2]) == "open: 2 of 3 seeds"
    assert verdict([-4, 0, 0], not_worse=True) == "held"
    assert verdict([-4, -2, 0], not_worse=True) == "did not hold"
