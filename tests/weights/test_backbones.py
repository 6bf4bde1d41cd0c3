import dataclasses
from pathlib import Path

import foreign
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from foreign import as_tensors, state_dict

from pixart_jax.convert import convert
from pixart_jax.errors import UserError
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.dit import DiT
from pixart_jax.models.pixart import PixArt
from pixart_jax.weights.adapters import Adapter, Factors, merge
from pixart_jax.weights.backbones import (
    backbone_table,
    detect,
    export_backbone,
    fold_size_conditions,
    import_backbone,
    strip_prefixes,
)
from pixart_jax.weights.configs import (
    diffusers_config,
    dit_config,
    official_config,
    to_diffusers_config,
)
from pixart_jax.weights.files import Tensors, open_tensors
from pixart_jax.weights.loading import read_any

torch = foreign.torch

CASES = [(size, sizes) for size in foreign.SIZES for sizes in (False, True)]
# The training size, and sizes that are wider or taller than it.
SHAPES = [(8, 8), (6, 14), (16, 10)]


def run(model_class, params, config, arguments) -> np.ndarray:
    graph = nnx.graphdef(nnx.eval_shape(lambda: model_class(config, rngs=nnx.Rngs(0))))
    return np.asarray(jax.jit(lambda p, a: nnx.merge(graph, p)(**a))(params, arguments))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'ms' if case[1] else 'plain'}")
