import dataclasses
import json
import re
import shlex
from collections import Counter
from types import SimpleNamespace

import pytest
from feature_folders import SQUARE, TEXT_LENGTH, WIDE, WIDTH, keys, make_record, three_shards
from feature_folders import write_folder as write_feature_folder
from source_files import crops, write_folder, write_tar

from pixart_jax.config import (
    FeaturesConfig,
    LogConfig,
    MeshConfig,
    TextEncoderConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training.data import (
    check_continuation,
    check_features,
    open_data,
    open_dataset,
    open_held_out,
    open_prompts,
    open_training_data,
)
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.sharding import make_mesh

MODEL = PixArtConfig(
    size="custom", depth=1, hidden_size=24, num_heads=2, text_dim=WIDTH, text_length=TEXT_LENGTH
)
CONFIG = TrainConfig(model=MODEL, features=FeaturesConfig(text_length=TEXT_LENGTH))


def test_features_must_match_the_config(tmp_path):
    dataset = open_dataset(str(three_shards(tmp_path / "features")))
    check_features(CONFIG, dataset)
    dataset.config["text_encoder"]["clean_caption"] = True
    check_features(dataclasses.replace(CONFIG, model=DiTConfig()), dataset)
    for changes, words in (
        (dict(features=FeaturesConfig(codec="pixels")), "features.codec is pixels"),
        (dict(features=FeaturesConfig(latent_scale=0.13025)), r"set --config.features.latent_scale=0.18215"),
        (dict(model=dataclasses.replace(MODEL, in_channels=16)), "model.in_channels is 16, .* have 4"),
        (dict(model=dataclasses.replace(MODEL, text_dim=4096)), "model.text_dim is 4096, .* have 8"),
        (
            dict(features=FeaturesConfig(text_encoder=TextEncoderConfig(clean_caption=False))),
            "set --config.features.text_encoder.clean_caption=True",
        ),
    ):
        with pytest.raises(UserError, match=words) as error:
            check_features(dataclasses.replace(CONFIG, **changes), dataset)
        assert "\n" not in str(error.value)
    # Captions that are not cleaned may be in lower case or not. Version 0.1 does not say that they are.
    dataset.config["text_encoder"] = {"clean_caption": False}
    encoder = TextEncoderConfig(clean_caption=False)
    features = dataclasses.replace(CONFIG.features, text_encoder=encoder)
    check_features(dataclasses.replace(CONFIG, features=features), dataset)
    features = dataclasses.replace(features, text_encoder=dataclasses.replace(encoder, lower_case=False))
    with pytest.raises(UserError, match=r"lower_case is False, .* have True"):
        check_features(dataclasses.replace(CONFIG, features=features), dataset)
    dataset.config["text_encoder"]["lower_case"] = False
    check_features(dataclasses.replace(CONFIG, features=features), dataset)


def test_buckets_whose_keys_and_values_cannot_be_compressed(tmp_path):
    """A run would otherwise end when their first batch arrives."""
    records = {bucket: [make_record(bucket.name, bucket)] for bucket in (SQUARE, WIDE)}
    dataset = open_dataset(str(write_feature_folder(tmp_path / "features", records)))
    compressed = {
        mode: dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, kv_compression=mode))
        for mode in ("conv", "uniform")
    }
    check_features(compressed["conv"], dataset)
    with pytest.raises(UserError, match=r"images of 48x80 px, but .*'uniform' cannot reduce a grid of 3x5"):
        check_features(compressed["uniform"], dataset)


