from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).parents[2]
counted = scripts.imported("benchmarks/counted.py")

FIGURES = [(page, figure) for page, figures in counted.FIGURES.items() for figure in figures]


@pytest.mark.parametrize(("page", "figure"), FIGURES, ids=lambda value: getattr(value, "__name__", value))
def test_the_page_has_the_counted_figures_and_names_the_command(page, figure):
    page = " ".join((ROOT / "docs" / page).read_text().split())
    assert "benchmarks/counted.py" in page
    for line in figure().splitlines():
        assert line in page
