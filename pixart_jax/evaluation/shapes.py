"""Does an image show the scene in its prompt? A reader for images of the shapes data set.

Each pixel gets the nearest colour of the palette. Connected pixels of one colour are a thing, and its shape
and size are those of the template that overlaps it most. On rendered scenes the reader makes no mistakes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from pixart_jax.data.shapes import COLOURS, RELATIONS, SHAPES, SIZES, Scene, Thing, mask

# Smaller groups of connected pixels are ignored as noise; the smallest thing has 5 pixels.
MIN_PIXELS = 4
# A thing has no known shape if its overlap with every template is below this.
MIN_OVERLAP = 0.6
# Offsets of the templates, in pixels, from the corner of the thing's bounding box.
SHIFTS = range(-1, 2)

SCORES = ("colour", "shape", "number", "relation", "scene")


@dataclasses.dataclass(frozen=True)
class Found:
    """A thing found in an image.

    Attributes:
      colour: a key of `COLOURS`.
      shape, size: keys of `SHAPES` and `SIZES`, or '' if no template fits.
      centre: (row, column) of the centre of its bounding box, in pixels.
    """

    colour: str
    shape: str
    size: str
    centre: tuple[float, float]


def read_scene(image: np.ndarray) -> list[Found]:
    """Finds the things in an image, uint8 [H, W, 3]; larger ones first."""
    palette = np.array([(0, 0, 0), *COLOURS.values()], float)
    nearest = np.square(image[:, :, None].astype(float) - palette).sum(axis=-1).argmin(axis=-1)
    things = []
    for number, colour in enumerate(COLOURS, 1):
        if np.sum(nearest == number) < MIN_PIXELS:
            continue
        parts, count = ndimage.label(nearest == number, structure=np.ones((3, 3)))
        for part in range(1, count + 1):
            pixels = parts == part
            if pixels.sum() >= MIN_PIXELS:
                box = np.argwhere(pixels)
                centre = (box.min(axis=0) + box.max(axis=0)) / 2
                things.append((pixels.sum(), Found(colour, *_best_template(pixels), tuple(centre))))
    return [thing for _, thing in sorted(things, key=lambda pair: -pair[0])]


def _best_template(pixels: np.ndarray) -> tuple[str, str]:
    """Shape and size of the template with the largest intersection over union with bool pixels [H, W]."""
    names, templates, total = _templates()
    side = templates.shape[1]
    padded = np.pad(pixels, side)
    top, left = np.argwhere(padded).min(axis=0)
    best, found = MIN_OVERLAP, ("", "")
    for down, right in itertools.product(SHIFTS, SHIFTS):
        window = padded[top + down :, left + right :][:side, :side]
        shared = (templates & window).sum(axis=(1, 2))
        overlap = shared / (total + pixels.sum() - shared)
        if overlap.max() > best:
            best, found = overlap.max(), names[int(overlap.argmax())]
    return found


@functools.cache
def _templates() -> tuple[list[tuple[str, str]], np.ndarray, np.ndarray]:
    """The templates: names (shape, size) [n], masks [n, side, side], and the number of pixels of each [n].

    A mask is in the top left corner of its square.
    """
    side = max(SIZES.values())
    names = list(itertools.product(SHAPES, SIZES))
    masks = [np.pad(mask(shape, SIZES[size]), (0, side - SIZES[size])) for shape, size in names]
    return names, np.stack(masks), np.sum(masks, axis=(1, 2))


def score(scene: Scene, found: Sequence[Found]) -> dict[str, float]:
    """Compares the things found in an image with the scene in its prompt.

    If the scene has n things, the n largest things found are paired with them in the way that makes most
    colours and shapes agree. A missing thing counts as a disagreement; extra things only lower the score of
    the number.

    Returns:
      colour, shape: share of the scene's things whose colour or shape agrees.
      number: 1 if the numbers of things agree.
      relation: 1 if all colours and shapes agree, and so does the relation, if the scene has one.
      scene: 1 if all of these are 1 and the sizes agree.
    """
    things = scene.things
    candidates = [*found[: len(things)], *[None] * (len(things) - len(found))]
    pairings = itertools.permutations(candidates)
    best = max(pairings, key=lambda pairing: sum(_agreements(t, f) for t, f in zip(things, pairing)))
    colour = np.mean([f is not None and f.colour == t.colour for t, f in zip(things, best)])
    shape = np.mean([f is not None and f.shape == t.shape for t, f in zip(things, best)])
    number = len(found) == len(things)
    kinds = colour == shape == 1
    relation = kinds and (not scene.relation or _relation_holds(scene.relation, *best))
    sizes = kinds and all(f.size == t.size for t, f in zip(things, best))
    values = (colour, shape, number, relation, number and relation and sizes)
    return dict(zip(SCORES, map(float, values)))


def _agreements(thing: Thing, found: Found | None) -> float:
    if found is None:
        return -1.0
    # The size breaks ties between pairings that otherwise agree equally.
    return (found.colour == thing.colour) + (found.shape == thing.shape) + 0.1 * (found.size == thing.size)


def _relation_holds(relation: str, first: Found, second: Found) -> bool:
    """Whether the larger component of the offset between the centres points in the relation's direction."""
    offset = np.subtract(first.centre, second.centre)
    along = float(offset @ RELATIONS[relation])
    return along > 0 and along >= np.abs(offset).max()


def score_all(scenes: Sequence[Scene], images: np.ndarray) -> dict[str, float]:
    """The means of `score` over n scenes and their images, uint8 [n, H, W, 3]."""
    rows = [score(scene, read_scene(image)) for scene, image in zip(scenes, images, strict=True)]
    return {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