@pytest.mark.parametrize("kind", ["folder", "manifest", "tar", "json", "tsv", "image", "pattern"])
def test_images_in_place_of_features(tmp_path, kind):
    """The message suggests another folder, not to write features into that of the images."""
    if kind in ("folder", "manifest"):
        path = write_folder(tmp_path / "photos", crops())
        if kind == "manifest":  # somebody else's
            (path / "manifest.json").write_text("[]")
    elif kind == "tar":
        path = tmp_path / "photos"
        path.mkdir()
        write_tar(path / "1.tar", [("a.png", crops()["a.png"][0])])
    elif kind == "image":
        path = tmp_path / "photos.png"
        path.write_bytes(crops()["a.png"][0])
    else:
        path = tmp_path / {"pattern": "photos-{000..123}.tar"}.get(kind, f"photos.{kind}")
    with pytest.raises(UserError, match="holds images, but a run reads features") as error:
        open_dataset(str(path), "configs/stage2.py")
    message = str(error.value)
    out = re.search(r"--out=(\S+)`", message)[1]
    assert out == "features/photos" and f"--images={shlex.quote(str(path))} " in message
    assert "\n" not in message
    assert "--config.data.on_the_fly=True" in message


@pytest.mark.parametrize("files", [[], ["job.json"], ["manifest.json"]])
def test_unfinished_features_are_not_images(tmp_path, files):
    for name in files:
        (tmp_path / name).write_text("[]")
    with pytest.raises(UserError, match=r"--images=IMAGES --out=") as error:
        open_dataset(str(tmp_path))
    assert "delete" not in str(error.value)


def resume(changes, fingerprint="f", earlier=None, *, saved=None, saved_fingerprint="f"):
    """Resumes from step 5 of a run of `CONFIG`, with other values of the fields; returns what is printed."""
    values, said, saved = to_dict(CONFIG), [], saved or {}
    for name, value in changes.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    before = to_dict(dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **saved)))
    metadata = {"config": before, "step": 5, "loader": {"fingerprint": saved_fingerprint}}
    hashes = fingerprint, earlier or fingerprint
    loader = SimpleNamespace(
        fingerprint=hashes[0],
        earlier_fingerprint=hashes[1],
        fingerprints=lambda first_step: [f"{same}{first_step or ''}" for same in hashes],
    )
    check_continuation(from_dict(values), metadata, loader, said.append)
    return said


