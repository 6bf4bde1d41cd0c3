"""A synthetic data set of simple scenes, with captions of three densities, for compositional generalization.

A scene has one or two things on black, in the cells of a 2 x 2 grid. Each thing has a size, a colour and a
shape. Two things differ in colour, and the first is left of, right of, above or below the second.

The kind of a thing is its colour and its shape, as numbers (their positions in `COLOURS` and `SHAPES`). The
splits are:

    novel   scenes with a kind whose two numbers are equal: red square, green plus, blue cross, yellow
            corner. No training scene has a thing of these kinds.
    test    scenes with two things of other kinds, whose four numbers add up to a multiple of 5. Training
            scenes have each of these kinds, alone and with others, but not the two together.
    train   all other scenes. A third of the training samples have one thing, the others have two.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np

from pixart_jax.data.captions import Caption
from pixart_jax.errors import UserError, one_of
from pixart_jax.flags import LARGEST_SEED, whole_number

SHAPES = ("square", "plus", "cross", "corner")
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "purple": (255, 0, 255),
    "cyan": (0, 255, 255),
}
# Sides of the things in pixels.
SIZES = {"small": 3, "large": 4}
# Direction (down, right) from the second thing to the first.
RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
DENSITIES = ("noun", "attributes", "full")
SPLITS = ("train", "test", "novel")

IMAGE_SIZE = 8
# Side of a cell of the 2 x 2 grid in pixels.
CELL = 4
HELD_OUT_EVERY = 5
SINGLE_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene. The fields are names in `SIZES`, `COLOURS` and `SHAPES`."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"

    @property
    def kind(self) -> tuple[int, int]:
        """Positions of the colour and the shape in `COLOURS` and `SHAPES`."""
        return list(COLOURS).index(self.colour), SHAPES.index(self.shape)

    @property
    def novel(self) -> bool:
        """Whether no training scene has a thing of this kind."""
        colour, shape = self.kind
        return colour == shape


@dataclasses.dataclass(frozen=True)
class Scene:
    """One thing, or two things and the relation of the first to the second, a name in `RELATIONS`."""

    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def split(self) -> str:
        """'train', 'test' or 'novel', by the rules in the module docstring."""
        if any(thing.novel for thing in self.things):
            return "novel"
        held_out = len(self.things) == 2 and sum(sum(t.kind) for t in self.things) % HELD_OUT_EVERY == 0
        return "test" if held_out else "train"

    def caption(self, density: str = "full") -> str:
        """Returns the caption of a density, for example:

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


# Pixels of each shape, by its name and side.
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
    """Returns the pixels of a shape, bool [side, side]."""
    return np.array([list(row) for row in _PIXELS[shape, side].split()]) == "#"


@functools.cache
def all_things() -> tuple[Thing, ...]:
    """Returns things of all sizes, colours and shapes."""
    return tuple(itertools.starmap(Thing, itertools.product(SIZES, COLOURS, SHAPES)))


@functools.cache
def all_scenes(split: str) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Returns all distinct scenes of a split: those with one thing, and those with two.

    Raises:
      UserError: the split is unknown.
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
    """Returns a random scene of a split; scenes of 'test' and 'novel' always have two things."""
    singles, pairs = all_scenes(split)
    scenes = singles if split == "train" and rng.random() < SINGLE_SHARE else pairs
    return scenes[rng.integers(len(scenes))]


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene. The cells of the things are random, but two things share a row or a column.

    Args:
      scene: the scene.
      rng: chooses the cells, in agreement with the relation.

    Returns:
      uint8 [8, 8, 3].
    """
    if scene.relation:
        # The relation fixes one coordinate of both cells. The other one is random, the same for both things.
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
    """The image of a scene, with the interface of `sources.Example`.

    Attributes:
      key: "shapes/train/000007".
      pixels: uint8 [8, 8, 3].
      captions: one for each requested density.
      label: position of the first thing's shape in `SHAPES`.
      scene: the scene in the image.
    """

    key: str
    pixels: np.ndarray
    captions: tuple[Caption, ...]
    label: int
    scene: Scene

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.pixels.shape[1]

    def decode(self) -> np.ndarray:
        """Returns the image, uint8 [8, 8, 3]."""
        return self.pixels

    def size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels."""
        return self.height, self.width


class ShapesSource:
    """Random scenes, with the interface of `sources.Source`. Example i is a function of (seed, split, i).

    Args:
      split: 'train', 'test' or 'novel'.
      image_size: must be 8.
      density: density of the captions; '' for all three with equal weights.
      count: number of examples; as text if it comes from a command line.
      seed: seed of the scenes; as text if it comes from a command line.
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
            raise UserError(f"image size {image_size} of the shapes: it must be {IMAGE_SIZE}.")
        for name, value, least, most in (("count", count, 1, 10_000_000), ("seed", seed, 0, LARGEST_SEED)):
            if whole_number(value, least, most) is None:
                raise UserError(
                    f"{name} '{value}' of the shapes: it must be a whole number in [{least}, {most}]."
                )
        all_scenes(split)[1][0].caption(density or "full")  # raises if the split or the density is unknown
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
