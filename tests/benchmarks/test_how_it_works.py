import json
import re
from pathlib import Path

import pytest
import scripts

pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
how = scripts.imported("benchmarks/how_it_works.py")
STORED = json.loads(how.RESULTS.read_text())
TEXT = " ".join(how.PAGE.read_text().split())


@pytest.fixture(scope="module")
def counted():
    return how.counted()


def test_the_page_names_the_command_and_the_results():
    assert "`python benchmarks/how_it_works.py`" in TEXT
    assert f"../{how.RESULTS.relative_to(ROOT).as_posix()}" in TEXT
    assert STORED["machine"]["cpus"] >= 1


def test_the_page_has_what_is_counted(counted):
    assert [passage for passage in how.counted_passages(counted) if passage not in TEXT] == []


def test_the_page_has_what_is_measured():
    assert [passage for passage in how.measured_passages(STORED) if passage not in TEXT] == []


def test_the_page_has_what_the_adapter_of_the_demo_does():
    demo = json.loads((ROOT / "benchmarks/results/demo_lora.json").read_text())
    assert demo["weight 1"]["share with light paper"] == 1
    light, plain = (how.percent(demo[f"weight {weight}"]["legible"]) for weight in (1, 0))
    assert (
        f"all of {demo['images']} digits have light paper, and a classifier reads {light} of them; "
        f"without it, it reads {plain}."
    ) in TEXT


@pytest.mark.parametrize("stage", (1, 2, 3))
def test_the_table_of_stages_has_the_updates_of_the_demo(stage):
    config = how.from_file(f"{how.DIGITS}:stage{stage}")
    row = re.search(rf"^\| \[{stage}\]\(.*$", how.PAGE.read_text(), re.MULTILINE)[0]
    assert f"| {config.steps:,} × {config.data.batch_size} |" in " ".join(
        row.replace(" at 16 px", "").split()
    )


def test_what_is_counted_is_what_is_stored(counted):
    flat = [flatten({name: numbers[name] for name in counted}) for numbers in (counted, STORED)]
    assert flat[0] == pytest.approx(flat[1], rel=1e-3)


def flatten(value, name=""):
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {name: value}
    return {key: leaf for part in value for key, leaf in flatten(value[part], f"{name}/{part}").items()}


def test_the_commands_that_were_run_are_those_of_the_page():
    page = how.PAGE.read_text()
    for command in STORED["runs"]["commands"]:
        without_out = re.sub(r" --(out=demo/val-loss/\w+|weights=raw)", "", command)
        assert without_out in how.page_commands(page, "python")


def test_the_snippets_of_a_page_share_their_names_and_its_commands_are_found():
    page = """Text.

```python
x = 2
```

```sh
python -m one --a \\
    --b
python -m two
```

Or `python -m three
--c`.

```python
y = x + 1
```
"""
    assert how.run_snippets(page)["y"] == 3
    assert how.page_commands(page, "-m") == [
        "python -m one --a     --b",
        "python -m two",
        "python -m three --c",
    ]
    assert how.page_commands(page, "two") == ["python -m two"]


def test_the_validation_loss_of_a_run_is_the_last_one():
    lines = [
        {"step": 1, "validation_loss": 2.0},
        {"step": 2, "validation_loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]
    assert how.last_validation_loss("\n".join(map(json.dumps, lines))) == 1.0


def test_without_the_demo_a_line_says_what_to_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(how, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["how_it_works.py"])
    with pytest.raises(SystemExit) as stopped:
        how.main()
    assert stopped.value.code == 2
    assert "no demo/stage1, demo/stage2, demo/stage3: run 'make demo' first" in capsys.readouterr().err
