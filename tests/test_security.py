"""The names in SECURITY.md exist, and its claims about how files are read hold in the code."""

import ast
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from pixart_jax.config import all_fields

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()
COMMANDS = ("train", "sample", "precompute", "caption", "convert", "evaluate", "benchmark")
CODE = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "pixart_jax").rglob("*.py"))}


def test_the_names_in_it_exist():
    modules = [importlib.import_module(f"pixart_jax.{name}") for name in COMMANDS]
    known = {field.name for module in modules for field in dataclasses.fields(module.Flags)}
    given = set(re.findall(r"--(\w+)", TEXT))
    assert given and given <= known, given - known
    fields = set(re.findall(r"`((?:compile|features)\.[a-z_.]+)`", TEXT))
    assert fields and fields <= set(all_fields()), fields
    for path in re.findall(r"`(pixart_jax/[\w/.]+|tests/[\w/.]+)`|\]\(([\w/.]+)\)", TEXT):
        assert (ROOT / "".join(path)).exists(), path
    for target in re.findall(r"`make (\w+)", TEXT):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("page", ["README.md", "docs/architecture.md"])
def test_it_is_linked(page):
    assert "SECURITY.md)" in (ROOT / page).read_text()


def calls(name):
    """(place, keyword arguments) of all calls of a function or method of this name."""
    for path, tree in CODE.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
                yield (
                    f"{path.name}:{node.lineno}",
                    {word.arg: ast.unparse(word.value) for word in node.keywords},
                )


def test_pickles_are_only_read_where_they_cannot_run_code():
    loads = dict(calls("torch.load"))
    assert loads and all(words["weights_only"] == "True" for words in loads.values()), loads
    for place, words in (*calls("np.load"), *calls("numpy.load")):
        assert words.get("allow_pickle", "False") == "False", place
    imported = {
        name.name
        for tree in CODE.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_code_of_others_is_never_run():
    assert "trust_remote_code" not in "".join(path.read_text() for path in CODE)
    # Downloads go through one module, which chooses the files (tests/hub/test_selection.py).
    assert {place.split(":")[0] for place, _ in calls("snapshot_download")} == {"downloads.py"}
    # Only configs are run as Python programs.
    assert [place.split(":")[0] for place, _ in calls("runpy.run_path")] == ["flags.py"]
    assert not [*calls("os.system"), *calls("torch.hub.load")]
