"""Do generated pictures show the emoji in their captions? For models trained on OpenMoji.

Two readers look at a generated picture. One finds the real picture that is most similar, in a linear space
in which shifted, turned and noisy copies of a picture lie close together. The other one compares it with the
real pictures that differ only in skin tone, or only in colour, at the pixels where those differ. Both know
real pictures only.
"""

from __future__ import annotations

import dataclasses
import functools
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from pixart_jax.config import TrainConfig
from pixart_jax.data.openmoji import (
    COLOURS,
    NEW_TONE_WORDINGS,
    NEW_WORDINGS,
    SHAPES,
    TONE_WORDINGS,
    WORDINGS,
    Emoji,
    emojis,
    in_part,
    originals,
    rasterize,
    split_of,
    word,
)
from pixart_jax.denoiser import Denoiser
from pixart_jax.encoders.images import make_codec
from pixart_jax.encoders.text import TextEncoder
from pixart_jax.errors import UserError
from pixart_jax.sampling import image_keys, make_sampler, sample_in_batches

# Images in one call of the sampler, and default number of captions of each of `SETS`.
BATCH_SIZE, SAMPLES = 64, 200
# What `captions` asks for.
SETS = ("trained", "wordings", "compositions")

# The space of the retrieval reader: standard deviation of the blur in pixels, number of dimensions, and the
# number of distorted copies from which it learns which differences do not matter.
_BLUR, _DIMENSIONS, _COPIES = 0.7, 128, 800
# Pixels at which variants differ by this standard deviation, of 255, tell them apart.
_DIFFERENT = 8.0
# Of the captions in a contact sheet: letters per 100 pixels, and pixels per line.
_LETTERS, _LINE = 17, 13
# Pictures of each set in the contact sheet, and its columns.
_SHOWN, _COLUMNS = 16, 8


def captions(which: str, count: int = 0, seed: int = 0, *, one_in: int = 1) -> list[tuple[Emoji, str]]:
    """Returns emojis with a caption to generate each from.

    Args:
      which: "trained" (trained emojis in a trained wording), "wordings" (the same emojis in wordings that are
        never trained) or "compositions" (held-out combinations, in a trained wording).
      count: number of emojis, chosen at random; 0 for all.
      seed: seed of the choice.
      one_in: as for `OpenMojiSource`.
    """
    split = "compositions" if which == "compositions" else "train"
    found = [
        emoji for emoji in emojis() if emoji.concept and split_of(emoji) == split and in_part(emoji, one_in)
    ]
    if 0 < count < len(found):
        chosen = np.random.default_rng(seed).choice(len(found), count, replace=False)
        found = [found[i] for i in sorted(chosen)]
    plain, toned = (NEW_WORDINGS, NEW_TONE_WORDINGS) if which == "wordings" else (WORDINGS, TONE_WORDINGS)
    return [
        (
            emoji,
            word(emoji.concept, emoji.tones, plain[i % len(plain)], toned[i % len(toned)]),
        )
        for i, emoji in enumerate(found)
    ]


# --- Readers


@dataclasses.dataclass(frozen=True)
class Reader:
    """Finds the real picture that is most similar to an image.

    The images are blurred and projected onto their first principal components, which are scaled so that the
    differences between a picture and its distorted copies have unit covariance (as in linear discriminant
    analysis, with a class for each picture).

    Attributes:
      emojis: the emojis that it knows.
      mean, projection: of the space, [P] and [P, K] float32.
      points: the real pictures in it, [n, K].
    """

    emojis: tuple[Emoji, ...]
    mean: np.ndarray
    projection: np.ndarray
    points: np.ndarray

    def embed(self, images: np.ndarray) -> np.ndarray:
        """[n, H, W, 3] uint8 -> [n, K] float32."""
        return (_blurred(images) - self.mean) @ self.projection

    def read(self, images: np.ndarray) -> list[Emoji]:
        """Returns the emoji of the most similar real picture for each image, [n, H, W, 3] uint8."""
        points = self.embed(images)
        distances = np.square(self.points).sum(axis=1) - 2 * points @ self.points.T
        return [self.emojis[i] for i in distances.argmin(axis=1)]


