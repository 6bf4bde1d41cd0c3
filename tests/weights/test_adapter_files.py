"""Adapter files of every tool are read to one adapter; what cannot be read is named in one line."""

import json
import shutil

import adapter_formats
import foreign
import numpy as np
import pytest
from adapter_formats import ALPHA, BASE, FORMATS, GOLDENS, RANK
from hostile import Bomb
from safetensors.numpy import load_file, save_file

from pixart_jax.errors import UserError
from pixart_jax.weights.adapter_files import parse_spec, read_adapter, read_adapters
from pixart_jax.weights.adapters import merge
from pixart_jax.weights.loading import read_any, with_adapters

torch = foreign.torch
LORA = GOLDENS / "lora"
ONE = "transformer_blocks.0.attn1.to_q"


def refused(path, *words, **kwargs):
    with pytest.raises(UserError) as error:
        read_adapter(path, **kwargs)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def save(path, tensors, metadata=None):
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def base():
    return read_any(BASE)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_the_same_network(tmp_path, base, name, dora):
    parts = adapter_formats.draw(dora)
    adapter = read_adapter(FORMATS[name](tmp_path / name, parts))
    assert adapter.modules.keys() == parts.keys() and not adapter.notes
    folded = name.startswith("onetrainer")
    for module, factors in adapter.modules.items():
        assert factors.scale == (1 if folded else ALPHA / RANK)
        up = parts[module].B * np.float32(ALPHA / RANK) if folded else parts[module].B
        for found, expected in ((factors.down, parts[module].A), (factors.up, up)):
            np.testing.assert_array_equal(found, expected, err_msg=module)
        assert (factors.magnitude is not None) == dora
        if dora:
            np.testing.assert_array_equal(factors.magnitude, parts[module].m)
    params = merge(base.params, base.config.model, [(adapter, 1.0)])
    expected = adapter_formats.merged(parts)["proj_out"]
    np.testing.assert_allclose(params["final_layer"]["linear"]["kernel"], expected.T, rtol=0, atol=1e-5)


def test_the_second_file_of_the_official_script_needs_alpha(tmp_path):
    path = adapter_formats.save_second_file(tmp_path / "w.safetensors", adapter_formats.draw())
    refused(path, "does not state the scale of unet.base_model.model.", "--adapter_alpha")
    assert {f.scale for f in read_adapter(path, ALPHA).modules.values()} == {ALPHA / RANK}
    golden = read_adapter(GOLDENS / "pytorch_lora_weights_unet.safetensors", 8)
    assert golden.digest == read_adapter(LORA).digest
    refused(LORA, "states its scale, so --adapter_alpha has no effect", alpha=8)
    refused(path, "adapter_alpha is nan", alpha=float("nan"))


@pytest.mark.parametrize(
    "prefix, suffix, scale",
    [
        ("diffusion_model.blocks.0.attn.proj", "lora_A lora_B", 1.0),
        ("lora_unet_blocks_0_attn_proj", "lora_down lora_up", 1.0),
        ("lora_unet_transformer_blocks_0_attn1_to_out_0", "lora_down lora_up", 1.0),
        ("transformer.transformer_blocks.0.attn1.to_out.0", "lora_A lora_B", None),
        ("blocks.0.attn.proj", "lora_A lora_B", None),
        ("base_model.model.transformer_blocks.0.attn1.to_out.0", "lora_A.default lora_B.default", None),
        ("transformer_blocks.0.attn1.to_out.0", "lora_linear_layer.down lora_linear_layer.up", None),
        ("transformer_blocks.0.attn1.to_out.0", "lora.down lora.up", None),
    ],
)
def test_scale_without_alpha(tmp_path, prefix, suffix, scale):
    """Loaders of Kohya's and ComfyUI's formats agree on 1. For others, alpha has to be given."""
    down, up = suffix.split()
    tensors = {f"{prefix}.{down}.weight": np.ones((4, 48)), f"{prefix}.{up}.weight": np.ones((48, 4))}
    path = save(tmp_path / "w.safetensors", {n: v.astype(np.float16) for n, v in tensors.items()})
    if scale is None:
        refused(path, f"does not state the scale of {prefix}", "--adapter_alpha")
        scale, adapter = 0.5, read_adapter(path, 2.0)
    else:
        adapter = read_adapter(path)
    ((module, factors),) = adapter.modules.items()
    assert module == "transformer_blocks.0.attn1.to_out.0" and factors.scale == scale
    assert factors.down.dtype == factors.up.dtype == np.float32


