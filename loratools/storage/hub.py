"""The Hub: the one module that knows its client.

The client is imported inside functions, so that importing this module costs nothing. What it
raises (its own errors, and those of its transport, which is another library from one major version
to the next) leaves here as ours, with a sentence on what to do and never with a token.
Credentials come from `HF_TOKEN` or the stored login, the server from `HF_ENDPOINT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratools.errors import (
    AccessError,
    HubError,
    InputMissingError,
    LoratoolsError,
    StorageError,
    UsageError,
    printable,
)
from loratools.storage.hub_files import LocalFile, RemoteFile

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile, RepoFolder

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})
_MAX_PULL_REQUESTS: Final = 20
_FIX_LOGIN: Final = "Log in (`hf auth login`, or set HF_TOKEN) with a token that may do this."
_FIX_NAME: Final = "Check the name; if the repository is private, log in with a token that may read it."
_FIX_AGAIN: Final = "Check the connection and HF_ENDPOINT, then run the same command again."


@dataclasses.dataclass(frozen=True, slots=True)
class Commit:
    """A commit that is on the Hub; `pull_request` is the URL of the one that holds it, if any.

    `answered` is False where it was found by looking: the Hub's answer was lost, or it was there before.
    """

    oid: str
    pull_request: str | None = None
    answered: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """What a branch points to; `commit` is None if the branch, or the whole repository, is not there."""

    repository: bool
    commit: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class HubRepository:
    """A model repository. Every method sends requests, and raises only our errors."""

    repo_id: str
    api: HfApi

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def find(self, revision: str | None = None) -> Head:
        """Where `revision` (default `main`) points, without complaint if it is not there."""
        from huggingface_hub import errors

        with _translated(f"Reading {self.repo_id}"):
            try:
                return Head(True, self.api.model_info(self.repo_id, revision=revision).sha)
            except errors.RevisionNotFoundError:
                return Head(True, None)
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return Head(False, None)

    def resolve(self, revision: str | None = None) -> str:
        """The commit that `revision` means; `InputMissingError` if there is none."""
        with _translated(f"Reading {self.repo_id}", revision=revision or "main"):
            commit = self.api.model_info(self.repo_id, revision=revision).sha
        if commit is None:
            raise HubError("The Hub did not say which commit this is.", fix=_FIX_AGAIN, repository=self.url)
        return commit

    def files(self, commit: str) -> Mapping[str, RemoteFile]:
        """Every file at `commit`, by name."""
        with _translated(f"Listing {self.repo_id}"):
            return _by_name(self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True))

    def differing(self, commit: str, files: Sequence[LocalFile]) -> list[str]:
        """The names of those `files` that `commit` does not hold byte for byte."""
        with _translated(f"Reading {self.repo_id} back"):
            found = _by_name(self.api.get_paths_info(self.repo_id, [file.name for file in files], revision=commit))
        return [file.name for file in files if file.name not in found or not found[file.name].same_as(file)]

    def create(self, *, private: bool) -> None:
        """Make the repository; one that is there already stays as it is."""
        with _translated(f"Creating {self.repo_id}"):
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)

    def create_branch(self, branch: str, commit: str) -> None:
        """Make a branch that starts at `commit`."""
        with _translated(f"Creating the branch {branch} of {self.repo_id}"):
            self.api.create_branch(self.repo_id, branch=branch, revision=commit, exist_ok=True)

    def find_pull_request(self, files: Sequence[LocalFile]) -> Commit | None:
        """The newest open pull request that holds all of `files`, if there is one."""
        with _translated(f"Listing the pull requests of {self.repo_id}"):
            listed = self.api.get_repo_discussions(self.repo_id, discussion_type="pull_request")
            opened = [item for _, item in zip(range(_MAX_PULL_REQUESTS), listed, strict=False)]
        for item in opened:
            head = self.find(f"refs/pr/{item.num}") if item.status in {"open", "draft"} else Head(True, None)
            if head.commit and not self.differing(head.commit, files):
                return Commit(head.commit, f"{self.url}/discussions/{item.num}", answered=False)
        return None

    def commit(
        self, files: Sequence[LocalFile], *, parent: str, message: str, revision: str | None, create_pr: bool
    ) -> Commit:
        """Put `files` on top of `parent` in one commit: all of them, or none.

        Where the connection breaks, the branch is read to learn what became of the commit.

        Raises:
            HubError: nothing was committed, or nobody can tell.
            AccessError: writing is not permitted.
        """
        from huggingface_hub import CommitOperationAdd

        try:
            with _translated(f"Publishing to {self.repo_id}"), _quiet():
                done = self.api.create_commit(
                    self.repo_id,
                    [CommitOperationAdd(file.name, str(file.path.absolute())) for file in files],
                    commit_message=message,
                    revision=revision,
                    create_pr=create_pr,
                    parent_commit=parent,
                )
        except HubError as error:
            if error.where.get("status") in {400, 409, 412}:
                raise
            with self._doubt(error):
                found = self.find_pull_request(files) if create_pr else self._landed(files, parent, revision)
            if found is None:
                raise HubError(f"{error.what} Nothing was committed.", fix=_FIX_AGAIN, repository=self.url) from error
            return found
        return Commit(done.oid, done.pr_url)

    def _landed(self, files: Sequence[LocalFile], parent: str, revision: str | None) -> Commit | None:
        head = self.find(revision).commit
        arrived = head and head != parent and not self.differing(head, files)
        return Commit(head, answered=False) if head and arrived else None

    @contextlib.contextmanager
    def _doubt(self, error: HubError) -> Iterator[None]:
        try:
            yield
        except LoratoolsError:
            raise HubError(
                f"{error.what} Whether the commit arrived is not known.",
                fix="Run the same command again: it looks first, and commits only what is missing.",
                repository=self.url,
            ) from error

    def download(self, file: RemoteFile, commit: str, directory: Path) -> None:
        """Write `file` below `directory` and check its hash; a wrong one is fetched once more.

        Raises:
            HubError: the bytes that come are not those that the commit names.
        """
        for force in (False, True):
            with _translated(f"Downloading {file.name} of {self.repo_id}"), _quiet():
                self.api.hf_hub_download(
                    self.repo_id, file.name, revision=commit, local_dir=directory, force_download=force
                )
            if file.holds(directory / file.name):
                return
        raise HubError(
            "The bytes that arrived, twice, are not those that the commit names.",
            fix="Try again later, or through another network or mirror.",
            file=file.name,
            repository=self.url,
        )


def open_repository(repo_id: str) -> HubRepository:
    """The model repository `repo_id` at `HF_ENDPOINT`; sends nothing yet.

    Raises:
        HubError: offline mode is on.
        UsageError: `HF_ENDPOINT` is no place to send a token to.
    """
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in _TRUE:
            raise HubError(f"The Hub is needed, and {name} forbids it.", fix=f"Unset {name}, or use local files.")
    from huggingface_hub import HfApi, get_token

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT", "").rstrip("/") or None, library_name="loratools")
    place = re.fullmatch(r"(https?)://([A-Za-z0-9.-]+|\[::1\])(?::\d{1,5})?(?:/[\w./-]*)?", api.endpoint)
    if place is None:
        raise UsageError("HF_ENDPOINT is not a plain http(s) address.", fix="Write it like https://huggingface.co.")
    if place[1] == "http" and place[2] not in _LOOPBACK and get_token():
        raise UsageError("HF_ENDPOINT would carry your token over plain http.", fix="Use an https address.")
    return HubRepository(repo_id, api)


def forget_downloads(directory: Path) -> None:
    """Remove the client's bookkeeping from a directory that it downloaded into."""
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def _by_name(entries: Iterable[RepoFile | RepoFolder]) -> dict[str, RemoteFile]:
    from huggingface_hub.hf_api import RepoFile

    files = [entry for entry in entries if isinstance(entry, RepoFile)]
    hashes = {file.path: file.lfs.sha256 if file.lfs else None for file in files}
    return {file.path: RemoteFile(file.path, file.size, file.blob_id, hashes[file.path]) for file in files}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's progress bars: progress is events here, and the command line draws it."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextlib.contextmanager
