"""Builds the site of docs/ strictly, and checks that it is complete."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from bs4 import BeautifulSoup

import pixart_jax
from pixart_jax.config import all_fields
from pixart_jax.flags import range_words

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md"))
COMMANDS = sorted(
    path.stem for path in (ROOT / "pixart_jax").glob("*.py") if "\nclass Flags(" in path.read_text()
)


def flag_fields(command):
    fields = dataclasses.fields(importlib.import_module(f"pixart_jax.{command}").Flags)
    return {field.name: field for field in fields if "help" in field.metadata}


# --- The built site ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The finished process of Sphinx, and the folder of the site."""
    out = tmp_path_factory.mktemp("site")
    # The command of `make docs`. The environment of other commands has the eight devices of the tests.
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", DOCS, out / "html"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, "-d", out / "doctrees"], cwd=out, env=environment, capture_output=True, text=True
    )
    return done, out / "html"


@pytest.fixture(scope="module")
def site(build):
    """The parsed pages of the site, by path."""
    _, folder = build
    return {
        path.relative_to(folder).as_posix(): BeautifulSoup(path.read_text(), "html.parser")
        for path in sorted(folder.rglob("*.html"))
    }


def test_the_site_builds_without_warnings(build):
    done, _ = build
    assert (done.returncode, done.stderr) == (0, "")


def test_every_page_is_in_the_navigation_and_only_once(site):
    links = site["index.html"].select(".sidebar-tree a.reference.internal")
    found = [link["href"].removesuffix(".html") for link in links if link["href"] != "#"]
    assert sorted(found) == [page for page in PAGES if page != "index"]


def test_the_navigation_is_in_the_order_of_what_users_do(site):
    captions = [caption.get_text() for caption in site["index.html"].select(".sidebar-tree .caption")]
    assert captions == [
        *("Install", "Sample", "Fine-tune", "Train from scratch", "Scale", "Evaluate", "Convert"),
        *("Python API", "Reference", "How it works", "Contributing"),
    ]


def test_every_internal_link_and_image_resolves(build, site):
    _, folder = build
    anchors = {path: {tag["id"] for tag in page.find_all(id=True)} for path, page in site.items()}
    broken, count = [], 0
    for path, page in site.items():
        for tag in page.find_all(href=True) + page.find_all(src=True):
            address = urlsplit(tag.get("href") or tag.get("src"))
            if address.scheme or address.netloc:
                continue
            count += 1
            target = unquote(address.path)
            file = (folder / path).parent / target if target else folder / path
            name = os.path.relpath(file, folder)
            anchor = unquote(address.fragment)
            if not file.is_file() or (anchor and name in anchors and anchor not in anchors[name]):
                broken.append((path, tag.get("href") or tag.get("src")))
    assert not broken
    assert count > 1000


# --- The reference -----------------------------------------------------------------------------------


def plain(text):
    """Text without white space and without the marks of code."""
    return "".join(text.replace("`", "").split())


def check_described(page, program, name, field):
    """Checks that a page says about a flag what its declaration does."""
    head = page.find(id=f"cmdoption-{program}-{name}")
    assert head is not None, f"--{name} is not on the page of {program}"
    text, known = plain(head.parent.get_text()), field.metadata
    # The name of a page becomes a link that shows its title.
    for part in re.split(r"docs/[\w-]+\.md", known["help"]):
        assert plain(part) in text
    for other in re.findall(r"docs/([\w-]+)\.md", known["help"]):
        assert head.parent.find("a", href=f"../{other}.html")
    for choice in known["choices"] or ():
        assert choice in text
    assert plain(range_words(known)) in text
    if field.default not in (None, "", ()):
        assert plain(f"Default: {field.default}.") in text


