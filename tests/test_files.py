import errno
import hashlib
import json
import os
import re
import socket
import subprocess
import sys

import pytest
from etils import epath

from pixart_jax import files
from pixart_jax.errors import UserError

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "x"
    for content in (b"one", b"two"):
        before = path.read_bytes() if path.exists() else None
        with files.replacing(path) as temporary:
            temporary.write_bytes(content)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(error), files.replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert os.listdir(tmp_path) == ["x"] and path.read_bytes() == b"old"


def test_what_a_killed_process_leaves_is_overwritten(tmp_path):
    with files.replacing(tmp_path / "x") as temporary:
        name = temporary
        temporary.write_bytes(b"")
    name.write_bytes(b"left by a killed process")
    with files.replacing(tmp_path / "x") as temporary:
        temporary.write_bytes(b"new")
    assert os.listdir(tmp_path) == ["x"]


def test_the_temporary_file_may_lie_elsewhere(tmp_path):
    with files.replacing(tmp_path / "listed" / "x", tmp_path / "y") as temporary:
        temporary.write_bytes(b"1")
        assert temporary == tmp_path / "y" and not os.listdir(tmp_path / "listed")
    assert os.listdir(tmp_path / "listed") == ["x"]


@pytest.mark.parametrize("write", [files.write_bytes, files.write_text, files.write_json])
def test_bytes_reach_the_disk_before_the_rename(tmp_path, monkeypatch, write):
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
        )
    write(tmp_path / "x", b"1" if write is files.write_bytes else "1")
    assert calls == ["fsync", "replace"] and os.listdir(tmp_path) == ["x"]


def test_writers_of_one_file_use_different_temporary_files(tmp_path, monkeypatch):
    sources = []
    monkeypatch.setattr(os, "replace", lambda source, target: sources.append(source))
    files.write_text(tmp_path / "x", "1")
    files.write_text(tmp_path / "x", "2")
    assert len(set(sources)) == 2