def _translated(action: str, **where: object) -> Iterator[None]:
    """Turn what the client raises into our errors."""
    try:
        yield
    except (_transport_error(), OSError, RuntimeError, ValueError, KeyError) as failure:
        if isinstance(failure, LoratoolsError):
            raise
        raise _translation(failure, action, where) from failure


def _transport_error() -> type[BaseException]:
    """The root of the transport's errors: `httpx.HTTPError`, or that of httpx2, whichever the client uses."""
    from huggingface_hub import errors

    return errors.HfHubHTTPError.__bases__[0]


def _translation(failure: BaseException, action: str, where: Mapping[str, object]) -> LoratoolsError:
    from huggingface_hub import errors

    while failure.__cause__ is not None and not isinstance(failure, _transport_error()):
        failure = failure.__cause__
    for kinds, error, what, fix in (
        (errors.OfflineModeIsEnabled, HubError, "needs the Hub, and offline mode forbids it", "Unset HF_HUB_OFFLINE."),
        (errors.LocalTokenNotFoundError, AccessError, "needs a login", _FIX_LOGIN),
        (errors.GatedRepoError, AccessError, "needs its terms accepted", "Accept them on its page, and log in."),
        (errors.RepositoryNotFoundError, InputMissingError, "failed: there is no such repository", _FIX_NAME),
        (errors.RevisionNotFoundError, InputMissingError, "failed: there is no such revision", _FIX_NAME),
        (errors.RemoteEntryNotFoundError, InputMissingError, "failed: there is no such file", _FIX_NAME),
    ):
        if isinstance(failure, kinds):
            return error(f"{action} {what}.", fix=fix, **where)
    if isinstance(failure, errors.HfHubHTTPError):
        return _refusal(failure.response.status_code, failure.server_message, action)
    if isinstance(failure, OSError) and failure.errno and not isinstance(failure, ConnectionError):
        return StorageError(f"{action} failed: {os.strerror(failure.errno)}.", fix="Check the disk, then run again.")
    return HubError(f"{action} failed: {_said(failure)}.", fix=_FIX_AGAIN)


def _refusal(status: int, message: str | None, action: str) -> LoratoolsError:
    said = _said(message or f"status {status}")
    if status in {401, 403}:
        return AccessError(f"{action} is not permitted: {said}.", fix=_FIX_LOGIN, status=status)
    if status in {409, 412}:
        return HubError(f"{action} failed: someone else changed it meanwhile.", fix="Run it again.", status=status)
    return HubError(f"{action} failed: {said}.", fix=_FIX_AGAIN, status=status)


def _said(message: object) -> str:
    """One line of what a stranger said, without anything like a token."""
    text = printable(re.sub(r"hf_\w+", "hf_…", " ".join(str(message).split()))).rstrip(".")
    return text or type(message).__name__
