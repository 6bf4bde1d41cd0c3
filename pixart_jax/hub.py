"""Paths of the Hugging Face hub: hub:OWNER/NAME[@REVISION][/PATH], of a data set hub:datasets/OWNER/NAME….

    local("hub:PixArt-alpha/PixArt-XL-2-512x512")       # downloads what is needed, and returns the folder
    local("PixArt-XL-2-512x512")                        # any other path is returned as it is
    pinned("hub:PixArt-alpha/PixArt-XL-2-512x512")      # hub:…@COMMIT, which always names the same files

PATH is a folder or a file of the repository. `huggingface_hub` downloads, resumes and caches; this module
chooses the files, says what is downloaded, and explains what went wrong. What is stored in configs,
checkpoints and images are pinned paths, never folders of the cache (`name_of`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import glob
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError, did_you_mean, listing, report, short

PREFIX = "hub:"
# The file of a pipeline folder that names its class and its parts.
INDEX = "model_index.json"

_GRAMMAR = "hub:OWNER/NAME[@REVISION][/PATH], or hub:datasets/OWNER/NAME[@REVISION][/PATH]"
_NAME = r"[A-Za-z0-9][\w.-]*"
_PATTERN = re.compile(
    rf"hub:(?P<kind>datasets/|models/)?(?P<owner>{_NAME})/(?P<name>{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@:,\s]+|[^/@:,\s]+))?(?:/(?P<path>[^:,]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(
    rf"(?P<kind>models|datasets)--(?P<owner>{_NAME}?)--(?P<name>{_NAME})"
    rf"/snapshots/(?P<revision>{_COMMIT.pattern})(?:/(?P<path>.*))?$"
)
# Addresses that users copy from a browser or from other tools.
_ADDRESS = re.compile(
    r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)(?P<repository>(?:datasets/)?[^/]+/[^/@?]+)"
    r"(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[^/?]+))?(?:/(?P<path>[^?]*))?"
)

# Weights in the order in which a folder's format is chosen. Those below .ckpt are never read here.
_FORMATS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
_UNREAD = (
    *(".msgpack", ".h5", ".onnx", ".onnx_data", ".ot", ".gguf", ".tflite", ".pb", ".mlmodel", ".mlpackage"),
    *(".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".svg", ".mp4", ".webm", ".pdf", ".ipynb"),
)
# Names that libraries give to weights. Only these have variants, such as model.fp16.safetensors.
_KNOWN = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model|adapter_model|pytorch_lora_weights)"
    r"(?P<before>\.[A-Za-z]\w*)?(?:-\d{5}-of-\d{5})?(?P<after>\.[A-Za-z]\w*)??"
    r"(?P<format>\.safetensors|\.bin)(?:\.index(?P<last>\.[A-Za-z]\w*)?\.json)?"
)
# Lists of images, whose paths are relative to their folder.
_LISTS = (".json", ".jsonl", ".csv", ".tsv")
# Files of trainers that are not weights, and the state of the optimizer in our checkpoints.
_STATE = re.compile(r"(?:optimizer|scheduler|scaler|sampler|random_states|rng_state|training_args)[\w.-]*")
_OPTIMIZER = re.compile(r"(?:.*/)?checkpoints/\d+/optimizer/.*")
# The repositories of the releases, for messages.
RELEASES = (
    *("PixArt-XL-2-256x256", "PixArt-XL-2-512x512", "PixArt-XL-2-1024-MS", "PixArt-Sigma-XL-2-256x256"),
    *("PixArt-Sigma-XL-2-512-MS", "PixArt-Sigma-XL-2-1024-MS", "PixArt-Sigma-XL-2-2K-MS"),
    *("pixart_sigma_sdxlvae_T5_diffusers", "PixArt-alpha", "PixArt-Sigma"),
)
RELEASES_OWNER = "PixArt-alpha"
# Exceptions that neither the hub nor the network raises: they keep their tracebacks.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)
# Folders of a pipeline that hold weights.
PARTS = ("transformer", "text_encoder", "vae")
# Small files that are read together with a file beside them.
_BESIDE = ("adapter_config.json", "config.json", "README.md")


def is_hub(path: object) -> bool:
    """Whether a path is one of the hub."""
    return str(path).startswith(PREFIX)


def release(name: str) -> str:
    """The path of a release: its folder if it is in the working directory, otherwise its repository.

    Args:
      name: of its repository, or of a folder in it, such as 'PixArt-XL-2-512x512/transformer'.
    """
    return name if Path(name.partition("/")[0]).is_dir() else f"{PREFIX}{RELEASES_OWNER}/{name}"


def names_one(text: str) -> bool:
    """Whether a text, such as a prompt, is exactly one path of the hub."""
    return bool(_PATTERN.fullmatch(text))


@dataclasses.dataclass(frozen=True)
class HubPath:
    """A repository of the hub, or a folder or file of it.

    Attributes:
      repository: OWNER/NAME; NAME alone for a few old models.
      dataset: whether it is a data set.
      revision: a branch, a tag or a commit; None for the default branch.
      path: folder or file in the repository; '' for all of it.
    """

    repository: str
    dataset: bool = False
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, text: object, name: str = "path") -> HubPath:
        """Reads hub:OWNER/NAME[@REVISION][/PATH].

        Args:
          text: the path.
          name: the flag or config field that names it, for messages.

        Raises:
          UserError: it is not of this form.
        """
        found = _PATTERN.fullmatch(str(text))
        path = (found["path"] or "").rstrip("/") if found else ""
        if found is None or any(part in ("", ".", "..") for part in path.split("/")[path == "" :]):
            only = re.fullmatch(rf"hub:({_NAME})", str(text))
            owner = " Did you mean 'hub:PixArt-alpha/{}'?"
            hint = owner.format(only[1]) if only and re.match("(?i)pixart[-_]", only[1]) else ""
            raise UserError(f"{name} is '{short(text)}': write a path of the hub as {_GRAMMAR}.{hint}")
        repository = f"{found['owner']}/{found['name']}"
        revision = found["revision"]
        return cls(repository, found["kind"] == "datasets/", revision and revision.replace("%2F", "/"), path)

    def __str__(self) -> str:
        revision = self.revision
        if revision and not re.fullmatch(r"refs/(?:pr|convert)/[^/]+", revision):
            revision = revision.replace("/", "%2F")
        at, below = f"@{revision}" if revision else "", f"/{self.path}" if self.path else ""
        return f"{PREFIX}{'datasets/' if self.dataset else ''}{self.repository}{at}{below}"

    @property
    def kind(self) -> str:
        """What the hub calls the kind of repository."""
        return "dataset" if self.dataset else "model"

    @property
    def page(self) -> str:
        """The address of the repository's page."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.dataset else ''}{self.repository}"


