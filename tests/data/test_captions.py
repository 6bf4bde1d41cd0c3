"""Compares cleaning with diffusers, also for unusual text, and compares statistics with manual counts."""

import random
import re
import subprocess
import sys

import pytest

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.errors import UserError

NASTY = [
    "",
    "   ",
    "A plain caption of a Cat.",
    "<person> and <person>'s dog",
    "See https://example.com/a?b=c&d=%20e for more",
    "http:/broken.example and https:///three",
    "visit www.shop.co.uk/path/to or shop.com, now!",
    "www:/thing mail me@site.org please",
    "write to someone@example.com @nick_name42 hello",
    "<b>bold</b> <a href='x'>link</a><br/>line<p>para",
    "a < b and c > d <<not a tag>>",
    "<script>alert('x')</script> after",
    "<!-- comment --> visible &lt;tag&gt; &amp;amp; &quot;quoted&quot; &#39;x&#39;",
    "&amp;quot;twice&amp;quot; &ampersand &quot",
    "100%25 percent%20encoded+plus+signs",
    "%E4%B8%AD%E6%96%87 caf%C3%A9",
    "汉字 and 漢字 mixed with かな and ㍿ ㊗ ䷀ 㐀 ㇀ ㇰ",
    "dashes – — ‒ ― ‐ − ﹣ － 〜 ゠ all",
    "«guillemets» “curly” ‘single’ `tick` ´acute´ ¨",
    '"""AUSVERKAUFT""" ***SALE*** ###',
    "''''many'''' quotes\"'\"'",
    "ip 192.168.0.1 and 10.0.0.255:80",
    "article 1:23   ",
    "literal \\n newline and\nreal\r\nnewline\ttab",
    "#1 #12 #123 #1234 #12345 #123456789",
    "ids 123456 1234567890 12345",
    "IMG_1234.jpg photo.png c:\\dir\\file.webp some.pdf.exe",
    "wait... what.. ok . . . done . ",
    "trade®mark™ copy© bullet• dot· º½¾¿¡§~ [x] {y} |z| (w) a\\b a/b a*b",
    "this-is-my-cute-cat",
    "this_is_my_cute_cat_2020",
    "one-two-three only",
    "mojibake: cafÃ© â€œquotesâ€\x9d itâ€™s",
    "schÃ¶n &eacute;t&eacute; &hellip; &nbsp; end",
    "jc6640 jc6640vc 6640vc231 a1b2c3 abcd1234 x1 4k",
    "free shipping worldwide free shipping",
    "worldwide   shipping and free download free",
    "download now, click for details, click on here",
    "jpg image png images bmp mp4 jpgs",
    "page 12 of Page   3",
    "j2d1a2a b7n5k2xyz",
    "1920x1080 12.5x7 3х4 10×20 2x",
    "title : subtitle :x : y",
    "a,b,c d.e f/g 1,2 3.4",
    "'quoted whole caption'",
    '"double quoted"',
    "-leading dash and trailing-",
    ":leading colon, trailing plus+",
    ".hidden",
    "_under_",
    "; ; ;",
    "emoji 😀👍🏽 ❤️ 🇩🇪 family 👨‍👩‍👧",
    "zero\u200bwidth \u00a0nbsp \ufeffbom \u202eright-to-left",
    "ﬁ ligature ﬂ full ｗｉｄｔｈ Ⅷ",
    "control \x00 \x07 \x1b[31mred\x1b[0m",
    "Привет, МИР! ёлка – дерево",
    "İstanbul ẞ ǅ",
    "very    spaced      out",
    "tag soup <div><span>unclosed <img src=x.png> & stuff",
    "unclosed &lt;b&gt; &unknown; &#128512; &#x1F600;",
    "https://x.com",
    "100",
    "a" * 300 + " " + "1" * 300,
    "cat.com dog.org/bird/fish_1-2/ @end",
    "e-mail, well-known, state-of-the-art thing",
    "$5.99 €10,50 50% off!!! only today!!!",
    "the cat's whiskers' tips 'round",
]


@pytest.fixture(scope="module")
def diffusers_pipeline():
    module = pytest.importorskip("diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha")
    parts = ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")
    return module.PixArtAlphaPipeline(**dict.fromkeys(parts))  # cleaning captions needs no models


