import numpy as np
import pytest
from tiny_captioners import enlarge, save_blip, save_blip2, save_qwen, tokenizer

from pixart_jax.captioning.model import load_captioner
from pixart_jax.captioning.run import INSTRUCTION
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError


def test_llava_is_prompted_through_its_template(describe, llava, folder):
    source = open_source("folder", folder)
    images = [source[i].decode() for i in (1, 2, 3)]
    asked = [INSTRUCTION] * 3
    together = describe(images, asked)
    assert len(set(together)) == 3, "captions depend on the image"
    assert all(text and "USER" not in text.split()[:1] and "<" not in text for text in together)
    assert all(len(text.split()) <= 24 for text in together)
    assert describe(images, asked) == together
    assert describe(images[:1], ["w1 w2 w3"]) != together[:1], "and on the instruction"
    # Instructions in a batch may differ in length; padding on the wrong side would change the short one.
    assert describe(images[:2], ["w1", "w1 w2 w3 w4 w5 w6"])[0] == describe(images[:1], ["w1"])[0]
    narrow = np.full((3, 30, 3), 200, np.uint8)  # 3 rows, not 3 colours
    assert describe([narrow], asked[:1]) == describe([np.full((30, 30, 3), 200, np.uint8)], asked[:1])
    # A special token in an instruction is removed, so <image> does not stand for a second image.
    assert describe(images[:1], ["w1 <image> w2 </s>"]) == describe(images[:1], ["w1   w2  "])


def test_plain_prompts_are_given_as_they_are(llava, describe, folder):
    # The chat template begins the prompt with <s>, so the tokenizer must not add a second one.
    plain = load_captioner(str(llava), max_new_tokens=8, prompt_style="plain")
    images = [open_source("folder", folder)[1].decode()]
    (text,) = plain(images, ["USER <image> w1 ASSISTANT"])
    assert text == " ".join(describe(images, ["w1"])[0].split()[:8])


def test_models_without_a_joint_processor(tmp_path, folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = tokenizer()
    words.save_pretrained(tmp_path)
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8)),
        decoder=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, is_decoder=True,
                add_cross_attention=True, bos_token_id=1, eos_token_id=2,
            )
        ),
    )  # fmt: skip
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = 1
    model.generation_config.pad_token_id = 0
    enlarge(model).save_pretrained(tmp_path)
    describe = load_captioner(str(tmp_path), max_new_tokens=12)
    source = open_source("folder", folder)
    texts = describe([source[i].decode() for i in range(1, 7)], ["ignored"] * 6)
    assert len(set(texts)) > 1 and all("ignored" not in text for text in texts)
    with pytest.raises(UserError, match="no chat template"):
        load_captioner(str(tmp_path), prompt_style="chat")


@pytest.mark.parametrize(
    ("save", "arguments", "style"),
    [
        (save_blip, (), "none"),
        (save_blip2, ("opt",), "none"),
        (save_blip2, ("t5",), "none"),
        (save_blip2, ("opt", True), "plain"),
        (save_blip2, ("t5", True), "plain"),
        (save_qwen, (), "chat"),
    ],
    ids=["blip", "blip2-opt", "blip2-t5", "instructblip-opt", "instructblip-t5", "qwen2-vl"],
)
def test_kinds_of_models(tmp_path, folder, capsys, save, arguments, style):
    """Each kind has its own processor, inputs, and way to pass settings to the part that writes text."""
    pytest.importorskip("torch")
    save(tmp_path, *arguments)
    describe = load_captioner(str(tmp_path), max_new_tokens=8)
    assert f"prompt style {style}" in capsys.readouterr().out
    source = open_source("folder", folder)
    images = [source[i].decode() for i in range(1, 7)]
    texts = describe(images, ["w1 w2 w3"] * 6)
    assert len(set(texts)) > 1, "captions depend on the image"
    assert describe(images, ["w1 w2 w3"] * 6) == texts
    for text in texts:
        assert not set(text.split()) & {"<pad>", "<s>", "</s>", "<image>", "[PAD]", "[CLS]", "[SEP]", "USER"}
        assert len(text.split()) <= 8, "the prompt is not part of the caption"
    asked = [describe([image], ["w4 w5 w6"])[0] for image in images]
    alone = [describe([image], ["w1 w2 w3"])[0] for image in images]
    assert (asked == alone) == (style == "none"), "captions depend on the instruction, if there is one"
    # Padding does not change the shorter instruction.
    assert [describe([image] * 2, ["w1 w2 w3", "w1 w2 w3 w4 w5"])[0] for image in images] == alone


def test_blip_continues_a_plain_prompt(tmp_path, folder):
    pytest.importorskip("torch")
    save_blip(tmp_path)
    describe = load_captioner(str(tmp_path), max_new_tokens=8, prompt_style="plain")
    (text,) = describe([open_source("folder", folder)[1].decode()], ["w1 w2 w3"])
    assert text.startswith("w1 w2 w3 ")


def test_a_model_that_expects_other_inputs(tmp_path, folder):
    pytest.importorskip("torch")
    save_qwen(tmp_path)
    plain = load_captioner(str(tmp_path), prompt_style="plain")
    with pytest.raises(UserError, match=r"cannot caption .* prompt_style plain .*<image>") as error:
        plain([open_source("folder", folder)[1].decode()], ["no image token"])
    assert "\n" not in str(error.value)


def test_models_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="give an image-to-text model") as error:
        load_captioner(str(tmp_path))
    assert "\n" not in str(error.value)
    for options, words in [
        ({"dtype": "flaot32"}, "torch dtype"),
        ({"prompt_style": "chta"}, "Did you mean 'chat'"),
    ]:
        with pytest.raises(UserError, match=words):
            load_captioner(str(tmp_path), **options)
