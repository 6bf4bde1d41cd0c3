import errno
import hashlib
import json
import os
import socket
import subprocess
import sys

import pytest

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