def check(pipeline, caption):
    once = pipeline._clean_caption(caption)
    assert C.clean_caption(caption, passes=1) == once
    assert [C.clean_caption(caption)] == pipeline._text_preprocessing(caption, clean_caption=True)
    assert [C.prepare_caption(caption, clean=False)] == pipeline._text_preprocessing(caption)
    assert C.prepare_caption(caption, clean=False, lower_case=False) == caption.strip()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("caption", NASTY)
def test_cleaning_equals_diffusers(diffusers_pipeline, caption):
    check(diffusers_pipeline, caption)


@pytest.mark.filterwarnings("ignore")
def test_cleaning_equals_diffusers_on_spliced_captions(diffusers_pipeline):
    rng = random.Random(0)
    pieces = [piece for caption in NASTY[:-6] for piece in caption.split(" ")]
    for _ in range(400):
        check(diffusers_pipeline, rng.choice(["", " ", "."]).join(rng.choices(pieces, k=rng.randint(1, 9))))


def test_cleaning_of_some_captions():
    caption = "  A RED Car — 1920x1080, https://cars.com/x free shipping "
    assert C.clean_caption(caption, passes=1) == "a red car - ,"
    assert C.clean_caption(caption) == "a red car -"  # the second pass removes what the first one left
    assert C.clean_caption('"<b>Two</b> dogs"') == "two dogs"


@pytest.mark.parametrize(
    "caption, removed",
    [
        ("a photo of sks123 dog", "sks123"),
        ("A 4x4 Truck, don’t stop", "4x4"),
        ("a dog, a Dog", None),
        ("two <b>dogs</b>", "b b"),
        ("an R2D2%20robot", "r2d2"),
        ("🐱🐱", None),
        ("", None),
    ],
)
def test_words_that_cleaning_removes(caption, removed):
    loss = C.cleaning_loss(caption)
    assert (loss and loss.removed) == removed
    if loss:
        assert (loss.caption, loss.cleaned, loss.emptied) == (caption, C.prepare_caption(caption), False)
    assert C.cleaning_loss(caption, clean=False) is None


@pytest.mark.parametrize(
    "caption",
    [
        "一只橘猫坐在窗台上",
        "https://example.org/a/b",
        "img_2034.jpg",
        "1234567",
        "(1234567).",
        "猫。",
        "@someone",
        "...",
        "5.jpg \u200b",
    ],
)
def test_captions_that_cleaning_empties(caption):
    assert C.cleaning_loss(caption).emptied
    one, other = C.Caption(caption, 2.0), C.Caption("a photo of sks123 dog")
    kept, losses = C.without_emptied((one, other), clean=True)
    assert kept == (other,) and [loss.caption for loss in losses] == [caption, other.text]
    assert C.without_emptied((one,), clean=False) == ((one,), ())
    with pytest.raises(I.Refused, match=r"emptied_caption: .*clean_caption=False keeps it"):
        C.without_emptied((one,), clean=True)
    assert C.without_emptied((), clean=True) == ((), ())


@pytest.mark.parametrize(
    "text", ["\u200b", " \ufeff\u200d\n", "\u2800", "\u3164", "\u00ad", "\x00", b"\xe2\x80\x8b"]
)
def test_invisible_text_is_no_caption(text):
    assert C.captions_of(text) == ()
    assert C.captions_of([text, "a cat"]) == (C.Caption("a cat"),)


def test_text_that_is_not_unicode_is_a_bad_caption():
    """JSON can have half of a surrogate pair, for example where an emoji was cut."""
    with pytest.raises(I.Refused, match="bad_caption: character 6 is not Unicode"):
        C.captions_of(["a dog", "a cat \ud83d"])
    with pytest.raises(I.Refused, match="bad_caption"):
        C.captions_of_record({"captions": [{"text": "a dog", "name": "\ud83d"}]}, None)


def test_summary_of_cleaning():
    losses = [C.cleaning_loss(text) for text in ("1234567", "a 4x4 truck")]
    assert C.cleaning_summary(losses, "cleaned.jsonl") == (
        "2 captions lost words in cleaning (all in cleaned.jsonl), for example 'a 4x4 truck' lost '4x4'; "
        "--config.features.text_encoder.clean_caption=False turns cleaning off"
    )


