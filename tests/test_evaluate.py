import sys

import pytest

from pixart_jax.errors import UserError
from pixart_jax.evaluate import MODES, main, table


def test_the_table_has_a_row_for_each_stage():
    rows = [
        {
            "stage": "stage1",
            "pixels": 8,
            "samples": 500,
            "agreement": 0.987,
            "reader_on_held_out_scans": 0.98,
        }
    ]
    assert table(rows).splitlines()[-1] == "| stage1 | 8 | 500 | 98.7% | 98.0% |"


@pytest.mark.parametrize("words", [[], ["val-los"], ["digits", "more"]])
def test_modes_are_named(words):
    with pytest.raises(UserError, match=f"takes one of {', '.join(MODES)}"):
        main({}, [sys.argv[0], *words])