def official(request):
    """The sizes of a model, its official state dict, and the config and params that we read from it."""
    name, sizes = request.param
    numbers = {**foreign.SIZES[name], "sizes": sizes}
    tensors = as_tensors(foreign.official_state_dict(**numbers))
    config = official_config(tensors, {"num_heads": numbers["heads"]})
    return numbers, tensors, config, import_backbone("official", tensors, config)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_official_weights_in_diffusers_give_our_output(official, shape):
    numbers, _, config, params = official
    model = foreign.diffusers_model(**numbers, seed=7)
    _, exported = export_backbone("diffusers", params, config)
    model.load_state_dict({name: torch.tensor(value) for name, value in exported}, strict=True)
    arguments = foreign.inputs(shape, **numbers)
    expected = foreign.run_diffusers(model, arguments)
    assert expected.std() > 0.5
    np.testing.assert_allclose(run(PixArt, params, config, arguments), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, sizes", CASES)
def test_diffusers_weights_give_the_output_of_diffusers(name, sizes):
    numbers = {**foreign.SIZES[name], "sizes": sizes}
    model = foreign.diffusers_model(**numbers)
    tensors = as_tensors(state_dict(model))
    config = diffusers_config(tensors, dict(model.config), {"text_length": numbers["tokens"]})
    params = import_backbone("diffusers", tensors, config)
    arguments = foreign.inputs((6, 10), **numbers)
    expected = foreign.run_diffusers(model, arguments)
    np.testing.assert_allclose(run(PixArt, params, config, arguments), expected, rtol=0, atol=2e-5)


def test_the_same_tensors_come_out_of_every_format(official):
    numbers, tensors, config, params = official
    shapes, exported = export_backbone("official", params, config)
    exported = dict(exported)
    assert {name: value.shape for name, value in exported.items()} == shapes
    assert exported.keys() == tensors.keys()
    for name, value in exported.items():
        # Positions are computed, not copied, and may differ from the official ones in the last bit.
        atol = 2e-7 if name == "pos_embed" else 0
        np.testing.assert_allclose(value, tensors[name], rtol=0, atol=atol, err_msg=name)

    through = as_tensors(dict(export_backbone("diffusers", params, config)[1]))
    again = diffusers_config(through, to_diffusers_config(config), {"text_length": numbers["tokens"]})
    assert again == config
    back = import_backbone("diffusers", through, again)
    for name, value in export_backbone("official", back, again)[1]:
        if name != "y_embedder.y_embedding":
            np.testing.assert_array_equal(value, exported[name], err_msg=name)


def test_dit_gives_the_output_of_a_torch_dit():
    torch.manual_seed(0)
    model = foreign.TorchDiT(width=64, depth=3, heads=4, side=8, classes=10).eval()
    tensors = as_tensors(state_dict(model))
    assert detect(tensors) == "dit"
    config = dit_config(tensors, {"num_heads": 4})
    assert (config.num_classes, config.base_size, config.position_scale) == (10, 4, 1.0)
    params = import_backbone("dit", tensors, config)
    rng = np.random.default_rng(0)
    arguments = {
        "latents": rng.standard_normal((3, 8, 8, 4)).astype(np.float32),
        "timesteps": np.array([0.0, 500.0, 999.0], np.float32),
        "labels": np.array([0, 7, 10]),
    }
    with torch.no_grad():
        theirs = [torch.from_numpy(value) for value in arguments.values()]
        expected = model(theirs[0].permute(0, 3, 1, 2), *theirs[1:]).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(run(DiT, params, config, arguments), expected, rtol=0, atol=2e-5)
    # The exported weights can be loaded into PyTorch with strict=True.
    exported = dict(export_backbone("dit", params, config)[1])
    for name, value in exported.items():
        np.testing.assert_allclose(value, tensors[name], rtol=0, atol=2e-7 if name == "pos_embed" else 0)
    model.load_state_dict({name: torch.tensor(value) for name, value in exported.items()}, strict=True)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(dtype):
    numbers = {**foreign.SIZES["small"], "sizes": True}
    tensors = as_tensors({k: v.astype(dtype) for k, v in foreign.official_state_dict(**numbers).items()})
    config = official_config(tensors, {"num_heads": 4})
    assert (config.base_size, config.position_scale) == (4, 1.0)
    for name, value in export_backbone("official", import_backbone("official", tensors, config), config)[1]:
        assert value.dtype == np.float32
        if name != "pos_embed":
            np.testing.assert_array_equal(value, tensors[name].astype(np.float32))


def test_folded_size_conditions_are_the_network_at_that_size():
    numbers = {**foreign.SIZES["small"], "sizes": True}
    tensors = as_tensors(foreign.official_state_dict(**numbers))
    config = official_config(tensors, {"num_heads": 4})
    params = import_backbone("official", tensors, config)
    arguments = foreign.inputs((8, 12), **numbers)
    arguments["image_size"] = np.full((3, 2), (384, 576), np.float32)
    arguments["aspect_ratio"] = np.full((3, 1), 384 / 576, np.float32)
    expected = run(PixArt, params, config, arguments)
    folded, plain = fold_size_conditions(params, config, 384, 576)
    assert plain == dataclasses.replace(config, size_conditions=False)
    del arguments["image_size"], arguments["aspect_ratio"]
    np.testing.assert_allclose(run(PixArt, folded, plain, arguments), expected, rtol=0, atol=2e-5)
    # The original parameters do not change.
    assert "size_embedder" in params
    np.testing.assert_array_equal(params["t_embedder"]["fc2"]["bias"], tensors["t_embedder.mlp.2.bias"])


def test_every_problem_is_in_one_error_with_both_names():
    numbers = {**foreign.SIZES["small"], "sizes": True}
    arrays = foreign.official_state_dict(**numbers)
    config = official_config(as_tensors(arrays), {"num_heads": 4})
    del arrays["blocks.1.cross_attn.kv_linear.bias"]
    arrays["blocks.0.mlp.fc1.weight"] = arrays["blocks.0.mlp.fc1.weight"].T
    arrays["blocks.2.mlp.fc1.weight"] = np.zeros((1, 1), np.float32)
    with pytest.raises(UserError) as error:
        import_backbone("official", as_tensors(arrays), config)
    message = str(error.value)
    assert "\n" not in message
    for part in (
        "blocks.1.cross_attn.kv_linear.bias (ours: blocks.stacked.cross_attn.kv.bias[1])",
        "blocks.0.mlp.fc1.weight 48x192 for 192x48 (ours: blocks.stacked.mlp.fc1.kernel[0])",
        "unknown: blocks.2.mlp.fc1.weight",
    ):
        assert part in message


@pytest.mark.parametrize(
    "lost",
    [
        "x_embedder.proj.weight",
        "x_embedder.proj.bias",
        "blocks.0.mlp.fc1.bias",
        "final_layer.linear.bias",
        "y_embedder.y_embedding",
        "y_embedder.y_proj.fc1.weight",
        "csize_embedder.mlp.0.weight",
        "blocks.1.attn.qkv.weight",
    ],
)
@pytest.mark.parametrize("how", ["missing", "transposed"])
def test_a_tensor_that_the_config_is_read_from_is_named_too(lost, how):
    arrays = foreign.official_state_dict(**{**foreign.SIZES["small"], "sizes": True})
    value = arrays.pop(lost)
    if how == "transposed":
        arrays[lost] = value[None] if value.ndim == 1 else value.swapaxes(0, 1)
    with pytest.raises(UserError, match=lost.replace(".", r"\.")):
        tensors = as_tensors(arrays)
        import_backbone("official", tensors, official_config(tensors, {"num_heads": 4}))


def test_integers_are_no_weights():
    arrays = foreign.official_state_dict(**{**foreign.SIZES["small"], "sizes": False})
    config = official_config(as_tensors(arrays), {"num_heads": 4})
    arrays["t_block.1.bias"] = arrays["t_block.1.bias"].astype(np.int32)
    with pytest.raises(UserError, match=r"t_block\.1\.bias .*int32"):
        import_backbone("official", as_tensors(arrays), config)


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "model.diffusion_model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module.",
    ],
)
def test_prefixes_are_removed_and_said(prefix):
    arrays = foreign.official_state_dict(**{**foreign.SIZES["small"], "sizes": False})
    found, notes = strip_prefixes(as_tensors({prefix + name: value for name, value in arrays.items()}))
    assert list(found) == list(arrays) and detect(found) == "official"
    for name, value in arrays.items():
        assert found.shapes[name] == value.shape
        np.testing.assert_array_equal(found[name], value)
    assert notes == (f"removed the prefix {prefix} from the names in 'test'.",)


