"""Recognizes encoders by their files, so that features of two encoders are never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pixart_jax.config import FeaturesConfig
from pixart_jax.files import sha256_of_json
from pixart_jax.hub import local
from pixart_jax.weights.files import PICKLES

# Files of this size or less are read completely; of larger ones, `_BLOCKS` blocks of `_BLOCK` bytes, spread
# evenly. Two versions of a weight file differ almost everywhere.
_SMALL = 1 << 22
_BLOCK, _BLOCKS = 1 << 16, 32
_SUFFIXES = (".json", ".safetensors", ".model", ".txt", *PICKLES)


def encoder_files(config: FeaturesConfig) -> dict[str, str]:
    """Returns a hash of the files of each encoder that is a local folder, by the name of its config field.

    Paths of the hub are downloaded. A plain name on the hub, and a folder that is not on this machine, is
    left out.
    """
    text = config.text_encoder
    tokenizer = local(text.tokenizer, parts=())
    if text.tokenizer_subfolder and (tokenizer / text.tokenizer_subfolder).is_dir():
        tokenizer /= text.tokenizer_subfolder
    folders = {"features.vae": config.vae} if config.codec == "vae" else {}
    if config.image_encoder:
        folders["features.image_encoder"] = config.image_encoder
    if config.text:
        folders["features.text_encoder.weights"] = text.weights
        folders["features.text_encoder.tokenizer"] = str(tokenizer)
    found = {field: local(name) for field, name in folders.items() if name}
    return {field: _hash_of_folder(folder) for field, folder in found.items() if folder.is_dir()}


def _hash_of_folder(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and path.is_file())
    return sha256_of_json([[path.name, path.stat().st_size, _hash_of_blocks(path)] for path in files])


def _hash_of_blocks(path: Path) -> str:
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= _SMALL:
            return hashlib.file_digest(file, "sha256").hexdigest()
        for block in range(_BLOCKS):
            file.seek((size - _BLOCK) * block // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()
