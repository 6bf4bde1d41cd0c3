import sys

import pytest
from absl import flags

from pixart_jax.errors import UserError, did_you_mean, run_command


def test_did_you_mean():
    assert did_you_mean("optimizr", ["optimizer", "data"]) == " Did you mean 'optimizer'?"
    assert did_you_mean("zzz", ["optimizer"]) == ""


@pytest.mark.parametrize(
    ("outcome", "status", "printed"),
    [
        (None, 0, ""),
        (UserError("the value\n is wrong"), 2, "error: the value is wrong\n"),
        (flags.Error("no such flag"), 2, "error: no such flag\n"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(monkeypatch, capsys, outcome, status, printed):
    monkeypatch.setattr(sys, "argv", ["command"])

    def main(_):
        if outcome:
            raise outcome

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert stopped.value.code == status
    assert capsys.readouterr().err == printed


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(lambda _: 1 / 0)