def hub_parts(text: str) -> list[tuple[str, str]]:
    """Splits comma-separated paths into (prefix, path): ('', PATH), or ('NAME=', PATH) for NAME=PATH."""
    out = []
    for part in text.split(","):
        name, equals, value = part.partition("=")
        named = equals and name.isidentifier()
        out.append((f"{name}=", value) if named else ("", part))
    return out


def check_paths(name: str, text: str, *, output: bool = False) -> None:
    """Checks the syntax of the hub paths in a value, without a look at the hub.

    Args:
      name: the flag or field, for messages.
      text: a path, or several, see `hub_parts`.
      output: whether something is written to the path.

    Raises:
      UserError: a path is not of the form, is the address of a page, or is an output.
    """
    for _, path in hub_parts(text):
        address = _ADDRESS.fullmatch(path)
        if address:
            revision = f"@{address['revision']}" if address["revision"] else ""
            below = f"/{address['path']}" if address["path"] else ""
            raise UserError(
                f"{name} is '{short(path)}', the address of a page: write it as "
                f"'{PREFIX}{address['repository']}{revision}{below}'."
            )
        if is_hub(path) and output:
            raise UserError(
                f"{name} is '{short(path)}', and results are written to this machine: give a local path. "
                "`convert --push` uploads weights to the hub."
            )
        if is_hub(path):
            HubPath.parse(without_weight(path), name)


