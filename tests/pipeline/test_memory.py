import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from PIL import Image

from pixart_jax.encoders.text import LENGTH_STEP, TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.models.activations import sampling_bytes
from pixart_jax.pipeline import Pipeline, memory
from pixart_jax.pipeline.generation import Generator, Program
from pixart_jax.pipeline.memory import (
    Plan,
    Work,
    check_memory,
    file_bytes,
    image_bytes,
    plan_memory,
)
from pixart_jax.pipeline.requests import Settings
from pixart_jax.pipeline.sizes import Size


@pytest.fixture(scope="module")
def pipe(random_params):
    return tiny.make_pipe(random_params)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def test_the_estimates_are_those_of_the_compiler(random_params):
    """They agree within a factor of 1.6 on a CPU, for a model large enough that its activations matter."""
    model = dataclasses.replace(tiny.MODEL, depth=2, hidden_size=384, num_heads=6, in_channels=4)
    config = dataclasses.replace(tiny.CONFIG, model=model)
    generator = Generator(nnx.merge(*random_params(model)), config, jax.devices()[:1])
    for side, images in ((32, 2), (64, 2)):
        text = jnp.zeros((images, 32, 16)), jnp.ones((images, 32), bool)
        batch = {"seeds": jnp.zeros(images, jnp.uint32), "conditional": text, "unconditional": text}
        program = generator.compiled(Program.of((side, side, 4), Settings(steps=2)))
        compiled = program.lower(generator.params, shapes(batch), jnp.float32(2)).compile()
        used = compiled.memory_analysis().temp_size_in_bytes
        assert 1 / 1.6 < sampling_bytes(model, (side, side), images) / used < 1.6


def test_the_plan_of_a_pipeline(pipe):
    plan = plan_memory(pipe, Size(32, 32, 32, 32), 1)
    assert plan.backbone == sum(leaf.size for leaf in jax.tree.leaves(pipe.generator.params)) * 4
    assert plan.text_encoder == pipe.text_encoder.network.bytes_per_device > 0
    assert plan.vae == plan.decoding == 0 and plan.keeps_text_encoder
    assert plan.limit is None or plan.limit > 2**26
    assert "text encoder" in str(plan) and "freed" not in str(plan)
    # If the text features are given, the weights of the text encoder are not loaded.
    given = plan_memory(pipe, Size(32, 32, 32, 32), 1, Work(texts=0))
    assert given == dataclasses.replace(plan, text_encoder=0, encoding=0, host=given.host)
    assert plan.host - given.host == 4 * (2 + 2) * 32 * 16  # two texts, kept and in a block
    alone = Pipeline(pipe.model, pipe.config, None, pipe.codec, devices=jax.devices()[:1])
    assert plan_memory(alone, Size(32, 32, 32, 32), 1).text_encoder == 0


def test_the_peak_is_the_larger_of_text_and_sampling():
    parts = dict(backbone=10, text_encoder=90, vae=5, encoding=7, sampling=40, decoding=60, limit=None)
    assert Plan(**parts, keeps_text_encoder=True).peak == 10 + 5 + 90 + 60
    assert Plan(**parts, keeps_text_encoder=False).peak == 10 + 5 + 90 + 7
    assert "freed before sampling" in str(Plan(**parts, keeps_text_encoder=False))


def test_too_large_says_what_would_fit(pipe, monkeypatch):
    def limit(value):
        monkeypatch.setattr(memory, "device_memory", lambda device: int(value))

    # The host has its own test.
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    size = Size(1024, 1024, 1024, 1024)
    need = plan_memory(pipe, size, 4).peak
    limit(need)
    assert check_memory(pipe, size, 4).peak == need
    limit(need - 1)
    with pytest.raises(UserError, match=r"batch_size 4 at 1024x1024 px .* batch_size 3 fits"):
        check_memory(pipe, size, 4)
    limit(plan_memory(pipe, size, 1).peak - 1)
    with pytest.raises(UserError, match="batch_size 1 at 512x512 px fits"):
        check_memory(pipe, size, 4)
    limit(1000)
    with pytest.raises(UserError, match="weights alone are too large"):
        check_memory(pipe, size, 1)
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    assert check_memory(pipe, size, 10**6).limit is None