def test_what_may_change_is_printed_when_a_run_resumes():
    assert resume({}) == []
    assert resume({"mesh.fsdp": 2, "compile.ahead": True, "data.threads": 1, "model.remat": "full"}) == []
    assert resume({"optimizer.learning_rate": 1e-6, "log.every": 5, "steps": 2000}) == [
        "config: steps was 1000, now 2000",
        "config: optimizer.learning_rate was 2e-05, now 1e-06",
        "config: log.every was 100, now 5",
    ]
    assert resume({"steps": 5}) == ["config: steps was 1000, now 5"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "steps is 4, the checkpoint has done 5"),
        ({"optimizer.clip_norm": 0.0}, "optimizer.clip_norm is 0.0, the checkpoint has 0.01"),
        ({"optimizer.name": "muon"}, "optimizer.name is 'muon', the checkpoint has 'adamw'"),
        ({"optimizer.accumulation": 2}, "optimizer.accumulation is 2"),
        ({"model.dtype": "bfloat16"}, "model.dtype is 'bfloat16', the checkpoint has 'float32'"),
        ({"model.position_scale": 2.0}, "model.position_scale is 2.0"),
        ({"model.base_size": 32, "features.image_size": 256}, "model.base_size is 32, the checkpoint has 16"),
        ({"diffusion.num_timesteps": 500}, "diffusion.num_timesteps is 500"),
        ({"features.text_encoder.tokenizer": "byt5"}, "features.text_encoder.tokenizer is 'byt5'"),
        ({"guidance.null_mask": "caption"}, "guidance.null_mask is 'caption', the checkpoint has 'own'"),
        ({"seed": 1, "data.batch_size": 8}, "seed is 1, the checkpoint has 0; data.batch_size is 8"),
    ],
)
def test_a_run_does_not_resume_as_another_run(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        resume(changes)
    text = str(raised.value)
    assert "\n" not in text and "Restore these values" in text and "emove" not in text


def test_changed_data_needs_a_decision():
    with pytest.raises(UserError, match="changed since the checkpoint of step 5") as error:
        resume({"data.train": "a,b"}, fingerprint="g")
    message = str(error.value)
    for words in (
        "data.train was '', now 'a,b'",
        "--config.data.first_step=5",
        "--config.init.method=weights",
        "--config.init.path",
    ):
        assert words in message
    assert resume({}, fingerprint="g", earlier="f") == []  # as version 0.1 stored it
    assert resume({"data.train": "a,b", "data.first_step": 5}, fingerprint="g") == [
        "config: data.train was '', now 'a,b'",
        "config: data.first_step was 0, now 5",
    ]
    with pytest.raises(UserError, match=r"data.first_step was 0, now 4"):
        resume({"data.first_step": 4}, fingerprint="g")
    with pytest.raises(UserError, match="seed is 1"):
        resume({"data.first_step": 5, "seed": 1}, fingerprint="g")


def test_a_forgotten_first_step_is_named():
    """The data are the same; first_step=5 would begin another epoch."""
    before = dict(saved={"first_step": 3}, saved_fingerprint="f3")
    with pytest.raises(UserError, match=r"has 3 with the same data: set --config\.data\.first_step=3"):
        resume({}, **before)
    with pytest.raises(UserError, match="has changed since the checkpoint") as error:
        resume({}, fingerprint="g", **before)
    assert "first_step was 3, now 0" in str(error.value)


def test_another_spelling_of_the_same_folder_is_no_change(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the records are others"):
        resume({"data.train": "a,b"}, fingerprint="g", saved={"train": f"{tmp_path}/a,{tmp_path}/b"})


def test_features_of_another_image_size_are_named(tmp_path, capsys):
    path = three_shards(tmp_path / "features")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["config"]["image_size"] = 256
    (path / "manifest.json").write_text(json.dumps(manifest))
    for size, printed in ((256, ""), (512, "has features of 256 px, but features.image_size is 512")):
        features = dataclasses.replace(CONFIG.features, image_size=size)
        open_data(str(path), dataclasses.replace(CONFIG, features=features), "configs/stage2.py")
        out = capsys.readouterr().out
        assert printed in out if printed else out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss_weights="1,2"), "data.loss_weights has 2 values for 1 folders: set one per folder"),
        (dict(repeats="3,1"), "data.repeats has 2 values for 1 folders"),
        (dict(weights="1,1"), "data.weights has 2 values for 1 folders"),
        ({}, "unmasked_weight is 0.5, but '.*' has no masks: precompute them with --masks, or set"),
    ],
)
def test_numbers_of_folders_and_masks_must_fit_the_data(tmp_path, changes, message):
    folder = str(three_shards(tmp_path / "features"))
    config = dataclasses.replace(
        CONFIG,
        data=dataclasses.replace(CONFIG.data, train=folder, batch_size=8, **changes),
        diffusion=dataclasses.replace(CONFIG.diffusion, unmasked_weight=0.5),
    )
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match=message) as error:
        open_training_data(config, "CONFIG", make_objective(config), mesh)
    assert "\n" not in str(error.value)


def test_dreambooth(tmp_path):
    """Images of a subject and of its class: the former twice per epoch, the latter with weight 0.5."""
    folders = {}
    for name, count in (("instance", 8), ("prior", 16)):
        records = {SQUARE: [make_record(key) for key in keys(count, name)]}
        folders[name] = str(write_feature_folder(tmp_path / name, records))
    data = dataclasses.replace(
        CONFIG.data, train=",".join(folders.values()), repeats="2,1", loss_weights="1,0.5", batch_size=8
    )
    config = dataclasses.replace(CONFIG, data=data)
    loader, _ = open_training_data(config, "CONFIG", make_objective(config), make_mesh(MeshConfig()))
    epoch = [loader.load(step) for step in range(4)]
    times = Counter(key for batch in epoch for key in batch.keys)
    assert times == dict.fromkeys(keys(8, "instance"), 2) | dict.fromkeys(keys(16, "prior"), 1)
    weights = {(key.split("/")[0], float(w)) for b in epoch for key, w in zip(b.keys, b.arrays["weight"])}
    assert weights == {("instance", 1.0), ("prior", 0.5)}


