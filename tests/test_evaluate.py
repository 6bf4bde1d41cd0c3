import dataclasses
import json
import os
import types

import feature_folders
import numpy as np
import pytest
from absl import flags
from command_line import parse
from fake_pipeline import FakePipeline, picture_of
from feature_networks import save_clip, save_inception
from PIL import Image

from pixart_jax import evaluate
from pixart_jax.config import FeaturesConfig, TrainConfig
from pixart_jax.errors import EXIT_STORAGE, OutputError, UserError
from pixart_jax.evaluate import MODES, Flags, main
from pixart_jax.evaluation import digits, emoji
from pixart_jax.evaluation.protocol import PRESETS, Protocol, Result
from pixart_jax.files import sha256_of_file
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.weights.checkpoints import write_weights


@pytest.fixture
def run(monkeypatch):
    """Runs the command, run(mode, flag=value, ...), with `run.pipe` instead of a real pipeline."""
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return command.pipe

    monkeypatch.setattr("pixart_jax.pipeline.load_pipeline", load)

    def command(mode, **given):
        main(parse(Flags, mode, *(f"--{name}={value}" for name, value in given.items())))

    command.pipe, command.asked = FakePipeline(), asked
    return command


def test_the_table_has_a_row_for_each_stage():
    rows = [
        {
            "stage": "stage1",
            "pixels": 8,
            "samples": 500,
            "agreement": 0.987,
            "reader_on_held_out_scans": 0.98,
        }
    ]
    assert digits.table(rows).splitlines()[-1] == "| stage1 | 8 | 500 | 98.7% | 98.0% |"


@pytest.mark.parametrize("words", [[], ["val-los"], ["digits", "more"]])
def test_modes_are_named(words):
    with pytest.raises(UserError, match=f"choose one of {', '.join(MODES)}"):
        main(Flags(words=tuple(words)))


# --- val-loss ---------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path, random_params):
    model = PixArtConfig(
        size="custom", depth=1, hidden_size=16, num_heads=2, base_size=4,
        text_dim=feature_folders.WIDTH, text_length=feature_folders.TEXT_LENGTH,
    )  # fmt: skip
    config = TrainConfig(
        name="tiny", model=model, features=FeaturesConfig(text_length=feature_folders.TEXT_LENGTH)
    )
    _, params = random_params(model)
    write_weights(tmp_path / "weights", params, config)
    return tmp_path / "weights"


def held_out(path, count):
    records = [feature_folders.make_record(key) for key in feature_folders.keys(count)]
    feature_folders.write_folder(path, {feature_folders.SQUARE: records})
    return path


