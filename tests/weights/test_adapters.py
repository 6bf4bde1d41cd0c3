"""Merging adapters, against arrays computed with peft and against the formulas."""

import dataclasses

import adapter_formats
import foreign
import jax
import numpy as np
import pytest
from adapter_formats import BASE, GOLDENS
from flax import nnx
from safetensors.numpy import save_file

import pixart_jax
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig
from pixart_jax.weights.adapter_files import read_adapter
from pixart_jax.weights.adapters import Adapter, Factors, fuse, merge, split
from pixart_jax.weights.backbones import export_backbone
from pixart_jax.weights.loading import read_any


@pytest.fixture(scope="module")
def base():
    return read_any(BASE)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "io.npz")


def adapter(parts, scale=2.0, **changes):
    return Adapter({name: Factors(part.A, part.B, scale, part.m) for name, part in parts.items()}, **changes)


def kernels_of(params, config):
    _, tensors = export_backbone("diffusers", params, config)
    return {n.removesuffix(".weight"): t for n, t in tensors if n.endswith(".weight")}


def test_the_outputs_of_peft(golden):
    x, t = golden["x"].transpose(0, 2, 3, 1), golden["t"].astype(np.float32)
    run = nnx.jit(lambda model: model(x, t, golden["y"], golden["mask"]))
    for kind in ("lora", "rslora", "dora"):
        out = run(pixart_jax.load_model(BASE, adapter=GOLDENS / kind))
        difference = np.abs(np.asarray(out).transpose(0, 3, 1, 2) - golden[f"out_{kind}"]).max()
        assert difference < 2e-5 < 1 < np.abs(golden["out_base"] - golden[f"out_{kind}"]).max()


@pytest.mark.parametrize("dora", [False, True])
def test_every_kernel_has_the_value_of_the_formula(base, dora):
    parts = adapter_formats.draw(dora)
    params = merge(base.params, base.config.model, [(adapter(parts), 1.0)])
    found, expected = kernels_of(params, base.config.model), adapter_formats.merged(parts)
    assert found.keys() == expected.keys()
    for module, kernel in expected.items():
        np.testing.assert_allclose(found[module], kernel, rtol=0, atol=1e-5, err_msg=module)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_changes_of_several_adapters_add_up(base):
    first, second = adapter_formats.draw(), adapter_formats.draw(dora=True, seed=1)
    del second["proj_out"]
    pairs = [(adapter(first), 0.5), (adapter(second), -0.25)]
    found = kernels_of(merge(base.params, base.config.model, pairs), base.config.model)
    second["proj_out"] = first["proj_out"]._replace(B=0 * first["proj_out"].B)
    one, two, kernels = (
        adapter_formats.merged(first),
        adapter_formats.merged(second),
        adapter_formats.kernels(),
    )
    for module, kernel in kernels.items():
        expected = kernel + 0.5 * (one[module] - kernel) - 0.25 * (two[module] - kernel)
        np.testing.assert_allclose(found[module], expected, rtol=0, atol=1e-5, err_msg=module)


def test_arrays_that_do_not_change_are_the_same_objects(base):
    parts = adapter_formats.draw(dora=True)
    config, before = base.config.model, jax.tree.map(np.copy, base.params)
    same = merge(base.params, config, [(adapter(parts), 0.0)])
    assert all(a is b for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(base.params), strict=True))
    one = {"transformer_blocks.1.attn1.to_k": parts["transformer_blocks.1.attn1.to_k"]}
    params = merge(base.params, config, [(adapter(one), 1.0)])
    changed = [
        jax.tree_util.keystr(path)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(base.params))
        if a is not b
    ]
    assert changed == ["['blocks']['stacked']['attn']['qkv']['kernel']"]
    kernel, old = (each["blocks"]["stacked"]["attn"]["qkv"]["kernel"] for each in (params, base.params))
    different = (kernel != old).any(axis=(1, 3, 4))  # [layer, part]
    np.testing.assert_array_equal(different, [[False, False, False], [False, True, False]])
    jax.tree.map(np.testing.assert_array_equal, base.params, before)


def test_adapters_of_other_networks(base):
    parts = adapter_formats.draw()
    config = base.config.model

    def message(parts, config=config):
        with pytest.raises(UserError) as error:
            merge(base.params, config, [(adapter(parts, name="x.safetensors"), 0.0)])
        assert "\n" not in str(error.value) and "'x.safetensors'" in str(error.value)
        return str(error.value)

    wide = dataclasses.replace(config, hidden_size=96)
    assert "these weights of width 96 and depth 2: " in message(parts, wide)
    assert "A of adaln_single.linear 3x48 for 3x96" in message(parts, wide)
    assert "B of adaln_single.linear 288x3 for 576x3" in message(parts, wide)
    deep = {"transformer_blocks.7.ff.net.2": parts["transformer_blocks.1.ff.net.2"]}
    assert "1 modules unknown: transformer_blocks.7.ff.net.2." in message(deep)
    part = parts["proj_out"]
    assert "m of proj_out 31 for 32" in message({"proj_out": part._replace(m=np.ones(31, np.float32))})
    assert "B of proj_out 32x2 for 32x3" in message({"proj_out": part._replace(B=part.B[:, :2])})
    dit = DiTConfig(size="custom", depth=1, hidden_size=16, num_heads=2)
    assert "is an adapter of a PixArt, and these weights are a DiT" in message(parts, dit)