def test_validation_data_without_records(tmp_path):
    folder = three_shards(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"shards": []}))
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, validation=str(folder)))
    with pytest.raises(UserError, match=r"^data.validation .* has no records"):
        open_held_out(config, "CONFIG", print)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = []
    held_out = open_held_out(config, "CONFIG", said.append)
    assert said[0].startswith(f"{len(held_out)} held-out records")
    assert ("leaves out the largest timesteps" in said[0]) == (len(held_out) < 8)


@pytest.mark.parametrize("on_the_fly", [False, True])
def test_a_run_without_validation_data_says_what_it_lacks(on_the_fly):
    said = []
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, on_the_fly=on_the_fly))
    assert open_held_out(config, "CONFIG", said.append) is None
    (line,) = said
    assert "no validation loss and no sample images" in line and "--config.data.validation" in line
    # A run that encodes images during training does not use `precompute`.
    assert ("--validation_share" in line) != on_the_fly
    assert "--config.log.prompts='A PROMPT' is enough" in line
    # Without sample images, they are not missed.
    log = dataclasses.replace(CONFIG.log, sample_every=0)
    open_held_out(dataclasses.replace(config, log=log), "CONFIG", said.append)
    assert "has no validation loss. To get one" in said[1] and "log.prompts" not in said[1]


def prompts_of(text, **changes):
    return open_prompts(dataclasses.replace(CONFIG, log=LogConfig(prompts=text, **changes)))


def test_prompts_are_texts_and_files(tmp_path, monkeypatch):
    assert prompts_of("") == [] and prompts_of("a fox", sample_every=0) == []
    assert prompts_of("a fox, red| \n and a dog/cat\n") == [("a fox, red", 0), ("and a dog/cat", 0)]
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("a | b\n\n# no prompt\nc\n")
    (tmp_path / "b.jsonl").write_text('{"prompt": "d", "seed": 7}\n"e"\n')
    expected = [("a | b", 0), ("c", 0), ("f", 0), ("d", 7), ("e", 0)]
    assert prompts_of(f"~/a.txt|f|{tmp_path / 'b.jsonl'}") == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "x", "steps": 3}', r"line 1 of '.*': field 'steps' has no effect on sample images"),
        ('"x"\n{"prompt": 3}', "line 2 .* prompt is 3: it must be text"),
        ('{"seed": 3}', "prompt is None"),
        ('{"prompt": "x", "seed": 4294967296}', "seed is 4294967296: it must be a whole number from 0 to"),
        ('{"prompt": "x", "seed": true}', "seed is True"),
        ('{"prompt": "\\ud800"}', "not UTF-8: remove the characters"),
        ("\n".join(['"x"'] * 257), "has 257 prompts: give 1 to 256, or leave it empty"),
        ("", "hold no prompt"),
    ],
)
def test_invalid_prompts(tmp_path, lines, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(lines)
    with pytest.raises(UserError, match=rf"^log.prompts.*{message}"):
        prompts_of(str(file))


def test_prompts_that_are_nothing_or_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"^log.prompts: prompts 'a.txt': there is no such file"):
        prompts_of("a fox|a.txt")
    with pytest.raises(UserError, match=r"^log.prompts has 0 prompts"):
        prompts_of(" | ")
    with pytest.raises(UserError, match=r"^log.prompts is 'a fox', and a 'dit' model takes classes"):
        TrainConfig(model=DiTConfig(), log=LogConfig(prompts="a fox"))