def without_weight(spec: str) -> str:
    """The path in PATH:WEIGHT of an adapter, if PATH is one of the hub."""
    return PREFIX + spec.removeprefix(PREFIX).partition(":")[0] if is_hub(spec) else spec


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
            if not _COMMIT.fullmatch(place.revision or ""):
                place = before.get(place) or _find(place).place
            path = f"{place}{path.removeprefix(bare)}"
        out.append(f"{prefix}{path}")
    return ",".join(out)


def name_of(path: str | Path) -> str:
    """The pinned hub path of a file or folder in the cache; any other path as it is."""
    text = os.fspath(path)
    for cache in {_cache(), os.path.realpath(_cache())}:
        if text.startswith(f"{cache}{os.sep}") and (
            found := _SNAPSHOT.match(os.path.relpath(text, cache).replace(os.sep, "/"))
        ):
            repository = f"{found['owner']}/{found['name']}"
            return str(
                HubPath(repository, found["kind"] == "datasets", found["revision"], found["path"] or "")
            )
    return text


# --- Choosing files ---------------------------------------------------------------------------------


def needed_files(
    files: Mapping[str, int],
    place: HubPath,
    *,
    parts: Collection[str] | None = None,
    everything: bool = False,
) -> list[str]:
    """Chooses the files to download.

    In each folder, it prefers safetensors to other formats, and plain weights to variants such as fp16. It
    skips formats that this project does not read, pictures, and the states of trainers.

    Args:
      files: sizes of all files of the repository, by path.
      place: what is wanted of it.
      parts: the folders of a pipeline whose weights are needed; None for all, () for no weights at all.
      everything: whether to take all files, as of a data set.

    Raises:
      UserError: there is no such folder or file, or the folder has several files of weights with names that
        do not say which one to take.
    """
    path = place.path
    if path in files:
        return _with_neighbours(files, path)
    below = f"{path}/" if path else ""
    inside = [
        name
        for name in files
        if name.startswith(below) and not any(part.startswith(".") for part in name[len(below) :].split("/"))
    ]
    if not inside:
        raise _no_such_path(files, place)
    if everything or place.dataset:
        return inside
    folders = defaultdict(list)
    for name in inside:
        if _OPTIMIZER.fullmatch(name):
            continue
        folders[os.path.dirname(name)].append(os.path.basename(name))
    chosen = []
    for folder, names in folders.items():
        chosen += [f"{folder}/{name}" if folder else name for name in _of_folder(names, folder, place)]
    pipeline = f"{below}{INDEX}" in files

    def is_needed(name: str) -> bool:
        if not is_weights(os.path.basename(name)):
            return True
        first, slash, _ = name[len(below) :].partition("/")
        part = first if slash else ""
        if pipeline and not part:  # a single file beside the parts
            return False
        return parts is None or part in parts or (bool(parts) and part not in PARTS)

    return [name for name in chosen if is_needed(name)]


def _of_folder(names: Sequence[str], folder: str, place: HubPath) -> Iterator[str]:
    """The needed files of one folder."""
    weights = [name for name in names if is_weights(name)]
    others = [name for name in names if name not in weights]
    yield from (name for name in others if not name.lower().endswith(_UNREAD))
    known = {name: found for name in weights if (found := _KNOWN.fullmatch(name))}
    plain = [name for name, found in known.items() if not _variant(found)]
    variants = sorted({_variant(found) for found in known.values()} - {""})
    if plain or variants:
        if not plain and len(variants) > 1:
            each = listing(f"'{os.path.join(folder, name)}'" for name in known)
            raise UserError(
                f"'{place}' has weights only in several variants ({each}): give one of the files."
            )
        usable = plain or list(known)
        formats = {name: _FORMATS.index(known[name]["format"]) for name in usable}
        yield from (name for name in usable if formats[name] == min(formats.values()))
        return
    ranks = {name: _FORMATS.index(_format(name)) for name in weights if not _STATE.fullmatch(name)}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    shards = all(re.search(r"-\d{5}-of-\d{5}\.", name) for name in best)
    if len(best) > 1 and not shards and folder == place.path:
        each = listing(f"'{place}/{name}'" for name in best)
        raise UserError(f"'{place}' has several files of weights: give one of {each}.")
    yield from best


