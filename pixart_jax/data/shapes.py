"""Drawn scenes that need no download, with captions of three densities.

A scene has one or two things, each of a size, a colour and a shape, in the cells of a 2 x 2 grid on black; of
two, which differ in colour, one is left of, right of, above or below the other. What is held out:

    novel   a kind is a colour and a shape. The kinds with equal numbers (red square, green plus, blue
            cross, yellow corner) are drawn in no training scene.
    test    of the other kinds, two that stand together in no training scene: those whose four numbers,
            of colours and shapes, add up to a multiple of 5. Each alone, and each with others, is drawn.
    train   everything else: one thing in a third of the scenes, two in the others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from pixart_jax.data.captions import Caption
from pixart_jax.errors import UserError, one_of

SHAPES = ("square", "plus", "cross", "corner")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
}
# Side in pixels.
SIZES = {"small": 3, "large": 4}
# Offset (down, right) of the first thing from the second.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
DENSITIES = ("noun", "attributes", "full")
SPLITS = ("train", "test", "novel")

IMAGE_SIZE = 8
# Things stand in the cells of a 2 x 2 grid.
CELL = 4
HELD_OUT_EVERY = 5
SINGLE_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene: names in `SIZES`, `COLOURS` and `SHAPES`."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def kind(self) -> tuple[int, int]:
        """Numbers of the colour and the shape."""
        return list(COLOURS).index(self.colour), SHAPES.index(self.shape)

    @property
    def novel(self) -> bool:
        """Whether its kind is drawn in no training scene."""
        colour, shape = self.kind
        return colour == shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing, or two and the relation of the first to the second, a name in `RELATIONS`."""

    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def split(self) -> str:
        """'train', 'test' or 'novel', by the rule of the module."""
        if any(thing.novel for thing in self.things):
            return "novel"
        held_out = len(self.things) == 2 and sum(sum(t.kind) for t in self.things) % HELD_OUT_EVERY == 0
        return "test" if held_out else "train"

    def caption(self, density: str = "full") -> str:
        """The caption of a density.

        noun        a plus
        attributes  a small red plus and a large cyan square
        full        a small red plus left of a large cyan square
        """
        first, *second = self.things
        if density == "noun":
            return f"a {first.shape}"
        one_of("caption density of the shapes", density, DENSITIES)
        if not second:
            return str(first)
        return f"{first} {self.relation if density == 'full' else 'and'} {second[0]}"


# Pixels of every shape, by its side.
_PIXELS = {
    ("square", 3): "### ### ###",
    ("plus", 3): ".#. ### .#.",
    ("cross", 3): "#.# .#. #.#",
    ("corner", 3): "#.. #.. ###",
    ("square", 4): "#### #### #### ####",
    ("plus", 4): ".##. #### #### .##.",
    ("cross", 4): "#..# .##. .##. #..#",
    ("corner", 4): "#... #... #... ####",
}


def mask(shape: str, side: int) -> np.ndarray:
    """Pixels of a shape, bool [side, side]."""
    return np.array([list(row) for row in _PIXELS[shape, side].split()]) == "#"


@functools.cache
def all_things() -> tuple[Thing, ...]:
    """Every size, colour and shape."""
    return tuple(itertools.starmap(Thing, itertools.product(SIZES, COLOURS, SHAPES)))


@functools.cache
def all_scenes(split: str) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """The different scenes of a split: those of one thing, and those of two, which differ in colour.

    Raises:
      UserError: unknown split.
    """
    one_of("split of the shapes", split, SPLITS)
    singles = (Scene((thing,)) for thing in all_things())
    pairs = (
        Scene(things, relation)
        for things in itertools.product(all_things(), repeat=2)
        if things[0].colour != things[1].colour
        for relation in RELATIONS
    )
    return tuple(s for s in singles if s.split == split), tuple(s for s in pairs if s.split == split)


def random_scene(rng: np.random.Generator, split: str = "train") -> Scene:
    """Draws a scene of a split; in 'test' and 'novel' always two things."""
    singles, pairs = all_scenes(split)
    scenes = singles if split == "train" and rng.random() < SINGLE_SHARE else pairs
    return scenes[rng.integers(len(scenes))]


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws the things in random cells that agree with the relation: two things share a row or a column.

    Returns:
      uint8 [8, 8, 3].
    """
    if scene.relation:
        # One row or column is drawn; the second thing stands where the first one's offset points away from.
        offset = np.array(RELATIONS[scene.relation])
        first = np.where(offset == 0, rng.integers(2), offset > 0)
        cells = [first, first - offset]
    else:
        cells = [rng.integers(2, size=2)]
    image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for thing, cell in zip(scene.things, cells):
        side = SIZES[thing.size]
        top, left = cell * CELL + (CELL - side) // 2
        image[top : top + side, left : left + side][mask(thing.shape, side)] = COLOURS[thing.colour]
    return image


@dataclasses.dataclass(frozen=True)
class ShapesExample:
    """One drawn scene, with the interface of `sources.Example`.

    Attributes:
      key: "shapes/train/000007".
      pixels: uint8 [8, 8, 3].
      captions: at all densities, or those that were asked for.
      label: number of the first thing's shape, the noun of the sparse caption.
      scene: what is drawn.
    """

    key: str
    pixels: np.ndarray
    captions: tuple[Caption, ...]
    label: int
    scene: Scene

    @property
    def height(self) -> int:
        """Pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Pixels."""
        return self.pixels.shape[1]

    def decode(self) -> np.ndarray:
        """Returns the image, uint8 [8, 8, 3]."""
        return self.pixels

    def size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels."""
        return self.height, self.width


class ShapesSource:
    """Scenes drawn on the fly, with the interface of `sources.Source`; example i is a function of (seed, i).

    Args:
      split: 'train', 'test' or 'novel'.
      image_size: 8, the size that scenes are drawn at.
      density: of the captions; '' for all three, each with the same weight.
      count: examples; the numbers may come as text, from a command line.
      seed: of the drawing.
    """

    kind = "shapes"
    channels = 3

    def __init__(
        self,
        split: str = "train",
        image_size: int = IMAGE_SIZE,
        density: str = "",
        count: int | str = 8192,
        seed: int | str = 0,
    ):
        if image_size != IMAGE_SIZE:
            raise UserError(f"image size {image_size} of the shapes: they are drawn at {IMAGE_SIZE} pixels.")
        for name, value, least in (("count", count, 1), ("seed", seed, 0)):
            if not str(value).isdecimal() or int(value) < least:
                raise UserError(
                    f"{name} '{value}' of the shapes: it must be a whole number, at least {least}."
                )
        all_scenes(split)[1][0].caption(density or "full")  # refuses what is unknown
        self._split, self._densities = split, (density,) if density else DENSITIES
        self._count, self._seed = int(count), int(seed)
        self.classes = list(SHAPES)

    def __len__(self) -> int:
        return self._count

    def key(self, index: int) -> str:
        """Returns the key of a scene."""
        return f"shapes/{self._split}/{index:06d}"

    def __getitem__(self, index: int) -> ShapesExample:
        index = range(self._count)[index]
        rng = np.random.default_rng([self._seed, SPLITS.index(self._split), index])
        scene = random_scene(rng, self._split)
        captions = tuple(Caption(scene.caption(density), 1.0, density) for density in self._densities)
        label = scene.things[0].kind[1]
        return ShapesExample(self.key(index), draw(scene, rng), captions, label, scene)
