"""Checks the import rules in the table of docs/architecture.md, and what importing a module loads."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pixart_jax"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# Every part may import these. The table says what they may import themselves.
SHARED = {"errors", "constants", "files", "readers", "hub", "flags"}
# What `__init__.py` defines itself. Other names that it exports are imported from their own modules.
OWN_NAMES = {"pixart_jax.__version__", "pixart_jax.end_on_interrupt"}
MODULES = {
    ".".join(("pixart_jax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def table(heading):
    """The rows of the table under a heading of the page, as lists of cells."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def names(cell):
    """The names in backticks, without a trailing `/` or `.py`."""
    return [name.removesuffix("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", cell)]


# part -> (contents, parts that it may import); None means everything except commands.
PARTS = {
    part: (contents, None if allowed == "everything" else set(names(allowed)))
    for parts, contents, allowed in table("Parts")
    for part in names(parts)
}
COMMANDS = {part for part, (_, allowed) in PARTS.items() if allowed is None}


def part_of(module):
    """The part that a module belongs to: the most specific row. "" is the package itself."""
    name = module.removeprefix("pixart_jax").removeprefix(".").replace(".", "/")
    return next((part for part in (name, name.split("/")[0]) if part in PARTS), name)


def imports(path, everywhere=True):
    """The dotted names that a file imports; with `everywhere`, also those imported inside functions."""

    def walk(nodes):
        for node in nodes:
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                yield from walk(node.orelse)
            elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(ast.iter_child_nodes(node))

    return set(walk(ast.parse(path.read_text()).body))


def ours(name):
    """The module of this package that an imported name belongs to, or None."""
    if name.split(".")[0] != "pixart_jax":
        return None
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@cache
def loaded_with(module):
    """The modules of this package that importing a module loads: its parents and module-level imports."""
    found, todo = set(), [module]
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        todo += [name.rpartition(".")[0]] if "." in name else []
        todo += [other for other in map(ours, imports(MODULES[name], everywhere=False)) if other]
    return found


def test_every_part_is_in_the_table_with_its_modules():
    found = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert {part for part in PARTS if "/" not in part} == found - {"__init__", "__pycache__", "py"}
    for part in (part for part in PARTS if (PACKAGE / part).is_dir()):
        inside = {path.stem for path in (PACKAGE / part).iterdir()} - {"__init__", "__pycache__"}
        assert set(names(PARTS[part][0])) >= inside, part


def test_imports_follow_the_table():
    wrong = []
    for module, path in MODULES.items():
        part = part_of(module)
        if not part:
            continue  # `__init__.py` imports public names when they are first used; see tests/test_init.py
        permitted = PARTS[part][1]
        if permitted is not None and part not in SHARED:
            permitted = permitted | SHARED
        for name in imports(path):
            target = ours(name)
            if target is None or name in OWN_NAMES:
                continue
            other = part_of(target)
            folder = other.split("/")[0]
            if folder == part.split("/")[0]:
                continue
            if folder in COMMANDS or (permitted is not None and not {other, folder} & permitted):
                wrong.append(f"{module} imports {target}")
    assert wrong == []


def test_the_table_says_what_the_text_below_it_says():
    """Adding a name to the table must not break the rules that the text below it states."""
    allowed = {part: permitted for part, (_, permitted) in PARTS.items()}
    assert allowed["models"] == allowed["diffusion"] == allowed["data"] == set()
    for part in ("weights", "encoders", "sampling", "pipeline", "evaluation", "captioning", "on_the_fly"):
        assert "training" not in allowed[part], part
    assert not {"data", "pipeline"} & allowed["weights"]
    for part in ("training", "training/data", "training/samples"):
        assert not {"pipeline", "evaluation"} & allowed[part]
    assert not any(permitted & COMMANDS for permitted in allowed.values() if permitted)


def test_data_knows_no_jax():
    for module in MODULES:
        if part_of(module) == "data":
            used = {name.split(".")[0] for name in imports(MODULES[module])}
            assert not used & {"jax", "flax", "optax", "orbax"}, module


def test_train_is_short_and_loads_little():
    # It imports most modules inside its functions.
    used = {name for name in map(ours, imports(MODULES["pixart_jax.train"])) if name}
    assert len(set().union(*map(loaded_with, used))) <= 90
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 321


def test_sampling_loading_and_trackers_load_only_what_they_need():
    for module in loaded_with("pixart_jax.sampling"):
        used = {name.split(".")[0] for name in imports(MODULES[module], everywhere=False)}
        assert not used & {"optax", "orbax"}, module
    # In a separate process, in which no other test has loaded them.
    program = f"""
import json, sys
import pixart_jax.sampling
def loaded(): return [name for name in sys.modules if name.startswith(("pixart_jax", "orbax"))]
sampling = loaded()
import pixart_jax
pixart_jax.load_model({str(ROOT / "tests/data/pixart_weights.safetensors")!r}, num_heads=4)
loading = loaded()
import pixart_jax.training.trackers
torch = "torch" in sys.modules
from tensorboardX import SummaryWriter
print(json.dumps([sampling, loading, torch]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sampling, loading, torch = json.loads(done.stdout.splitlines()[-1])
    assert set(sampling) == loaded_with("pixart_jax.sampling")
    assert not [name for name in loading if name.startswith(("orbax", "pixart_jax.training"))]
    assert not torch  # `import tensorboardX` would load it, if it is installed; see training/trackers.py


def test_hardly_any_code_checks_the_class_of_a_network():
    """A config describes its network: see `configs.BackboneConfig`."""
    asks = re.compile(r"isinstance\(.*(PixArtConfig|DiTConfig)")
    lines = [line for path in MODULES.values() for line in path.read_text().splitlines() if asks.search(line)]
    assert len(lines) <= 4, lines


def test_the_files_to_change_and_the_tests_to_copy_exist():
    rows = table("Where do I change …")
    assert len(rows) >= 8
    for _, files, tests in rows:
        for cell, roots in ((files, (PACKAGE, ROOT)), (tests, (ROOT,))):
            for name in re.findall(r"`([\w/.]+(?:\.py|\.md|/))`", cell):
                if "NAME" not in name:
                    assert any((root / name).exists() for root in roots), name