def test_val_loss_has_a_curve_and_a_total(tmp_path, weights, run, capsys):
    features = held_out(tmp_path / "features", 20)
    run("val-loss", checkpoint=weights, features=features, samples=16, out=tmp_path / "a")
    stored = json.loads((tmp_path / "a" / "val_loss.json").read_text())
    curve = stored["validation_loss_at_timestep"]
    assert [int(timestep) for timestep in curve] == [62, 187, 312, 437, 562, 687, 812, 937]
    # 16 of the 20 records are used, evenly spaced; the timestep depends on the index of the record modulo 8.
    counts = np.bincount([index * 20 // 16 % 8 for index in range(16)], minlength=8)
    assert stored["validation_loss"] == pytest.approx(
        np.average(list(curve.values()), weights=counts), rel=1e-5
    )
    assert stored["records"] == 16 and stored["weights"] == "ema" and stored["features_fingerprint"]
    shown = capsys.readouterr().out
    assert f"t = 62     {curve['62']:.6f}" in shown and f"{stored['validation_loss']:.6f}" in shown
    # The noise does not depend on the batch size.
    run("val-loss", checkpoint=weights, features=features, samples=16, batch_size=8, out=tmp_path / "b")
    again = json.loads((tmp_path / "b" / "val_loss.json").read_text())
    assert again["validation_loss"] == pytest.approx(stored["validation_loss"], rel=1e-5)


def test_val_loss_of_few_records_has_no_empty_timestep(tmp_path, weights, run):
    features = held_out(tmp_path / "features", 3)
    run("val-loss", checkpoint=weights, features=features, out=tmp_path / "a")
    stored = json.loads((tmp_path / "a" / "val_loss.json").read_text())
    assert stored["records"] == 3
    curve = stored["validation_loss_at_timestep"]
    assert list(curve) == ["62", "187", "312"] and all(value > 0 for value in curve.values())
    assert stored["validation_loss"] == pytest.approx(np.mean(list(curve.values())), rel=1e-5)


# --- fid, clip --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    (tmp_path / "captions.txt").write_text("".join(f"a corgi {number}\n" for number in range(20)))
    (tmp_path / "real").mkdir()
    for number in range(12):
        Image.fromarray(picture_of("real", number, 8)).save(tmp_path / "real" / f"{number}.png")
    save_inception(tmp_path / "inception.pt")
    return tmp_path


def fid_flags(root, **changes):
    given = dict(
        checkpoint="weights.pth", captions=root / "captions.txt", reference=root / "real",
        inception=root / "inception.pt", out=root / "out", seed=5, steps=3, weights="raw", height=8, width=8,
    )  # fmt: skip
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def test_fid_generates_images_and_stores_its_protocol(files, run, capsys):
    run("fid", **fid_flags(files))
    assert run.asked == [("weights.pth", {"weights": "raw", "pipeline": None})]
    drawn = np.asarray(Image.open(files / "out" / "images" / "000007.png"))
    np.testing.assert_array_equal(drawn, picture_of("a corgi 7", 12))
    result = Result.read(files / "out" / "fid.json")
    assert result.model == "weights.pth" and result.value > 0 and result.preset == ""
    protocol = result.protocol
    assert dataclasses.replace(protocol, reference=None) == Protocol(
        "fid", 20, captions=sha256_of_file(files / "captions.txt"), sampler="dpm_solver", steps=3,
        guidance_scale=4.5, seed=5, weights="raw", height=8, width=8,
        network=sha256_of_file(files / "inception.pt"),
    )  # fmt: skip
    assert f"protocol {protocol.id}" in capsys.readouterr().out
    # The images exist already, so none is generated again, and the same folder gives the same value.
    run.pipe = FakePipeline(limit=0)
    run("fid", **fid_flags(files))
    assert Result.read(files / "out" / "fid.json") == result
    run("fid", **fid_flags(files, checkpoint=None, images=files / "out" / "images", out=files / "again"))
    assert Result.read(files / "again" / "fid.json") == result
    (files / "others.txt").write_text("a cat\n" * 20)
    with pytest.raises(UserError, match="was not generated from --captions"):
        run("fid", **fid_flags(files, images=files / "out" / "images", captions=files / "others.txt"))


@pytest.mark.parametrize("scale", ["nan", "-1"])
def test_a_setting_that_is_not_valid_is_not_stored(files, run, scale):
    with pytest.raises(UserError, match="guidance_scale is"):
        run("fid", **fid_flags(files, guidance_scale=scale))
    assert not (files / "out").exists()


def test_a_result_that_is_not_finite_is_not_stored(files, run, monkeypatch):
    monkeypatch.setattr(evaluate, "frechet_distance", lambda *statistics: float("nan"))
    with pytest.raises(UserError, match=r"fid is nan: .* No result is stored"):
        run("fid", **fid_flags(files))
    assert not (files / "out" / "fid.json").exists()


def test_fid_in_shards_and_with_stored_statistics(files, run, capsys):
    for index in range(3):
        run("fid", **fid_flags(files, shard=f"{index}/3"))
    assert run.pipe.drawn == 20 and not (files / "out" / "fid.json").exists()
    assert "run the same command without --shard" in capsys.readouterr().out
    run("fid", **fid_flags(files))
    value = Result.read(files / "out" / "fid.json").value
    measure = dict(images=files / "real", inception=files / "inception.pt", statistics=files / "real.npz")
    with pytest.raises(UserError, match=r"--samples is 3, but '.*real' holds .* fid measures all images"):
        run("fid", **measure, samples=3)
    run("fid", **measure)
    run("fid", **fid_flags(files, reference=files / "real.npz"))
    assert run.pipe.drawn == 20
    assert Result.read(files / "out" / "fid.json").value == pytest.approx(value, abs=1e-6)
    with pytest.raises(UserError, match="measured with crop none, not centre"):
        run("fid", **fid_flags(files, reference=files / "real.npz", crop="centre"))
    with pytest.raises(UserError, match="generated with steps 3, now 4"):
        run("fid", **fid_flags(files, steps=4))


def test_clip_and_a_table_of_both(files, run, capsys):
    save_clip(files / "clip")
    run("fid", **fid_flags(files))
    run("clip", captions=files / "captions.txt", images=files / "out" / "images", clip=files / "clip")
    fid, clip = (Result.read(files / "out" / f"{metric}.json") for metric in ("fid", "clip"))
    assert clip.protocol.seed == 5 and clip.protocol.resize == "clip" and clip.protocol.captions
    assert clip.protocol.images == 20
    measured = dict(captions=files / "captions.txt", images=files / "out" / "images", clip=files / "clip")
    run("clip", **measured, samples=3, out=files / "three")
    assert Result.read(files / "three" / "clip.json").protocol.images == 3
    other = dataclasses.replace(fid, model="runs/b", value=fid.value / 2)
    other.write(files / "other.json")
    paths = f"{files}/out/fid.json,{files}/other.json,{files}/out/clip.json"
    capsys.readouterr()
    run("table", results=paths, out=files / "tables")
    shown = capsys.readouterr().out
    assert shown.startswith("| metric | protocol | weights.pth | runs/b |")
    assert (files / "tables" / "table.md").read_text() == shown
    assert len(json.loads((files / "tables" / "table.json").read_text())["rows"]) == 2
    changed = dataclasses.replace(other, protocol=dataclasses.replace(other.protocol, seed=6))
    changed.write(files / "other.json")
    with pytest.raises(UserError, match="not comparable, their protocols differ in seed 5 and 6"):
        run("table", results=paths)


def test_presets(files, run, capsys):
    preset = dict(preset="pixart-coco-30k", steps=None, height=None, width=None)
    with pytest.raises(UserError, match="--steps=3 contradicts preset pixart-coco-30k, which has 20"):
        run("fid", **fid_flags(files, **{**preset, "steps": 3}))
    run.pipe = FakePipeline(side=256)
    run("fid", **fid_flags(files, **preset))
    assert run.pipe.arguments == {
        "sampler": "dpm_solver", "steps": 20, "guidance_scale": 4.5, "height": 256, "width": 256,
    }  # fmt: skip
    result = Result.read(files / "out" / "fid.json")
    assert result.protocol.crop == "centre" and result.protocol.size == 256
    # The preset needs 30,000 images, so a result from 20 is not labelled with the preset.
    assert (
        result.preset == ""
        and "preset pixart-coco-30k does not apply: 20 images instead of 30000" in capsys.readouterr().out
    )


def test_a_followed_preset_is_named(files, run, monkeypatch):
    short = dataclasses.replace(PRESETS["pixart-coco-30k"], images=20)
    monkeypatch.setitem(PRESETS, "pixart-coco-30k", short)
    preset = dict(preset="pixart-coco-30k", steps=None, height=None, width=None)
    run.pipe = FakePipeline(side=256)
    run("fid", **fid_flags(files, **preset))
    assert Result.read(files / "out" / "fid.json").preset == "pixart-coco-30k"
    # A result for images that were not generated with the preset is not labelled with it.
    run("fid", **fid_flags(files, **preset, checkpoint=None, images=files / "real", out=files / "b"))
    assert Result.read(files / "b" / "fid.json").preset == ""


# --- layout, table ----------------------------------------------------------------------------------


def test_a_layout_is_generated_resumed_and_tabulated(tmp_path, run, capsys):
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text(
        "".join(json.dumps({"tag": "counting", "prompt": f"{n} cups"}) + "\n" for n in range(6))
    )
    given = dict(benchmark="geneval", prompts=prompts, checkpoint="weights.pth", out=tmp_path / "out")
    run("layout", **given, shard="1/2")
    assert run.pipe.drawn == 12 and "evaluate_images.py" not in capsys.readouterr().out
    run("layout", **given)
    assert run.pipe.drawn == 24
    shown = capsys.readouterr().out.splitlines()
    assert shown[1] == f"# 24 of 2212 images of geneval are in {tmp_path}/out/images"
    assert shown[2] == "# In a checkout of github.com/djghosh13/geneval:"
    assert (
        shown[-1]
        == f"# Then: python -m pixart_jax.evaluate table --benchmark=geneval --results={tmp_path}/out"
    )
    assert json.loads((tmp_path / "out" / "images/00003/metadata.jsonl").read_text())["prompt"] == "3 cups"
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["seed"] == 42 and settings["prompts"] == {prompts.name: sha256_of_file(prompts)}
    with pytest.raises(UserError, match=r"generated with guidance_scale 4.5, now 2.0"):
        run("layout", **given, guidance_scale=2)
    with pytest.raises(UserError, match="--checkpoint is missing"):
        run("layout", **given | {"out": tmp_path / "other", "checkpoint": ""})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text('{"benchmark": "dpg"}')
    with pytest.raises(UserError, match="generated with"):
        run("layout", **given | {"out": tmp_path / "other"})
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["settings.json"]

    tasks = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    records = [json.dumps({"tag": tag, "correct": True}) for tag in tasks]
    (tmp_path / "out" / "results.jsonl").write_text("\n".join(records))
    run("table", benchmark="geneval", results=tmp_path / "out", name="ours")
    shown = capsys.readouterr().out
    assert "| ours | 1.00 |" in shown and "| ours − PixArt-α | +0.02 |" in shown
    stored = json.loads((tmp_path / "out" / "table.json").read_text())
    assert stored["settings"] == settings and stored["answers"]["overall"] == 6
    assert (tmp_path / "out" / "table.md").read_text() in shown
    with pytest.raises(UserError, match="--results names 2: give one"):
        run("table", benchmark="geneval", results="a,b")


def test_the_layout_of_dpg_prints_the_side_of_a_tile(tmp_path, run, capsys):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "1.txt").write_text("a dense prompt")
    given = dict(benchmark="dpg", prompts=tmp_path / "prompts", checkpoint="x", out=tmp_path / "out")
    run("layout", **given)
    assert f"dist_eval.sh {tmp_path}/out/images 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="are of dpg, not of wise"):
        run("table", benchmark="wise", results=tmp_path / "out")


# --- Outputs ----------------------------------------------------------------------------------------


def test_outputs_that_cannot_be_written(files, weights, run, monkeypatch):
    """One line with status 74 that names the output, and nothing half-written."""
    save_clip(files / "clip")
    run("fid", **fid_flags(files))
    (files / "notes").write_text("not a folder")
    for name in ("fid.json", "clip.json", "val_loss.json", "table.md", "digits.json", "emoji.json"):
        (files / "blocked" / name).mkdir(parents=True)
    (files / "full").mkdir()
    for name in ("samples.png", "real.npz", "table.json", "emoji.png"):
        os.symlink("/dev/full", files / "full" / name)
    prompts = files / "geneval.jsonl"
    prompts.write_text('{"tag": "counting", "prompt": "2 cups"}\n')
    measured = dict(images=files / "out" / "images", inception=files / "inception.pt")
    clip = dict(captions=files / "captions.txt", images=files / "out" / "images", clip=files / "clip")
    loss = dict(checkpoint=weights, features=held_out(files / "features", 3))
    layout = dict(benchmark="geneval", prompts=prompts, checkpoint="weights.pth")
    table = dict(results=files / "out" / "fid.json")
    ten = np.zeros((10, 8, 8, 1), np.uint8), np.arange(10)
    monkeypatch.setattr(digits, "generate_digits", lambda *arguments, **options: ten)
    reader = types.SimpleNamespace(read=lambda images: np.arange(10), accuracy=1.0)
    monkeypatch.setattr(digits, "train_reader", lambda size: reader)
    found = [{"stage": "", "captions": "", "pictures": 1, "emoji": 0.0, "concept": 0.0, "part": 0.0}]
    sheet = np.zeros((8, 8, 3), np.uint8)
    monkeypatch.setattr(emoji, "measure", lambda *arguments, **options: (found, sheet))
    folder, taken = "Is a directory", "a file is where a folder should be"
    for mode, given, out, name, reason in [
        ("fid", fid_flags(files), "notes", "notes", taken),
        ("fid", {**measured, "reference": files / "real"}, "blocked", "blocked/fid.json", folder),
        (
            "fid",
            {**measured, "statistics": files / "full" / "real.npz"},
            None,
            "full/real.npz",
            "No space left",
        ),
        ("fid", {**measured, "statistics": files / "notes" / "x.npz"}, None, "notes/x.npz", taken),
        ("clip", clip, "blocked", "blocked/clip.json", folder),
        ("clip", clip, "x" * 300, "x", "File name too long"),
        ("layout", layout, "notes", "notes", taken),
        ("table", table, "blocked", "blocked/table.md", folder),
        ("table", table, "full", "full/table.json", "No space left"),
        ("val-loss", loss, "notes", "notes", taken),
        ("val-loss", loss, "blocked", "blocked/val_loss.json", folder),
        ("digits", {"checkpoint": weights}, "blocked", "blocked/digits.json", folder),
        ("digits", {"checkpoint": weights}, "full", "full/samples.png", "No space left"),
        ("emoji", {"checkpoint": weights}, "blocked", "blocked/emoji.json", folder),
        ("emoji", {"checkpoint": weights}, "full", "full/emoji.png", "No space left"),
    ]:
        with pytest.raises(OutputError, match=rf"^'{files / name}.*' cannot be written .*{reason}") as stop:
            run(mode, **given | ({"out": files / out} if out else {}))
        assert stop.value.status == EXIT_STORAGE and "\n" not in str(stop.value)
    assert not list(files.rglob("*.tmp")) and (files / "notes").read_text() == "not a folder"


def test_missing_flags(tmp_path, run):
    for mode, names in (
        ("fid", "--inception is"),
        ("clip", "--clip, --captions are"),
        ("layout", "--benchmark, --prompts, --out are"),
        ("table", "--results is"),
    ):
        with pytest.raises(UserError, match=f"{names} missing"):
            run(mode)
    with pytest.raises(UserError, match="--prompts, --out are missing"):
        run("layout", benchmark="wise")
    with pytest.raises(flags.IllegalFlagValueError):
        run("layout", benchmark="genevil")
