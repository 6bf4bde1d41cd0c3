import dataclasses
import inspect
import json
import subprocess
import sys
from typing import Any

import pytest
import tiny
from command_line import parse
from damage import damaged

from pixart_jax.errors import UserError
from pixart_jax.flags import field_kinds, values_for
from pixart_jax.pipeline.pipeline import Pipeline
from pixart_jax.pipeline.requests import Request, Settings, read_requests
from pixart_jax.sample import Flags

# A value of each type, and how it is written as a flag.
EXAMPLES: dict[Any, tuple[Any, str]] = {
    str: ("x", "x"),
    bool: (False, "false"),
    int: (304, "304"),
    float: (0.5, "0.5"),
    tuple[float, float]: ((1.0, 2.5), "1,2.5"),
    dict[str, Any]: ({"order": 3}, '{"order": 3}'),
}


class Called(Exception):
    """Ends a call, and carries its settings."""


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_a_setting_is_a_flag_a_json_field_and_an_argument(field, tmp_path, random_params, monkeypatch):
    """The controls of the page are tested in test_app.py."""
    name, choices = field.name, field.metadata["choices"]
    value, text = (choices[-1], choices[-1]) if choices else EXAMPLES[field_kinds(Settings)[name]]
    assert value != field.default
    expected = dataclasses.replace(Settings(), **{name: value})

    flags = parse(Flags, f"--{name}={text}")
    assert Settings(**values_for(Settings, flags)) == expected

    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a corgi", name: value}))
    ((request,),) = read_requests(str(file), {name: field.default})
    if name in ("image", "mask"):
        assert getattr(request, name) == str(tmp_path / value)
    else:
        assert values_for(Settings, request) == values_for(Settings, expected)

    def resolve(settings):
        raise Called(settings)

    pipe = tiny.make_pipe(random_params)
    monkeypatch.setattr(pipe, "resolve", resolve)
    with pytest.raises(Called) as called:
        pipe("a corgi", **{name: value})
    assert called.value.args == (expected,)


def test_the_signature_of_a_pipeline_shows_the_settings():
    parameters = inspect.signature(Pipeline.__call__).parameters
    for field in dataclasses.fields(Settings):
        assert parameters[field.name].default == field.default
        assert f"{field.name}: {field.metadata['help']}" in Pipeline.__call__.__doc__
    assert "settings" not in parameters and parameters["images_per_prompt"].default == 1


