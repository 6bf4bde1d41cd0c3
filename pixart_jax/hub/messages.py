"""Explains the exceptions of `huggingface_hub` and of the network: one line that says what to do."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from pixart_jax.errors import EXIT_STORAGE, RunStopped, UserError, did_you_mean, listing, short
from pixart_jax.hub.paths import PREFIX, RELEASES, RELEASES_OWNER, HubPath, cache_folder

# Exceptions that neither the hub nor the network raises: they keep their tracebacks.
BUGS = (TypeError, AttributeError, NameError, LookupError, AssertionError)


@contextlib.contextmanager
def explained(place: HubPath, missing: Sequence[str] = (), folder: Path | None = None) -> Iterator[None]:
    """Within this context, what huggingface_hub raises becomes one line that says what to do."""
    try:
        yield
    except (UserError, RunStopped, *BUGS):
        raise
    except Exception as error:  # of the hub, of the network, of the disk: each package has its own
        raise _explanation(error, place, missing, folder) from error


def _explanation(
    error: Exception, place: HubPath, missing: Sequence[str] = (), folder: Path | None = None
) -> Exception:
    """The `UserError` or `RunStopped` for an exception of huggingface_hub or the network.

    Args:
      error: the exception.
      place: what was asked for.
      missing: the files that are not in the cache, if that is known.
      folder: where they should be; None before it is known which files are needed.
    """
    from huggingface_hub import constants, errors

    chain = list(_causes(error))

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((each for each in chain if isinstance(each, kinds)), None)

    login = "log in with `hf auth login`, or set HF_TOKEN"
    token = _has_token()
    if any(getattr(each, "errno", None) == errno.ENOSPC for each in chain):
        return RunStopped(
            f"'{place}': the disk of '{cache_folder()}' is full: free space there, or set HF_HOME to a "
            "folder on another disk, and run the same command again, which keeps the complete files.",
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
    if folder is not None and folder.is_dir():
        some = listing(missing[:2])
        what = f"is not complete in the cache ({len(missing)} files are missing, such as {some})"
    if offline or first(errors.OfflineModeIsEnabled):
        return UserError(
            f"'{place}' {what}, and HF_HUB_OFFLINE forbids downloads: run the command once without "
            "HF_HUB_OFFLINE on a machine with network."
        )
    reason = _network_reason(chain)
    if folder is not None:
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
