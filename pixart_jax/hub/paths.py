"""Reads and writes paths of the hub, without a look at the hub."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from pixart_jax.errors import UserError, short

PREFIX = "hub:"
_GRAMMAR = "hub:OWNER/NAME[@REVISION][/PATH], or hub:datasets/OWNER/NAME[@REVISION][/PATH]"
_NAME = r"[A-Za-z0-9][\w.-]*"
_PATTERN = re.compile(
    rf"hub:(?P<kind>datasets/|models/)?(?P<owner>{_NAME})/(?P<name>{_NAME})"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/@:,\s]+|[^/@:,\s]+))?(?:/(?P<path>[^:,]*))?"
)
COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(
    rf"(?P<kind>models|datasets)--(?P<owner>{_NAME}?)--(?P<name>{_NAME})"
    rf"/snapshots/(?P<revision>{COMMIT.pattern})(?:/(?P<path>.*))?$"
)
# Addresses that users copy from a browser or from other tools.
_ADDRESS = re.compile(
    r"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)(?P<repository>(?:datasets/)?[^/]+/[^/@?]+)"
    r"(?:(?:/(?:tree|blob|resolve)/|@)(?P<revision>[^/?]+))?(?:/(?P<path>[^?]*))?"
)
# The repositories of the releases, for messages.
RELEASES = (
    *("PixArt-XL-2-256x256", "PixArt-XL-2-512x512", "PixArt-XL-2-1024-MS", "PixArt-Sigma-XL-2-256x256"),
    *("PixArt-Sigma-XL-2-512-MS", "PixArt-Sigma-XL-2-1024-MS", "PixArt-Sigma-XL-2-2K-MS"),
    *("pixart_sigma_sdxlvae_T5_diffusers", "PixArt-alpha", "PixArt-Sigma"),
)
RELEASES_OWNER = "PixArt-alpha"


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


def name_of(path: str | Path) -> str:
    """The pinned hub path of a file or folder in the cache; any other path as it is."""
    text = os.fspath(path)
    for cache in {cache_folder(), os.path.realpath(cache_folder())}:
        if text.startswith(f"{cache}{os.sep}") and (
            found := _SNAPSHOT.match(os.path.relpath(text, cache).replace(os.sep, "/"))
        ):
            repository = f"{found['owner']}/{found['name']}"
            return str(
                HubPath(repository, found["kind"] == "datasets", found["revision"], found["path"] or "")
            )
    return text


def cache_folder() -> str:
    """The folder in which `huggingface_hub` keeps what it downloads."""
    from huggingface_hub import constants

    return os.path.abspath(os.path.expanduser(constants.HF_HUB_CACHE))