def _with_neighbours(files: Mapping[str, int], path: str) -> list[str]:
    """A file with the small files that are read beside it, and the shards that an index names."""
    folder, name = os.path.split(path)
    below = f"{folder}/" if folder else ""
    beside = [f"{below}{other}" for other in (*_BESIDE, f"{name}.md") if is_weights(name)]
    found = [path, *(other for other in beside if other in files and other != path)]
    index = _KNOWN.fullmatch(name)
    if index and ".index" in name:
        for other in files:
            shard = _KNOWN.fullmatch(other.removeprefix(below)) if other.startswith(below) else None
            if (
                shard
                and re.search(r"-\d{5}-of-\d{5}", other)
                and all(
                    part(shard) == part(index)
                    for part in (_variant, lambda each: each["stem"], lambda each: each["format"])
                )
            ):
                found.append(other)
    return found


def _format(name: str) -> str:
    found = _KNOWN.fullmatch(name)
    return found["format"] if found else os.path.splitext(name)[1].lower()


def is_weights(name: str) -> bool:
    """Whether a file has weights, by its name."""
    return _format(name) in _FORMATS


def _variant(found: re.Match) -> str:
    return found["before"] or found["after"] or found["last"] or ""


def _no_such_path(files: Iterable[str], place: HubPath) -> UserError:
    parent = place.path
    while parent and not any(name.startswith(f"{parent}/") for name in files):
        parent = os.path.dirname(parent)
    below = f"{parent}/" if parent else ""
    tops = {name[len(below) :].split("/")[0] for name in files if name.startswith(below)}
    known = sorted(name for name in tops if not name.startswith("."))
    wanted = place.path[len(below) :].split("/")[0]
    shown = listing(known[:20]) + (", …" if len(known) > 20 else "")
    where = f"folder '{parent}' of {place.repository}" if parent else place.repository
    return UserError(
        f"'{place}': there is no such folder or file; {where} has {shown or 'no files'}."
        f"{did_you_mean(wanted, known)}"
    )


# --- Downloading ------------------------------------------------------------------------------------


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


def _find(place: HubPath) -> Snapshot:
    return _found(place, _cache())


@functools.lru_cache
def _found(place: HubPath, cache: str) -> Snapshot:
    """The files of a repository. A process asks the hub only once for each path."""
    from huggingface_hub import HfApi, constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    with _explained(place):
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
        with _explained(place, missing, snapshot):
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
        f"(commit {place.revision[:12]}{revision}) to {_cache()}{already}"
    )


