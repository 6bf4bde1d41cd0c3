"""Files of adapters: the names in their headers, the settings of peft, and their values."""

import json
import struct

import adapter_formats
import numpy as np
import pytest
from fuzzing import fuzz
from hostile import damaged, json_files, to_json, trees
from hypothesis import strategies as st
from safetensors.numpy import save

SMALL = {m: p for m, p in adapter_formats.draw(dora=True).items() if m in ("proj_out", "pos_embed.proj")}
PEFT = save(adapter_formats.peft_tensors(SMALL, "base_model.model."))
SETTINGS = adapter_formats.settings(SMALL, rank_pattern={"proj": 3}, alpha_pattern={"proj": 4.0})
KOHYA = save(
    adapter_formats.kohya_tensors(
        adapter_formats.official(SMALL), lambda m: f"lora_unet_{m}".replace(".", "_"), "lora_down", "lora_up"
    ),
    {"pixart_jax.adapter": json.dumps({"base": "b", "rslora": False}), "lora_adapter_metadata": "{}"},
)


def parts(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header, data):
    text = to_json(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def convert(sandbox, source, to):
    output = "out" if to == "peft" else "out.safetensors"
    outcome = sandbox.command("convert", f"--input={source}", f"--output={output}", f"--to={to}")
    outcome.check(outputs=[output])


@fuzz(25, data=st.data(), to=st.sampled_from(["peft", "comfyui", "kohya"]))
def test_headers(sandbox, data, to):
    header, values = parts(KOHYA)
    renamed = {
        data.draw(st.sampled_from([name, name.replace("unet", "te"), name + "x", "lycoris_" + name])): value
        for name, value in header.items()
    }
    sandbox.write("w.safetensors", with_header(data.draw(trees(renamed), label="header"), values))
    convert(sandbox, "w.safetensors", to)


@fuzz(15, content=damaged(KOHYA), to=st.sampled_from(["peft", "comfyui", "kohya"]))
def test_bytes(sandbox, content, to):
    sandbox.write("w.safetensors", content)
    convert(sandbox, "w.safetensors", to)


@fuzz(25, settings=json_files(SETTINGS), to=st.sampled_from(["comfyui", "kohya"]))
def test_settings(sandbox, settings, to):
    sandbox.write("in/adapter_model.safetensors", PEFT)
    sandbox.write("in/adapter_config.json", settings)
    convert(sandbox, "in", to)


@pytest.mark.parametrize("to", ["peft", "comfyui", "kohya"])
def test_valid_files_are_read(sandbox, to):
    sandbox.clear()
    sandbox.write("w.safetensors", KOHYA)
    sandbox.write("in/adapter_model.safetensors", PEFT)
    sandbox.write("in/adapter_config.json", json.dumps(SETTINGS).encode())
    assert np.frombuffer(parts(PEFT)[1], np.float32).any()
    for number, source in enumerate(("w.safetensors", "in")):
        output = f"out{number}" if to == "peft" else f"out{number}.safetensors"
        outcome = sandbox.command("convert", f"--input={source}", f"--output={output}", f"--to={to}")
        assert outcome.status == 0, outcome.err
