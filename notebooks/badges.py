"""Writes the "Open in Colab" badges of the notebooks, or removes them if the project has no public address.

    python notebooks/badges.py

The address is `Repository` in `[project.urls]` of pyproject.toml, on GitHub, where Colab opens notebooks
from. In the pages, a badge follows each link to a notebook.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/install.md")
BRANCH = "main"
IMAGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
_BADGE = re.compile(r" ?" + re.escape(IMAGE) + r"\([^)]*\)\n*")
_LINK = re.compile(r"\[[^\]]*\]\((?:\.\./)?notebooks/(\w+\.ipynb)\)")


def badge(repository: str, name: str) -> str:
    """Returns the badge of a notebook in Markdown; "" without a repository."""
    if not repository:
        return ""
    github = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", repository)
    if github is None:
        sys.exit(
            f"Repository is '{repository}': Colab opens notebooks from https://github.com/OWNER/NAME only."
        )
    page = f"https://colab.research.google.com/github/{github[1]}/blob/{BRANCH}/notebooks/{name}"
    return f"{IMAGE}({page})"


def main(root: Path = ROOT) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository", "")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        first = notebook["cells"][0]
        text = _BADGE.sub("", "".join(first["source"]))
        if line := badge(repository, path.name):
            text = f"{line}\n\n{text}"
        first["source"] = text.splitlines(keepends=True)
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(f"{text}\n", encoding="utf-8")
    for page in PAGES:
        path = root / page
        text = _BADGE.sub("", path.read_text(encoding="utf-8"))
        text = _LINK.sub(lambda link: f"{link[0]} {badge(repository, link[1])}".rstrip(), text)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
