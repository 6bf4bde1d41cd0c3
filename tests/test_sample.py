import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import xla_flags
from absl import flags
from command_line import parse
from PIL import Image

from pixart_jax.convert import convert
from pixart_jax.errors import EXIT_STORAGE, OutputError, UserError
from pixart_jax.pipeline import memory
from pixart_jax.pipeline.image_files import read_png_settings, read_record
from pixart_jax.pipeline.loading import load_pipeline
from pixart_jax.pipeline.page.clicks import Clicks
from pixart_jax.sample import Flags, main
from pixart_jax.weights.adapter_export import write_kohya, write_peft
from pixart_jax.weights.checkpoints import write_weights

ODD = ["../x", "🙂", "word " * 400, "", "a corgi", "a corgi"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, random_params):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    write_weights(folder, random_params(tiny.MODEL)[1], tiny.CONFIG)
    return folder


def sample(*arguments):
    main(parse(Flags, *arguments))


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_an_interrupted_command_continues(checkpoint, tmp_path, capsys):
    """The command is killed at a random moment in a process with one device, and resumed here on eight."""
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    lines = [*ODD, *(f"prompt {k}" for k in range(15))]
    prompts.write_text("\n".join(lines))
    arguments = [f"--checkpoint={checkpoint}", f"--prompts={prompts}", "--images_per_prompt=2", "--steps=25"]
    environment = os.environ | {"XLA_FLAGS": xla_flags.ONE_DEVICE}
    command = [sys.executable, "-m", "pixart_jax.sample", *arguments, f"--out={out}"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(list(out.glob("*.png")) if out.exists() else []) < 5:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    errors = process.communicate()[1]
    before = pictures(out)
    assert 5 <= len(before) < 40, errors
    assert "was truncated to 32; removed: " in errors

    sample(*arguments, f"--out={out}", f"--contact_sheet={tmp_path / 'sheet.png'}")
    said = capsys.readouterr().out
    assert said.startswith("dtype float32 (the backend is cpu); attention xla (auto: the backend is cpu)\n")
    after = pictures(out)
    assert len(after) == 40 and all(name.endswith(".png") for name in after)
    done = {name: data for name, data in before.items() if name.endswith(".png")}
    assert done.items() <= after.items() and f"{len(done)} existed already" in said
    # Every prompt and seed has one image; each of the two equal lines counts, and the empty line is ignored.
    found = [read_png_settings(out / name)["request"] for name in after]
    assert sorted((each["prompt"], each["seed"]) for each in found) == sorted(
        (line.strip(), seed) for line in lines if line for seed in (0, 1)
    )
    assert Image.open(tmp_path / "sheet.png").size == (2 * 258 + 2, 20 * 258 + 2)

    # Generating an image of the killed process again, on eight devices, gives the same bytes.
    first = next(iter(done))
    sample(f"--from_image={out / first}", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'again'}")
    assert pictures(tmp_path / "again") == {first: after[first]}
    # With other settings the command raises an error, and the existing images stay unchanged.
    with pytest.raises(UserError, match=r"-x\.png' exists and was generated with different negative_prompt:"):
        sample(*arguments, f"--out={out}", "--negative_prompt=blurry")
    assert pictures(out) == after


def test_an_image_of_the_web_page_is_generated_again_from_the_file_of_its_visitor(checkpoint, tmp_path):
    picture = tmp_path / "mine.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    out = tmp_path / "out"
    out.mkdir()
    clicks = Clicks(
        load_pipeline(str(checkpoint)), {"checkpoint": str(checkpoint)}, out, tmp_path / "temporary"
    )
    clicks.listeners["abc"] = 1
    values = {name: control.value for name, control in clicks.form.controls.items()}
    values |= {"prompt": "a fox", "steps": 4, "seed": 3, "image": clicks.uploads.add(picture.read_bytes())}
    click = clicks.submit("abc", "visitor", values)
    assert click.done.wait(60) and click.error is None
    clicks.close()
    shutil.rmtree(out / "inputs")
    (path,) = out.iterdir()
    again = [f"--from_image={path}", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'again'}"]
    with pytest.raises(UserError, match="also give --image="):
        sample(*again)
    sample(*again, f"--image={picture}")
    made, generated = (read_record(each) for each in (path, tmp_path / "again" / path.name))
    assert made["made_with"] == generated["made_with"] and made["made_with"]["watched"]
    np.testing.assert_array_equal(Image.open(path), Image.open(tmp_path / "again" / path.name))


def test_images_made_from_images(checkpoint, tmp_path, random_params, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 255, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
    mask[:16] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    noise = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "noise.npy", noise)
    common = [f"--checkpoint={checkpoint}", "--steps=3", "--images_per_prompt=2"]
    features = tmp_path / "features.npz"
    sample(*common, "--prompts=a fox", f"--save_embeddings={features}")
    edit = [f"--image={tmp_path / 'picture.png'}", f"--mask={tmp_path / 'mask.png'}"]
    files = [f"--embeddings={features}", f"--latents={tmp_path / 'noise.npy'}", "--save_latents"]
    options = ["--guidance_interval=100,900", "--guidance_rescale=0.5", '--sampler_options={"order": 3}']
    out = tmp_path / "out"
    sample(*common, *edit, *files, *options, f"--out={out}")
    said = capsys.readouterr().out
    assert "Memory of each device" in said and "text encoder" not in said
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"00000-{k}-a-fox.{kind}" for k in range(2) for kind in ("npy", "png")]
    expected, latents = tiny.make_pipe(random_params)(
        "a fox",
        steps=3,
        images_per_prompt=2,
        image=picture,
        mask=mask,
        latents=noise,
        guidance_interval=(100, 900),
        guidance_rescale=0.5,
        sampler_options={"order": 3},
        output="both",
    )
    for k in range(2):
        path = out / f"00000-{k}-a-fox.png"
        np.testing.assert_array_equal(np.load(path.with_suffix(".npy")), latents[k])
        np.testing.assert_array_equal(np.asarray(Image.open(path)), expected[k])
        np.testing.assert_array_equal(expected[k][16:], picture[16:])
    origin = f"--from_image={out / names[3]}"
    sample(origin, "--open_recorded_paths", f"--out={tmp_path / 'again'}")
    assert pictures(tmp_path / "again") == {names[3]: (out / names[3]).read_bytes()}
    # The same files under other names.
    shutil.copy(tmp_path / "mask.png", tmp_path / "mask2.png")
    named = [edit[0], f"--mask={tmp_path / 'mask2.png'}", *files[:2]]
    sample(origin, common[0], *named, f"--out={tmp_path / 'moved'}")
    moved = read_png_settings(tmp_path / "moved" / names[3])["request"]["mask"]
    assert moved == str(tmp_path / "mask2.png")
    np.testing.assert_array_equal(Image.open(tmp_path / "moved" / names[3]), Image.open(out / names[3]))
    # Nothing that the PNG names is opened if it is not named again.
    hashed = []
    monkeypatch.setattr("pixart_jax.pipeline.image_files.sha256_of", hashed.append)
    monkeypatch.setattr(
        "pixart_jax.pipeline.loading.load_pipeline", lambda *_, **__: hashed.append("weights")
    )
    for given, missing in (
        ([], "--checkpoint=.* --image=.* --mask=.* --embeddings=.* --latents=.*noise.npy"),
        ([common[0], *edit, files[0]], "also give --latents=.*noise.npy"),
        ([*edit, *files[:2]], "also give --checkpoint="),
    ):
        with pytest.raises(UserError, match=f"{missing}.*, or --open_recorded_paths if you trust it"):
            sample(origin, *given, f"--out={tmp_path / 'other'}")
    assert not hashed
    monkeypatch.undo()
    # If an input file has changed, the image cannot be generated again, and the command raises an error.
    Image.fromarray(picture[::-1]).save(tmp_path / "picture.png")
    with pytest.raises(UserError, match="is not the file that"):
        sample(origin, "--open_recorded_paths", f"--out={tmp_path / 'other'}")
    with pytest.raises(UserError, match="generated with different input files"):
        sample(*common, *edit, *files, *options, f"--out={out}")
    assert not (tmp_path / "other").exists()


