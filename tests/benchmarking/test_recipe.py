import dataclasses
import json
from pathlib import Path

import pytest
from damage import damaged

from pixart_jax.benchmarking import recipe
from pixart_jax.benchmarking.flops import run_flops, stage_flops
from pixart_jax.config import AlignmentConfig, RoutingConfig, from_file
from pixart_jax.errors import UserError

CONFIGS = Path(__file__).parent.parent.parent / "configs"
STAGES = ("stage1.py", "stage2.py", "stage3.py:256", "stage3.py:512", "stage3.py:1024")


@pytest.fixture(scope="module")
def stages():
    return [from_file(f"{CONFIGS / stage}") for stage in STAGES]


def test_days_and_cost_match_a_computation_by_hand(stages):
    """300,000 steps of 1,024 images at 100 images per second per chip on 64 chips take 48,000 s."""
    (row,) = recipe.project(stages[:1], {"stage1": 100}, "v5e:64", 1.5)["stages"]
    assert row["days"] == pytest.approx(48_000 / 86_400)
    assert row["chip_days"] == pytest.approx(64 * 48_000 / 86_400)
    assert row["cost"] == pytest.approx(64 * 48_000 / 3600 * 1.5)


def test_totals_match_the_paper(stages):
    """PixArt-α Table 4: 3.30 billion samples and 1,656 V100-days in total."""
    rates = {stage.name: 1.0 for stage in stages}
    projection = recipe.project(stages, rates, "a100:8", None)
    assert sum(row["images"] for row in projection["stages"]) == pytest.approx(3.30e9, rel=0.01)
    *_, total, foot = recipe.table(projection).splitlines()
    assert total.split()[0] == "sum" and total.split()[-1] == "1656"
    assert "753 A100-days and $28,400" in foot
    assert "$" not in total


def test_the_fast_recipe_needs_at_most_half_of_the_papers_flops(stages):
    fast = [from_file(f"{CONFIGS / 'fast.py'}:{stage}") for stage in ("stage1", "256", "512", "1024")]
    flops = [sum(map(run_flops, recipe)) for recipe in (stages, fast)]
    assert flops[0] == pytest.approx(3.733e21, rel=1e-3)
    assert flops[1] < flops[0] / 2
    projection = recipe.project(fast, {stage.name: 1.0 for stage in fast}, "h100:8", None)
    assert sum(row["flops"] for row in projection["stages"]) == flops[1]
    assert "753 A100-days" in recipe.table(projection)


def test_steps_with_routing_take_less_time_and_the_last_steps_have_none(stages):
    """Only steps with routing can reach this rate; the last third of the steps trains on all tokens."""
    stage = stages[1]
    routed = dataclasses.replace(stage, routing=RoutingConfig(rate=0.5, finish=50_000))
    more = stage_flops(stage) / stage_flops(routed)
    # 22 of 28 blocks process half of the tokens.
    assert more == pytest.approx(1.6, abs=0.05)
    rate = 1.2 * 312e12 / stage_flops(stage)
    with pytest.raises(UserError, match=r"stage2=.* is 120% of the peak of one a100"):
        recipe.project([stage], {"stage2": rate}, "a100:64", None)
    (row,) = recipe.project([routed], {"stage2": rate}, "a100:64", None)["stages"]
    assert row["share_of_peak"] == pytest.approx(1.2 / more)
    assert row["images"] == 150_000 * 11_392
    assert row["days"] == pytest.approx((100_000 + 50_000 * more) * 11_392 / (rate * 64) / 86_400)


def test_steps_after_the_alignment_take_less_time(stages):
    features = dataclasses.replace(stages[1].features, image_encoder="dinov2")
    stage = dataclasses.replace(
        stages[1],
        objective="alignment",
        features=features,
        alignment=AlignmentConfig(stop_step=50_000),
    )
    less = stage_flops(stages[1]) / stage_flops(stage)
    assert 0.97 < less < 0.99
    (row,) = recipe.project([stage], {"stage2": 100}, "a100:64", None)["stages"]
    assert row["days"] == pytest.approx((50_000 + 100_000 * less) * 11_392 / (100 * 64) / 86_400)


def test_small_models_are_not_compared_with_the_paper():
    stage = from_file(f"{CONFIGS / 'digits.py'}:stage1")
    projection = recipe.project([stage], {"stage1": 50}, "h100:1", None)
    assert projection["stages"][0]["paper_v100_days"] is None
    assert "paper:" not in recipe.table(projection)


def test_measured_rates_are_divided_by_the_number_of_chips(tmp_path):
    result = {"config": "stage2", "images_per_second": 800.0, "machine": {"devices": 8}}
    (tmp_path / "stage2.json").write_text(json.dumps(result))
    (tmp_path / "other.json").write_text(json.dumps({"peak": 1}))
    assert recipe.read_rates(str(tmp_path)) == {"stage2": 100.0}
    assert recipe.read_rates("stage1=2,stage2=0.5") == {"stage1": 2.0, "stage2": 0.5}


@pytest.mark.parametrize(
    ("rates", "hardware", "message"),
    [
        ("stage1=100", "v5e", "such as v5e:256"),
        ("stage1=100", "v6:8", "Did you mean 'v6e'"),
        ("stage2=100", "v5e:8", "rates lack 'stage1'"),
        ("stage1=70000", "v5e:256", "images per second for one chip, not for all"),
        ("stage1=0", "v5e:256", "must be above 0"),
        ("stage1=nan", "v5e:256", "must be above 0"),
        ("stage1:5", "v5e:256", "pass stage1=110,stage2=88 or a folder"),
    ],
)
def test_invalid_rates_and_hardware_raise(stages, rates, hardware, message):
    with pytest.raises(UserError, match=message):
        recipe.project(stages[:1], recipe.read_rates(rates), hardware, None)


def test_a_folder_without_results_raises(tmp_path):
    with pytest.raises(UserError, match="the folder has no results of `benchmark train"):
        recipe.read_rates(str(tmp_path))
    result = {"config": "stage1", "images_per_second": 0, "machine": {"devices": 4}}
    (tmp_path / "stage1.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="must be above 0"):
        recipe.read_rates(str(tmp_path))


def test_damaged_results(stages, tmp_path):
    path = tmp_path / "stage1.json"
    result = {"config": "stage1", "images_per_second": 800.0, "machine": {"devices": 8}}
    refused = 0
    for place, changed in damaged(result):
        path.write_text(json.dumps(changed))
        try:
            recipe.table(recipe.project(stages[:1], recipe.read_rates(str(tmp_path)), "v5e:8", 1.0))
        except UserError as error:
            assert "\n" not in str(error), place
            refused += 1
    assert refused > 30
