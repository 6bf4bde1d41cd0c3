import os
import re
from pathlib import Path

import pytest
from etils import epath

from pixart_jax import readers
from pixart_jax.errors import UserError


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('# a; comment, with "quotes\n\nname;n\na, b;1\n# no row\n"#";"two\nlines"\n"x""y"\n')
    rows = [
        (4, {"name": "a, b", "n": "1"}),
        (6, {"name": "#", "n": "two\nlines"}),
        (8, {"name": 'x"y', "n": None}),
    ]
    assert readers.read_table(path, comments=True) == (["name", "n"], rows)
    path.write_text("name\n# a row\n")
    assert readers.read_table(path) == (["name"], [(2, {"name": "# a row"})])
    for text, message in [
        ("n,text,text,,\n", "has several columns 'text'"),
        ('text\n"a cat\na dog\n', "is not a table in CSV and UTF-8 .unexpected end of data"),
        ('text\n"a" cat\n', "is not a table in CSV and UTF-8"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            readers.read_table(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("nan", "Expecting value"),
        (b"\xff", "can't decode byte 0xff"),
        (b"\0\0\0\0", "Expecting value"),
        ('"\0"', "Invalid control character"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 deep"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than 64 deep"),
        ('{"a": 1, "b": 2, "a": 1}', "the name 'a' twice in an object"),
        (f'{{"{"x" * 500}": 1, "{"x" * 500}": 2}}', r"…x+' \(502 characters\) twice"),
        ("1" * 5000, r"the number 1+…1+ \(5,000 characters\) has more than 64 bits"),
        ("-18446744073709551616", "has more than 64 bits"),
        ("NaN", "the number NaN is not finite"),
        ("[-Infinity]", "the number -Infinity is not finite"),
        ("1e999", "the number 1e999 is not finite"),
        (r'["\ud800"]', "half of a surrogate pair"),
        (r'{"\uDC00": 1}', "half of a surrogate pair"),
        ('"\ud800"'.encode("utf-8", "surrogatepass"), "invalid continuation byte"),
    ],
)
def test_json_that_is_damaged_or_hostile(text, message):
    with pytest.raises(ValueError, match=message) as error:
        readers.parse_json(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_json_that_is_fine():
    for text, value in [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('\ufeff{"a": 1}', {"a": 1}),
        ('{"ü": 1}'.encode("utf-16"), {"ü": 1}),
        ("[" * 64 + "]" * 64, None),
        ("[" + "[]," * 99 + "[]]", [[]] * 100),
        (r'"\ud83d\ude42 \u0000"', "🙂 \0"),
        ("18446744073709551615", 2**64 - 1),
        ("[1e308, -0.5]", [1e308, -0.5]),
    ]:
        found = readers.parse_json(text)
        assert value is None or found == value
    # For callers that check each value.
    assert readers.parse_json('[NaN, 1e999, "\\ud800"]', lenient=True)[1:] == [float("inf"), "\ud800"]
    assert readers.parse_json("1" * 4000, lenient=True) > 2**64
    for text, message in (("1" * 5000, "more than 4,300 digits"), ("[" * 65 + "]" * 65, "deep")):
        with pytest.raises(ValueError, match=message):
            readers.parse_json(text, lenient=True)


def test_json_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2]}')
    assert readers.read_json(path, "copy it again") == {"a": [1, 2]}
    assert readers.read_json(str(path), "", {"a": [int], "b?": str}) == {"a": [1, 2]}
    monkeypatch.setattr(readers, "MOST_BYTES", 5)
    with pytest.raises(UserError, match=r"x.json' cannot .* \(it has more than 5 bytes\): copy it"):
        readers.read_json(path, "copy it again")
    with pytest.raises(UserError, match="is missing: copy it again"):
        readers.read_json(tmp_path / "y.json", "copy it again")
    path.write_text("[]")
    with pytest.raises(UserError, match=r"it is \[\], and must be a JSON object, {...}\): copy it again."):
        readers.read_json(path, "copy it again")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        readers.read_json(tmp_path, "copy it again")
    path.unlink()
    os.mkfifo(path)  # would block
    with pytest.raises(UserError, match="it is not a regular file"):
        readers.read_json(path, "copy it again")


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        ({}, {"a": int}, "it has no a$"),
        ({"a": {"b": [{}]}}, {"a": {"b": [{"c": int}]}}, r"it has no a.b\[0\].c$"),
        ({"a": True}, {"a": int}, "^a is true, and must be a whole number$"),
        ({"a": 1.0}, {"a": int}, "a is 1.0, and must be a whole number"),
        ({"a": True}, {"a": float}, "a is true, and must be a finite number"),
        ({"a": float("nan")}, {"a": float}, "a is NaN, and must be a finite number"),
        ({"a": 10**400}, {"a": float}, "and must be a finite number"),
        ({"a": 1}, {"a": bool}, "a is 1, and must be true or false"),
        ({"a": None}, {"a": str}, "a is null, and must be text"),
        ({"a": [1, "x"]}, {"a": [int]}, r'a\[1\] is "x", and must be a whole number'),
        ({"a": [1, "x", 2]}, {"a": (int, str)}, r"a is .*, and must be a list of 2 values"),
        ({"a": [1, 2]}, {"a": (int, str)}, r"a\[1\] is 2, and must be text"),
        (
            {"a": -1},
            {"a": readers.COUNT},
            "a is -1, and must be a whole number from 0 to 9223372036854775807",
        ),
        ({"a": "../x"}, {"a": re.compile(r"\w+")}, r'a is "../x", and must be text of the form \\w+'),
        ({"a": {"x": 1}}, {"a": {str: str}}, "a.x is 1, and must be text"),
        ({"a": 1}, {"a": readers.OrNull(str)}, "a is 1, and must be text"),
        ({"a": "x" * 999}, {"a": int}, r'a is "x+…x+" \(1,001 characters\), and must be a whole number'),
        ([], {"a": int}, r"it is \[\], and must be a JSON object"),
    ],
)
def test_json_of_another_shape(value, shape, message):
    with pytest.raises(ValueError, match=message):
        readers.check_shape(value, shape)