@functools.cache
def train_reader(image_size: int) -> Reader:
    """Fits the retrieval reader to all distinct real pictures that have a name."""
    from sklearn.decomposition import PCA  # only this needs it, and importing it takes seconds

    known = tuple(emoji for emoji in emojis() if emoji.concept and originals()[emoji.code] == emoji.code)
    images = np.stack([rasterize(emoji, image_size) for emoji in known])
    pca = PCA(_DIMENSIONS, svd_solver="randomized", random_state=0).fit(_blurred(images))
    rng = np.random.default_rng(0)
    rows = rng.choice(len(known), _COPIES, replace=False)
    copies = np.stack([distort(images[i], rng) for i in rows])
    differences = pca.transform(_blurred(copies)) - pca.transform(_blurred(images[rows]))
    scaling = np.linalg.cholesky(np.linalg.inv(np.cov(differences.T) + 1e-3 * np.eye(_DIMENSIONS)))
    projection = (pca.components_.T @ scaling).astype(np.float32)
    return Reader(known, pca.mean_, projection, (_blurred(images) - pca.mean_) @ projection)


def _blurred(images: np.ndarray) -> np.ndarray:
    """[n, H, W, 3] uint8 -> [n, H W 3] float32 in [0, 1]."""
    values = ndimage.gaussian_filter(images.astype(np.float32) / 255, (0, _BLUR, _BLUR, 0))
    return values.reshape(len(values), -1)