def test_these_are_all_commands():
    assert COMMANDS == ["benchmark", "caption", "convert", "evaluate", "precompute", "sample", "train"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_of_a_command_describes_every_flag(site, command):
    page, program = site[f"commands/{command}.html"], f"pixart-{command}"
    fields = flag_fields(command)
    assert fields
    for name, field in fields.items():
        check_described(page, program, name, field)


def test_the_page_of_the_config_describes_every_field(site):
    for name, info in all_fields().items():
        check_described(site["commands/config.html"], "config", f"config.{name}", info.field)


@pytest.mark.parametrize("command", ["benchmark", "evaluate"])
def test_the_page_of_a_command_names_its_modes(site, command):
    text = site[f"commands/{command}.html"].find(id="modes").get_text()
    for mode in importlib.import_module(f"pixart_jax.{command}").MODES:
        assert f"{mode}:" in text


def test_every_public_name_is_in_the_api_reference(site):
    found = {
        tag["id"] for path, page in site.items() if path.startswith("api/") for tag in page.find_all(id=True)
    }
    names = {f"pixart_jax.{name}" for name in pixart_jax.__all__}
    assert {name for name in names if not {name, f"module-{name}"} & found} == set()


# Constants and modules in snippets of the pages; the reference describes functions and classes.
NOT_DESCRIBED = {"pixart_jax.denoiser.NETWORK", "pixart_jax.training.objectives.diffusion"}


def imported_in_snippets():
    for page in PAGES:
        for code in re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.M | re.S):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module.startswith("pixart_jax"):
                    yield from (f"{node.module}.{name.name}" for name in node.names)


def test_what_the_snippets_import_is_in_the_api_reference(site):
    found = {tag["id"] for page in site.values() for tag in page.find_all(id=True)}
    names = set(imported_in_snippets())
    assert len(names) > 10
    assert names - found == NOT_DESCRIBED


# --- What the pages say ------------------------------------------------------------------------------

# Commands may be written over several lines, and in the text.
COMMAND = re.compile(r"(?:python -m pixart_jax\.|pixart-)(\w+)((?:[^\n`]|\\\n)*)")


def test_every_flag_in_a_command_of_the_pages_exists():
    unknown, count = [], 0
    for path in (ROOT / "README.md", *(DOCS / f"{page}.md" for page in PAGES)):
        for command, rest in COMMAND.findall(path.read_text()):
            if command not in COMMANDS:
                continue
            known = {*flag_fields(command), "help"}
            known |= {f"no{name}" for name in known} | {f"config.{name}" for name in all_fields()}
            for name in re.findall(r"(?<![\w-])--([\w.]+)(?!\.\*)", rest):
                count += 1
                if name.rstrip(".") not in known:
                    unknown.append((path.name, command, name))
    assert not unknown
    assert count > 200


# Folders whose files the pages name. PART and the like stand for several names.
NAMED = re.compile(
    r"`(?:python |bash )?((?:benchmarks|configs|docs|launch|notebooks|pixart_jax|tests)/[\w./-]+\w)"
)
PLACEHOLDER = re.compile(r"\b[A-Z]+(?:_[A-Z]+)*\.\w+$")


def test_every_file_that_a_page_names_exists():
    names = {(page, name) for page in PAGES for name in NAMED.findall((DOCS / f"{page}.md").read_text())}
    missing = [(page, name) for page, name in names if not (ROOT / name).exists()]
    assert [each for each in missing if not PLACEHOLDER.search(each[1])] == []
    assert len(names) > 100


# Where a figure comes from: a command, a script, raw results, a test, or a publication.
ORIGIN = re.compile(
    r"benchmarks/|tests/|`make |^    make |python -m pixart_jax\.benchmark|launch/recipe\.sh|\.json`|\.txt`"
    r"|arxiv\.org|[Pp]aper's|official configs|PRX",
    re.MULTILINE,
)
# A cell with a measured or counted figure: a number that is not whole, or one with a unit.
FIGURE = re.compile(
    r"(?<![\w^.-])~?[+−-]?\d[\d,]*(?:\.\d+)?(?:\s?(?:%|ms|s|GiB|GB|MiB|kB)(?!\w))|(?<![\w.-])\d+\.\d+(?![\w.])"
)


def tables_of_figures(text):
    """Tables in which at least four cells have a figure, with the paragraphs that may say where it is from.

    These are the table itself, the two paragraphs before and after it, and the first two of its section.
    """
    for section in re.split(r"^(?=#{1,3} )", text, flags=re.MULTILINE):
        parts = re.split(r"\n\s*\n", section)
        for number, part in enumerate(parts):
            cells = [
                cell for line in part.splitlines()[2:] if line[:1] == "|" for cell in line.split("|")[2:]
            ]
            if sum(bool(FIGURE.search(cell)) for cell in cells) >= 4:
                yield part, "\n\n".join([*parts[:3], *parts[max(0, number - 2) : number + 3]])


def test_every_table_of_figures_says_where_they_come_from():
    found = [
        (page, table[:80], bool(ORIGIN.search(near)))
        for page in PAGES
        for table, near in tables_of_figures((DOCS / f"{page}.md").read_text())
    ]
    assert [each[:2] for each in found if not each[2]] == []
    assert len(found) > 20