def test_markup_that_the_parser_rejects_is_kept_as_text():
    assert "dog" in C.clean_caption("a <![x dog")
    assert "cat" in C.clean_caption("<![if cat")


def test_error_if_a_cleaning_package_is_missing():
    program = (
        "import sys; sys.modules['ftfy'] = None\n"
        "from pixart_jax.data import captions\n"
        "captions.clean_caption('x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode and re.search("UserError: .*ftfy.*pip install", done.stderr)


def fake_tagger(text):
    """A tagger for text in which every word is written as word/TAG."""
    return [tuple(token.rsplit("/", 1)) for token in text.split()]


def count(captions, *options):
    """Returns the statistics of captions; an item is the caption, or the list of captions, of one image."""
    counter = C.NounCounter(*options)
    for of_image in captions:
        counter.add(of_image)
    return counter.statistics()


def test_statistics_of_some_captions():
    captions = [
        "A/DT cat/NN sits/VBZ on/IN mats/NNS",  # cat, mats
        "The/DT Cat/NNP likes/VBZ London/NNP 42/NN",  # cat, london; 42 has no letter
        "nothing/RB here/RB",
        "",
        *["dog/NN"] * 11,  # valid: more than 10
        *["bird/NN"] * 10,  # not valid: exactly 10
    ]
    stats = count(captions, fake_tagger)
    assert stats == C.CaptionStatistics(images=25, total_nouns=25, distinct_nouns=5, valid_nouns=1)
    assert stats.valid_share == pytest.approx(0.2) and stats.average == 1.0
    assert count(captions, fake_tagger, 1).valid_nouns == 3
    together = count([captions[:2], captions[2:]], fake_tagger)
    assert (together.images, together.total_nouns, together.average) == (2, 25, 12.5)


def test_statistics_without_captions():
    stats = count([], fake_tagger)
    assert (stats.valid_share, stats.average, stats.images) == (0.0, 0.0, 0)


def test_nouns_found_by_the_default_tagger():
    caption = (
        "A large wooden boat floats on the calm lake near the mountain. "
        "Two children and a dog are playing on the beach in Kyoto."
    )
    # boat lake mountain children dog beach kyoto
    stats = count([caption] * 11)
    assert stats == C.CaptionStatistics(images=11, total_nouns=77, distinct_nouns=7, valid_nouns=7)


def test_statistics_table():
    rows = {"original": C.CaptionStatistics(2, 3000, 40, 10), "llava": C.CaptionStatistics(2, 7, 5, 0)}
    assert C.statistics_table(rows).splitlines() == [
        "captions  images  VN  DN  VN/DN  total nouns  average",
        "original       2  10  40  25.0%        3,000   1500.0",
        "llava          2   0   5   0.0%            7      3.5",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("textblobb", "Did you mean 'textblob'"),
        ("spacy", "must be one of"),
        ("spacy:en_core_web_sm", "package 'spacy'.*pip install spacy"),
        ("nltk", "nltk.downloader"),
    ],
)
def test_errors_of_unusable_taggers(name, words, monkeypatch):
    if name == "nltk":
        nltk = pytest.importorskip("nltk")
        monkeypatch.setattr(nltk.data, "path", [])
    else:
        monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(UserError, match=words):
        C.load_tagger(name)


def test_caption_fields_of_a_flag():
    assert C.parse_caption_fields("") is None
    assert C.parse_caption_fields("prompt") == {"prompt": 1.0}
    assert C.parse_caption_fields(" prompt=1, sharegpt4v = 0.5") == {"prompt": 1.0, "sharegpt4v": 0.5}
    for text in ("a=0", "a=-1", "a=x", "a=nan", "a=inf"):
        with pytest.raises(UserError, match="positive number"):
            C.parse_caption_fields(text)


def test_a_prompt_that_cleaning_would_take_minutes_for():
    with pytest.raises(UserError, match=r"^prompt 'a\.a\.a.*characters\)' is too long: shorten it") as error:
        C.prepare_caption("a." * 1_000_000)
    assert len(str(error.value)) < 400


def test_weights_of_caption_fields_are_float32():
    for weight in ("1e39", "1e-39", "nan", "inf", "-1", 10**400):
        with pytest.raises(UserError, match=r"caption weight of 'prompt' is .*: must be a positive number"):
            C.field_weights({"prompt": weight})