def test_requests_are_light_to_import():
    """They are also used by code that needs neither checkpoints nor encoders."""
    program = (
        "import sys, pixart_jax.pipeline.requests\n"
        "sys.exit(' '.join({'optax', 'orbax', 'transformers', 'PIL', 'tqdm'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_prompts_come_from_text_or_file(tmp_path):
    assert read_requests("a corgi") == [[Request("a corgi")]]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa corgi\r\n\n  ein Hörnchen \u2028🙂\n../x\na corgi".encode())
    texts = ["a corgi", "ein Hörnchen \u2028🙂", "../x", "a corgi"]
    assert [images[0].prompt for images in read_requests(str(file))] == texts
    many = read_requests(str(file), {"steps": 3, "seed": 5}, images_per_prompt=2)
    assert [request.seed for request in many[2]] == [5, 6] and many[3][1].steps == 3
    long = ("word " * 400).strip()
    assert read_requests(long)[0][0].prompt == long
    assert read_requests("two\nlines")[0][0].prompt == "two lines"


def test_lines_of_json_have_fields_of_their_own(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a\u2028b", "seed": 9, "height": 64, "image": "x.png", "images_per_prompt": 3},
        {"prompt": "", "sampler_options": {"order": 3}, "guidance_scale": 2, "negative_prompt": "blurry"},
    ]
    file.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    first, second = read_requests(str(file), {"steps": 7, "seed": 1}, images_per_prompt=2)
    assert [request.seed for request in first] == [9, 10, 11] and first[0].image == str(tmp_path / "x.png")
    assert first[0].height == 64 and first[0].prompt == "a\u2028b"
    assert [request.seed for request in second] == [1, 2] and second[0].steps == 7
    assert second[0].sampler_options == {"order": 3} and second[0].negative_prompt == "blurry"
    # If a line sets a height or an aspect ratio, a default for the other one is ignored.
    first, second = read_requests(str(file), {"aspect_ratio": "16:9"})
    assert (first[0].aspect_ratio, second[0].aspect_ratio) == (None, "16:9")
    file.write_text('{"prompt": "x", "aspect_ratio": "1:2"}')
    ((only,),) = read_requests(str(file), {"height": 512})
    assert (only.height, only.aspect_ratio) == (None, "1:2")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"prompt": "x", "sede": 3}', "line 2 of .*field 'sede' is unknown. Did you mean 'seed'"),
        ('{"prompt": 3}', "line 2 .*prompt is 3: it must be text"),
        ('{"prompt": "x", "seed": true}', "seed is True: it must be a whole number"),
        ('{"prompt": "x", "seed": null}', "seed is None"),
        (
            '{"prompt": "x", "guidance_interval": [1]}',
            "interval is .1.: it must be two numbers",
        ),
        ('{"prompt": "x", "guidance_interval": [1, "x"]}', "guidance_interval is"),
        ('{"prompt": "x", "guidance_scale": "4"}', "guidance_scale is '4': it must be a number"),
        (
            '{"prompt": "x", "guidance_scale": NaN}',
            "line 2 .*guidance_scale is nan: it must be a finite number",
        ),
        (
            '{"prompt": "x", "guidance_rescale": 1e999}',
            "line 2 .*guidance_rescale is inf: it must be a finite",
        ),
        ('{"prompt": "x", "sampler_options": {"tau": NaN}}', "line 2 .*sampler_options.tau is nan: it must"),
        ('{"prompt": "x", "num_inference_steps": 3}', "field 'num_inference_steps' .* Here it is 'steps'"),
        ('{"prompt": "x", "binning": 1}', "binning is 1: it must be true or false"),
        ('{"prompt": "x", "sampler_options": [3]}', "sampler_options is .3.: it must be an object"),
        ('{"prompt": "x", "images_per_prompt": 0}', "images_per_prompt is 0"),
        (
            '{"prompt": "x", "images_per_prompt": 1e9}',
            "images_per_prompt is 1000000000.0: it must be a whole",
        ),
        ('{"prompt": "x", "images_per_prompt": 100001}', "whole number from 1 to 100000"),
        ('{"seed": 3}', "there is no prompt"),
        ('["x"]', "is not a JSON object"),
        ("{x}", "not valid JSON"),
    ],
)
def test_input_errors_name_their_line(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line)
    with pytest.raises(UserError, match=message):
        read_requests(str(file))


def test_files_that_are_not_there_or_empty(tmp_path):
    for name in ("prompts.txt", "some/where.jsonl"):
        with pytest.raises(UserError, match="there is no such file"):
            read_requests(name)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "latin.txt").write_bytes(b"H\xf6rnchen")
    for name, message in (("empty.txt", "hold no prompt"), ("latin.txt", "cannot be read")):
        with pytest.raises(UserError, match=message):
            read_requests(str(tmp_path / name))
    with pytest.raises(UserError, match="hold no prompt"):
        read_requests("  ")
    assert read_requests("a \0 b")[0][0].prompt == "a \0 b"