def test_settings_of_peft(tmp_path):
    parts = adapter_formats.draw()
    parts = {
        m: p._replace(A=p.A[:2], B=p.B[:, :2]) if m == "proj_out" or ".attn1.to_q" in m else p
        for m, p in parts.items()
    }
    folder = adapter_formats.save_peft(
        tmp_path / "a",
        parts,
        use_rslora=True,
        rank_pattern={"attn1.to_q": 2, "^proj_out": 2},
        alpha_pattern={"transformer_blocks.0.attn1.to_q": 10, r".*\.ff\.net\.\d+": 1.5},
        base_model_name_or_path="org/base",
    )
    adapter = read_adapter(folder)
    assert adapter.rslora and adapter.base == "org/base" and adapter.name == str(folder)
    expected = {
        "transformer_blocks.0.attn1.to_q": 10 / np.sqrt(2),
        "transformer_blocks.1.attn1.to_q": 6 / np.sqrt(2),
        "proj_out": 6 / np.sqrt(2),
        "transformer_blocks.1.ff.net.2": 1.5 / np.sqrt(3),
        "transformer_blocks.1.ff.net.0.proj": 6 / np.sqrt(3),
    }
    for module, scale in expected.items():
        assert adapter.modules[module].scale == pytest.approx(scale, rel=1e-12)
    # The file alone, beside its settings.
    assert read_adapter(folder / "adapter_model.safetensors").digest == adapter.digest

    def change(**changes):
        target = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        return adapter_formats.save_peft(target, adapter_formats.draw(), **changes)

    refused(change(r=4), "has rank 3, and", "adapter_config.json' states 4")
    refused(change(peft_type="LOHA"), "describes a LOHA adapter")
    refused(change(use_dora=True), "disagree about use_dora")
    refused(change(init_lora_weights="pissa_niter_4"), "init_lora_weights=pissa_niter_4", "not s B A")
    refused(change(layer_replication=[[0, 2]]), "layer_replication")
    many = {f"to_q{number}": 2 for number in range(10_001)}
    refused(change(rank_pattern=many), "has 10,001 patterns in rank_pattern")
    refused(change(alpha_pattern={"(a+)+$": 2}), "alpha_pattern '(a+)+$'", "Write the names")
    refused(change(lora_alpha=1e300), "the scale of base_model.model.", "which float32 cannot store")
    refused(change(lora_alpha="8"), "cannot be read as JSON (lora_alpha is", "copy the complete folder")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        copy = tmp_path / f"without {name}"
        shutil.copytree(folder, copy)
        (copy / name).unlink()
    refused(copy, "holds no adapter (adapter_model.safetensors, adapter_model.bin)")
    refused(tmp_path / "without adapter_config.json", "does not state the scale")


def test_pickles_of_peft(tmp_path):
    parts = adapter_formats.draw()
    folder = adapter_formats.save_peft(tmp_path / "a", parts)
    expected = read_adapter(folder).digest
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    file = folder / "adapter_model.bin"
    torch.save({name: torch.from_numpy(value) for name, value in tensors.items()}, file)
    assert read_adapter(folder).digest == expected
    # Nothing in a pickle is run, and a tensor cannot claim more values than the file has.
    torch.save({"a.lora_A.weight": Bomb(str(tmp_path / "canary"), 0)}, file)
    refused(folder, "adapter_model.bin' holds a", "plain containers only")
    assert not (tmp_path / "canary").exists()
    huge = torch.zeros(1).expand(2**20, 2**20)
    names = ("proj_out.lora_A.weight", "proj_out.lora_B.weight")
    torch.save({f"base_model.model.{name}": huge for name in names}, file)
    refused(folder, "has fewer bytes than its tensors have values")