def test_wrappers_within_names_are_removed():
    """Blocks that were compiled or checkpointed one by one."""
    arrays = {
        "blocks.0._orig_mod.attn.qkv.weight": np.ones(1),
        "blocks.1._checkpoint_wrapped_module.attn.qkv.weight": np.ones(2),
        "x_embedder.proj.weight": np.ones(3),
    }
    found, notes = strip_prefixes(as_tensors(arrays))
    assert list(found) == ["blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "x_embedder.proj.weight"]
    assert "_orig_mod., _checkpoint_wrapped_module." in notes[0]
    plain = as_tensors({"x_embedder.proj.weight": np.ones(3)})
    assert strip_prefixes(plain) == (plain, ())


def test_two_tensors_of_one_name_raise():
    arrays = {"module.pos_embed": np.ones(1), "pos_embed": np.ones(1)}
    with pytest.raises(UserError, match=r"both module\.pos_embed and pos_embed"):
        strip_prefixes(as_tensors(arrays))


def test_formats_are_distinguished():
    assert detect(foreign.official_state_dict(**{**foreign.SIZES["small"], "sizes": False})) == "official"
    assert (
        detect(state_dict(foreign.diffusers_model(**{**foreign.SIZES["small"], "sizes": False})))
        == "diffusers"
    )
    with pytest.raises(UserError, match="no known format"):
        detect({"conv.weight": 0})


def test_xl_tables_fill_every_parameter_once():
    """The official state dicts have 437 and 445 tensors, including the positions."""
    for sizes, count in ((False, 437), (True, 445)):
        config = PixArtConfig(size_conditions=sizes)
        assert len(export_backbone("official", {}, config)[0]) == count
        assert len(backbone_table("diffusers", config).entries) > count


def test_size_conditions_need_their_tensors():
    model = foreign.diffusers_model(**{**foreign.SIZES["small"], "sizes": True})
    # The config has size conditions, but the file has no size embedders.
    plain = as_tensors(
        {k: v for k, v in state_dict(model).items() if "_embedder.linear" not in k or "timestep" in k}
    )
    with pytest.raises(UserError, match="resolution_embedder"):
        import_backbone("diffusers", plain, diffusers_config(plain, dict(model.config), {}))


@pytest.mark.parametrize("other", ["first_stage_model.decoder.x", "text_encoders.t5xxl.x", "vae.x"])
def test_a_file_with_all_parts_of_a_pipeline(other):
    names = [f"model.diffusion_model.blocks.0.attn.{n}" for n in range(500)]
    tensors = as_tensors(dict.fromkeys([*names, *(f"{other}{n}" for n in range(500))], np.zeros(1)))
    with pytest.raises(UserError, match=rf"a text encoder or a VAE \(500 tensors, such as {other}0") as error:
        strip_prefixes(tensors)
    assert len(str(error.value)) < 400


SIGMA = Path(__file__).parents[1] / "data" / "sigma_kv_qknorm_weights.safetensors"


def test_official_sigma_weights_survive_a_round_trip(tmp_path):
    """A mode that the weights do not show is in the notes of our own exports."""
    assumed = read_any(SIGMA, num_heads=4)
    assert "and does not state how: 'conv' is assumed" in " ".join(assumed.notes)
    read = read_any(SIGMA, num_heads=4, kv_compression="ave")
    assert "does not state how" not in " ".join(read.notes)
    convert(SIGMA, tmp_path / "sigma.safetensors", "official", num_heads=4, kv_compression="ave", say=list)
    again = read_any(tmp_path / "sigma.safetensors")
    assert again.config.model == read.config.model and again.config.model.kv_compression == "nearest"
    convert(tmp_path / "sigma.safetensors", tmp_path / "checkpoint", "checkpoint", say=list)
    convert(tmp_path / "checkpoint", tmp_path / "back.safetensors", "official", say=list)
    old, new = (open_tensors(path) for path in (SIGMA, tmp_path / "back.safetensors"))
    assert set(old) == set(new)
    for name in old:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)