def in_bytes(size: float) -> str:
    """A size for people: '19.1 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _check_space(size: int) -> None:
    place = Path(_cache())
    while not place.exists() and place != place.parent:
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size:
        raise RunStopped(
            f"the download takes {in_bytes(size)}, and the disk of '{_cache()}' has {in_bytes(free)} free: "
            "free space there, or set HF_HOME to a folder on another disk.",
            EXIT_STORAGE,
        )


def _cache() -> str:
    from huggingface_hub import constants

    return os.path.abspath(os.path.expanduser(constants.HF_HUB_CACHE))


def _snapshot_folder(place: HubPath, commit: str) -> Path:
    folder = "--".join([f"{place.kind}s", *place.repository.split("/")])
    return Path(_cache(), folder, "snapshots", commit)


# --- Errors -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(
    place: HubPath, missing: Sequence[str] = (), snapshot: Snapshot | None = None
) -> Iterator[None]:
    """Within this context, what huggingface_hub raises becomes one line that says what to do."""
    try:
        yield
    except (UserError, RunStopped, *BUGS):
        raise
    except Exception as error:  # of the hub, of the network, of the disk: each package has its own
        raise explain(error, place, missing, snapshot) from error


def explain(
    error: Exception, place: HubPath, missing: Sequence[str] = (), snapshot: Snapshot | None = None
) -> Exception:
    """The `UserError` or `RunStopped` for an exception of huggingface_hub or the network.

    Args:
      error: the exception.
      place: what was asked for.
      missing: the files that are not in the cache, if that is known.
      snapshot: where they should be.
    """
    from huggingface_hub import constants, errors

    chain = list(_causes(error))

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((each for each in chain if isinstance(each, kinds)), None)

    login = "log in with `hf auth login`, or set HF_TOKEN"
    token = _has_token()
    if any(getattr(each, "errno", None) == errno.ENOSPC for each in chain):
        return RunStopped(
            f"'{place}': the disk of '{_cache()}' is full: free space there, or set HF_HOME to a folder on "
            "another disk, and run the same command again, which keeps the files that are complete.",
            EXIT_STORAGE,
        )
    if first(errors.GatedRepoError):
        account = "with the account of your token" if token else f"with your account, and {login}"
        return UserError(
            f"'{place}' is only for accounts that have accepted its licence: accept it on "
            f"{place.page} {account}."
        )
    http = first(errors.HfHubHTTPError)
    status = getattr(getattr(http, "response", None), "status_code", 0)
    if first(errors.RepositoryNotFoundError) or (status == 401 and not token):
        who = "your token may not see it" if token else "it is private and you are not logged in"
        fix = "check the name, or the rights of the token" if token else f"check the name, or {login}"
        kind = "" if place.dataset else " A data set is written hub:datasets/OWNER/NAME."
        return UserError(
            f"'{place}': {place.page} does not exist, or {who}: {fix}.{_similar_release(place)}{kind}"
        )
    if first(errors.RevisionNotFoundError):
        known = _revisions(place)
        has = f"; it has {listing(known[:20])}" if known else ""
        return UserError(
            f"'{place}': there is no revision '{place.revision}'{has}: give a branch, a tag or a commit."
            f"{did_you_mean(place.revision or '', known)}"
        )
    if status == 401:
        return UserError(
            f"'{place}': the hub does not accept your token (HF_TOKEN or `hf auth login`): {login}."
        )
    if status == 403:
        return UserError(f"'{place}': your token has no right to read it: {login} with one that has.")
    if status == 429:
        more = "" if token else f", or {login}"
        return UserError(f"'{place}': the hub limits how much you may ask for: wait some minutes{more}.")
    offline = constants.is_offline_mode()
    what = "is not in the cache"
    if snapshot is not None and snapshot.folder.is_dir():
        some = listing(missing[:2])
        what = f"is not complete in the cache ({len(missing)} files are missing, such as {some})"
    if offline or first(errors.OfflineModeIsEnabled):
        return UserError(
            f"'{place}' {what}, and HF_HUB_OFFLINE forbids downloads: run the command once without "
            "HF_HUB_OFFLINE on a machine with network."
        )
    reason = _network_reason(chain)
    if snapshot is not None:
        return UserError(
            f"'{place}': the download was interrupted ({reason}): run the same command again, which "
            "keeps the files that are complete."
        )
    return UserError(
        f"'{place}' {what}, and {constants.ENDPOINT} cannot be reached ({reason}): check the network, or "
        f"download it on another machine with `hf download {place.repository}` and copy its folder."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _network_reason(chain: Sequence[BaseException]) -> str:
    """What the innermost exception says, in one line."""
    for each in reversed(chain):
        text = str(each).strip().splitlines()
        if text:
            return short(text[0])
    return type(chain[0]).__name__


def _has_token() -> bool:
    from huggingface_hub import get_token

    return bool(get_token())


def _revisions(place: HubPath) -> list[str]:
    from huggingface_hub import HfApi

    with contextlib.suppress(Exception):  # only for the message
        refs = HfApi().list_repo_refs(place.repository, repo_type=place.kind)
        return [each.name for each in (*refs.branches, *refs.tags)]
    return []


def _similar_release(place: HubPath) -> str:
    known = [f"{PREFIX}{RELEASES_OWNER}/{name}" for name in RELEASES]
    return did_you_mean(f"{PREFIX}{place.repository}", known)
