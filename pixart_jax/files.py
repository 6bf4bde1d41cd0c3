"""Files that are written completely or not at all, locks, sha256 of files, bytes and JSON.

Functions that take an `epath.Path` also work in a bucket; the others are for local files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart_jax.errors import UserError, system_reason, writing

if TYPE_CHECKING:
    from etils import epath


# Temporary files and folders of this project are called .pixart-HOST-RANDOM.tmp, where HOST is a hash. The
# name does not depend on that of the output, which may be as long as the file system allows.
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
# Seconds after which another host's temporary file, whose lock may not be visible here, is surely a leftover.
_SURELY_LEFT = 24 * 60 * 60


@contextlib.contextmanager
def temporary(folder: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """Yields a new temporary file or folder in `folder`. If it still exists at the end, it is removed.

    The process holds a lock on it (`flock`). What a killed process has left has no lock, and is removed by
    the next process that makes a temporary file in the same folder.

    Args:
      folder: an existing folder.
      is_folder: whether to make a folder.

    Raises:
      OSError: it cannot be made.
    """
    remove_leftovers(folder.absolute())
    path, lock = _make_temporary(folder, is_folder)
    try:
        yield path
    finally:
        try:
            _remove(path, is_folder)
        finally:
            os.close(lock)


def _make_temporary(folder: Path, is_folder: bool) -> tuple[Path, int]:
    """Makes a temporary file or folder; returns its path and the file descriptor that holds its lock."""
    while True:
        path = folder / f".pixart-{_HOST}-{uuid.uuid4().hex[:16]}.tmp"
        if is_folder:
            path.mkdir()
            lock = os.open(path, os.O_RDONLY)
        else:
            lock = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        # On a file system without locks, leftovers cannot be recognized and stay.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.path.exists(path):
            return path, lock
        # Another process took it for a leftover before it was locked.
        os.close(lock)


def _remove(path: Path, is_folder: bool) -> None:
    """Removes a temporary file or folder if that is possible.

    If it is not, for example because the file system has become read-only, an earlier exception has the
    reason, and the next process will remove it.
    """
    if is_folder:
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.unlink(path)


@functools.cache  # once in each process
def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of processes that no longer run."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".pixart-*.tmp"):
            # Gone, in use (`BlockingIOError`), not ours, or on a file system without locks.
            with contextlib.suppress(OSError):
                _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    state = os.lstat(path)
    here = path.name.startswith(f".pixart-{_HOST}-")
    if not here and time.time() - state.st_mtime < _SURELY_LEFT:
        return
    is_folder = stat.S_ISDIR(state.st_mode)
    lock = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path, is_folder)
    finally:
        os.close(lock)


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, folder: Path | None = None, flush: bool = False) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` at the end of the block.

    If the block raises an exception, the temporary file is removed and `path` is not changed. Several
    processes may write the same file at the same time; one of them wins.

    Args:
      path: the file to write. Its folder is created if it does not exist. If it is a device or a pipe, it is
        yielded itself.
      folder: where the temporary file lies, on the same file system; by default beside `path`.
      flush: whether to wait until the data is on the disk before renaming the file, so that either the old or
        the new file exists after a power failure.

    Raises:
      OutputError: it cannot be written. If `path` is a folder or cannot be a file, this is found at once.
    """
    path = Path(path)
    with writing(path):
        if _is_special(path):
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary(folder or path.parent) as new:
            yield new
            if flush:
                with open(new, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(new, path)


def _is_special(path: Path) -> bool:
    """Whether `path` is neither a file nor absent, but a device or a pipe.

    Raises:
      OSError: it is a folder, or has a name that no file can have.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    return not stat.S_ISREG(mode)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file, flushes it to the disk and renames it into place.

    Raises:
      OutputError: see `replacing`.
    """
    with replacing(path, flush=True) as new:
        new.write_bytes(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text as UTF-8 with `write_bytes`. Halves of surrogate pairs become escapes, such as \\ud800."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes JSON with `write_bytes`. Keys are sorted, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def make_folder(path: str | os.PathLike) -> Path:
    """Makes a folder for outputs, and those above it, unless it exists.

    Raises:
      OutputError: it cannot be made.
    """
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def copy(source: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies the bytes of a file, within `writing` the output that `target` belongs to.

    Raises:
      UserError: `source` cannot be read.
      OSError: `target` cannot be written.
    """
    with open(target, "wb") as new:
        try:
            file = open(source, "rb")  # noqa: SIM115 closed below
        except OSError as error:
            raise _unreadable(source, error) from error
        with file:
            while True:
                try:
                    data = file.read(1 << 20)
                except OSError as error:
                    raise _unreadable(source, error) from error
                if not data:
                    return
                new.write(data)


def list_folder(path: Path) -> list[Path]:
    """What is in a folder, by name.

    Raises:
      UserError: the folder cannot be read.
    """
    try:
        return sorted(path.iterdir())
    except OSError as error:
        raise _unreadable(path, error) from error


def replace_bytes(path: epath.Path, data: bytes) -> None:
    """Replaces a file of a run directory, so that a kill leaves either the old or the new one.

    Raises:
      OutputError: it cannot be written.
    """
    if is_bucket(path):
        with writing(path):
            path.write_bytes(data)  # an object appears when it is complete
        return
    with replacing(path) as new:
        new.write_bytes(data)


def replace_text(path: epath.Path, text: str) -> None:
    """Replaces a text file of a run directory with `replace_bytes`."""
    replace_bytes(path, text.encode(errors="backslashreplace"))


def is_bucket(path: object) -> bool:
    """Whether a path is in a bucket and not on a file system."""
    return "://" in str(path)


class LineFile:
    """A local file that lines are appended to. Lines that cannot be written completely are removed again.

    Args:
      path: the file. It and its folder are created if they do not exist.

    Raises:
      OutputError: it cannot be written; so do the methods.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        with writing(path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what could not be written is not tried again when the file is closed.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 closed by `close`

    def append(self, data: bytes) -> None:
        """Appends bytes."""
        with writing(self._path):
            end = os.fstat(self._file.fileno()).st_size
            try:
                left = memoryview(data)
                while left:
                    left = left[self._file.write(left) :]
            except OSError:
                with contextlib.suppress(OSError):  # the first error is the one to report
                    self._file.truncate(end)
                raise

    def sync(self) -> None:
        """Waits until what was appended is on disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with writing(self._path):
            self._file.close()


@contextlib.contextmanager
def locked(
    path: str | os.PathLike, taken: str, fix: str, say: Callable[[str], None] = print
) -> Iterator[None]:
    """Holds a lock within the block, so that two processes do not write the same output.

    The operating system holds the lock (`flock`) and releases it when the process ends in any way, so a lock
    file that a killed process has left does not lock anything. The file stays at the end, unless it is new
    and the block raises an exception.

    Args:
      path: the lock file. It names the process that holds the lock, and its host. Its folder is created if it
        does not exist.
      taken: says that another process holds the lock, for the error message.
      fix: what to do then.
      say: called with one line if the file system has no locks.

    Raises:
      UserError: another process holds the lock.
      OutputError: the lock file cannot be written.
    """
    path = Path(path)
    while True:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new = not path.exists()
            file = open(path, "a+b", buffering=0)  # noqa: SIM115 closed below
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                # NFS servers can keep the lock of a host that crashed.
                holder = " ".join(file.read().decode(errors="replace").split())
                raise UserError(
                    f"{taken} ({holder or 'it has not given its name yet'}): {fix} If that process no longer "
                    f"runs, remove '{path}'."
                ) from None
            except OSError as error:
                new = False
                say(
                    f"'{path}' cannot be locked ({error}): make sure that no other process writes to its "
                    "folder."
                )
            else:
                if not _is_same(file.fileno(), path):
                    continue  # a process that failed has just removed it
            try:
                with writing(path):
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on host {socket.gethostname()}\n".encode())
                yield
            except BaseException:
                if new:
                    with contextlib.suppress(OSError):  # the exception has the reason
                        path.unlink()
                raise
            return


def _is_same(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def sha256_of_file(path: str | os.PathLike) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | os.PathLike, error: OSError) -> UserError:
    return UserError(f"'{os.fspath(path)}' cannot be read ({system_reason(error)}): check the path.")


def sha256_of_bytes(data: bytes) -> str:
    """Hash of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a value's JSON with sorted keys, in hexadecimal."""
    return sha256_of_bytes(json.dumps(value, sort_keys=True).encode())
