"""What a number was measured with: stored beside it, and compared before two numbers share a row.

A FID or a CLIP score is a number of a protocol as much as of a model: another resize filter is another FID.
`Protocol` holds all that such a number depends on; `Result` is a number with its protocol, a JSON file each.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixart_jax.errors import UserError
from pixart_jax.files import sha256_of_json, write_json
from pixart_jax.versions import package_versions

# None: as stored with the weights (guidance), or not known, for images that this project did not draw.
Told = str | int | float | None


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Everything but the model that a number depends on.

    Attributes:
      metric: 'fid' or 'clip'.
      images: how many were scored.
      reference: FID: sha256 of the statistics file, or of the reference images.
      captions: sha256 of the caption file.
      sampler, steps, guidance_scale, seed: how the images were drawn.
      weights: 'ema', 'raw', or 'ema if there is one' for files that may hold none.
      height, width: of the images in pixels; None if they differ.
      crop: 'none', or 'centre' for the centred square.
      size: side in pixels that both sets are resized to, before the feature network's resize; None: as is.
      filter: of that resize, a name in `fid.FILTERS`.
      rounding: whether it rounds to uint8.
      resize: how an image becomes the network's input, a name in `fid.RESIZES`; 'clip' for CLIP's own.
      network: sha256 of the feature network's weights.
    """

    metric: str
    images: int
    reference: Told = None
    captions: Told = None
    sampler: Told = None
    steps: Told = None
    guidance_scale: Told = None
    seed: Told = None
    weights: Told = None
    height: Told = None
    width: Told = None
    crop: str = "none"
    size: int | None = None
    filter: str = "bicubic"
    rounding: bool = True
    resize: str = "clean"
    network: Told = None

    @property
    def id(self) -> str:
        """Eight characters that two protocols share only if they are equal."""
        return sha256_of_json(dataclasses.asdict(self))[:8]


@dataclasses.dataclass(frozen=True)
class Result:
    """A number with its protocol.

    Attributes:
      model: what was measured: the path of the weights, or a name.
      value: the number.
      protocol: what it was measured with.
      preset: name of the preset the protocol follows, or ''.
    """

    model: str
    value: float
    protocol: Protocol
    preset: str = ""

    def write(self, path: Path) -> None:
        """Writes the result as JSON, with the versions of the libraries that computed it."""
        values = {
            "metric": self.protocol.metric,
            "protocol_id": self.protocol.id,
            **dataclasses.asdict(self),
            "versions": package_versions(("pixart_jax", "jax", "torch", "transformers", "numpy", "pillow")),
        }
        write_json(path, values)

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Reads what `write` wrote.

        Raises:
          UserError: no such file, or not a result.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            protocol = Protocol(**values["protocol"])
            return cls(values["model"], float(values["value"]), protocol, values.get("preset", ""))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"'{path}' is no result of `evaluate fid` or `evaluate clip`: {error}."
            ) from error


def require_same(results: Sequence[Result]) -> Protocol:
    """The protocol that all of the results have.

    Raises:
      UserError: they differ; names the fields with their values.
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
    """A named protocol: what the command takes for flags that are not given.

    Attributes:
      images: how many the protocol asks for.
      values: fields of `Protocol` it fixes.
      captions, reference, clip: which files it takes, in words.
      source: where it is written down, and which of the values are this project's own choice.
    """

    images: int
    values: dict[str, Any]
    captions: str
    reference: str
    clip: str
    source: str


PRESETS = {
    "mlperf-sd": Preset(
        images=30_000,
        values={
            "sampler": "ddim", "steps": 50, "guidance_scale": 8.0, "height": 512, "width": 512,
            "crop": "none", "size": None, "filter": "bicubic", "rounding": True, "resize": "pytorch",
        },
        captions="val2014_30k.tsv of MLCommons (30,000 captions of val2014, drawn with seed 2023)",
        reference="val2014_30k_stats.npz of MLCommons",
        clip="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        source="mlcommons/training, stable_diffusion: targets FID <= 90 and CLIP >= 0.15 (15 here)",
    ),
    "pixart-coco-30k": Preset(
        images=30_000,
        values={
            "sampler": "dpm_solver", "steps": 20, "guidance_scale": 4.5, "height": 256, "width": 256,
            "crop": "centre", "size": 256, "filter": "bicubic", "rounding": True, "resize": "clean",
        },
        captions="30,000 captions of COCO val2014; the paper does not say which",
        reference="the images of those captions, in the centre square, at 256 px",
        clip="openai/clip-vit-base-patch16",
        source="PixArt-α, table 2 (FID-30K); it names no filter, guidance or captions: those are chosen here",
    ),
    "mjhq-30k": Preset(
        images=30_000,
        values={
            "sampler": "dpm_solver", "steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024,
            "crop": "centre", "size": 1024, "filter": "bicubic", "rounding": True, "resize": "clean",
        },
        captions="meta_data.json of MJHQ-30K",
        reference="the images of MJHQ-30K, all folders",
        clip="openai/clip-vit-large-patch14",
        source="playgroundai/MJHQ-30K; sampler, guidance, size and filter are chosen here",
    ),
}  # fmt: skip
