import pytest

from pixart_jax.errors import UserError
from pixart_jax.hub.paths import HubPath
from pixart_jax.hub.selection import PARTS, needed_files


def chosen(names, path="", **options):
    return set(needed_files(dict.fromkeys(names, 1), HubPath("a/b", path=path), **options))


PIPELINE = (
    *("model_index.json", "README.md", ".gitattributes", "sample.png", "scheduler/scheduler_config.json"),
    *("transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"),
    *("transformer/diffusion_pytorch_model.fp16.safetensors", "transformer/diffusion_pytorch_model.bin"),
    *(
        "text_encoder/config.json",
        "text_encoder/model.safetensors.index.json",
        "text_encoder/flax_model.msgpack",
    ),
    *("text_encoder/model-00001-of-00002.safetensors", "text_encoder/model-00002-of-00002.safetensors"),
    *("text_encoder/pytorch_model-00001-of-00002.bin", "text_encoder/pytorch_model-00002-of-00002.bin"),
    *("text_encoder/pytorch_model.bin.index.json", "text_encoder/model.safetensors.index.fp16.json"),
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    *("tokenizer/spiece.model", "tokenizer/tokenizer_config.json"),
    *("vae/config.json", "vae/diffusion_pytorch_model.safetensors", "PixArt.safetensors", "optimizer.bin"),
)
SMALL = {"model_index.json", "README.md", "scheduler/scheduler_config.json", "tokenizer/spiece.model"}
SMALL |= {"tokenizer/tokenizer_config.json", *(f"{part}/config.json" for part in PARTS)}
NETWORK = {"transformer/diffusion_pytorch_model.safetensors"}
T5 = {f"text_encoder/model-0000{number}-of-00002.safetensors" for number in (1, 2)}
T5 |= {"text_encoder/model.safetensors.index.json"}
VAE = {"vae/diffusion_pytorch_model.safetensors"}


def test_of_a_pipeline_each_part_has_one_format_and_no_variants():
    found = chosen(PIPELINE)
    indices = {name for name in found if name.endswith(".index.json")}
    assert found - indices == (SMALL | NETWORK | T5 | VAE) - indices
    assert "text_encoder/model.safetensors.index.json" in found


@pytest.mark.parametrize(
    ("parts", "weights"), [(("transformer",), NETWORK), (("text_encoder", "vae"), T5 | VAE), ((), set())]
)
def test_only_the_wanted_parts_have_weights(parts, weights):
    suffixes = (".safetensors", ".bin")
    found = {name for name in chosen(PIPELINE, parts=parts) if name.endswith(suffixes)}
    assert found == {name for name in weights if name.endswith(suffixes)}
    assert chosen(PIPELINE, parts=parts) >= SMALL


def test_a_subfolder_is_all_that_is_read():
    found = chosen(PIPELINE, "vae", parts=("transformer",))
    assert found == {"vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        # Formats, in the order in which they are preferred.
        ("model.safetensors pytorch_model.bin tf_model.h5", "model.safetensors"),
        ("pytorch_model.bin tf_model.h5", "pytorch_model.bin"),
        # A variant only if there is nothing else, as when a folder is opened.
        ("model.fp16.safetensors pytorch_model.bin", "pytorch_model.bin"),
        ("model.fp16.safetensors", "model.fp16.safetensors"),
        # Known names before others.
        ("model.safetensors model_ema.safetensors", "model.safetensors"),
        ("lora.safetensors optimizer.bin training_args.bin", "lora.safetensors"),
        ("x-00001-of-00002.safetensors x-00002-of-00002.safetensors",) * 2,
    ],
)
def test_of_a_folder_with_several_weights(names, wanted):
    assert chosen(names.split()) == set(wanted.split())


def test_a_folder_of_several_networks_is_not_downloaded():
    names = ("PixArt-XL-2-512x512.pth", "PixArt-XL-2-1024-MS.pth", "README.md")
    with pytest.raises(UserError, match=r"several files of weights: give one of 'hub:a/b/PixArt-XL"):
        chosen(names)
    assert chosen(names, names[0]) == {names[0], "README.md"}
    with pytest.raises(UserError, match=r"several variants \('model.bf16.safetensors', 'model.fp16"):
        chosen(("model.bf16.safetensors", "model.fp16.safetensors"))


def test_of_a_file_what_is_read_with_it_comes_along():
    assert chosen(
        ("a/adapter_model.safetensors", "a/adapter_config.json", "a/x.png"), "a/adapter_model.safetensors"
    ) == {
        "a/adapter_model.safetensors",
        "a/adapter_config.json",
    }
    index = "text_encoder/model.safetensors.index.json"
    assert chosen(PIPELINE, index) == {*T5, "text_encoder/config.json"}
    assert chosen(("captions.jsonl", "README.md"), "captions.jsonl") == {"captions.jsonl"}


def test_of_data_everything_is_read():
    names = ("README.md", "a/1.png", "a/1.txt", "train-00000-of-00001.parquet", ".gitattributes")
    assert chosen(names, everything=True) == set(names[:-1])
    assert set(needed_files(dict.fromkeys(names, 1), HubPath("a/b", True, None, "a"))) == {
        "a/1.png",
        "a/1.txt",
    }


def test_a_path_that_is_not_there_names_what_is():
    with pytest.raises(UserError, match=r"a/b has PixArt.safetensors, .*vae. Did you mean 'transformer'\?"):
        chosen(PIPELINE, "transfomer")
    with pytest.raises(UserError, match=r"folder 'vae' of a/b has config.json, diffusion"):
        chosen(PIPELINE, "vae/confg.json")
