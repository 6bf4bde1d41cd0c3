import dataclasses
import json

import pytest

from pixart_jax.errors import UserError
from pixart_jax.evaluation.layouts import BENCHMARKS
from pixart_jax.evaluation.protocol import Protocol, Result
from pixart_jax.evaluation.tables import PUBLISHED, benchmark_table, result_table


def target(benchmark):
    (row,) = [row for row in PUBLISHED[benchmark].rows if row.target]
    return row.scores


def test_targets_are_the_published_rows_of_pixart():
    assert list(target("t2i_compbench").values()) == [0.6886, 0.5582, 0.7044, 0.2082, 0.3179, 0.4117]
    wise = target("wise_legacy")
    names = ("biology", "chemistry", "culture", "overall", "physics", "space", "time")
    assert [wise[name] for name in names] == [0.49, 0.34, 0.45, 0.47, 0.56, 0.48, 0.50]
    assert target("geneval")["overall"] == 0.48
    assert set(PUBLISHED) == set(BENCHMARKS)
    assert not any(row.target for row in PUBLISHED["wise"].rows)


def test_a_table_beside_the_published_rows():
    scores = {"color": 0.7, "shape": 0.5, "numeracy": 0.25}
    text, values = benchmark_table(
        "t2i_compbench", scores, {"color": 3000}, model="ours", source="measured: x"
    )
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[0] == [
        "model", "color", "shape", "texture", "spatial", "non-spatial", "complex", "numeracy", "source",
    ]  # fmt: skip
    assert len({len(row) for row in rows}) == 1
    by_model = {row[0]: row for row in rows}
    assert by_model["**PixArt-α**"][1] == "**0.6886**" and by_model["**PixArt-α**"][7] == "**–**"
    assert by_model["ours"] == ["ours", "0.7000", "0.5000", "–", "–", "–", "–", "0.2500", "measured: x"]
    assert by_model["ours − PixArt-α"][1:4] == ["+0.0114", "-0.0582", "–"]
    assert "Answers: color 3000." in text and "Run a known model next to yours" in text
    values = json.loads(json.dumps(values))
    assert values["rows"][-1]["scores"] == scores
    assert values["difference_to_target"] == pytest.approx({"color": 0.0114, "shape": -0.0582})


@pytest.mark.parametrize("benchmark", PUBLISHED)
def test_every_benchmark_has_a_table(benchmark):
    published = PUBLISHED[benchmark]
    scores = dict.fromkeys(published.columns, 0.5)
    text, _ = benchmark_table(benchmark, scores, {}, model="ours", source="x")
    assert text.count("\n| ours |") == 1
    for row in published.rows:
        assert set(row.scores) <= set(published.columns) and row.source


def test_results_of_one_protocol_share_a_row():
    fid, clip = Protocol("fid", 100, seed=0), Protocol("clip", 100, seed=0, resize="clip")
    results = [
        Result("a", 20.125, fid, "mjhq-30k"),
        Result("b", 18, fid, "mjhq-30k"),
        Result("a", 27.5, clip),
    ]
    text, values = result_table(results)
    assert text.splitlines()[2:] == [
        f"| fid | {fid.id} (mjhq-30k) | 20.12 | 18.00 |",
        f"| clip | {clip.id} | 27.50 | – |",
    ]
    assert (
        values["rows"][0]["values"] == {"a": 20.125, "b": 18} and values["rows"][0]["protocol"]["seed"] == 0
    )


def test_results_of_different_protocols_raise():
    fid = Protocol("fid", 100, seed=0, weights="ema")
    other = dataclasses.replace(fid, weights="raw", resize="pytorch")
    with pytest.raises(UserError, match="differ in weights 'ema' and 'raw', resize 'clean' and 'pytorch'"):
        result_table([Result("a", 20, fid), Result("b", 18, other)])