def test_equal_values_give_equal_json(tmp_path):
    files.write_json(tmp_path / "a", {"x": 1, "é": [2]})
    files.write_json(tmp_path / "b", {"é": [2], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert json.loads((tmp_path / "a").read_text("utf-8")) == {"x": 1, "é": [2]}
    assert "é" in (tmp_path / "a").read_text("utf-8")


def test_hashes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_of_file(tmp_path / "a") == files.sha256_of_bytes(b"abc") == ABC
    assert files.sha256_of_json({"b": 1, "a": "é"}) == files.sha256_of_json({"a": "é", "b": 1})
    # Version 0.1 stored hashes of this form in checkpoints and for features.
    assert files.sha256_of_json({"a": "é"}) == hashlib.sha256(rb'{"a": "\u00e9"}').hexdigest()
    with pytest.raises(UserError, match="none' cannot be read"):
        files.sha256_of_file(tmp_path / "none")


HOLDER = """
import sys, time
from pixart_jax.files import locked
with locked(sys.argv[1], "the output is taken", "wait."):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    path = tmp_path / "deep" / "lock"
    # A file that a killed process has left locks nothing.
    path.parent.mkdir()
    path.write_text("process 1 on host gone, which had a longer name than this one\n")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError) as error, files.locked(path, "the output is taken", "wait."):
            pass
        name = f"process {holder.pid} on host {socket.gethostname()}"
        assert str(error.value) == (
            f"the output is taken ({name}): wait. If that process no longer runs, remove '{path}'."
        )
    finally:
        holder.kill()
        holder.wait()
    for _ in range(2):
        with files.locked(path, "", ""):
            assert path.read_text() == f"process {os.getpid()} on host {socket.gethostname()}\n"


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said = []
    with files.locked(tmp_path / "lock", "", "", said.append):
        pass
    assert len(said) == 1 and "cannot be locked ([Errno 37] No locks available): make sure" in said[0]


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('# a; comment, with "quotes\n\nname;n\na, b;1\n# no row\n"#";"two\nlines"\n"x""y"\n')
    rows = [
        (4, {"name": "a, b", "n": "1"}),
        (6, {"name": "#", "n": "two\nlines"}),
        (8, {"name": 'x"y', "n": None}),
    ]
    assert files.read_table(path, comments=True) == (["name", "n"], rows)
    path.write_text("name\n# a row\n")
    assert files.read_table(path) == (["name"], [(2, {"name": "# a row"})])
    for text, message in [
        ("n,text,text,,\n", "has several columns 'text'"),
        ('text\n"a cat\na dog\n', "is not a table in CSV and UTF-8 .unexpected end of data"),
        ('text\n"a" cat\n', "is not a table in CSV and UTF-8"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            files.read_table(path)


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
        files.parse_json(text)
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
        found = files.parse_json(text)
        assert value is None or found == value
    # For callers that check each value.
    assert files.parse_json('[NaN, 1e999, "\\ud800"]', lenient=True)[1:] == [float("inf"), "\ud800"]
    assert files.parse_json("1" * 4000, lenient=True) > 2**64
    for text, message in (("1" * 5000, "more than 4,300 digits"), ("[" * 65 + "]" * 65, "deep")):
        with pytest.raises(ValueError, match=message):
            files.parse_json(text, lenient=True)


def test_json_from_a_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2]}')
    assert files.read_json(path, "copy it again") == {"a": [1, 2]}
    assert files.read_json(str(path), "", {"a": [int], "b?": str}) == {"a": [1, 2]}
    monkeypatch.setattr(files, "MOST_BYTES", 5)
    with pytest.raises(UserError, match=r"x.json' cannot .* \(it has more than 5 bytes\): copy it"):
        files.read_json(path, "copy it again")
    with pytest.raises(UserError, match="is missing: copy it again"):
        files.read_json(tmp_path / "y.json", "copy it again")
    path.write_text("[]")
    with pytest.raises(UserError, match=r"it is \[\], and must be a JSON object, {...}\): copy it again."):
        files.read_json(path, "copy it again")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        files.read_json(tmp_path, "copy it again")
    path.unlink()
    os.mkfifo(path)  # would block
    with pytest.raises(UserError, match="it is not a regular file"):
        files.read_json(path, "copy it again")


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
        ({"a": -1}, {"a": files.COUNT}, "a is -1, and must be a whole number from 0 to 9223372036854775807"),
        ({"a": "../x"}, {"a": re.compile(r"\w+")}, r'a is "../x", and must be text of the form \\w+'),
        ({"a": {"x": 1}}, {"a": {str: str}}, "a.x is 1, and must be text"),
        ({"a": 1}, {"a": files.OrNull(str)}, "a is 1, and must be text"),
        ({"a": "x" * 999}, {"a": int}, r'a is "x+…x+" \(1,001 characters\), and must be a whole number'),
        ([], {"a": int}, r"it is \[\], and must be a JSON object"),
    ],
)
def test_json_of_another_shape(value, shape, message):
    with pytest.raises(ValueError, match=message):
        files.check_shape(value, shape)


def test_json_of_the_right_shape():
    shape = {"a": files.OrNull([int]), "b?": float, "c": (str, {str: bool}), "d": dict}
    for a in (None, [], [1]):
        files.check_shape({"a": a, "c": ["x", {"y": True}], "d": {"z": 1}, "e": 1}, shape)
    files.check_shape({"a": None, "b": 1, "c": ["x", {}], "d": {}}, shape)


def test_lines_of_a_run(tmp_path):
    path = epath.Path(tmp_path) / "metrics.jsonl"
    assert files.lines_until(path, 3) == []
    lines = '{"step": 1, "loss": 0.10}\n{"step":2,"loss":NaN}\n{"step": 4}\n'
    kept = lines.splitlines(keepends=True)[:2]
    path.write_text(lines)
    assert files.lines_until(path, 3) == kept
    # The process was killed while it wrote the last line, or only before its end.
    for last in ("", '{"step": 3, "l', '{"step": 3}', "\0\0"):
        path.write_text(lines + last)
        assert files.lines_until(path, 3) == kept + (['{"step": 3}\n'] if last[-1:] == "}" else [])
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
        with pytest.raises(UserError, match=rf"metrics.jsonl' line 2 .*{message}.*\): remove this line.$"):
            files.lines_until(path, 3)
