"""Written adapters: peft over diffusers gives our outputs, and every format is read back unchanged."""

import json

import adapter_formats
import foreign
import numpy as np
import pytest
from adapter_formats import BASE, GOLDENS
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

import pixart_jax
from pixart_jax.errors import UserError
from pixart_jax.weights.adapter_export import WRITERS, write_comfyui, write_kohya, write_peft
from pixart_jax.weights.adapter_files import read_adapter
from pixart_jax.weights.adapters import Adapter, Factors

torch = foreign.torch


def random_adapter(dora=False, **changes) -> Adapter:
    """Modules of different ranks and scales, with another A in every module."""
    rng = np.random.default_rng(1)
    modules = {}
    for number, (module, kernel) in enumerate(sorted(adapter_formats.kernels().items())):
        rank = 2 + number % 3
        down = rng.normal(size=(rank, *kernel.shape[1:])).astype(np.float32)
        up = 0.02 * rng.normal(size=(len(kernel), rank)).astype(np.float32)
        norm = np.linalg.norm(kernel.reshape(len(kernel), -1), axis=1)
        magnitude = (norm * rng.uniform(0.5, 1.5, len(kernel))).astype(np.float32) if dora else None
        modules[module] = Factors(down, up, 1.5 if number % 2 else 5 / 3, magnitude)
    return Adapter(modules, **changes)


def assert_same(found: Adapter, expected: Adapter, scales=True):
    assert found.modules.keys() == expected.modules.keys()
    for module, factors in expected.modules.items():
        other = found.modules[module]
        if scales:
            assert other.scale == pytest.approx(factors.scale, rel=1e-7), module
        for name in ("down", "up", "magnitude") if scales else ("down", "magnitude"):
            np.testing.assert_array_equal(
                getattr(other, name), getattr(factors, name), err_msg=f"{module} {name}"
            )


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDENS / "io.npz")


