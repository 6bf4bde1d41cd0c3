"""Captioning: order, batches, equal images, kills, refusals, real tiny models."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pixart_jax import captioning as cap
from pixart_jax.data.images import RefusalReport, decode_image
from pixart_jax.data.sources import open_source
from pixart_jax.errors import UserError

REPOSITORY = Path(cap.__file__).parents[1]


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 photos: 20 crops, of which 00, 07 and 19 have equal bytes, and three in a subfolder, one broken."""
    root = tmp_path_factory.mktemp("photos")
    photos = load_sample_images().images
    for i in range(20):
        crop = photos[i % 2][3 * i : 3 * i + 40 + i, 5 * i : 5 * i + 60]
        (root / f"{i:02d}.png").write_bytes(png(photos[0][:50, :70] if i in (0, 7, 19) else crop))
        (root / f"{i:02d}.txt").write_text(f"photo {i % 3}")
    (root / "sub").mkdir()
    (root / "sub" / "20.png").write_bytes(png(photos[1][:44, :55]))
    (root / "sub" / "21.png").write_bytes((root / "03.png").read_bytes())
    (root / "sub" / "broken.png").write_bytes(png(photos[1][:44, :55])[:300])
    return root


def open_folder(folder):
    return open_source("folder", folder, require_captions=False)


class FakeModel:
    """Captions that depend on the image, the instruction and the size of the batch, as a real model's may."""

    def __init__(self, fail_at=None):
        self.batches = []
        self.fail_at = fail_at

    def __call__(self, images, instructions):
        if len(self.batches) == self.fail_at:
            raise KeyboardInterrupt
        self.batches.append(len(images))
        batch = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:6]
        return [f"{text} / {image.sum()} / {batch}" for image, text in zip(images, instructions, strict=True)]


def run(folder, out, model, **options):
    report = RefusalReport(max_refused_share=0.2)
    options = {"name": "fake", "batch_size": 4, **options}
    written = cap.caption_images(open_folder(folder), model, out, report, **options)
    return written, report