def test_values_that_are_not_finite(base):
    part = adapter_formats.draw()["proj_out"]
    with pytest.raises(UserError, match="proj_out with 'the adapter' has values that are NaN or infinite"):
        merge(base.params, base.config.model, [(adapter({"proj_out": part}, 1e38), 1e3)])
    # The norm of a row of zeros.
    params = {**base.params, "final_layer": {**base.params["final_layer"]}}
    linear = params["final_layer"]["linear"]
    params["final_layer"]["linear"] = {**linear, "kernel": np.zeros_like(linear["kernel"])}
    zero = part._replace(B=0 * part.B, m=np.ones(32, np.float32))
    with pytest.raises(UserError, match="NaN or infinite"):
        merge(params, base.config.model, [(adapter({"proj_out": zero}), 1.0)])


def products(members):
    return {name: f.scale * f.up.astype(np.float64) @ f.down for name, f in members.items()}


def test_fused_and_split():
    rng = np.random.default_rng(0)

    def factors(rank, scale, m=False):
        down, up = rng.normal(size=(rank, 5)), rng.normal(size=(4, rank))
        return Factors(
            down.astype(np.float32), up.astype(np.float32), scale, np.ones(4, np.float32) if m else None
        )

    names = ("q", "k", "v")
    # Different A: block diagonal, and split into the same factors again. A member may be missing.
    for members in ([factors(2, 0.5), factors(2, 0.5), factors(3, 0.5)], [None, factors(2, 3.0), None]):
        fused = fuse(members)
        rank = sum(each.rank for each in members if each)
        assert fused.up.shape == (12, rank) and fused.down.shape == (rank, 5)
        again = split(fused, names)
        expected = {name: each for name, each in zip(names, members) if each}
        assert again.keys() == expected.keys()
        for name in expected:
            for a, b in zip(again[name], expected[name]):
                np.testing.assert_array_equal(a, b)
    # Different scales: the same product.
    members = [factors(2, 0.5), factors(1, -2.0), factors(1, 0.0)]
    again = products(split(fuse(members), names))
    for name, product in products(dict(zip(names, members))).items():
        np.testing.assert_allclose(again.get(name, 0 * product), product, rtol=1e-6)
    # One A: the rank does not grow, and every member has it again.
    shared = Factors(members[0].down, rng.normal(size=(12, 2)).astype(np.float32), 0.5, None)
    assert all(each.down.shape == (2, 5) for each in split(shared, names).values())
    fused = fuse(list(split(shared, names).values()))
    for a, b in zip(fused, shared):
        np.testing.assert_array_equal(a, b)
    # An adapter that was not trained yet keeps its factors.
    assert split(shared._replace(up=0 * shared.up), names)["k"].rank == 2
    # The magnitudes of DoRA are those of the rows.
    magnitude = np.arange(12, dtype=np.float32)
    parts = split(shared._replace(magnitude=magnitude), names)
    np.testing.assert_array_equal(parts["k"].magnitude, [4, 5, 6, 7])
    np.testing.assert_array_equal(fuse(list(parts.values())).magnitude, magnitude)
    for members in ([factors(2, 1.0, m=True), None, None], [factors(2, 1.0, m=True), *[factors(2, 1.0)] * 2]):
        with pytest.raises(ValueError, match="DoRA needs all members"):
            fuse(members)


def test_alpha_is_the_inverse_of_the_scale():
    lora, rslora = read_adapter(GOLDENS / "lora"), read_adapter(GOLDENS / "rslora")
    assert (lora.alpha("proj_out"), rslora.alpha("proj_out")) == (8, 8)
    assert (lora.modules["proj_out"].scale, rslora.modules["proj_out"].scale) == (2, 4)
    assert lora.digest != rslora.digest == read_adapter(GOLDENS / "rslora").digest


def test_size_embedders(tmp_path):
    """The modules of a network with size conditions."""
    tensors = foreign.official_state_dict(**foreign.SIZES["small"], sizes=True)
    save_file(tensors, tmp_path / "w.safetensors")
    read = read_any(tmp_path / "w.safetensors", num_heads=4)
    module, kernel = "adaln_single.emb.aspect_ratio_embedder.linear_2", tensors["ar_embedder.mlp.2.weight"]
    factors = Factors(np.eye(2, 16, dtype=np.float32), np.ones((16, 2), np.float32), 0.5, None)
    params = merge(read.params, read.config.model, [(Adapter({module: factors}), 2.0)])
    found = kernels_of(params, read.config.model)[module]
    np.testing.assert_allclose(found - kernel, np.ones((16, 2)) @ np.eye(2, 16), atol=1e-6)