def test_diffusers_cannot_hold_all_of_sigma():
    read = read_any(SIGMA, num_heads=4)
    with pytest.raises(
        UserError, match=r"normalized queries and keys \(model\.qk_norm\) and compressed .* lose"
    ):
        export_backbone("diffusers", read.params, read.config.model)


@pytest.mark.parametrize(
    ("weights", "given", "message"),
    [
        ("pixart", "conv", r"kv_compression=conv, but no block of '.*' has the weights of a compression"),
        ("sigma_kv", "none", r"kv_compression=none, but 2 blocks of '.*' compress keys and values"),
        ("sigma_kv", "average", "kv_compression is 'average'"),
    ],
)
def test_wrong_compressions_raise(weights, given, message):
    with pytest.raises(UserError, match=message):
        read_any(SIGMA.with_name(f"{weights}_weights.safetensors"), num_heads=4, kv_compression=given)


@pytest.mark.parametrize("name", ["blocks.{}.attn.sr.weight", "blocks.{}.mlp.fc1.bias"])
def test_numbers_of_blocks_that_python_does_not_convert(name):
    name = name.format("9" * 5000)
    tensors = open_tensors(SIGMA)
    shapes = {**tensors.shapes, name: (1,)}
    config = official_config(Tensors(SIGMA, shapes, tensors.__getitem__), {"num_heads": 4})
    assert (config.depth, config.compressed_layers) == (3, (1, 2))


def test_adapters_fit_a_network_that_diffusers_cannot_hold():
    read = read_any(SIGMA, num_heads=4)
    name = "transformer_blocks.1.attn1.to_q"
    rng = np.random.default_rng(0)
    factors = Factors(down=rng.normal(size=(2, 48)), up=rng.normal(size=(48, 2)), scale=1.0, magnitude=None)
    merged = merge(read.params, read.config.model, [(Adapter({name: factors}), 0.5)])
    new, old = (each["blocks"]["stacked"]["attn"]["qkv"]["kernel"][1, :, 0] for each in (merged, read.params))
    np.testing.assert_allclose(
        (new - old).reshape(48, 48), 0.5 * (factors.up @ factors.down).T, rtol=0, atol=1e-5
    )
    conv, before = (each["blocks"]["compression"]["conv"]["kernel"] for each in (merged, read.params))
    assert conv is before
