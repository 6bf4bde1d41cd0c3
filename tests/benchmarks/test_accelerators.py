import json
from pathlib import Path

import pytest
import scripts

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cost.md"


@pytest.fixture(scope="module")
def report():
    return scripts.imported("benchmarks/accelerators/report.py")


def result(*scores):
    """A run that was evaluated after 10, 20, … FLOPs."""
    sets = [{"wordings": {"concept": 0.9 * s}, "compositions": {"concept": 1.1 * s}} for s in scores]
    return {"curve": [{"flops": 10.0 * (i + 1)} | one for i, one in enumerate(sets)]}


@pytest.mark.parametrize(
    ("scores", "factor"),
    [
        ((0.2, 0.4), 1),
        # The plain run's 0.4 after 10 FLOPs, and halfway between 10 and 20.
        ((0.4, 0.5), 2),
        ((0.3, 0.5), 20 / 15),
        # A later fall does not count.
        ((0.8, 0.1), 20 / 5),
        # It ends at a score that the plain run has after 10 and 15 FLOPs.
        ((0.1, 0.2), 10 / 20),
        ((0.1, 0.3), 15 / 20),
    ],
)
def test_the_factor_compares_the_flops_to_the_same_score(report, scores, factor):
    assert report.factor(result(*scores), result(0.2, 0.4)) == pytest.approx(factor)


def test_the_tables_of_the_page_are_those_of_the_results(report):
    runs, page = report.read(), PAGE.read_text()
    assert report.table(runs) in page and report.averages(runs) in page
    # Runs with the same seed saw the same autoencoder and image encoder.
    for seed in runs[report.PLAIN]:
        of_seed = [seeds[seed] for seeds in runs.values() if seed in seeds]
        assert len({json.dumps(each.get("weights")) for each in of_seed}) == 1


def test_the_table_of_mup_is_that_of_its_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "mup_transfer.json").read_text())
    assert scripts.imported("benchmarks/mup_transfer.py").table(results) in PAGE.read_text()
