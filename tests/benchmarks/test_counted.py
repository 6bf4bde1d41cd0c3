import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("counted", ROOT / "benchmarks" / "counted.py")
counted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counted)

FIGURES = [(page, figure) for page, figures in counted.FIGURES.items() for figure in figures]


@pytest.mark.parametrize(("page", "figure"), FIGURES, ids=lambda value: getattr(value, "__name__", value))
def test_the_page_has_the_counted_figures_and_names_the_command(page, figure):
    page = " ".join((ROOT / "docs" / page).read_text().split())
    assert "benchmarks/counted.py" in page
    for line in figure().splitlines():
        assert line in page
