"""The protocol of a measurement: stored with the number, and compared before numbers share a table row.

An FID or a CLIP score depends on the protocol as much as on the model; a different resize filter alone
changes the FID. `Protocol` holds everything that a number depends on except the model. `Result` is a number
with its protocol, stored as a JSON file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError, short
from pixart_jax.files import sha256_of_json, write_json
from pixart_jax.readers import COUNT, check_shape, parse_json, read_bytes
from pixart_jax.versions import package_versions

# A setting that may be unknown: None for images that this project did not generate.
Setting = str | int | float | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything that a number depends on except the model.

    Attributes:
      metric: 'fid' or 'clip'.
      images: number of images.
      reference: for FID, sha256 of the statistics file or of the reference images.
      captions: sha256 of the caption file.
      sampler: sampling algorithm that the images were generated with.
      steps: model evaluations per image.
      guidance_scale: scale of classifier-free guidance.
      seed: seed of the first image.
      weights: 'ema', 'raw', or 'ema if there is one' for files that may not hold an average.
      height: of the images, in pixels; None if they differ.
      width: likewise.
      crop: 'none', or 'centre' for the square in the middle.
      size: side in pixels to which both sets are resized before the feature network's own resize; None for no
        resize.
      filter: filter of that resize, a key of `fid.FILTERS`.
      rounding: whether that resize rounds to uint8.
      resize: how an image becomes the network's input, a key of `fid.RESIZES`; 'clip' for CLIP's own
        processor.
      network: sha256 of the feature network's weights.
    """

    metric: str
    images: int
    reference: Setting = None
    captions: Setting = None
    sampler: Setting = None
    steps: Setting = None
    guidance_scale: Setting = None
    seed: Setting = None
    weights: Setting = None
    height: Setting = None
    width: Setting = None
    crop: str = "none"
    size: int | None = None
    filter: str = "bicubic"
    rounding: bool = True
    resize: str = "clean"
    network: Setting = None

    @property
    def id(self) -> str:
        """The first eight hexadecimal digits of a hash: equal protocols have equal ids."""
        return sha256_of_json(dataclasses.asdict(self))[:8]


@dataclasses.dataclass(frozen=True)
class Result:
    """A number with its protocol.

    Attributes:
      model: the path of the weights that were measured, or a name for them.
      value: the number.
      protocol: its protocol.
      preset: name of the preset that the protocol follows, or ''.
    """

    model: str
    value: float
    protocol: Protocol
    preset: str = ""

    def write(self, path: Path) -> None:
        """Writes the result as JSON, with the versions of the libraries that were used."""
        values = {
            "metric": self.protocol.metric,
            "protocol_id": self.protocol.id,
            **dataclasses.asdict(self),
            "versions": package_versions(("pixart_jax", "jax", "torch", "transformers", "numpy", "pillow")),
        }
        write_json(path, values)

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Reads a result that `write` wrote.

        Raises:
          UserError: the file does not exist, or is not a result.
        """
        try:
            values = parse_json(read_bytes(Path(path)))
            check_shape(values, {"model": str, "value": float, "protocol": dict, "preset?": str})
            wrong = [name for name, value in values["protocol"].items() if isinstance(value, list | dict)]
            if wrong:
                raise ValueError(f"protocol.{short(wrong[0])} is a list or an object")
            check_shape(values["protocol"], {"metric": str, "images": COUNT}, "protocol")
            protocol = Protocol(**values["protocol"])
            return cls(values["model"], float(values["value"]), protocol, values.get("preset", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"'{path}' is not a result of `evaluate fid` or `evaluate clip`: {error}."
            ) from error


def require_same(results: Sequence[Result]) -> Protocol:
    """Returns the protocol that all results have in common.

    Raises:
      UserError: the protocols differ. The message names the fields that differ, with their values.
    """
    first = results[0].protocol
    for result in results[1:]:
        ours, theirs = dataclasses.asdict(first), dataclasses.asdict(result.protocol)
        differing = [
            f"{name} {ours[name]!r} and {theirs[name]!r}" for name in ours if ours[name] != theirs[name]
        ]
        if differing:
            raise UserError(
                f"'{results[0].model}' and '{result.model}' are not comparable, their protocols differ in "
                f"{', '.join(differing)}: measure both the same way."
            )
    return first


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named protocol, whose values replace the defaults of the command's flags.

    Attributes:
      images: number of images that the protocol requires.
      values: fields of `Protocol` that it fixes.
    """

    images: int
    values: dict[str, Any]


PRESETS = {
    # MLPerf training, Stable Diffusion (mlcommons/training); its targets are FID <= 90 and CLIP >= 0.15,
    # which is 15 here. Captions: val2014_30k.tsv (30,000 captions of COCO val2014, sampled with seed 2023).
    # Reference: val2014_30k_stats.npz. CLIP: laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
    "mlperf-sd": Preset(
        images=30_000,
        values={
            "sampler": "ddim", "steps": 50, "guidance_scale": 8.0, "height": 512, "width": 512,
            "crop": "none", "size": None, "filter": "bicubic", "rounding": True, "resize": "pytorch",
        },
    ),
    # PixArt-α, table 2 (FID-30K). The paper does not state captions, guidance or filter; they are chosen
    # here. Captions: 30,000 of COCO val2014. Reference: their images, cropped to the centre square, at 256
    # px. CLIP: openai/clip-vit-base-patch16.
    "pixart-coco-30k": Preset(
        images=30_000,
        values={
            "sampler": "dpm_solver", "steps": 20, "guidance_scale": 4.5, "height": 256, "width": 256,
            "crop": "centre", "size": 256, "filter": "bicubic", "rounding": True, "resize": "clean",
        },
    ),
    # playgroundai/MJHQ-30K. Sampler, guidance, size and filter are chosen here. Captions: meta_data.json.
    # Reference: all images. CLIP: openai/clip-vit-large-patch14.
    "mjhq-30k": Preset(
        images=30_000,
        values={
            "sampler": "dpm_solver", "steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024,
            "crop": "centre", "size": 1024, "filter": "bicubic", "rounding": True, "resize": "clean",
        },
    ),
}  # fmt: skip
