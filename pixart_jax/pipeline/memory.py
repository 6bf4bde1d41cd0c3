"""Computes how much memory generation needs, before it starts: on each device, and on the host.

The memory of the weights is exact. That of the activations is estimated (`models/activations.py`). The
host holds text features, finished images, the contact sheet, and the kernels that adapters change. With CPU
devices, both are parts of the same memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

import jax

from pixart_jax.data.buckets import SIZES
from pixart_jax.data.images import Refused, read_size
from pixart_jax.encoders.images import VAECodec
from pixart_jax.errors import UserError
from pixart_jax.models.activations import decoding_bytes, generation_peak, sampling_bytes
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.pipeline.batching import TEXT_BLOCK
from pixart_jax.pipeline.image_files import CELL
from pixart_jax.pipeline.pipeline import TEXTS_KEPT, Pipeline
from pixart_jax.pipeline.sizes import MAX_PIXELS, Size
from pixart_jax.readers import open_regular

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes on one device, and on the host.

    `encoding`, `sampling` and `decoding` are activations. They are never alive at the same time, because
    texts are encoded before latents are sampled, and latents are sampled before they are decoded. (An image
    to start from is encoded before sampling, and needs less than decoding.)
    """

    backbone: int
    text_encoder: int
    vae: int
    encoding: int
    sampling: int
    decoding: int
    # Whether the text encoder stays in memory while latents are sampled.
    keeps_text_encoder: bool
    # Memory of the device; None if it is not known.
    limit: int | None
    # Bytes on the host, besides those of devices.
    host: int = 0
    # Number of devices whose memory is that of the host.
    devices_on_host: int = 0
    # Memory of the host; None if it is not known.
    host_limit: int | None = None
    # Side in pixels of the tiles that are decoded one after the other; 0 for whole images.
    tile: int = 0
    # Kernels that adapters change: while their weights change, there are two copies, but no activations.
    adapting: int = 0

    @property
    def host_peak(self) -> int:
        return self.host + self.devices_on_host * self.peak

    @property
    def decodes_at_once(self) -> bool:
        """Whether a device has enough memory to decode the images, with the weights that it keeps."""
        weights = self.backbone + self.vae + (self.text_encoder if self.keeps_text_encoder else 0)
        return self.limit is None or weights + self.decoding <= self.limit

    @property
    def peak(self) -> int:
        after = max(self.sampling, self.decoding, self.adapting)
        weights = self.backbone + self.vae
        return generation_peak(weights, self.text_encoder, self.encoding, after, self.keeps_text_encoder)

    def __str__(self) -> str:
        also = ", kernels" if self.adapting else ""
        freed = "" if self.keeps_text_encoder else ", freed before sampling"
        rows = [
            ("backbone", self.backbone, ""),
            (f"text encoder{freed}", self.text_encoder, ""),
            ("VAE", self.vae, ""),
            ("encoding texts", self.encoding, ", estimated"),
            ("sampling", self.sampling, ", estimated"),
            ("decoding", self.decoding, f", estimated{f', in tiles of {self.tile} px' if self.tile else ''}"),
            ("changing weights of adapters", self.adapting, ""),
            ("peak", self.peak, "" if self.limit is None else f" of {_gib(self.limit)}"),
            (f"host: texts, finished images{also}", self.host, ", estimated"),
        ]
        return "\n".join(f"  {name:<38}{_gib(size)}{note}" for name, size, note in rows if size)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a command does, besides generating a batch on a device."""

    # Number of images, of all batches. None for one full batch of all devices.
    total: int | None = None
    # Number of texts, prompts and negative prompts together; 0 if the text encoder is not used. Its weights
    # are loaded when it encodes the first text.
    texts: int = 2
    # Number of images on the contact sheet.
    sheet: int = 0
    # Bytes of the files that are read: `file_bytes`.
    files: int = 0


def plan_memory(pipe: Pipeline, size: Size, images: int, work: Work = Work()) -> Plan:
    """The memory that a pipeline needs.

    Args:
      pipe: the pipeline.
      size: size of the images.
      images: number of images in a device's batch.
      work: everything else.
    """
    model = pipe.model.config
    latent = size.height // pipe.codec.downsampling, size.width // pipe.codec.downsampling
    vae, decoding = 0, 0
    if isinstance(pipe.codec, VAECodec):
        codec = pipe.codec
        vae = codec.bytes_per_device
        sides = size.height, size.width
        decoding = decoding_bytes(codec.config, sides, codec.images_per_device, size.tile)
    encoder = pipe.text_encoder.network if work.texts and pipe.text_encoder else None
    devices = pipe.generator.devices
    batch = images * len(devices)
    host = (
        work.files
        + text_bytes(model, work.texts)
        + max(
            image_bytes(size, batch if work.total is None else min(batch, work.total)),
            sheet_bytes(size, work.sheet),
        )
    )
    on_host = devices[0].platform == "cpu"
    if encoder is not None and not on_host:
        # The weights are read here before they are put on the devices.
        host += encoder.bytes_per_device * len(devices) + encoder.bytes_of_largest
    host += encoder.host_bytes if encoder else 0
    host += pipe.adapters.host_bytes if pipe.adapters else 0
    return Plan(
        backbone=_bytes(pipe.generator.params),
        text_encoder=0 if encoder is None else encoder.bytes_per_device,
        vae=vae,
        encoding=0 if encoder is None else encoder.encoding_bytes,
        sampling=sampling_bytes(model, latent, images),
        decoding=decoding,
        tile=size.tile,
        keeps_text_encoder=pipe.keep_text_encoder,
        limit=device_memory(devices[0]),
        host=host,
        devices_on_host=len(devices) if on_host else 0,
        host_limit=host_memory(),
        adapting=pipe.adapters.kernel_bytes if pipe.adapters else 0,
    )


def check_memory(pipe: Pipeline, size: Size, images: int, work: Work = Work()) -> Plan:
    """Checks that the devices and the host have enough memory for `plan_memory`, and returns the plan.

    Raises:
      UserError: there is too little memory. The message says what would fit.
    """
    plan = plan_memory(pipe, size, images, work)
    if plan.limit is None or plan.peak <= plan.limit:
        _check_host(pipe, plan, size, images, work)
        return plan

    def fits(size: Size, images: int) -> bool:
        return plan_memory(pipe, size, images, work).peak <= plan.limit

    fewer = next((n for n in range(images - 1, 0, -1) if fits(size, n)), None)
    squares = (Size(side, side, side, side) for side in reversed(SIZES) if side < max(size[:2]))
    smaller = next((square for square in squares if fits(square, 1)), None)
    if fewer:
        advice = f"batch_size {fewer} fits"
    elif smaller:
        advice = f"batch_size 1 at {smaller.height}x{smaller.width} px fits (with binning off)"
    else:
        advice = "the weights alone are too large: use more devices, or --text_weights_dtype=int8"
    need, have = _gib(plan.peak).strip(), _gib(plan.limit).strip()
    raise UserError(
        f"batch_size {images} at {size.height}x{size.width} px needs {need} on each device, which has "
        f"{have}: {advice}."
    )


def _check_host(pipe: Pipeline, plan: Plan, size: Size, images: int, work: Work) -> None:
    if plan.host_limit is None or plan.host_peak <= plan.host_limit:
        return

    def fits(side: int) -> bool:
        square = Size(size.height, size.width, side, side)
        return plan_memory(pipe, square, images, work).host_peak <= plan.host_limit

    side = next((2**power for power in range(MAX_PIXELS.bit_length() // 2, 5, -1) if fits(2**power)), None)
    advice = (
        f"{side}x{side} px fit"
        if side
        else "use a smaller --batch_size, fewer devices or prompts, or smaller files"
    )
    need, have = _gib(plan.host_peak).strip(), _gib(plan.host_limit).strip()
    raise UserError(
        f"images of {size.out_width}x{size.out_height} px (width x height) need {need} of the host's memory, "
        f"which has {have}: {advice}."
    )


def device_memory(device: jax.Device) -> int | None:
    """Bytes that this process may use on a device, or None if that is not known.

    On a CPU: the memory of the machine, divided by the number of simulated devices.
    """
    if device.platform == "cpu":
        total = host_memory()
        return total and total // len(jax.local_devices())
    return (device.memory_stats() or {}).get("bytes_limit")


# Files with the limit of a container, of versions 2 and 1 of Linux's control groups.
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int | None:
    """Bytes that the machine has, or its container may use; None if that is not known."""
    known = []
    with contextlib.suppress(AttributeError, ValueError, OSError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _CGROUPS:
        with contextlib.suppress(OSError, ValueError):  # no control groups, or 'max'
            known.append(int(Path(path).read_text()))
    return min(known, default=None)


def text_bytes(model: PixArtConfig, texts: int) -> int:
    """Text features on the host: those that are kept, and the arrays of a block of prompts."""
    return 4 * (min(texts, TEXTS_KEPT) + min(texts, 2 * TEXT_BLOCK)) * model.text_length * model.text_dim


def saved_text_bytes(model: PixArtConfig, prompts: int, texts: int) -> int:
    """Features of all prompts and negative prompts in arrays, and of each of their texts."""
    return 4 * (2 * prompts + texts) * model.text_length * model.text_dim


def file_bytes(images: Iterable[str], embeddings: Iterable[str]) -> int:
    """Files that requests read: the largest image while it is decoded, and the largest file of text features.

    Decoding holds up to 25 bytes per pixel: Pillow's image, upright and without transparency, and its bytes.
    A file that cannot be read counts as nothing; reading it raises an error that names it.
    """
    pixels, arrays = [0], [0]
    for path in set(images):
        with contextlib.suppress(Refused):
            pixels.append(math.prod(read_size(path)))
    for path in set(embeddings):
        # zipfile raises a dozen classes.
        with contextlib.suppress(Exception), open_regular(path) as file, zipfile.ZipFile(file) as archive:
            arrays.append(sum(entry.file_size for entry in archive.infolist()))
    return 25 * max(pixels) + max(arrays)


def check_host_memory(what: str, size: int) -> None:
    """Raises a `UserError` if `what` takes more bytes than the host has."""
    limit = host_memory()
    if limit is not None and size > limit:
        need, have = _gib(size).strip(), _gib(limit).strip()
        raise UserError(
            f"{what} needs {need} of the host's memory, which has {have}: use fewer prompts at a time."
        )


def image_bytes(size: Size, images: int) -> int:
    """The finished images of a batch: decoded in float32, resized, and converted for Pillow.

    Decoding holds three float arrays of the generated size. Resizing holds the images of both sizes, and for
    one image Pillow's copy (4 bytes per pixel) and two copies of its bytes. Saving holds one Pillow copy.
    """
    generated, final = size.height * size.width, size.out_height * size.out_width
    if generated == final:
        return max(36 * images * generated, (3 * images + 4) * final)
    return max(36 * images * generated, 3 * images * generated + (3 * images + 10) * final)


def sheet_bytes(size: Size, images: int) -> int:
    """A contact sheet: its cells, two copies of them, the sheet twice, and two copies of one image."""
    if not images:
        return 0
    return 16 * (CELL + 2) ** 2 * images + 8 * size.out_height * size.out_width


def _bytes(params: object) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def _gib(size: int) -> str:
    return f"{size / GIB:8.2f} GiB"
