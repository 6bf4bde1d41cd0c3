import dataclasses

import numpy as np
import pytest
from web_page import drawn, png

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError
from pixart_jax.pipeline.generation import options_of
from pixart_jax.pipeline.image_files import make_record
from pixart_jax.pipeline.page.form import Form
from pixart_jax.pipeline.page.uploads import Uploads
from pixart_jax.pipeline.requests import Request

VALUES = {"prompt": "a corgi", "width": 32, "height": 32, "steps": 2, "guidance_scale": 1.0}


@pytest.fixture
def uploads(tmp_path):
    return Uploads(tmp_path / "temporary", tmp_path / "inputs")


def read(form, uploads, **changes):
    values = {name: control.value for name, control in form.controls.items()}
    return form.read(values | VALUES | changes, uploads)


def test_every_setting_has_a_control_with_its_default(pipe):
    form = Form(pipe)
    resolved, _ = pipe.resolve(Request(""))
    settings = {name.split(".")[0] for name in form.controls} - {"count"}
    fields = {field.name for field in dataclasses.fields(Request)} - {"embeddings", "latents"}
    assert settings == fields - {"aspect_ratio"}
    for name in ("steps", "width", "guidance_scale", "binning", "sampler", "seed", "negative_prompt"):
        assert form.controls[name].value == getattr(resolved, name) and form.controls[name].label
    assert form.ratios["1:1"] == (32, 32) and form.ratios["16:9"][0] > form.ratios["16:9"][1]
    for sampler in SAMPLERS:
        names = {
            name.split(".")[2] for name in form.controls if name.startswith(f"sampler_options.{sampler}.")
        }
        assert names == set(options_of(sampler))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": "x" * 4001}, "prompt has 4,001 characters"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt has 4,001 characters"),
        ({"sampler": "x" * 4001}, "sampler has 4,001 characters"),
        ({"prompt": " "}, "The prompt is empty"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "\ud800"}, "not Unicode"),
        ({"prompt": None}, "fill in the field 'Prompt'"),
        ({"steps": None}, "steps is empty: fill in the field 'Steps'"),
        ({"count": 0}, "count is 0: it must be between 1 and 16"),
        ({"count": 1e9}, "count is 1000000000"),
        ({"count": "2"}, "count is"),
        ({"count": float("nan")}, "count is nan"),
        ({"steps": 101}, "steps is 101: it must be between 1 and 100"),
        ({"steps": 10**9}, "steps is 1000000000: it must be"),
        ({"steps": 10**4000}, "steps is 1000"),
        ({"steps": [1]}, "steps is [1]"),
        ({"steps": True}, "steps is True"),
        ({"binning": 1}, "binning is 1"),
        ({"width": 4097}, "width is 4097: it must be between 1 and 4096"),
        ({"width": 100_000}, "width is 100000: it must be"),
        ({"height": 1e308}, "height is"),
        ({"seed": -1}, "seed is -1"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"guidance_scale": 16}, "guidance_scale is 16"),
        ({"guidance_rescale": 2.0}, "guidance_rescale is 2.0"),
        ({"guidance_interval.lowest": 5}, "guidance_interval has only one of its two numbers"),
        ({"guidance_interval.lowest": "x", "guidance_interval.highest": 5.0}, "guidance_interval is 'x'"),
        (
            {"guidance_interval.lowest": float("nan"), "guidance_interval.highest": 5.0},
            "guidance_interval is nan",
        ),
        ({"guidance_by": "magic"}, "guidance_by is"),
        ({"sampler": "magic"}, "sampler is"),
        ({"sampler_options.dpm_solver.order": 1.5}, "sampler_options.order is 1.5"),
        ({"sampler_options.dpm_solver.order": "x"}, "sampler_options.order is 'x'"),
        ({"tile": 5}, "tile is 5"),
        ({"image": "/etc/passwd"}, "upload it again"),
        ({"image": 5}, "image is 5"),
        ({"image": ["x"]}, "image is"),
    ],
)
def test_values_that_no_control_allows_are_one_line(pipe, uploads, change, words):
    with pytest.raises(UserError) as caught:
        read(Form(pipe), uploads, **change)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_only_the_options_of_the_chosen_sampler_count(pipe, uploads):
    form = Form(pipe)
    options = {
        "sampler_options.ddim.eta": 0.5,
        "sampler_options.ddim.spacing": "trailing",
        "sampler_options.lcm.training_steps": "x",
        "sampler_options.sa_solver.tau_interval.lowest": 0.1,
        "sampler_options.sa_solver.tau_interval.highest": 0.9,
    }
    assert read(form, uploads, **options).request.sampler_options is None
    for sampler, expected in (
        ("ddim", {"eta": 0.5, "spacing": "trailing"}),
        ("sa_solver", {"tau_interval": [0.1, 0.9]}),
    ):
        request = read(form, uploads, sampler=sampler, **options).request
        assert request.sampler_options == expected
        pipe.resolve(request)


def test_a_mask_and_a_strength_without_an_image_are_left_out(pipe, uploads):
    mask = drawn(np.ones((8, 8), bool))
    request = read(Form(pipe), uploads, mask=mask, strength=0.5).request
    assert (request.image, request.mask, request.strength) == (None, None, None)


def test_the_values_of_an_image_ask_for_it_again(pipe, uploads):
    form = Form(pipe)
    image = uploads.use(uploads.add(png(np.zeros((8, 8, 3), np.uint8))))
    mask = np.eye(8, dtype=bool)
    asked = {
        "prompt": "a corgi",
        "negative_prompt": "blurry",
        "seed": 5,
        "guidance_interval.lowest": 100.0,
        "guidance_interval.highest": "900",
        "sampler": "sa_solver",
        "sampler_options.sa_solver.tau": 0.5,
        "sampler_options.sa_solver.tau_interval.lowest": 0.1,
        "sampler_options.sa_solver.tau_interval.highest": 0.9,
        "binning": False,
        "image": image,
        "mask": drawn(mask),
        "strength": 0.5,
    }
    request, _ = pipe.resolve(read(form, uploads, **asked).request)
    request = dataclasses.replace(request, mask=uploads.use(request.mask))
    values = form.values(make_record(pipe, request, {}, 1), uploads)
    assert set(values) == set(form.controls) and values["count"] == 1
    assert all(
        str(values[name]) in (str(value), f"{value}.0") for name, value in asked.items() if name != "mask"
    )
    values["mask"] = f'{{"mask": "{values["mask"]}"}}'
    again, _ = pipe.resolve(form.read(values, uploads).request)
    assert dataclasses.replace(again, mask=request.mask) == request
    assert uploads.use(again.mask) == request.mask
    # Files that are gone are left out.
    gone = form.values(make_record(pipe, request, {}, 1), Uploads(uploads._folder, uploads._used))
    assert (gone["image"], gone["mask"]) == (None, "")
