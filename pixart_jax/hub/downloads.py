"""Looks up repositories, and downloads the needed files into the cache of `huggingface_hub`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError, listing, report
from pixart_jax.hub.messages import explained
from pixart_jax.hub.paths import COMMIT, PREFIX, HubPath, cache_folder, hub_parts, is_hub, without_weight
from pixart_jax.hub.selection import needed_files

# Lists of images, whose paths are relative to their folder.
_LISTS = (".json", ".jsonl", ".csv", ".tsv")


class Snapshot(NamedTuple):
    """The files of a repository at a commit.

    Attributes:
      place: the pinned path.
      label: the revision that the user gave.
      files: sizes of all files of the repository in bytes, by path. If they come from the cache of an older
        version of huggingface_hub, those that are in the cache.
      folder: where they are in the cache.
    """

    place: HubPath
    label: str
    files: Mapping[str, int]
    folder: Path


class Wanted(NamedTuple):
    """What `local_all` is asked for; see `needed_files`."""

    path: str | Path | HubPath
    parts: Collection[str] | None = None
    everything: bool = False


def local(
    path: str | Path | HubPath,
    *,
    parts: Collection[str] | None = None,
    everything: bool = False,
    with_folder: bool = False,
) -> Path:
    """The path of a file or folder on this machine. What is missing in the cache is downloaded.

    Prints what is downloaded, before. After an interruption, the files that are complete are kept.

    Args:
      path: a path of the hub; any other path is returned as it is.
      parts, everything: see `needed_files`.
      with_folder: of a list, such as captions.jsonl, also download the files of its folder.

    Raises:
      UserError: there is no such repository, revision, folder or file; it cannot be downloaded without a
        token or an accepted licence; or the hub cannot be reached and the cache is not complete.
      RunStopped: the disk has no room for it.
    """
    if with_folder and is_hub(path) and Path(path).suffix.lower() in _LISTS:
        place = HubPath.parse(path)
        folder = dataclasses.replace(place, path=os.path.dirname(place.path))
        return local(str(folder), everything=True) / os.path.basename(place.path)
    return local_all([Wanted(path, parts, everything)])[0]


def local_all(wanted: Sequence[Wanted]) -> list[Path]:
    """As `local` for several paths. It says how much is downloaded before it starts with the first one."""
    found = [_find(_parsed(each.path)) if is_hub(each.path) else None for each in wanted]
    plans = []
    for each, snapshot in zip(wanted, found, strict=True):
        if snapshot is None:
            plans.append(None)
            continue
        names = needed_files(snapshot.files, snapshot.place, parts=each.parts, everything=each.everything)
        missing = [name for name in names if not (snapshot.folder / name).is_file()]
        plans.append((snapshot, names, missing))
    size = sum(plan[0].files[name] for plan in plans if plan for name in plan[2])
    if size:
        _check_space(size)
    for plan in plans:
        if plan and plan[2]:
            _say(*plan)
    for plan in plans:
        if plan and plan[2]:
            _download(*plan)
    return [
        Path(each.path) if plan is None else plan[0].folder / plan[0].place.path
        for each, plan in zip(wanted, plans, strict=True)
    ]


def _parsed(path: object) -> HubPath:
    return path if isinstance(path, HubPath) else HubPath.parse(path)


def cached(path: str | Path) -> Path | None:
    """The path on this machine, without a look at the hub; None if a path of the hub is not in the cache."""
    if not is_hub(path):
        return Path(path)
    from huggingface_hub import HfApi, errors

    place = HubPath.parse(path)
    try:
        commit = (
            HfApi()
            .resolve_revision(
                place.repository, repo_type=place.kind, revision=place.revision, local_files_only=True
            )
            .resolved
        )
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError):
        return None
    folder = _snapshot_folder(place, commit) / place.path
    return folder if folder.exists() else None


def look_up(path: str | Path) -> Snapshot:
    """The files of a repository, without downloading them.

    Raises:
      UserError: as `local`.
    """
    return _find(HubPath.parse(path))


def read_headers(snapshot: Snapshot, names: Sequence[str]) -> dict[str, int]:
    """The number of values in safetensors files by dtype, such as {'F32': 610856096}.

    Only the headers are read, from the cache or over the network; {} if that fails.
    """
    from huggingface_hub import HfApi

    counts: dict[str, int] = defaultdict(int)
    place = snapshot.place
    with contextlib.suppress(Exception):  # it is only for a message
        for name in names:
            header = HfApi().parse_safetensors_file_metadata(
                place.repository, name, repo_type=place.kind, revision=place.revision
            )
            for dtype, count in header.parameter_count.items():
                counts[dtype] += count
        return dict(counts)
    return {}


def pinned(text: str, like: str = "") -> str:
    """Replaces the revisions of the hub paths in a value by commits, so that they always name the same files.

    Args:
      text: a path, or several, see `hub_parts`; adapters may have weights.
      like: the value of an earlier run. Its commits are used for paths without a revision.

    Raises:
      UserError: see `local`.
    """
    before = {}
    for _, path in hub_parts(like):
        with contextlib.suppress(UserError):
            place = HubPath.parse(path)
            before[dataclasses.replace(place, revision=None)] = place
    out = []
    for prefix, path in hub_parts(text):
        if is_hub(path):
            bare = without_weight(path)
            place = HubPath.parse(bare)
            if not COMMIT.fullmatch(place.revision or ""):
                place = before.get(place) or _find(place).place
            path = f"{place}{path.removeprefix(bare)}"
        out.append(f"{prefix}{path}")
    return ",".join(out)


def _find(place: HubPath) -> Snapshot:
    return _found(place, cache_folder())


@functools.lru_cache
def _found(place: HubPath, cache: str) -> Snapshot:
    """The files of a repository. A process asks the hub only once for each path."""
    from huggingface_hub import HfApi, constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with explained(place):
        api = HfApi()
        found = api.resolve_revision(
            place.repository,
            repo_type=place.kind,
            revision=place.revision,
            local_files_only=constants.is_offline_mode(),  # otherwise the library warns that it is offline
        )
        commit = found.resolved
        folder = _snapshot_folder(place, commit)
        try:
            tree = get_cached_repo_tree(place.repository, repo_type=place.kind, revision=commit)
        except CachedRepoTreeNotFoundError:
            tree = None
        if tree is None and constants.is_offline_mode() and folder.is_dir():
            files = {
                file.relative_to(folder).as_posix(): file.stat().st_size
                for file in folder.rglob("*")
                if file.is_file()
            }
        else:
            if tree is None:
                tree = [
                    entry
                    for entry in api.list_repo_tree(
                        place.repository, repo_type=place.kind, revision=commit, recursive=True
                    )
                    if hasattr(entry, "size")
                ]
            files = {entry.path: entry.size for entry in tree}
    label = place.revision or "main"
    return Snapshot(dataclasses.replace(place, revision=commit), label, files, folder)


def _download(snapshot: Snapshot, names: Sequence[str], missing: Sequence[str]) -> None:
    import huggingface_hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    place = snapshot.place
    below = f"{place.path}/" if place.path else ""
    # Patterns are compared with every file of the repository, so there should not be one for each of many.
    chosen = set(names)
    everything = all(name in chosen for name in snapshot.files if name.startswith(below))
    patterns = [glob.escape(name) for name in names]
    if len(names) > 1000 and everything:
        patterns = [f"{glob.escape(below)}*"]
    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        with explained(place, missing, snapshot.folder):
            huggingface_hub.snapshot_download(
                place.repository, repo_type=place.kind, revision=place.revision, allow_patterns=patterns
            )
    finally:
        if quiet:
            enable_progress_bars()
    absent = [name for name in missing if not (snapshot.folder / name).is_file()]
    if absent:
        raise UserError(
            f"'{place}': the hub did not send {listing(absent[:3])}: run the same command again, or download "
            f"it with `hf download {place.repository}`."
        )


def _say(snapshot: Snapshot, names: Sequence[str], missing: Sequence[str]) -> None:
    place, sizes = snapshot.place, snapshot.files
    todo = sum(sizes[name] for name in missing)
    there = sum(sizes[name] for name in names) - todo
    already = f", {in_bytes(there)} are there already" if there else ""
    revision = "" if snapshot.label == place.revision else f" of '{snapshot.label}'"
    what = f"{PREFIX}{'datasets/' if place.dataset else ''}{place.repository}"
    report(
        f"downloading {len(missing)} {'file' if len(missing) == 1 else 'files'}, {in_bytes(todo)}, of {what} "
        f"(commit {place.revision[:12]}{revision}) to {cache_folder()}{already}"
    )


def in_bytes(size: float) -> str:
    """A size for people: '19.1 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _check_space(size: int) -> None:
    place = Path(cache_folder())
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise RunStopped(
            f"the download takes {in_bytes(size)}, and the disk of '{cache_folder()}' has {in_bytes(free)} "
            "free: free space there, or set HF_HOME to a folder on another disk.",
            EXIT_STORAGE,
        )


def _snapshot_folder(place: HubPath, commit: str) -> Path:
    folder = "--".join([f"{place.kind}s", *place.repository.split("/")])
    return Path(cache_folder(), folder, "snapshots", commit)
