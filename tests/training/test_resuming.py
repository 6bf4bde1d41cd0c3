import copy
import dataclasses

import pytest

from pixart_jax.config import (
    AdapterConfig,
    DiTConfig,
    FeaturesConfig,
    InitConfig,
    PixArtConfig,
    TrainConfig,
    all_fields,
    from_file,
)
from pixart_jax.training.resuming import changes_on_resume, resume_rules


def test_every_field_has_a_rule_for_resuming():
    rules = resume_rules()
    assert rules.keys() == {"model.kind", *all_fields()}
    assert set(rules.values()) == {"free", "reported", "rejected"}


@pytest.mark.parametrize("name", [name for name in all_fields() if name != "steps"])
def test_a_changed_field_follows_its_rule_when_a_run_resumes(name):
    kind, rule = all_fields()[name].kind, resume_rules()[name]
    model = DiTConfig() if name == "model.num_classes" else PixArtConfig()
    saved, now = TrainConfig(model=model), TrainConfig(model=model)
    *sections, last = name.split(".")
    place = now
    for section in sections:
        # A copy, because configs share their default sections.
        object.__setattr__(place, section, copy.copy(getattr(place, section)))
        place = getattr(place, section)
    then = getattr(place, last)
    value = "other" if kind is str else not then if kind is bool else then + 1
    # Not a valid config in all cases, but the comparison must see each field alone.
    object.__setattr__(place, last, value)
    reported, rejected = changes_on_resume(now, saved, step=10)
    if rule == "reported":
        (line,) = reported
        assert line.startswith(f"{name} was {then!r}, now {value!r}") and not rejected
    else:
        expected = [f"{name} is {value!r}, the checkpoint has {then!r}"] if rule == "rejected" else []
        assert (reported, rejected) == ([], expected)


def test_alpha_0_and_the_rank_are_the_same_on_resume():
    init = InitConfig("weights", "w")
    old, new = (
        TrainConfig(adapter=AdapterConfig("lora", rank=16, alpha=alpha), init=init) for alpha in (16.0, 0.0)
    )
    assert changes_on_resume(new, old, 5) == changes_on_resume(old, new, 5) == ([], [])
    other = dataclasses.replace(new, adapter=dataclasses.replace(new.adapter, alpha=8.0))
    assert changes_on_resume(other, old, 5)[1] == ["adapter.alpha is 8.0, the checkpoint has 16.0"]
    # A run in which only the rank is changed keeps the scale.
    assert from_file("configs/lora.py:512").adapter.scale == 1
    assert dataclasses.replace(from_file("configs/lora.py:512").adapter, rank=4).scale == 1


def test_a_folder_that_a_link_replaces_is_the_same_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "old").symlink_to("new")

    def run(vae):
        return TrainConfig(features=FeaturesConfig(vae=vae))

    assert changes_on_resume(run("new"), run("old"), 1) == ([], [])
    assert changes_on_resume(run(str(tmp_path / "new")), run("old"), 1) == ([], [])
    assert changes_on_resume(run("new"), run("other"), 1)[1] == [
        "features.vae is 'new', the checkpoint has 'other'"
    ]
    # Two names of the Hub are not files.
    assert changes_on_resume(run("a/b"), run("a/c"), 1)[1]