@pytest.fixture(scope="module")
def ours(golden):
    """(adapters) -> our output, NCHW."""
    x, t = golden["x"].transpose(0, 2, 3, 1), golden["t"].astype(np.float32)
    run = nnx.jit(lambda model: model(x, t, golden["y"], golden["mask"]))
    return lambda specs: np.asarray(run(pixart_jax.load_model(BASE, adapter=specs))).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_peft_reads_what_is_written(tmp_path, golden, ours, kind):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    write_peft(tmp_path / "a", random_adapter(kind == "dora", rslora=kind == "rslora"), "org/base")
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(BASE)
    model = peft.PeftModel.from_pretrained(transformer, tmp_path / "a").eval()
    loaded = {name for name, value in model.state_dict().items() if "lora_" in name}
    assert len(loaded) == len(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    arguments = {
        "latents": golden["x"].transpose(0, 2, 3, 1),
        "timesteps": golden["t"],
        "text": golden["y"],
        "text_mask": golden["mask"],
    }
    expected = ours(tmp_path / "a")
    assert np.abs(expected - golden["out_base"]).max() > 0.1
    for each in (model, model.merge_and_unload()):
        theirs = foreign.run_diffusers(each, arguments).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(expected, theirs, rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base" and len(config["target_modules"]) == 27
    assert config["use_rslora"] == (kind == "rslora") and config["use_dora"] == (kind == "dora")


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", WRITERS)
def test_round_trips(tmp_path, name, dora):
    adapter = random_adapter(dora, rslora=True, base="org/base", manifest={"step": 5})
    path = tmp_path / ("a" if name == "peft" else "a.safetensors")
    WRITERS[name](path, adapter)
    again = read_adapter(path)
    assert (again.rslora, again.base, again.manifest) == (True, "org/base", {"step": 5})
    # The members of a fused projection get one scale: that of the first, which then multiplies B.
    assert_same(again, adapter, scales=name != "kohya")
    if name == "kohya":
        for module, factors in adapter.modules.items():
            other = again.modules[module]
            np.testing.assert_allclose(
                other.scale * other.up, factors.scale * factors.up, rtol=1e-6, err_msg=module
            )


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_kohya_and_back_are_the_same_bits(tmp_path, kind):
    adapter = read_adapter(GOLDENS / kind)
    write_kohya(tmp_path / "k.safetensors", adapter)
    again = read_adapter(tmp_path / "k.safetensors")
    assert again.digest == adapter.digest and again.rslora == adapter.rslora
    tensors, scale = load_file(tmp_path / "k.safetensors"), adapter.modules["proj_out"].scale
    shapes = {
        name.removeprefix("lora_unet_blocks_1_"): value.shape
        for name, value in tensors.items()
        if name.startswith("lora_unet_blocks_1_")
    }
    assert shapes["attn_qkv.lora_down.weight"] == (12, 48) and shapes["attn_qkv.lora_up.weight"] == (144, 12)
    assert shapes["cross_attn_kv_linear.lora_up.weight"] == (96, 8)
    assert shapes["cross_attn_q_linear.lora_up.weight"] == (48, 4)
    # alpha / rank is s in every module, whatever its rank.
    alphas = {"attn_qkv": 12 * scale, "cross_attn_kv_linear": 8 * scale, "mlp_fc1": 4 * scale}
    for module, alpha in alphas.items():
        assert tensors[f"lora_unet_blocks_1_{module}.alpha"] == np.float32(alpha)
    up = tensors["lora_unet_blocks_1_attn_qkv.lora_up.weight"]
    blocks = up.reshape(3, 48, 3, 4).any(axis=(1, 3))
    np.testing.assert_array_equal(blocks, np.eye(3, dtype=bool))
    assert tensors["lora_unet_x_embedder_proj.lora_up.weight"].shape == (48, 4, 1, 1)
    if kind == "dora":
        assert tensors["lora_unet_blocks_1_attn_qkv.dora_scale"].shape == (144, 1)
        assert tensors["lora_unet_x_embedder_proj.dora_scale"].shape == (48, 1, 1, 1)


def test_a_trained_fused_adapter_keeps_its_rank(tmp_path):
    """Its members have one A."""
    path = adapter_formats.save_kohya(tmp_path / "k.safetensors", adapter_formats.draw(dora=True))
    write_kohya(tmp_path / "again.safetensors", read_adapter(path))
    before, after = load_file(path), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


def test_comfyui_has_the_names_that_its_pixart_maps(tmp_path):
    adapter = random_adapter(dora=True)
    write_comfyui(tmp_path / "c.safetensors", adapter)
    tensors = load_file(tmp_path / "c.safetensors")
    suffixes = ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale")
    assert tensors.keys() == {f"transformer.{m}.{s}" for m in adapter.modules for s in suffixes}
    for module, factors in adapter.modules.items():
        alpha = tensors[f"transformer.{module}.alpha"]
        assert alpha.shape == () and alpha == pytest.approx(factors.scale * factors.rank)
        # ComfyUI takes the norm of each row if the first axis is that of the rows.
        assert tensors[f"transformer.{module}.dora_scale"].shape[0] == len(factors.up)
    with safe_open(tmp_path / "c.safetensors", "numpy") as file:
        notes = json.loads(file.metadata()["pixart_jax.adapter"])
    assert notes == {"base": "", "rslora": False, "rank": 4}


def test_adapters_of_some_modules(tmp_path):
    adapter = random_adapter()
    some = {m: f for m, f in adapter.modules.items() if m.endswith(("to_q", "to_v"))}
    for name, write in WRITERS.items():
        path = tmp_path / f"{name}.safetensors"
        write(path, Adapter(some))
        assert read_adapter(path).modules.keys() == some.keys()
    # The magnitudes of the members that are missing are those of the base, which is not known here.
    some = {m: f for m, f in random_adapter(dora=True).modules.items() if m in some}
    write_comfyui(tmp_path / "c.safetensors", Adapter(some))
    with pytest.raises(UserError, match=r"with blocks\.0\.attn\.qkv as one module \(DoRA needs all members"):
        write_kohya(tmp_path / "k.safetensors", Adapter(some))
    some["proj_out"] = adapter.modules["proj_out"]
    with pytest.raises(UserError, match=r"no DoRA magnitude for proj_out, .*: write it with --to=comfyui"):
        write_peft(tmp_path / "p", Adapter(some))
    assert not (tmp_path / "p").exists()
