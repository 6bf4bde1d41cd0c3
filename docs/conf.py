"""Builds the site: python -m sphinx -W --keep-going -n docs build/docs

`reference.py` completes the pages with what it makes from the code. If the environment variable REPOSITORY
has the address of the repository on GitHub, GitLab or Bitbucket, each page has links to its source.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
# The site describes this checkout, whatever version is installed; `reference` is the module in this folder.
sys.path[:0] = [str(DOCS.parent), str(DOCS)]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import reference  # noqa: E402

import pixart_jax  # noqa: E402

project = "pixart_jax"
version = release = pixart_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["_*"]
nitpicky = True
smartquotes = False  # they would turn the dashes of flags into one

# Links to headings, as code hosts make them: [text](page.md#its-heading).
myst_heading_anchors = 4
# Formulas, as code hosts write them: $…$ and $$…$$. A dollar before a digit is a price.
myst_enable_extensions = ["dollarmath"]
myst_dmath_allow_digits = False
highlight_language = "none"

default_role = "py:obj"  # docstrings have `name`, as in Markdown; documented names become links
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_attr_annotations = False
# Other packages are not linked, because the build needs no network. Names of this one must resolve.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!pixart_jax\b).*"),
    (r"py:class", r"pixart_jax\..*\.SettingsT"),  # a type variable
]

html_theme = "furo"
html_title = f"pixart_jax {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options = {}
if repository := os.environ.get("REPOSITORY"):
    html_theme_options = {
        "source_repository": repository,
        "source_branch": os.environ.get("BRANCH", "main"),
        "source_directory": "docs/",
    }


def setup(app):
    app.connect("source-read", reference.complete)
    app.connect("autodoc-process-signature", reference.correct_signature)
    # Before napoleon, which reads the sections of a docstring.
    app.connect("autodoc-process-docstring", reference.mark_code, priority=400)
    app.connect("autodoc-process-docstring", reference.link_fields)
    app.connect("doctree-read", reference.use_dashes)