def lines(out):
    return [json.loads(line) for line in Path(out).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """The bytes of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "c.jsonl"
    run(folder, out, FakeModel())
    return out.read_bytes()


def test_one_line_an_image_in_order(folder, tmp_path):
    model = FakeModel()
    written, report = run(folder, tmp_path / "c.jsonl", model)
    records = lines(tmp_path / "c.jsonl")
    keys = [f"{i:02d}.png" for i in range(20)] + ["sub/20.png", "sub/21.png"]
    assert [record["path"] for record in records] == keys and written == 22
    assert model.batches == [4, 4, 4, 4, 3], "19 distinct images"
    for record in records:
        data = (folder / record["path"]).read_bytes()
        assert record["sha256"] == hashlib.sha256(data).hexdigest()
        height, width = decode_image(data).shape[:2]
        assert (record["height"], record["width"]) == (height, width)
        assert record["ratio"] == round(height / width, 4)
        assert record["captions"][-1]["text"].startswith(f"{cap.INSTRUCTION} / {decode_image(data).sum()}")
        assert record["captions"][-1]["name"] == "fake"
    by_key = {record["path"]: record["captions"][-1]["text"] for record in records}
    assert by_key["00.png"] == by_key["07.png"] == by_key["19.png"] != by_key["01.png"]
    assert by_key["sub/21.png"] == by_key["03.png"]
    assert records[5]["captions"][0] == {"text": "photo 2", "weight": 1.0, "name": "caption"}
    assert len(records[20]["captions"]) == 1
    assert (report.taken, report.counts()) == (22, {"broken": 1})
    refused = (tmp_path / "c.jsonl.refused.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["key"] for line in refused] == ["sub/broken.png"]


def test_output_is_a_source(folder, tmp_path):
    run(folder, tmp_path / "c.jsonl", FakeModel())
    source = open_source("auto", tmp_path / "c.jsonl", image_root=folder)
    assert len(source) == 22 and [c.name for c in source[4].captions] == ["caption", "fake"]
    assert source[4].decode().shape[:2] == (source[4].height, source[4].width)
    recaptioned = open_source("folder", folder, captions=tmp_path / "c.jsonl")
    assert recaptioned[4].captions == source[4].captions


def test_running_again_does_nothing(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    run(folder, out, FakeModel())
    model = FakeModel()
    written, report = run(folder, out, model)
    assert (written, model.batches, report.taken) == (0, [], 22)
    assert out.read_bytes() == whole


def test_any_cut_is_continued_to_the_same_bytes(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    run(folder, out, FakeModel())
    ends = np.cumsum([len(line) for line in whole.splitlines(keepends=True)])
    rng = np.random.default_rng(0)
    cuts = {
        0,
        1,
        len(whole) - 1,
        *ends[[0, 3, 4, 11, 20]],
        *(ends[[2, 8]] - 1),
        *rng.integers(0, len(whole), 12),
    }
    for cut in sorted(map(int, cuts)):
        out.write_bytes(whole[:cut])
        run(folder, out, FakeModel())
        assert out.read_bytes() == whole, cut


def test_interrupted_at_every_batch(folder, tmp_path, whole):
    for fail_at in range(5):
        out = tmp_path / f"{fail_at}.jsonl"
        with pytest.raises(KeyboardInterrupt):
            run(folder, out, FakeModel(fail_at))
        assert whole.startswith(out.read_bytes()) and len(lines(out)) < 22
        run(folder, out, FakeModel())
        assert out.read_bytes() == whole


def test_another_batch_size_neither_loses_nor_repeats(folder, tmp_path, whole):
    out = tmp_path / "c.jsonl"
    (tmp_path / "first").mkdir()
    run(folder, tmp_path / "first" / "c.jsonl", FakeModel())
    for file in (tmp_path / "first").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    out.write_bytes(whole[: len(whole) // 2])
    run(folder, out, FakeModel(), batch_size=3)
    assert [r["path"] for r in lines(out)] == [json.loads(line)["path"] for line in whole.splitlines()]


def test_images_added_later_get_lines_too(folder, tmp_path):
    import shutil

    copy, out = tmp_path / "photos", tmp_path / "c.jsonl"
    shutil.copytree(folder, copy)
    moved = (copy / "05.png").read_bytes()
    (copy / "05.png").unlink()
    run(copy, out, FakeModel())
    (copy / "05.png").write_bytes(moved)
    written, _ = run(copy, out, FakeModel())
    assert written == 1 and lines(out)[-1]["path"] == "05.png" and len(lines(out)) == 22


def test_many_equal_images_do_not_pile_up(tmp_path, monkeypatch):
    for i in range(300):
        (tmp_path / f"{i:03d}.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    model, out = FakeModel(), tmp_path / "out" / "c.jsonl"
    flushed = []  # lines in the file whenever something is written to disk
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (flushed.append(len(lines(out)) if out.exists() else 0), fsync(file))
    )
    written, _ = run(tmp_path, out, model, batch_size=2)
    assert (written, model.batches) == (300, [1])
    assert sorted(set(flushed)) == [0, 128, 256, 300]


def test_shards_split_the_images(folder, tmp_path, whole):
    keys = []
    for i in range(3):
        run(folder, tmp_path / f"{i}.jsonl", FakeModel(), shard=(i, 3))
        keys += [record["path"] for record in lines(tmp_path / f"{i}.jsonl")]
    assert sorted(keys) == [json.loads(line)["path"] for line in whole.splitlines()]


def test_original_captions_are_given(folder, tmp_path):
    out = tmp_path / "c.jsonl"
    report = RefusalReport(max_refused_share=0.2)
    options = {"name": "fake", "batch_size": 4, "with_original": True}
    model = FakeModel()
    cap.caption_images(open_folder(folder), model, out, report, **options)
    texts = {record["path"]: record["captions"][-1]["text"] for record in lines(out)}
    assert texts["05.png"].startswith(
        'Given the caption of this image "photo 2", describe this image and its'
    )
    # 00, 07 and 19 have equal bytes; 00 has caption 0, the others 1: asked otherwise, captioned otherwise.
    assert texts["07.png"] == texts["19.png"] != texts["00.png"]
    assert report.counts() == {"missing_caption": 3}
    data = out.read_bytes()
    out.write_bytes(data[: len(data) // 3])
    cap.caption_images(open_folder(folder), FakeModel(), out, RefusalReport(0.2), **options)
    assert out.read_bytes() == data


def test_too_many_refusals_stop(folder, tmp_path):
    report = RefusalReport(max_refused_share=0.01)
    with pytest.raises(UserError, match=r"refused 1 of 23 samples.*sub/broken.png"):
        cap.caption_images(open_folder(folder), FakeModel(), tmp_path / "c.jsonl", report, name="fake")
    assert len(lines(tmp_path / "c.jsonl")) == 22, "what was captioned is kept"


def test_another_model_or_a_strange_file_is_not_continued(folder, tmp_path):
    out = tmp_path / "c.jsonl"
    out.write_bytes(b"")  # nothing in it yet: may become anything
    run(folder, out, FakeModel(), name="first thought", instruction="Say it short", shard=(19, 23))
    out.write_bytes(b"")
    run(folder, out, FakeModel())
    with pytest.raises(UserError, match=r"begun with name='fake', now it is 'other'"):
        run(folder, out, FakeModel(), name="other")
    with pytest.raises(UserError, match="begun with instruction="):
        run(folder, out, FakeModel(), instruction="Say it short")
    with pytest.raises(UserError, match="shard='0/1', now it is '0/2'"):
        run(folder, out, FakeModel(), shard=(0, 2))
    data = out.read_bytes()
    out.write_bytes(data + data.splitlines(keepends=True)[3])
    with pytest.raises(UserError, match=r"line 23.*second time"):
        run(folder, out, FakeModel())
    out.write_bytes(b"hello\n" + data)
    with pytest.raises(UserError, match="line 1: no caption line"):
        run(folder, out, FakeModel())
    (tmp_path / "c.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match=r"c.jsonl.settings.json.*another --out"):
        run(folder, out, FakeModel())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"with_original": True, "instruction": "Describe"}, "exactly when the original caption is given"),
        ({"instruction": "Given {caption}"}, "exactly when the original caption is given"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_contradictions(folder, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path / "c.jsonl", FakeModel(), **options)
    assert not list(tmp_path.iterdir())


# --- real models of transformers, tiny and with random weights


def tokenizer(transformers):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "USER", "ASSISTANT", *(f"w{i}" for i in range(90))]
    words += cap.INSTRUCTION.split()
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )


def enlarge(torch, model):
    """Makes random weights so large that captions differ between images."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(64 if "crossattention" in name else 8)
    return model


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("llava")
    words = tokenizer(transformers)
    template = (
        "<s>{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
        "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}ASSISTANT"
    )
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        tokenizer=words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(path)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**size, image_size=16, patch_size=8, projection_dim=16)
    text = transformers.LlamaConfig(
        **size, vocab_size=len(words), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    config = transformers.LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        image_token_index=3,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = enlarge(torch, transformers.LlavaForConditionalGeneration(config))
    model.generation_config.temperature = 0.2  # as the released ones: must be overruled in silence
    model.generation_config.do_sample = True
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def describe(llava):
    return cap.load_model(str(llava), max_new_tokens=24)


def test_llava_is_asked_through_its_template(describe, llava, folder):
    source = open_folder(folder)
    images = [source[i].decode() for i in (1, 2, 3)]
    asked = [cap.INSTRUCTION] * 3
    together = describe(images, asked)
    assert len(set(together)) == 3, "captions depend on the image"
    assert all(text and "USER" not in text.split()[:1] and "<" not in text for text in together)
    assert all(len(text.split()) <= 24 for text in together)
    assert describe(images, asked) == together
    assert describe(images[:1], ["w1 w2 w3"]) != together[:1], "and on the instruction"
    # Instructions of several lengths share a batch: padding on the wrong side would change the short one.
    assert describe(images[:2], ["w1", "w1 w2 w3 w4 w5 w6"])[0] == describe(images[:1], ["w1"])[0]
    # The template writes the token that begins a text, the tokenizer then must not.
    inputs = cap._Processor(str(llava))(images[:2], ["w1", "w2 w3"], "chat")
    assert (inputs["input_ids"] == 1).sum(1).tolist() == [1, 1]
    narrow = np.full((3, 30, 3), 200, np.uint8)  # 3 rows, not 3 colours
    assert describe([narrow], asked[:1]) == describe([np.full((30, 30, 3), 200, np.uint8)], asked[:1])
    # A caption that spells a special token is no second image.
    assert describe(images[:1], ["w1 <image> w2 </s>"]) == describe(images[:1], ["w1   w2  "])


def test_plain_prompts_are_given_as_they_are(llava, describe, folder):
    plain = cap.load_model(str(llava), max_new_tokens=8, prompt_style="plain")
    images = [open_folder(folder)[1].decode()]
    (text,) = plain(images, ["USER <image> w1 ASSISTANT"])
    assert text == " ".join(describe(images, ["w1"])[0].split()[:8])


def test_models_without_a_joint_processor(tmp_path, folder):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    words = tokenizer(transformers)
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
    enlarge(torch, model).save_pretrained(tmp_path)
    describe = cap.load_model(str(tmp_path), max_new_tokens=12)
    source = open_folder(folder)
    texts = describe([source[i].decode() for i in range(1, 7)], ["ignored"] * 6)
    assert len(set(texts)) > 1 and all("ignored" not in text for text in texts)
    with pytest.raises(UserError, match="no chat template"):
        cap.load_model(str(tmp_path), prompt_style="chat")


def test_models_that_cannot_be_loaded(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(UserError, match="give an image-to-text model") as error:
        cap.load_model(str(tmp_path))
    assert "\n" not in str(error.value)
    for options, words in [
        ({"dtype": "flaot32"}, "torch dtype"),
        ({"prompt_style": "chta"}, "Did you mean 'chat'"),
    ]:
        with pytest.raises(UserError, match=words):
            cap.load_model(str(tmp_path), **options)


def command(*arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "pixart_jax.caption", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options,
    )  # fmt: skip


def test_command_killed_and_resumed(describe, llava, folder, tmp_path):
    settings = {"max_new_tokens": 24, "prompt_style": "auto", "dtype": "auto"}
    expected = tmp_path / "expected.jsonl"
    options = {"name": str(llava), "batch_size": 2, "settings": settings}
    cap.caption_images(open_folder(folder), describe, expected, RefusalReport(0.2), **options)

    out = tmp_path / "c.jsonl"
    arguments = [
        f"--images={folder}",
        f"--out={out}",
        f"--model={llava}",
        "--batch_size=2",
        "--max_new_tokens=24",
    ]
    process = command(*arguments, "--source=folder", "--max_refused_share=0.2")
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = out.read_bytes()
    assert expected.read_bytes().startswith(killed) and 3 <= killed.count(b"\n") < 22
    with open(out, "ab") as file:  # and a line torn by a kill in the middle of a write
        file.write(expected.read_bytes()[len(killed) :][:50])
    written = cap.caption_images(open_folder(folder), describe, out, RefusalReport(0.2), **options)
    assert out.read_bytes() == expected.read_bytes() and written == 22 - killed.count(b"\n")

    finished = command(*arguments, "--source=folder", "--max_refused_share=0.2")
    stdout, stderr = finished.communicate(timeout=120)
    assert finished.returncode == 0, stderr
    assert "taken" in stdout and "truncated or damaged image" in stdout and "0 captions written" in stdout
    assert out.read_bytes() == expected.read_bytes()
