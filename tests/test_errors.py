import sys

import pytest
from absl import flags

from pixart_jax.errors import UserError, _parse, at_least, did_you_mean, one_of, run_command


def test_did_you_mean():
    assert did_you_mean("optimizr", ["optimizer", "data"]) == " Did you mean 'optimizer'?"
    assert did_you_mean("zzz", ["optimizer"]) == ""


def test_checks_of_a_value():
    one_of("codec", "vae", iter(["pixels", "vae"]))
    at_least("steps", 1, 1)
    with pytest.raises(UserError, match="steps is nan"):
        at_least("steps", float("nan"), 1)
    with pytest.raises(UserError) as error:
        one_of("codec", "vea", iter(["pixels", "vae"]))
    assert str(error.value) == "codec is 'vea': choose one of pixels, vae. Did you mean 'vae'?"
    with pytest.raises(UserError) as error:
        one_of("codec", None, ["pixels"])
    assert str(error.value) == "codec is 'None': choose one of pixels."
    with pytest.raises(UserError) as error:
        at_least("steps", 0, 1)
    assert str(error.value) == "steps is 0: it must be at least 1."


@pytest.mark.parametrize(
    ("outcome", "status", "printed"),
    [
        (None, 0, ""),
        (UserError("the value\n is wrong"), 2, "error: the value is wrong\n"),
        (flags.Error("no such flag"), 2, "error: no such flag\n"),
        (KeyboardInterrupt(), 130, "interrupted: the same command continues\n"),
    ],
)
def test_input_errors_and_interrupts_are_one_line(monkeypatch, capsys, outcome, status, printed):
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


def test_flags_are_read_with_dashes_too(monkeypatch):
    values = flags.FlagValues()
    from_image = flags.DEFINE_string("from_image", None, "", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    for argument in ("--from-image=a-b.png", "--from_image=a-b.png"):
        _parse(["command", argument])
        assert from_image.value == "a-b.png"
    with pytest.raises(UserError, match="from-imag"):
        _parse(["command", "--from-imag=x"])
