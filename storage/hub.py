"""Models and rows by name on the Hugging Face Hub: owner/name[@revision], of a dataset also [:split] or [:file].

    pin("owner/name@main", "model")                              → "owner/name@0123…", the commit that the revision stands for now
    list_files("owner/name@0123…", "model")                      → ["README.md", "config.json", …]
    fetch("owner/name@0123…", "model", ["config.json"])          → [Path("…/snapshots/0123…/config.json")]

A revision is a branch, a tag or a commit; without one it is the branch "main". Files go to the client's cache (HF_HOME) and are
fetched once. With no network, or HF_HUB_OFFLINE=1, everything is answered from there.

What goes wrong is an OSError that says what to do about it. No message holds the token.
"""
from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@([^:@]+))?(?::(.+))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKEN = re.compile(r"[!-~]+")


class Name(NamedTuple):
    repo: str                   # "owner/name"
    revision: str | None
    part: str | None            # of a dataset: a split or a file


def parse(source: str) -> Name | None:
    """What a name on the Hub says; None for a source that is a local path, or looks like one."""
    match = NAME.fullmatch(source)
    if not match or Path(source).exists() or Path(source.partition("/")[0]).exists() or match[1].endswith((".json", ".jsonl", ".gz")):
        return None
    return Name(*match.groups())


def pin(source: str, kind: str) -> str:
    """The source at the commit that its revision stands for now; a local path, or a commit, as it is.  kind: "model" or "dataset"."""
    name = parse(source)
    if name is None or COMMIT.fullmatch(name.revision or ""):
        return source
    from huggingface_hub import HfApi, constants, resolve_revision
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RevisionResolutionError
    with explained(name, kind):
        try:
            found = HfApi().repo_info(name.repo, repo_type=kind, revision=name.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT).id
            commit = resolve_revision(name.repo, repo_type=kind, revision=name.revision).resolved      # and is kept for offline
            if found != name.repo:
                print(f"{kind} {name.repo} is called {found} now, and is taken from there", file=sys.stderr)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:
                commit = resolve_revision(name.repo, repo_type=kind, revision=name.revision, local_files_only=True).resolved
            except RevisionResolutionError:
                raise error from None
            print(f"{kind} {name.repo}: the Hub is not asked or does not answer; commit {commit} is taken from the cache", file=sys.stderr)
    return f"{name.repo}@{commit}" + (f":{name.part}" if name.part else "")


def list_files(source: str, kind: str) -> list[str]:
    """All files of a pinned source, whether they are fetched or not."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    name = parse(source)
    with explained(name, kind):
        try:
            return sorted(file.path for file in get_cached_repo_tree(name.repo, repo_type=kind, revision=name.revision))
        except CachedRepoTreeNotFoundError:
            return sorted(HfApi().list_repo_files(name.repo, repo_type=kind, revision=name.revision))


def fetch(source: str, kind: str, files: list[str]) -> list[Path]:
    """These files of a pinned source, fetched unless they are in the cache; the bar is the client's, and the first process's alone."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    name = parse(source)
    with explained(name, kind):
        folder = snapshot_download(name.repo, repo_type=kind, revision=name.revision, allow_patterns=[glob.escape(file) for file in files])
    return [Path(folder, file) for file in files]


@contextlib.contextmanager
def explained(name: Name, kind: str) -> Iterator[None]:
    """Whatever the client raises inside becomes an OSError that says what is the matter and what to do."""
    from huggingface_hub import errors, get_token
    token = get_token()
    if token and not TOKEN.fullmatch(token):
        raise PermissionError("HF_TOKEN holds a character that no token has, such as a space; set it again")
    try:
        yield
    except (OSError, RuntimeError, errors.HTTPError, errors.EntryNotFoundError) as error:
        kind_of_error, text = _explanation(error, name, kind, bool(token))
        raise kind_of_error(text.replace(token, "…") if token else text) from None


def _explanation(error: Exception, name: Name, kind: str, has_token: bool) -> tuple[type[OSError], str]:
    """What to raise instead of the client's error, and what it says."""
    from huggingface_hub import constants, errors
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__                             # why the client looked at the cache alone
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    what, cache = f"{kind} {name.repo}", Path(constants.HF_HUB_CACHE)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name.repo}"
    set_token = f"set HF_TOKEN to a token from {constants.ENDPOINT}/settings/tokens"
    said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"

    if isinstance(error, errors.GatedRepoError):
        then = "your token's account has not, or the token may not read gated repositories" if has_token else f"then {set_token}"
        return PermissionError, f"{what} is gated: accept its licence at {page}; {then}"
    if status == 401 and has_token:
        return PermissionError, f"the Hub does not accept your token; {set_token}, or unset it for what is public"
    if isinstance(error, errors.RepositoryNotFoundError):
        then = "your token may not read it" if has_token else set_token
        return FileNotFoundError, f"{what}: there is none at {page}, or it is private; look at the spelling; if it is private, {then}"
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError, f"{what} has no revision {name.revision or 'main'!r}; {page}/tree/main lists its branches and tags"
    if status == 403:
        return PermissionError, f"{what}: the Hub forbids it (403); look at {page}, and {set_token} with the right to read it"
    if status == 429:
        return ConnectionError, f"{what}: too many requests (429); wait some minutes{'' if has_token else f', or {set_token}'}"
    if status and status < 500:
        return OSError, f"{what}: the Hub answers {status}; look at {page}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FileNotFoundError, f"{what} is not, or not whole, in {cache}, and HF_HUB_OFFLINE=1 forbids to fetch it; run once without"
    if status or isinstance(error, errors.HTTPError | errors.EntryNotFoundError):
        return ConnectionError, (f"{what}: {constants.ENDPOINT} does not answer or breaks off ({said}), and {cache} does not hold all "
                                 "of it; look at the network and run it again: what came whole is kept")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        return OSError, (f"{what}: the disk is full, {free / 2**30:.1f} GiB are free at {cache}; make room, or set HF_HOME to a folder "
                         "on a larger disk, and run it again: what came whole is kept")
    return OSError, f"{what}: {said}; run it again: what came whole is kept"