def test_outputs_that_cannot_be_written(checkpoint, tmp_path):
    common = [f"--checkpoint={checkpoint}", "--prompts=a fox", "--steps=1", "--save_latents"]
    out = tmp_path / "out"
    latents, sheet = out / "00000-0-a-fox.npy", tmp_path / "sheet.png"
    for folder in (latents, sheet):
        folder.mkdir(parents=True)
    (tmp_path / "file").write_text("notes")
    for suffix in (".png", ".jpg", ".webp", ".npz"):
        os.symlink("/dev/full", tmp_path / f"full{suffix}")
    wrong, full = "a file is where a folder should be", "No space left on device"
    for arguments, message in [
        ((f"--out={tmp_path / 'file'}",), wrong),
        ((f"--out={tmp_path / 'file' / 'x'}",), wrong),
        ((f"--out={tmp_path / ('x' * 256)}",), "File name too long"),
        ((f"--out={out}",), f"{latents}' cannot be written .Is a directory"),
        ((f"--save_embeddings={tmp_path / 'file' / 'x.npz'}",), wrong),
        ((f"--save_embeddings={tmp_path / 'full.npz'}",), "full.npz' cannot be written"),
        (
            (f"--out={tmp_path / 'a'}", f"--contact_sheet={sheet}"),
            f"{sheet}' cannot be written .Is a directory",
        ),
        ((f"--out={tmp_path / 'a'}", f"--contact_sheet={tmp_path / 'full.png'}"), full),
        ((f"--out={tmp_path / 'a'}", f"--contact_sheet={tmp_path / 'full.jpg'}"), full),
        ((f"--out={tmp_path / 'a'}", f"--contact_sheet={tmp_path / 'full.webp'}"), full),
    ]:
        with pytest.raises(OutputError, match=message) as error:
            sample(*common, *arguments)
        assert error.value.status == EXIT_STORAGE and "\n" not in str(error.value)
    # The picture is not there without its latents, and pictures are there without the contact sheet.
    assert [path.name for path in out.iterdir()] == [latents.name]
    assert sorted(path.suffix for path in (tmp_path / "a").iterdir()) == [".npy", ".png"]
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "file").read_text() == "notes"


