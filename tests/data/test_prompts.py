import json

import pytest

from pixart_jax.data.prompts import read_prompts
from pixart_jax.errors import UserError

KINDS = {"seed": int}


def test_every_entry_has_its_place_and_fields(tmp_path):
    """What is in the fields is checked by the callers; see also tests/pipeline/test_requests.py."""
    assert read_prompts("a red\nfox", KINDS) == [("", {"prompt": "a red fox"})]
    table, lines, listed = (tmp_path / f"prompts.{kind}" for kind in ("csv", "jsonl", "json"))
    table.write_text('prompt,seed,other\n"a fox, red",3,4\n\na corgi,,\n')
    assert read_prompts(str(table), KINDS) == [
        (f"line 2 of '{table}': ", {"prompt": "a fox, red", "seed": 3, "other": "4"}),
        (f"line 4 of '{table}': ", {"prompt": "a corgi"}),
    ]
    lines.write_text('# comment\n{"prompt": "a fox", "x": [1]}\n"a corgi"\n')
    assert read_prompts(str(lines), KINDS) == [
        (f"line 2 of '{lines}': ", {"prompt": "a fox", "x": [1]}),
        (f"line 3 of '{lines}': ", {"prompt": "a corgi"}),
    ]
    listed.write_text(json.dumps(["a fox", {"seed": 3}]))
    assert [fields for _, fields in read_prompts(str(listed), KINDS)] == [{"prompt": "a fox"}, {"seed": 3}]


def test_no_prompts_are_an_error(tmp_path):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    for source in (" ", str(tmp_path / "empty.txt")):
        with pytest.raises(UserError, match="hold no prompt: give a text, or a file"):
            read_prompts(source, KINDS)