def text_encoder(tensors):
    return {"lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": np.ones((2, 4)), **tensors}


def test_text_encoders_are_left_out_with_a_note(tmp_path, base):
    path = adapter_formats.save_kohya(tmp_path / "w.safetensors", adapter_formats.draw())
    expected = read_adapter(path)
    save(path, text_encoder(load_file(path)))
    adapter = read_adapter(path)
    assert adapter.digest == expected.digest
    assert "also changes the text encoder (1 tensors, such as lora_te_" in adapter.notes[0]
    assert adapter.notes[0] in with_adapters(base, [(adapter, 1.0)]).notes
    refused(save(path, text_encoder({})), "holds no adapter of the network")


@pytest.mark.parametrize(
    "name, words",
    [
        ("lycoris_transformer_blocks_0_attn1_to_q.lokr_w1", "is a LoKr adapter"),
        ("lora_unet_blocks_0_attn_qkv.hada_w1_a", "is a LoHa adapter"),
        ("transformer.transformer_blocks.0.attn1.to_q.oft_R.weight", "is a OFT or BOFT adapter"),
        ("lora_unet_blocks_0_attn_qkv.lora_mid.weight", "is a LoCon with Tucker decomposition adapter"),
        ("diffusion_model.blocks.0.attn.qkv.diff", "full differences"),
        ("lycoris_blocks_0_attn_qkv.lora_down.weight", "is a LyCORIS adapter"),
        ("controlnet.transformer_blocks.0.attn1.to_q.lora_A.weight", "is an adapter of a ControlNet"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "1 tensors that no adapter of a"),
        ("lora_unet_input_blocks_1_1_proj_in.lora_down.weight", "trained from a PixArt"),
        (f"transformer.{ONE}.lora_B.bias", "1 tensors that no adapter"),
        (f"transformer.{ONE}.base_layer.weight", "1 tensors that no adapter"),
    ],
)
def test_other_kinds_are_named(tmp_path, name, words):
    refused(save(tmp_path / "w.safetensors", {name: np.ones((2, 4), np.float32)}), words, name)