def test_prompts_in_json(tmp_path):
    file = tmp_path / "prompts.JSON"
    file.write_text(
        json.dumps(["a corgi", {"prompt": "b", "seed": 4, "images_per_prompt": 2, "image": "x.png"}])
    )
    first, second = read_requests(str(file), {"steps": 3})
    assert [r.prompt for r in first] == ["a corgi"] and [r.seed for r in second] == [4, 5]
    assert second[0].image == str(tmp_path / "x.png") and first[0].steps == 3
    for text, message in [
        ('{"prompt": "x"}', "it must be a list of texts or of objects"),
        ("[1]", "element 1 of .* is not a JSON object"),
        ('["x", {"prompt": "x", "sede": 1}]', "element 2 of .*field 'sede' is unknown. Did you mean 'seed'"),
        ("[", "not valid JSON"),
        ("[]", "hold no prompt"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_requests(str(file))


def test_paths_in_a_file_are_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    file = tmp_path / "prompts.jsonl"
    row = {"prompt": "x", "image": "a.png", "mask": "~/b.png", "latents": ["n.npy", 2]}
    row |= {"embeddings": ["~/e.npz", 0]}
    file.write_text(json.dumps(row))
    ((request,),) = read_requests(str(file))
    assert request.image == str(tmp_path / "a.png") and request.mask == "/home/me/b.png"
    assert request.latents == (str(tmp_path / "n.npy"), 2) and request.embeddings == ("/home/me/e.npz", 0)
    file.write_text(json.dumps({"prompt": "x", "latents": [2, "n.npy"]}))
    with pytest.raises(UserError, match="latents is"):
        read_requests(str(file))


def test_prompts_in_a_table(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_text(
        "prompt, seed,binning,sampler_options,images_per_prompt,negative_prompt\n"
        '"a fox, red",7,False,"{""order"": 3}",2,\n\n# a comment\n"# 5",,,,,blurry\n'
    )
    first, second = read_requests(str(file), {"seed": 1})
    assert [(r.prompt, r.seed, r.binning) for r in first] == [
        ("a fox, red", 7, False),
        ("a fox, red", 8, False),
    ]
    assert first[0].sampler_options == {"order": 3} and first[0].negative_prompt == ""
    assert (second[0].prompt, second[0].seed, second[0].negative_prompt) == ("# 5", 1, "blurry")
    tabs = tmp_path / "prompts.tsv"
    tabs.write_text("prompt\tseed\na fox, red\t3\n")
    assert read_requests(str(tabs))[0][0] == Request("a fox, red", seed=3)
    for text, message in [
        ("a red fox\na dog\n", "has no column 'prompt' .columns: a red fox.: name the columns"),
        (
            "Prompt,seed\nx,1\n",
            "no column 'prompt' .*Did you mean 'prompt'|no column 'prompt' .columns: Prompt",
        ),
        ("prompt,seed\nx,1,2\n", "line 2 of .*more cells"),
        ('prompt,seed\n"two\nlines",1\nx,one\n', "line 4 of .*seed is 'one': it must be a whole number"),
        ("prompt,sede\nx,1\n", "line 2 of .*field 'sede' is unknown"),
        ("prompt,seed\n,1\n", "line 2 of .*there is no prompt"),
        ("prompt\n", "hold no prompt"),
        ("a prompt without a header " * 20, r"columns: a prompt .*….* \(519 characters\)\): name the"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_requests(str(file))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl", "prompts.ndjson"])
def test_comments(tmp_path, name):
    file = tmp_path / name
    line = "a #1 corgi" if name == "prompts.txt" else '{"prompt": "a #1 corgi"}'
    file.write_text(f"# a comment\n  # another\n{line}\n#{line}\n")
    assert read_requests(str(file)) == [[Request("a #1 corgi")]]


@pytest.mark.parametrize("name", ["prompts.yaml", "Prompts.TOML", "prompts.xml", "fox.png"])
def test_lines_of_other_formats_are_not_prompts(tmp_path, name):
    file = tmp_path / name
    file.write_text("- a fox\n")
    with pytest.raises(UserError, match=f"a {file.suffix} file is not read: give a .txt"):
        read_requests(str(file))


def test_text_that_is_not_unicode_is_an_error(tmp_path):
    """JSON can have half of a surrogate pair, and a command line bytes that are not UTF-8."""
    file = tmp_path / "prompts.jsonl"
    for field in ("prompt", "negative_prompt"):
        file.write_text(json.dumps({"prompt": "a fox", field: "a fox \ud83e"}))
        with pytest.raises(UserError, match=rf"line 1 of .*: {field} is 'a fox .*: remove the characters"):
            read_requests(str(file))
    with pytest.raises(UserError, match=r"^prompt is .* not Unicode"):
        read_requests("caf\udce9")


@pytest.mark.parametrize(
    "name",
    [
        "my prompts.txt",
        "fox.png",
        "prompts.jsonlines",
        "some prompts.JSON",
        "prompts.csv",
        "a b/c.tsv",
        "no.jsonl",
        "/data/prompts",
        "./x",
        "x.yaml",
        "my prompts/",
        "prompts/fox",
        "~/my prompts",
        "/home/me/my prompts",
        "prompts\\fox",
    ],
)
def test_names_of_files_are_not_generated(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no such file. To use it as a prompt, put it into a text"):
        read_requests(name)


def test_a_folder_is_not_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").mkdir()
    with pytest.raises(UserError, match="prompts 'prompts': this is a folder"):
        read_requests("prompts")
    for text in ("a fox/dog", "/imagine a dog", "U.S.A.", "a 1.5 litre bottle", "sks"):
        assert read_requests(text) == [[Request(text)]]


def test_a_long_value_is_not_repeated(tmp_path):
    file = tmp_path / "prompts.jsonl"
    for value in ([0.5] * 500, "word " * 500, {"a": [1] * 500}):
        file.write_text(json.dumps({"prompt": "x", "guidance_interval": value}))
        with pytest.raises(UserError) as error:
            read_requests(str(file))
        assert len(str(error.value)) < 300 + len(str(file))


def test_a_number_that_python_cannot_parse_is_an_error_of_one_line(tmp_path):
    """Python parses integers of at most 4,300 digits."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a fox", "seed": ' + "1" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"line 1 of .*: not valid JSON"):
        read_requests(str(path))


# A line with a value for every field.
EVERY_FIELD = {
    "prompt": "x", "negative_prompt": "y", "width": 32, "height": 32, "binning": True, "seed": 1, "steps": 2,
    "guidance_scale": 2.0, "guidance_interval": [0, 500], "guidance_rescale": 0.1, "sampler": "dpm_solver",
    "sampler_options": {"order": 2, "spacing": "linspace"}, "image": "a.png", "mask": "m.png",
    "strength": 0.5, "embeddings": ["e.npz", 0], "latents": ["l.npy", 0], "images_per_prompt": 1,
}  # fmt: skip


def test_lines_of_other_types(tmp_path, random_params):
    """Each is read, or one line says what is wrong with it."""
    pipe, file = tiny.make_pipe(random_params), tmp_path / "x.jsonl"
    wrong = [
        1e308,
        2**31,
        2**64,
        "1",
        "\ud800",
        [1, 2, 3],
        {"order": True},
        {"order": 10**30},
        {"spacing": 3},
    ]
    lines = [line for _, line in damaged(EVERY_FIELD)]
    lines += [{**EVERY_FIELD, name: value} for name in EVERY_FIELD for value in wrong]
    count = 0
    for line in lines:
        file.write_text(json.dumps(line))
        try:
            (requests,) = read_requests(str(file))
            pipe.resolve(requests[0])
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000, line
            count += 1
    assert count > len(lines) / 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"sampler_options": ' + "[" * 100_000, "not valid JSON .lists and objects are nested more than 64"),
        ('"sampler_options": ' + '{"a":' * 64 + "1" + "}" * 64, "nested more than 64"),
        ('"seed": ' + "1" * 5000, "not valid JSON .it has a whole number of more than 4,300 digits"),
        ('"seed": ' + "1" * 4000, "seed is 1+….*it must be"),
        ('"guidance_scale": ' + "9" * 4000, "guidance_scale is 9+….*it must be"),
        ('"seed": 1, "seed": 2', "has the name 'seed' twice"),
        ('"embeddings": []', r"embeddings is \[\]: it must be a file and a row"),
        ('"latents": [1, 2, 3]', r"latents is \[1, 2, 3\]: it must be a file and a row"),
        ('"latents": ["l.npy", true]', "latents is .*: it must be a file and a row"),
        (r'"image": "a\u0000.png"', r"image is 'a\\x00.png': a path has no NUL"),
        (r'"mask": "~\u0000"', "a path has no NUL"),
        (r'"latents": ["\u0000", 1]', "latents is .*: a path has no NUL"),
        (r'"embeddings": ["~\ud800", 1]', "embeddings is .*: remove the characters that are not Unicode"),
        (r'"image": "~\ud800/x"', "image is .*: remove the characters that are not Unicode"),
    ],
)
def test_hostile_lines(tmp_path, fields, message):
    file = tmp_path / "x.jsonl"
    file.write_text('{"prompt": "x", ' + fields + "}")
    with pytest.raises(UserError, match=f"^line 1 of '.*x.jsonl': .*{message}"):
        read_requests(str(file))