def distort(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turns (by up to 8 degrees), scales (8 %), shifts (3 %) and blurs an image, and adds noise.

    Args:
      image: [H, W, 3] uint8, with a white background.
      rng: generator of the random numbers.
    """
    side = image.shape[0]
    angle, zoom = np.deg2rad(rng.uniform(-8, 8)), rng.uniform(0.92, 1.08)
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / zoom
    centre = np.full(2, (side - 1) / 2)
    offset = centre - matrix @ centre + rng.uniform(-side / 32, side / 32, 2)
    channels = [
        ndimage.affine_transform(image[..., c].astype(np.float32), matrix, offset, order=1, cval=255.0)
        for c in range(3)
    ]
    blur = rng.uniform(0, 0.6)
    values = ndimage.gaussian_filter(np.stack(channels, axis=-1), (blur, blur, 0))
    return np.clip(values + rng.normal(0, 15, values.shape), 0, 255).astype(np.uint8)


def variants(emoji: Emoji) -> list[Emoji]:
    """Returns the emojis that differ from one in its skin tone only, or in its colour, with itself.

    The list is empty for an emoji that has neither a single skin tone nor a colour that can vary.
    """
    if len(emoji.tones) == 1:
        concepts = {emoji.concept}
        same = [each for each in emojis() if each.concept in concepts and len(each.tones) == 1]
    else:
        shape = emoji.concept.rpartition(" ")[2]
        concepts = {f"{colour} {shape}" for colour in COLOURS} if shape in SHAPES else set()
        same = [each for each in emojis() if each.concept in concepts]
    return same if emoji in same else []


# Pictures of several captions have the same variants.
_real = functools.lru_cache(maxsize=1024)(rasterize)


def read_part(image: np.ndarray, candidates: Sequence[Emoji]) -> Emoji:
    """Returns which of several emojis an image shows, at the pixels where their real pictures differ.

    Args:
      image: [H, W, 3] uint8.
      candidates: emojis from `variants`.
    """
    real = np.stack([_real(each, image.shape[0]).astype(float) for each in candidates])
    differ = real.std(axis=0).mean(axis=-1) > _DIFFERENT
    distances = np.abs(real - image)[:, differ].mean(axis=(1, 2))
    return candidates[int(distances.argmin())]


# --- Scores


def make_generator(
    config: TrainConfig, *, steps: int = 20, scale: float | None = None
) -> Callable[..., np.ndarray]:
    """Returns a function (params, texts, seed=0) -> uint8 [n, H, W, 3] that generates pictures.

    The i-th picture has the seed `seed` + i. The sampler is compiled in the first call.

    Args:
      config: the config of the stage that the weights are from.
      steps: sampling steps.
      scale: guidance scale; None for that of the config.
    """
    size, side = config.features.image_size, config.features.latent_side
    encoder = TextEncoder(config.features.text_encoder, config.features.text_length)
    denoiser = Denoiser.of(config.for_sampling())
    sample = make_sampler(denoiser, height=side, width=side, steps=steps, scale=scale)
    codec = make_codec(config.features)

    def generate(params: dict, texts: Sequence[str], seed: int = 0) -> np.ndarray:
        text, lengths = encoder.encode(texts)
        conditions = {
            "text": jnp.asarray(text),
            "text_mask": jnp.asarray(np.arange(text.shape[1]) < np.asarray(lengths)[:, None]),
        }
        if config.model.size_conditions:
            conditions["image_size"] = jnp.full((len(texts), 2), float(size))
            conditions["aspect_ratio"] = jnp.ones((len(texts), 1))
        keys = image_keys(seed + np.arange(len(texts)))
        return codec.decode(sample_in_batches(sample, params, keys, conditions, BATCH_SIZE))

    return generate


def score(wanted: Sequence[Emoji], images: np.ndarray) -> dict[str, Any]:
    """Compares generated pictures with what their captions ask for.

    Args:
      wanted: n emojis.
      images: [n, H, W, 3] uint8.

    Returns:
      pictures: n.
      emoji: share of the pictures in which the reader finds the emoji, or one that is drawn alike.
      concept: share of those in which it finds the concept, with any skin tones.
      part: share of those with `variants` that have the right skin tone or colour; nan if there are none.
    """
    pairs = list(zip(train_reader(images.shape[1]).read(images), wanted))
    same, names = originals(), _concepts()
    parts = [
        read_part(image, candidates) == emoji
        for emoji, image in zip(wanted, images)
        if (candidates := variants(emoji))
    ]
    return {
        "pictures": len(images),
        "emoji": float(np.mean([same[each.code] == same[emoji.code] for each, emoji in pairs])),
        "concept": float(np.mean([emoji.concept in names[same[each.code]] for each, emoji in pairs])),
        "part": float(np.mean(parts)) if parts else float("nan"),
    }


def measure(
    params: dict,
    config: TrainConfig,
    count: int,
    *,
    seed: int = 0,
    steps: int = 20,
    scale: float | None = None,
    one_in: int = 1,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Generates pictures from each of `SETS` and scores them.

    Args:
      params: weights of a stage.
      config, steps, scale: as in `make_generator`.
      count: number of captions in each set.
      seed: of the choice of captions, and of the first picture.
      one_in: as in `captions`.

    Returns:
      a row for each set, and one with the scores of the readers for distorted copies of real pictures; and a
      contact sheet with some pictures of each set.

    Raises:
      UserError: the model does not take captions.
    """
    if "text" not in config.model.conditions:
        raise UserError(
            f"'{config.name}' takes classes instead of captions: give a checkpoint of a model with captions, "
            "such as stage 2 or 3."
        )
    size = config.features.image_size
    generate = make_generator(config, steps=steps, scale=scale)
    rows, images, texts = [], [], []
    for name in SETS:
        wanted = captions(name, count, seed, one_in=one_in)
        generated = generate(params, [text for _, text in wanted], seed)
        rows.append({"captions": name} | score([emoji for emoji, _ in wanted], generated))
        shown = np.linspace(0, len(wanted) - 1, _SHOWN).astype(int)
        images += [generated[i] for i in shown]
        texts += [wanted[i][1] for i in shown]
    rng = np.random.default_rng(seed + 1)
    real = [emoji for emoji, _ in captions("trained", count, seed + 1, one_in=one_in)]
    distorted = np.stack([distort(rasterize(emoji, size), rng) for emoji in real])
    rows.append({"captions": "real pictures, distorted"} | score(real, distorted))
    head = {"stage": config.name, "pixels": size}
    return [head | row for row in rows], contact_sheet(np.stack(images), texts, _COLUMNS)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The results of `measure` as a Markdown table."""
    lines = [
        "| stage | captions | pictures | emoji | concept | tone or colour |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['stage']} | {row['captions']} | {row['pictures']} | {row['emoji']:.1%} | "
        f"{row['concept']:.1%} | {row['part']:.1%} |"
        for row in rows
    ]
    return "\n".join(lines)


@functools.cache
def _concepts() -> dict[str, set[str]]:
    """The concepts that are drawn alike, by the first code of the picture."""
    names: dict[str, set[str]] = {}
    for emoji in emojis():
        names.setdefault(originals()[emoji.code], set()).add(emoji.concept)
    return names


def contact_sheet(images: np.ndarray, texts: Sequence[str], columns: int, *, side: int = 128) -> np.ndarray:
    """Arranges pictures, enlarged to `side` pixels, with their captions below them.

    Args:
      images: [n, H, W, 3] uint8.
      texts: n captions.
      columns: pictures in a row.
      side: in pixels.

    Returns:
      [height, width, 3] uint8; the width depends only on `columns` and `side`.
    """
    font = ImageFont.load_default(size=11)
    lines = [textwrap.wrap(text, _LETTERS * side // 100) for text in texts]
    cell = side + _LINE * max(map(len, lines)) + 10
    sheet = Image.new("RGB", (columns * (side + 12), -(-len(images) // columns) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, text) in enumerate(zip(images, lines)):
        left, top = index % columns * (side + 12) + 6, index // columns * cell
        sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC), (left, top))
        for row, line in enumerate(text):
            middle = left + side / 2
            draw.text((middle, top + side + 2 + row * _LINE), line, fill="#444444", font=font, anchor="ma")
    return np.asarray(sheet)
