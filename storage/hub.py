"""Models and rows on the Hugging Face Hub, by name: owner/name[@revision], of rows also [:split] or [:file].

    pin("owner/name@main", "model")                      → "owner/name@0123…", the revision's commit now
    list_files("owner/name@0123…", "model")              → ["README.md", "config.json", …]
    fetch("owner/name@0123…", "model", ["config.json"])  → [Path("…/snapshots/0123…/config.json")]

A revision is a branch, a tag or a commit; without one it is the branch "main". Files go to the client's cache
(HF_HOME) and are downloaded once. Without a network, or with HF_HUB_OFFLINE=1, the cache answers everything.

Every failure is an OSError that names the remedy. No message contains the token.
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
    """The parts of a name on the Hub; None for a local path, or for what looks like one."""
    match = NAME.fullmatch(source)
    if not match or match[1].endswith((".json", ".jsonl", ".gz")):
        return None
    if Path(source).exists() or Path(source.partition("/")[0]).exists():
        return None
    return Name(*match.groups())


def pin(source: str, kind: str) -> str:
    """The source at the commit that its revision stands for now.

    A local path, or a source at a commit, is returned as it is. kind: "model" or "dataset".
    """
    name = parse(source)
    if name is None or COMMIT.fullmatch(name.revision or ""):
        return source
    from huggingface_hub import HfApi, constants, resolve_revision
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RevisionResolutionError,
    )
    of = {"repo_type": kind, "revision": name.revision}
    with explain_errors(name, kind):
        try:
            found = HfApi().repo_info(name.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT, **of).id
            commit = resolve_revision(name.repo, **of).resolved         # and is recorded for offline use
            if found != name.repo:
                print(f"{kind} {name.repo} is called {found} now, and is taken from there", file=sys.stderr)
        except (HTTPError, OfflineModeIsEnabled) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code < 500:
                raise
            try:
                commit = resolve_revision(name.repo, local_files_only=True, **of).resolved
            except RevisionResolutionError:
                raise error from None
            print(f"{kind} {name.repo}: offline, or the Hub does not answer; commit {commit} is taken from "
                  "the cache", file=sys.stderr)
    return f"{name.repo}@{commit}" + (f":{name.part}" if name.part else "")


def list_files(source: str, kind: str) -> list[str]:
    """The paths of all files of a pinned source, downloaded or not."""
    from huggingface_hub import HfApi, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError
    name = parse(source)
    of = {"repo_type": kind, "revision": name.revision}
    with explain_errors(name, kind):
        try:
            return sorted(file.path for file in get_cached_repo_tree(name.repo, **of))
        except CachedRepoTreeNotFoundError:
            return sorted(HfApi().list_repo_files(name.repo, **of))


def fetch(source: str, kind: str, files: list[str]) -> list[Path]:
    """Local paths of these files of a pinned source, downloaded where they are not in the cache.

    The client shows a progress bar, in the first process alone.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars
    if os.environ.get("RANK", "0") != "0":
        disable_progress_bars()
    name = parse(source)
    patterns = [glob.escape(file) for file in files]
    with explain_errors(name, kind):
        folder = snapshot_download(name.repo, repo_type=kind, revision=name.revision, allow_patterns=patterns)
    return [Path(folder, file) for file in files]


@contextlib.contextmanager
def explain_errors(name: Name, kind: str) -> Iterator[None]:
    """Raise each of the client's errors as an OSError that says what is wrong and what to do."""
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
    """What to raise for one of the client's errors: the type and the message."""
    from huggingface_hub import constants, errors
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__                             # why the client used its cache alone
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    what, cache, endpoint = f"{kind} {name.repo}", Path(constants.HF_HUB_CACHE), constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name.repo}"
    set_token = f"set HF_TOKEN to a token from {endpoint}/settings/tokens"
    message = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
    kept = "what was downloaded completely is kept"

    if isinstance(error, errors.GatedRepoError):
        then = f"then {set_token}"
        if has_token:
            then = "your token's account has not, or the token may not read gated repositories"
        return PermissionError, f"{what} is gated: accept its licence at {page}; {then}"
    if status == 401 and has_token:
        remedy = f"{set_token}, or unset it for what is public"
        return PermissionError, f"the Hub does not accept your token; {remedy}"
    if isinstance(error, errors.RepositoryNotFoundError):
        private = "your token may not read it" if has_token else set_token
        return FileNotFoundError, (f"{what}: there is none at {page}, or it is private; check the spelling; "
                                   f"if it is private, {private}")
    if isinstance(error, errors.RevisionNotFoundError):
        revision, listing = repr(name.revision or "main"), f"{page}/tree/main"
        return FileNotFoundError, f"{what} has no revision {revision}; {listing} lists its branches and tags"
    if status == 403:
        return PermissionError, (f"{what}: the Hub forbids it (403); see {page}, and {set_token} with the "
                                 "right to read it")
    if status == 429:
        or_token = "" if has_token else f", or {set_token}"
        return ConnectionError, f"{what}: too many requests (429); wait some minutes{or_token}"
    if status and status < 500:
        return OSError, f"{what}: the Hub answers {status}; see {page}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return FileNotFoundError, (f"{what} is not, or not completely, in {cache}, and HF_HUB_OFFLINE=1 "
                                   "forbids to download it; run once without")
    if status or isinstance(error, errors.HTTPError | errors.EntryNotFoundError):
        return ConnectionError, (f"{what}: {endpoint} does not answer or broke off ({message}), and {cache} "
                                 f"does not hold all of it; check the network and run it again: {kept}")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
        return OSError, (f"{what}: the disk is full, {free / 2**30:.1f} GiB are free at {cache}; make room, "
                         f"or set HF_HOME to a folder on a larger disk, and run it again: {kept}")
    return OSError, f"{what}: {message}; run it again: {kept}"