def test_other_weights_are_reported(checkpoint, tmp_path, random_params):
    out = tmp_path / "out"
    sample(f"--checkpoint={checkpoint}", "--prompts=a fox", "--steps=1", f"--out={out}", "--weights=ema")
    path = out / "00000-0-a-fox.png"
    write_weights(tmp_path / "other", random_params(tiny.MODEL, seed=1)[1], tiny.CONFIG)
    with pytest.raises(UserError, match=r"--mask has no effect: .* was generated without it"):
        sample(f"--from_image={path}", f"--checkpoint={checkpoint}", "--mask=x", "--out=again")
    with pytest.raises(UserError, match="was generated with other weights"):
        sample(f"--from_image={path}", f"--checkpoint={tmp_path / 'other'}", f"--out={tmp_path / 'again'}")
    with pytest.raises(UserError, match="exists and was generated with different weights"):
        sample(f"--checkpoint={tmp_path / 'other'}", "--prompts=a fox", "--steps=1", f"--out={out}")
    path.write_bytes(b"mine")
    with pytest.raises(UserError, match="exists, and this command did not write it"):
        sample(f"--checkpoint={checkpoint}", "--prompts=a fox", "--steps=1", f"--out={out}")
    assert path.read_bytes() == b"mine"


def test_adapters(checkpoint, tmp_path, capsys):
    """They add up, are recorded in the image, and are needed to generate it again."""
    one, two = tmp_path / "one", tmp_path / "two.safetensors"
    write_peft(one, tiny.make_adapter(1))
    write_kohya(two, tiny.make_adapter(2))
    common = [f"--checkpoint={checkpoint}", "--prompts=a fox", "--steps=2"]
    given = [f"--adapter={one}:0.5", f"--adapter={two}"]

    def picture(*arguments, out):
        sample(*arguments, f"--out={tmp_path / out}")
        (path,) = (tmp_path / out).iterdir()
        return path

    path = picture(*common, *given, out="out")
    assert "changing weights of adapters" in capsys.readouterr().out
    adapters = [(each["path"], each["weight"]) for each in read_png_settings(path)["adapters"]]
    assert adapters == [(str(one), 0.5), (str(two), 1.0)]
    # The image is that of the merged weights.
    convert(checkpoint, tmp_path / "merged", "checkpoint", adapter=[f"{one}:0.5", two], say=lambda line: None)
    merged = picture(f"--checkpoint={tmp_path / 'merged'}", *common[1:], out="of merged")
    pixels = np.asarray(Image.open(path))
    np.testing.assert_array_equal(Image.open(merged), pixels)
    assert "adapters" not in read_png_settings(merged)

    # Again: the paths of the adapters are given, or those in the image are opened.
    origin, out = [f"--from_image={path}", f"--checkpoint={checkpoint}"], f"--out={tmp_path / 'other'}"
    moved = shutil.copytree(one, tmp_path / "moved")
    again = picture(*origin, f"--adapter={moved}", f"--adapter={two}:1", out="again")
    np.testing.assert_array_equal(Image.open(again), pixels)
    assert picture(origin[0], "--open_recorded_paths", out="recorded").read_bytes() == path.read_bytes()
    for arguments, message in (
        (origin, "also give --adapter=.*one --adapter=.*two.safetensors, or --open_recorded_paths"),
        ([*origin, given[0]], "was generated with 2 adapters, and --adapter is given 1 times"),
        ([*origin, f"--adapter={one}:2", given[1]], "one:2.0: .* was generated with the weight 0.5"),
        ([*origin, *given[::-1]], r"one:0\.5: .* was generated with the weight 1\.0"),
        ([*origin, f"--adapter={two}", f"--adapter={one}"], "two.safetensors' is not the adapter that"),
        ([f"--from_image={merged}", origin[1], given[0]], "was generated with 0 adapters"),
        ([*common, f"--adapter={one}:x"], "'x' after the ':' is not a number"),
        ([*common, f"--adapter={tmp_path / 'no'}"], "adapter '.*no' does not exist"),
        ([*common, given[0], "--adapter_alpha=0"], "--adapter_alpha is 0"),
        ([*common, "--adapter_alpha=2"], "--adapter_alpha has no effect without --adapter"),
    ):
        with pytest.raises(UserError, match=message):
            sample(*arguments, out)
    with pytest.raises(UserError, match="exists and was generated with different weights"):
        sample(*common, given[0], f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "other").exists()


