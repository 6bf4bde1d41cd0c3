"""The parts of the site that are made when it is built: the reference of commands and of the config.

Pages have these lines, which Markdown takes the place of. None of it is written to a file.

    <!-- flags of sample -->            the description of the command and its flags
    <!-- fields of the config -->       all fields of the config
    <!-- contents of SECURITY.md -->    the whole page: a file of the top folder
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from docutils import nodes
from ml_collections import ConfigDict
from sphinx.util.inspect import signature, stringify_signature

from pixart_jax import config, flags
from pixart_jax.pipeline.requests import Settings
from pixart_jax.precompute import Options

ROOT = Path(__file__).parents[1]
_CONTENTS = re.compile(r"^<!-- contents of (.+) -->$", re.MULTILINE)
_MARK = re.compile(r"^<!-- (?:flags of (\w+)|fields of the config) -->$", re.MULTILINE)
_LINK = re.compile(r"(\[[\w-]+\.md)?(\]\()(?!\w+:|#)([^)\s#]+)")
_DOCS_PAGE, _PAGE_LINK = re.compile(r"docs/([\w-]+\.md)"), r"[](../\1)"
# How the values of each type are written.
_VALUES: Mapping[Any, str] = {
    str: "TEXT",
    bool: "True|False",
    int: "INTEGER",
    float: "NUMBER",
    tuple[str, ...]: "TEXT",
    tuple[float, float]: "LOW,HIGH",
    dict[str, Any]: "JSON",
    ConfigDict: "CONFIG",
}


# --- Pages -------------------------------------------------------------------------------------------


def complete(app: Any, page: str, source: list[str]) -> None:
    """Completes the text of a page before it is parsed: for the event `source-read`."""
    folder = f"docs/{os.path.dirname(page)}"
    text, text_folder = source[0], folder
    if contents := _CONTENTS.search(text):
        file = ROOT / contents[1]
        app.env.note_dependency(str(file))
        text, text_folder = file.read_text(encoding="utf-8"), ""

    def in_site(link: re.Match) -> str:
        path = _page_of(os.path.normpath(os.path.join(text_folder, link[3])))
        # A file that no page shows can be downloaded.
        scheme = "" if path.startswith("docs/") else "path:"
        # Where the text of a link is the name of a page, the site shows the title of the page or section.
        return (
            ("[" if link[1] and not scheme else link[1] or "")
            + link[2]
            + scheme
            + os.path.relpath(path, folder)
        )

    def generated(mark: re.Match) -> str:
        module = importlib.import_module(f"pixart_jax.{mark[1]}") if mark[1] else config
        app.env.note_dependency(module.__file__)
        return "\n\n".join(command(module) if mark[1] else config_fields())

    source[0] = _MARK.sub(generated, _LINK.sub(in_site, text))


def _page_of(path: str) -> str:
    """The page that shows a file of the top folder; other paths as they are."""
    page = "docs/index.md" if path == "README.md" else f"docs/{path.lower()}"
    return page if os.path.dirname(path) == "" and (ROOT / page).is_file() else path


def command(module: Any) -> Iterator[str]:
    """Yields the Markdown of a command's page: its description, its modes and its flags."""
    yield _DOCS_PAGE.sub(_PAGE_LINK, module.__doc__)
    if hasattr(module, "MODES"):
        yield "## Modes"
        yield "\n".join(f"- `{mode}`: {_summary(run)}" for mode, run in module.MODES.items())
    yield "## Flags"
    yield _program(f"pixart-{module.__name__.rpartition('.')[2]}")
    kinds = flags.field_kinds(module.Flags)
    for field in dataclasses.fields(module.Flags):
        if "help" in field.metadata:
            yield _option(f"--{field.name}", kinds[field.name], field)


def config_fields() -> Iterator[str]:
    """Yields the Markdown of all fields of the config, with a heading for each section."""
    yield _program("config")
    section, headings = config.TrainConfig, set()
    for name, (cls, kind, field) in config.all_fields().items():
        if cls is not section:
            section, heading = cls, name.rpartition(".")[0]
            yield f"## {heading} ({cls.kind})" if heading in headings else f"## {heading}"
            yield _summary(cls)
            headings.add(heading)
        yield _option(f"--config.{name}", kind, field)


def _program(name: str) -> str:
    return f"```{{program}} {name}\n```"


def _option(name: str, kind: Any, field: dataclasses.Field) -> str:
    known = field.metadata
    value = "PATH" if known["path"] else "|".join(known["choices"] or ()) or _VALUES[kind]
    forms = f"{name}={value}"
    if kind is bool and not name.startswith("--config."):
        forms = f"{name}, --no{name.removeprefix('--')}"
    facts = []
    if kind is tuple[str, ...]:
        facts.append("May be given several times.")
    if limits := flags.range_words(known):
        facts.append(f"Must be {limits}.")
    if field.default not in (None, "", ()):
        facts.append(f"Default: `{field.default}`.")
    body = "\n\n".join(filter(None, [_escape(known["help"]), " ".join(facts)]))
    return f"````{{option}} {forms}\n{body}\n````"


def _summary(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return _escape(" ".join(inspect.getdoc(thing).split("\n\n")[0].split()))


def _escape(text: str) -> str:
    """Plain text as Markdown. Names of pages become links to them."""
    text = re.sub(r"[\\*_{}\[\]<>#|~$]", r"\\\g<0>", text)
    return _DOCS_PAGE.sub(_PAGE_LINK, text)


# --- API ---------------------------------------------------------------------------------------------


def correct_signature(
    app: Any, kind: str, name: str, thing: Any, options: Any, arguments: str | None, result: str | None
) -> tuple[str, str | None] | None:
    """Corrects the arguments of a class or function: for `autodoc-process-signature`.

    Those of a dataclass of flags, of which there are dozens, are left out.
    """
    if _page_of_fields(thing):
        return "", None
    if arguments and arguments.startswith("(*args"):  # flax makes its modules with a metaclass
        found = signature(thing.__init__, bound_method=True)
        arguments = stringify_signature(found, unqualified_typehints=True)
    # The default of an argument may be a function: its name, without its address.
    return arguments and (re.sub(r"<(?:built-in )?function (\w+)[^>]*>", r"\1", arguments), result)


def mark_code(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Marks the indented code of a docstring as code, as in Markdown: for `autodoc-process-docstring`."""
    for number in reversed(range(2, len(lines))):
        before, blank, line = lines[number - 2 : number + 1]
        if line.startswith("    ") and not blank and not before.startswith(" "):
            lines[number:number] = [".. code-block:: python", ""]


def link_fields(app: Any, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Adds a link to the arguments that `correct_signature` left out: for `autodoc-process-docstring`."""
    if page := _page_of_fields(thing):
        lines += ["", f"Fields with their defaults: :doc:`/commands/{page}`."]


def _page_of_fields(thing: Any) -> str:
    """The page in commands/ that lists the fields of a dataclass; "" for everything else."""
    if not (dataclasses.is_dataclass(thing) and any("help" in f.metadata for f in dataclasses.fields(thing))):
        return ""
    return "sample" if issubclass(thing, Settings) else "precompute" if thing is Options else "config"


def use_dashes(app: Any, tree: nodes.document) -> None:
    """Writes a dash behind the name of an argument; Sphinx writes two hyphens: for `doctree-read`."""
    for text in [node for node in tree.findall(nodes.Text) if node == " -- "]:
        text.parent.replace(text, nodes.Text(" – "))