def test_the_host_is_part_of_the_plan(pipe, monkeypatch):
    """Finished images are resized, saved and put on a contact sheet."""

    def plan(height, width, *work):
        return plan_memory(pipe, Size(64, 64, height, width), 1, Work(*work))

    small, large = plan(64, 64), plan(8000, 10_000)
    assert large.host - small.host > 12.9 * 8000 * 10_000 and large.peak == small.peak
    # A plan counts the images of one batch, all texts that are kept, and all cells of a sheet.
    assert plan(64, 64, 1000) == small
    assert plan(64, 64, 1, 1000).host - small.host > 4 * 1000 * 32 * 16
    assert plan(64, 64, 1, 2, 1000).host > 1000 * 3 * 256**2
    assert large.host_peak == large.host + large.peak and "host: texts, finished images" in str(large)

    size = Size(64, 64, 8000, 10_000)
    monkeypatch.setattr(memory, "device_memory", lambda device: None)
    monkeypatch.setattr(memory, "host_memory", lambda: large.host_peak)
    assert check_memory(pipe, size, 1) == dataclasses.replace(large, limit=None, host_limit=large.host_peak)
    monkeypatch.setattr(memory, "host_memory", lambda: large.host_peak - 1)
    message = r"images of 10000x8000 px .* need .* GiB of the host's memory, .*: 8192x8192 px fit"
    with pytest.raises(UserError, match=message):
        check_memory(pipe, size, 1)
    monkeypatch.setattr(memory, "host_memory", lambda: 10_000)
    with pytest.raises(UserError, match="fewer devices or prompts"):
        check_memory(pipe, size, 1)


def test_the_estimate_of_resizing_is_what_it_takes():
    """In a process of its own, whose largest memory is that of the resize."""
    code = """
import re
from pathlib import Path
import numpy as np
from pixart_jax.pipeline.editing import resize_back

def memory(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

images = np.zeros((3, 64, 64, 3), np.uint8)
resize_back(images, 65, 65)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = memory("VmRSS")
resize_back(images, 2000, 3000)
print(memory("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    estimate = image_bytes(Size(64, 64, 2000, 3000), 3)
    assert 0.7 < estimate / int(done.stdout) < 1.3


def test_files_that_requests_read_are_part_of_the_plan(pipe, tmp_path):
    image, mask, text = (str(tmp_path / name) for name in ("image.png", "mask.png", "text.npz"))
    Image.new("RGB", (300, 200)).save(image)
    Image.new("L", (30, 20)).save(mask)
    np.savez(text, text=np.zeros((5, 7, 3), np.float32))
    absent = str(tmp_path / "absent")
    size = file_bytes([image, mask, image, absent], [text, absent, image])
    assert 25 * 60_000 + 420 <= size < 25 * 60_000 + 1000
    plan, more = (plan_memory(pipe, Size(64, 64, 64, 64), 1, Work(files=files)) for files in (0, size))
    assert more.host == plan.host + size


@pytest.mark.parametrize("offset, value", [(6, 99), (46, 0xFF)], ids=["version", "name that is not UTF-8"])
def test_a_damaged_file_of_features_counts_as_nothing(tmp_path, offset, value):
    np.savez(tmp_path / "text.npz", text=np.zeros(3))
    data = bytearray((tmp_path / "text.npz").read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 9] |= 0x08  # the name is UTF-8
    data[entry + offset] = value
    (tmp_path / "text.npz").write_bytes(data)
    assert file_bytes([], [str(tmp_path / "text.npz")]) == 0


def test_pipes_and_devices_are_not_read_for_the_plan(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert file_bytes([], [str(tmp_path / "pipe"), "/dev/zero"]) == 0


def test_the_memory_of_a_container(tmp_path, monkeypatch):
    whole = memory.host_memory()
    limit, none = tmp_path / "memory.max", tmp_path / "other.max"
    limit.write_text("1048576\n")
    none.write_text("max\n")
    monkeypatch.setattr(memory, "_CGROUPS", (str(none), str(limit), str(tmp_path / "absent")))
    assert memory.host_memory() == 2**20 and memory.device_memory(jax.devices()[0]) == 2**20 // 8
    monkeypatch.setattr(memory, "_CGROUPS", (str(none),))
    assert memory.host_memory() >= whole > 2**26


def test_the_encoder_takes_what_is_counted():
    encoder = TextEncoder(tiny.TEXT, 32, batch_size=1, load=False)
    before = jax.live_arrays()
    encoder.load()
    new = {id(array): array.nbytes for array in jax.live_arrays()}
    for array in before:
        del new[id(array)]
    assert encoder.network.bytes_per_device == sum(new.values())
    assert encoder.network.encoding_bytes > 8 * LENGTH_STEP * 16