def test_alpha_of_an_adapter_is_recorded(checkpoint, tmp_path):
    adapter = tiny.make_adapter(1)
    write_peft(tmp_path / "a", adapter)
    (tmp_path / "a" / "adapter_config.json").unlink()
    common = [f"--checkpoint={checkpoint}", f"--adapter={tmp_path / 'a'}"]
    with pytest.raises(UserError, match=r"does not state the scale of .*--adapter_alpha"):
        sample(*common, "--prompts=a fox", "--steps=1", f"--out={tmp_path / 'out'}")
    sample(*common, "--adapter_alpha=0.6", "--prompts=a fox", "--steps=1", f"--out={tmp_path / 'out'}")
    path = tmp_path / "out" / "00000-0-a-fox.png"
    assert read_png_settings(path)["source"]["adapter_alpha"] == 0.6
    sample(*common, f"--from_image={path}", f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_how_weights_are_loaded_is_recorded(checkpoint, tmp_path):
    common = [f"--checkpoint={checkpoint}", "--prompts=A (4x4) fox", "--steps=2"]
    out, int8 = tmp_path / "out", ["--weights_dtype=int8", "--text_weights_dtype=int8"]
    uncleaned = "--noclean_caption"
    sample(*common, *int8, uncleaned, f"--out={out}")
    path = out / "00000-0-a-4x4-fox.png"
    source = read_record(path)["source"]
    assert (source["weights_dtype"], source["text_weights_dtype"]) == ("int8", "int8")
    assert source["clean_caption"] is False and "lower_case" not in source
    again = [f"--from_image={path}", f"--checkpoint={checkpoint}"]
    sample(*again, f"--out={tmp_path / 'again'}")
    assert pictures(tmp_path / "again") == pictures(out)
    with pytest.raises(UserError, match="was generated with other weights"):
        sample(*again, "--weights_dtype=float32", f"--out={tmp_path / 'again'}")
    for given, what in (
        ([uncleaned], "weights"),
        ([int8[0], uncleaned], "--text_weights_dtype"),
        (int8, "--clean_caption"),
        ([*int8, uncleaned, "--nolower_case"], "--lower_case"),
    ):
        with pytest.raises(UserError, match=f"exists and was generated with different {what}:"):
            sample(*common, *given, f"--out={out}")
    pixels = []
    for number, given in enumerate(([], ["--noclean_caption"], ["--noclean_caption", "--nolower_case"])):
        sample(*common, *given, f"--out={tmp_path / str(number)}")
        pixels.append(np.asarray(Image.open(tmp_path / str(number) / path.name)).tobytes())
    assert len(set(pixels)) == 3
    with pytest.raises(flags.Error, match="weights_dtype"):
        sample(*common, "--weights_dtype=int4", f"--out={out}")


def test_nothing_is_written_that_is_not_finite_or_too_large(checkpoint, tmp_path, random_params):
    """Neither a black picture nor a folder."""
    out = tmp_path / "out"
    prompts, noise = tmp_path / "prompts.jsonl", tmp_path / "noise.npy"
    prompts.write_text('{"prompt": "a fox", "guidance_scale": NaN}')
    np.save(noise, np.full((1, 32, 32, 3), np.nan))
    params = random_params(tiny.MODEL)[1]
    params["t_block"]["bias"] = params["t_block"]["bias"].at[0].set(np.nan)
    write_weights(tmp_path / "nan", params, tiny.CONFIG)
    good = f"--checkpoint={checkpoint}"
    for arguments, message in (
        ([good, "--prompts=a fox", "--guidance_scale=nan"], "guidance_scale is nan"),
        ([good, "--prompts=a fox", "--guidance_scale=-2"], "guidance_scale is -2"),
        ([good, f"--prompts={prompts}"], "line 1 of .*guidance_scale is nan"),
        ([good, "--prompts=a fox", "--sampler=sa_solver", '--sampler_options={"tau": NaN}'], "tau is nan"),
        (
            [good, "--prompts=a fox", "--width=60000", "--height=60000"],
            "3,600,000,000 pixels: an",
        ),
        ([good, "--prompts=a fox", f"--latents={noise}"], r"in row 0 \(a fox\)"),
        (
            [f"--checkpoint={tmp_path / 'nan'}", "--prompts=a fox"],
            "array network.t_block.bias has values",
        ),
        ([good, "--prompts=a fox", "--guidance_scale=1e38"], "^prompt 'a fox', seed 0: .* from step 1 of 2"),
    ):
        with pytest.raises(UserError, match=message):
            sample(*arguments, "--steps=2", f"--out={out}")
        assert not out.exists() or not list(out.iterdir())


def test_text_features_that_do_not_fit_into_memory(checkpoint, tmp_path, monkeypatch):
    """The command stops before it encodes or reads them."""
    prompts, features = tmp_path / "prompts.txt", tmp_path / "features.npz"
    prompts.write_text("\n".join(map(str, range(50))))
    command = [f"--checkpoint={checkpoint}", f"--prompts={prompts}", f"--save_embeddings={features}"]
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * 150 * 32 * 16)
    with pytest.raises(UserError, match=r"--save_embeddings of 50 prompts needs .* use fewer prompts"):
        sample(*command)
    assert not features.exists()
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * 151 * 32 * 16)
    sample(*command)
    monkeypatch.setattr(memory, "host_memory", lambda: 4 * 100 * 32 * 16)
    with pytest.raises(UserError, match=r"--embeddings=.*features\.npz needs .* of the host's memory"):
        sample(f"--checkpoint={checkpoint}", f"--embeddings={features}", f"--out={tmp_path / 'out'}")


