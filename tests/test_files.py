import errno
import hashlib
import json
import os
import socket
import stat
import subprocess
import sys
import time

import pytest
from full_disk import largest_file

from pixart_jax import files
from pixart_jax.errors import EXIT_STORAGE, OutputError, UserError

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


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError, UserError])
@pytest.mark.parametrize("removable", [True, False])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, error, removable):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    if not removable:

        def unlink(_):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(OutputError if error is OSError else error), files.replacing(path) as temporary:
        temporary.write_bytes(b"half of the n")
        raise error
    assert path.read_bytes() == b"old" and len(os.listdir(tmp_path)) == (1 if removable else 2)
    monkeypatch.undo()
    files.remove_leftovers.cache_clear()
    files.write_bytes(path, b"new")
    assert os.listdir(tmp_path) == ["x"] and path.read_bytes() == b"new"


KILLED = """
import os, signal, sys
from pathlib import Path
from pixart_jax import files
path = Path(sys.argv[1])
with files.replacing(path) as file, files.temporary(path.parent, is_folder=True) as folder:
    file.write_bytes(b"half")
    (folder / "deep").mkdir()
    (folder / "deep" / "x").write_bytes(b"half")
    if len(sys.argv) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_the_next_process_removes_what_a_killed_one_left(tmp_path, monkeypatch):
    path = tmp_path / "x"
    subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    left = set(os.listdir(tmp_path))
    assert len(left) == 2 and "x" not in left
    live = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert live.stdout.readline() == "writing\n"
    files.write_text(path, "new")
    # The files of the killed process are gone, those of the live one are not.
    now = set(os.listdir(tmp_path))
    assert len(now) == 3 and not now & left and path.read_text() == "new"
    live.communicate()
    assert os.listdir(tmp_path) == ["x"] and path.read_text() == "half"


def test_temporary_files_of_other_hosts_are_left_alone_for_a_day(tmp_path):
    other = tmp_path / ".pixart-00000000-1.tmp"
    other.write_text("half")
    files.write_text(tmp_path / "x", "1")
    assert other.exists()
    os.utime(other, (time.time() - 25 * 60 * 60,) * 2)
    files.remove_leftovers.cache_clear()
    files.write_text(tmp_path / "x", "1")
    assert os.listdir(tmp_path) == ["x"]


def test_a_temporary_file_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Another process may lock and remove it between its creation and its lock."""
    real, calls = files.fcntl.flock, []

    def flock(file, how):
        if not calls:
            for path in tmp_path.glob(".pixart-*"):
                path.unlink()
        calls.append(how)
        return real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    files.write_text(tmp_path / "x", "1")
    assert len(calls) == 2 and (tmp_path / "x").read_text() == "1" and os.listdir(tmp_path) == ["x"]


def test_the_temporary_file_may_lie_elsewhere(tmp_path):
    with files.replacing(tmp_path / "listed" / "x", folder=tmp_path) as temporary:
        temporary.write_bytes(b"1")
        assert temporary.parent == tmp_path and not os.listdir(tmp_path / "listed")
    assert os.listdir(tmp_path / "listed") == ["x"]


def test_an_output_that_cannot_be_written_is_found_at_once(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    longest = tmp_path / ("x" * 255)
    files.write_text(longest, "1")
    assert longest.read_text() == "1"
    for path, message in [
        (
            tmp_path / "file" / "x",
            "Not a directory): a file is where a folder should be; choose another path.",
        ),
        (tmp_path / "file" / "a" / "x", "Not a directory): a file is where"),
        (tmp_path / "folder", "Is a directory): a folder is where the file should be; choose another path."),
        (tmp_path / ("x" * 256), "File name too long): shorten the path or the name."),
        (tmp_path / "/".join(["x" * 200] * 25), "File name too long): shorten"),
        ("/proc/self/x", "No such file or directory): check the disk, or choose another path."),
        ("/dev/full", "No space left on device): free space there, then run the same command again."),
        (tmp_path / "x\0y", "cannot be written (embedded null byte): choose another path."),
        (tmp_path / "x\ud800", "choose another path."),
    ]:
        with pytest.raises(OutputError) as error:
            files.write_bytes(path, b"new")
        assert message in str(error.value) and error.value.status == EXIT_STORAGE, error.value
        assert "\n" not in str(error.value) and "cannot be written" in str(error.value)
    with pytest.raises(OutputError, match=r"file' cannot be written .File exists.: a file is where a folder"):
        files.make_folder(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", longest.name]
    assert (tmp_path / "file").read_text() == "old" and stat.S_ISCHR(os.stat("/dev/full").st_mode)
    files.write_text("/dev/null", "1")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_lines_that_do_not_fit_are_removed_again(tmp_path):
    path = tmp_path / "deep" / "lines"
    lines = files.LineFile(path)
    lines.append(b"one\n")
    with (
        largest_file(10),
        pytest.raises(OutputError, match=r"lines' cannot be written .File too large.: free space"),
    ):
        lines.append(b"two is longer\n")
    assert path.read_bytes() == b"one\n"
    lines.append(b"two is longer\n")
    lines.sync()
    lines.close()
    assert path.read_bytes() == b"one\ntwo is longer\n"


def test_a_copy_tells_reading_from_writing(tmp_path):
    (tmp_path / "a").write_bytes(b"1" * (3 << 20))
    files.copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    with pytest.raises(UserError, match="none' cannot be read"):
        files.copy(tmp_path / "none", tmp_path / "b")
    with pytest.raises(UserError, match="cannot be read"):
        files.copy(tmp_path, tmp_path / "b")
    with pytest.raises(OSError, match="No space left"):
        files.copy(tmp_path / "a", "/dev/full")
    with pytest.raises(UserError, match="none' cannot be read"):
        files.list_folder(tmp_path / "none")


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


@pytest.mark.parametrize("write", [files.write_text, files.replace_text])
def test_a_limit_on_the_file_size_leaves_the_old_file(tmp_path, write):
    path = tmp_path / "x"
    path.write_text("old")
    with (
        largest_file(1000),
        pytest.raises(OutputError, match=r"x' cannot be written .File too large.: free space there"),
    ):
        write(path, "new" * 1000)
    assert os.listdir(tmp_path) == ["x"] and path.read_text() == "old"


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


def test_text_that_is_not_unicode_is_written_with_escapes(tmp_path):
    files.write_json(tmp_path / "a", {"path": "a\udcff"})
    assert json.loads((tmp_path / "a").read_text()) == {"path": "a\udcff"}
    for write in (files.write_text, files.replace_text):
        write(tmp_path / "b", "é\ud800")
        assert (tmp_path / "b").read_text() == "é\\ud800"


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


def test_a_new_lock_file_goes_with_its_failed_process(tmp_path):
    path = tmp_path / "lock"
    with pytest.raises(UserError), files.locked(path, "", ""):
        raise UserError("the model cannot be loaded")
    assert not path.exists()
    with files.locked(path, "", ""):
        pass
    with pytest.raises(UserError), files.locked(path, "", ""):
        raise UserError("the model cannot be loaded")
    assert path.exists()


def test_a_lock_file_that_was_just_removed_locks_nothing(tmp_path, monkeypatch):
    path, real, calls = tmp_path / "lock", files.fcntl.flock, []

    def flock(file, how):
        if not calls:
            path.unlink()
        calls.append(how)
        return real(file, how)

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.locked(path, "", ""):
        assert path.read_text().startswith("process") and len(calls) == 2


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    said = []
    with files.locked(tmp_path / "lock", "", "", said.append):
        pass
    assert len(said) == 1 and "cannot be locked ([Errno 37] No locks available): make sure" in said[0]