def test_json_of_the_right_shape():
    shape = {"a": readers.OrNull([int]), "b?": float, "c": (str, {str: bool}), "d": dict}
    for a in (None, [], [1]):
        readers.check_shape({"a": a, "c": ["x", {"y": True}], "d": {"z": 1}, "e": 1}, shape)
    readers.check_shape({"a": None, "b": 1, "c": ["x", {}], "d": {}}, shape)


def test_lines_of_a_run(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    assert readers.lines_until(path, 3) == []
    lines = '{"step": 1, "loss": 0.10}\n{"step":2,"loss":NaN}\n{"step": 4}\n'
    kept = lines.splitlines(keepends=True)[:2]
    path.write_text(lines)
    assert readers.lines_until(path, 3) == kept
    # The process was killed while it wrote the last line, or only before its end.
    for last in ("", '{"step": 3, "l', '{"step": 3}', "\0\0"):
        path.write_text(lines + last)
        assert readers.lines_until(path, 3) == kept + (['{"step": 3}\n'] if last[-1:] == "}" else [])
    for line, message in (
        ("x", "Expecting value"),
        ("[]", "must be a JSON object"),
        ('{"loss": 1}', "it has no step"),
        ('{"step": "1"}', "step is .1., and must be a whole number"),
        ("[" * 100_000, "nested"),
        (b"\xff", "can't decode"),
    ):
        damaged = line if isinstance(line, bytes) else line.encode()
        path.write_bytes(b'{"step": 1}\n' + damaged + b'\n{"step": 2}\n')
        with pytest.raises(UserError, match=rf"metrics.jsonl' line 2 .*{message}.*\): remove this line, or"):
            readers.lines_until(path, 3)
    for make in (Path.mkdir, os.mkfifo):
        other = tmp_path / make.__name__
        make(other)
        with pytest.raises(UserError, match=r"' cannot be read \(.*\): remove .*, or this file if"):
            readers.lines_until(epath.Path(other), 3)