def test_damaged_tensors(tmp_path):
    path, prefix = tmp_path / "w.safetensors", f"lora_unet_{ONE.replace('.', '_')}"
    good = {
        f"{prefix}.lora_down.weight": np.ones((2, 48), np.float32),
        f"{prefix}.lora_up.weight": np.ones((48, 2), np.float32),
        f"{prefix}.alpha": np.array(1.0, np.float32),
    }

    def with_(part, value):
        return save(path, {**good, f"{prefix}.{part}": np.asarray(value)})

    assert read_adapter(save(path, good)).modules[ONE].scale == 0.5
    assert read_adapter(with_("alpha", np.int64(4))).modules[ONE].scale == 2
    refused(with_("alpha", np.ones(2)), "alpha is float64 2: it must be one number")
    refused(with_("alpha", np.float32("nan")), "alpha is nan")
    refused(with_("lora_up.weight", np.ones((48, 3))), "a column for each of the 2 rows of A")
    refused(with_("lora_up.weight", np.ones(48)), "must be matrices")
    refused(with_("lora_up.weight", np.ones((48, 2), int)), "is int64, but weights must be floating point")
    refused(with_("lora_up.weight", np.full((48, 2), np.inf)), "NaN or infinite")
    refused(with_("lora_down.weight", np.ones((0, 48))), "must be matrices")
    refused(with_("dora_scale", np.ones((1, 48))), "one magnitude for each column")
    refused(with_("dora_scale", np.ones((47, 1))), "is 47x1 for 48")
    refused(with_("lora_A.weight", np.ones((2, 48))), "has A of", "twice")
    # The same module by its official name.
    other = {n.replace(prefix, "lora_unet_blocks_0_attn_qkv"): v for n, v in good.items()}
    refused(save(path, good | other), f"has {ONE} twice, as lora_unet_")
    refused(save(path, other | {"lora_unet_blocks_0_attn_qkv.lora_up.weight": np.ones((47, 2))}), "3 parts")
    refused(
        save(path, {f"{prefix}.lora_down.weight": np.ones((2, 48))}), f"is not complete: {prefix} has no B"
    )
    refused(save(path, good, {"pixart_jax.adapter": "[]"}), "'pixart_jax.adapter' in the header")
    refused(save(path, good, {"pixart_jax.adapter": '{"base": 5}'}), "base is 5")
    refused(save(path, good, {"lora_adapter_metadata": "{"}), "'lora_adapter_metadata' in the header")
    packed = json.dumps({"transformer.r": -1, "transformer.lora_alpha": 1})
    refused(save(path, good, {"lora_adapter_metadata": packed}), "the header of", "r is -1")
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "not a complete safetensors file")
    refused(tmp_path / "absent", "does not exist: give a file, or a folder that peft wrote")
    refused(tmp_path.parent, "holds no adapter (")


def test_specs(tmp_path):
    assert parse_spec("a/b.safetensors:0.5") == ("a/b.safetensors", 0.5)
    assert parse_spec("a/b.safetensors") == ("a/b.safetensors", None)
    odd = tmp_path / "a:2"
    shutil.copytree(LORA, odd)
    assert parse_spec(str(odd)) == (str(odd), None) and parse_spec(f"{odd}:-3") == (str(odd), -3.0)

    def weights(specs):
        return [(adapter.name, weight) for adapter, weight in read_adapters(specs)]

    dora = GOLDENS / "dora"
    assert weights(LORA) == weights(str(LORA)) == weights([LORA]) == weights({LORA: 1}) == [(str(LORA), 1.0)]
    assert weights(None) == []
    assert weights([f"{LORA}:0.5", dora]) == [(str(LORA), 0.5), (str(dora), 1.0)] and weights(()) == []
    for specs, words in (
        (f"{tmp_path}/no:where", "there is no such file, and 'where' after the ':' is not a number"),
        (f"{LORA}:inf", f"the weight of adapter '{LORA}' is inf"),
        ({LORA: "1"}, "is '1': give a number"),
        ({LORA: True}, "is True: give a number"),
        ([str(LORA), f"{LORA}:2"], "is given twice"),
        ("\0", "no such file|does not exist|after the ':'"),
    ):
        with pytest.raises(UserError, match=words):
            read_adapters(specs)
    with pytest.raises(UserError, match="--adapter_alpha has no effect without --adapter"):
        read_adapters((), 3.0)


def test_adapters_of_different_bases(tmp_path):
    parts = adapter_formats.draw()
    names = ("PixArt-alpha/PixArt-XL-2-512x512", "/models/PixArt-XL-2-512x512/", "org/other")
    folders = [
        adapter_formats.save_peft(tmp_path / str(number), parts, base_model_name_or_path=name)
        for number, name in enumerate(names)
    ]
    assert len(read_adapters([*folders[:2], LORA])) == 3
    with pytest.raises(UserError, match=r"different base weights .*0' of 'PixArt-alpha.*2' of 'org/other'"):
        read_adapters([folders[0], folders[2]])


def test_an_adapter_is_not_a_network(tmp_path):
    for path in (LORA, LORA / "adapter_model.safetensors"):
        with pytest.raises(UserError, match="is an adapter, not the weights of a network"):
            read_any(path)