def test_a_path_from_a_png_runs_nothing_when_it_is_copied_into_a_shell(monkeypatch):
    record = {"request": {}, "source": {"checkpoint": "a'$(echo run)"}}
    monkeypatch.setattr("pixart_jax.pipeline.image_files.read_record", lambda _: record)
    with pytest.raises(UserError) as caught:
        sample("--from_image=x.png", "--out=o")
    flag = str(caught.value).split("also give ")[1].split(", or")[0]
    words = subprocess.run(["sh", "-c", f"printf %s {flag}"], capture_output=True, text=True).stdout
    assert words == "--checkpoint=a'$(echo run)"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--checkpoint=c", "--out=o"], "give either --prompts or --embeddings"),
        (["--checkpoint=c", "--out=o", "--prompts=x", "--embeddings=e"], "give either --prompts or"),
        (["--out=o", "--prompts=x"], "--checkpoint is missing"),
        (["--serve"], "--checkpoint is missing"),
        (["--prompts=x", "--guidance_interval=low"], "--guidance_interval=low: give two numbers, LOW,HIGH"),
        (["--prompts=x", "--guidance_interval=1"], "--guidance_interval=1: give two numbers"),
        (["--prompts=x", "--sampler_options=order"], "--sampler_options=order: give a JSON object"),
        (["--prompts=x", "--images_per_prompt=0"], r"--images_per_prompt is 0: it must be in \[1, 100000\]"),
        (["--prompts=x", "--batch_size=0"], "--batch_size is 0: it must be in "),
        (
            ["--prompts=x", "--out=o", "--checkpoint=c", "--contact_sheet=s.txt"],
            "--contact_sheet=s.txt: give a",
        ),
        (["--from_image=x.png", "--steps=3"], "--steps has no effect with --from_image"),
        (["--from_image=x.png", "--sampler=dpm_solver"], "--sampler has no effect with --from_image"),
        (["--serve", "--from_image=x.png"], "--from_image has no effect with --serve"),
        (["--serve", "--mask=x"], "--mask has no effect with --serve"),
        (["--prompts=x", "--open_recorded_paths"], "--open_recorded_paths has no effect without"),
        (["--serve", "--auth=ada"], "--auth=ada: give USER:PASSWORD_FILE"),
        (["--serve", "--auth=ada:missing"], "password file 'missing' of user 'ada'"),
        (["--serve", "--allow_host=example.org", "--allow_host=http://x"], "--allow_host=http://x: give"),
        (["--prompts=x", "--auth=ada:f"], "--auth has no effect without --serve"),
        (["--prompts=x", "--port=80"], "--port has no effect without --serve"),
        (["--serve", "--prompts=x"], "--prompts has no effect with --serve"),
        (["--from_image=x.png", "--out=o"], "x.png' cannot be read"),
        (["extra"], "argument 'extra' is not a flag"),
    ],
)
def test_input_errors(arguments, message):
    with pytest.raises((UserError, flags.Error), match=message):
        sample(*arguments)
