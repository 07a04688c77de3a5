"""`push`: publish a directory on the Hub in one commit, and read it back."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from loratools.engine.cards import is_generated
from loratools.engine.events import Listener, Stage, Started, ignore
from loratools.engine.reports import AbstractReport, version
from loratools.errors import HubError, InputMissingError, UnsupportedError, UsageError
from loratools.storage import hub, hub_files, outgoing
from loratools.storage.hub_files import LocalFile, RemoteFile

MAX_FILES: Final = 100
MESSAGE: Final = "Upload with loratools"

_MAX_CARD_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class PushPlan:
    """What `push` will do: nothing was changed to find it out.

    Attributes:
        repo_id: the repository.
        url: its page.
        revision: the branch or pull request that gets the commit; None is `main`.
        parent: the commit that it goes on top of; None where the repository is to be made.
        creates: what is to be made first: `repository`, `branch`.
        private: whether a new repository will be private.
        create_pr: whether the commit opens a pull request.
        upload: the files that differ from what is there.
        already_there: the files that do not.
        left_out: name and reason of everything else in the directory.
        notes: what else to know.
    """

    repo_id: str
    url: str
    revision: str | None
    parent: str | None
    creates: tuple[str, ...]
    private: bool
    create_pr: bool
    upload: tuple[LocalFile, ...]
    already_there: tuple[LocalFile, ...]
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def files(self) -> tuple[LocalFile, ...]:
        """All files that the revision will hold of this directory."""
        return tuple(sorted((*self.upload, *self.already_there), key=lambda file: file.name))

    def to_json(self) -> dict[str, object]:
        """The JSON document; it names no local path."""
        return {
            "schema": "loratools/plan/1",
            "loratools": version(),
            "verb": "push",
            "repo_id": self.repo_id,
            "url": self.url,
            "revision": self.revision or "main",
            "parent": self.parent,
            "creates": list(self.creates),
            "private": self.private,
            "create_pr": self.create_pr,
            "upload_bytes": sum(file.bytes for file in self.upload),
            **_files_json(self),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class PushReport(AbstractReport):
    """What `push` did.

    Attributes:
        plan: what was decided.
        commit: the commit that holds the files, old or new.
        pull_request: the URL of the pull request that holds it, if any.
        changed: whether this run made that commit.
        notes: what else to know.
    """

    plan: PushPlan
    commit: str
    pull_request: str | None
    changed: bool
    notes: tuple[str, ...] = ()

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "push"

    def to_json(self) -> dict[str, object]:
        """The JSON document; it names no local path."""
        return {
            "schema": "loratools/push/1",
            "loratools": version(),
            "repo_id": self.plan.repo_id,
            "url": self.plan.url,
            "revision": self.plan.revision or "main",
            "commit": self.commit,
            "commit_url": f"{self.plan.url}/commit/{self.commit}",
            "pull_request": self.pull_request,
            "changed": self.changed,
            "created": list(self.plan.creates),
            **_files_json(self.plan),
            "notes": [*self.plan.notes, *self.notes],
        }


def _files_json(plan: PushPlan) -> dict[str, object]:
    there = {file.name for file in plan.already_there}
    return {
        "files": [
            {"name": file.name, "bytes": file.bytes, "sha256": file.sha256, "already_there": file.name in there}
            for file in plan.files
        ],
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
        "notes": list(plan.notes),
    }


def plan_push(
    path: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    listener: Listener = ignore,
) -> PushPlan:
    """Check a directory and compare it with the Hub; changes nothing, here or there. Arguments as in `push`.

    Raises:
        UsageError: the arguments contradict each other.
        InputDataError: the directory holds what must not be published, or is not what its report says.
        LoratoolsError: the directory cannot be read, or the Hub did not answer.
    """
    _check_request(repo_id, revision, message, create_pr=create_pr)
    listener(Stage("checking the files"))
    files, left_out, notes = _read(Path(path))
    listener(Stage("comparing with the Hub"))
    repository = hub.open_repository(repo_id)
    parent, creates = _start(repository, revision)
    there = repository.files(parent) if parent else {}
    if parent and _keeps_remote_card(repository, parent, there, files):
        left_out.append((outgoing.CARD, "the one in the repository was written by hand and is kept"))
        files = [file for file in files if file.name != outgoing.CARD]
    same = tuple(file for file in files if file.name in there and there[file.name].same_as(file))
    upload = tuple(file for file in files if file not in same)
    return PushPlan(
        repo_id, repository.url, revision, parent, creates, private, create_pr, upload, same, tuple(left_out), notes
    )


def _check_request(repo_id: str, revision: str | None, message: str | None, *, create_pr: bool) -> None:
    hub_files.check_repo_id(repo_id, owner=True)
    hub_files.check_revision(revision)
    if create_pr and revision not in {None, "main"}:
        raise UsageError("A new pull request goes against main.", fix="Leave out --create-pr or --revision.")
    if message is not None and not message.strip():
        raise UsageError("The commit message is empty.", fix="Leave out --message, or write one.")


def _read(directory: Path) -> tuple[list[LocalFile], list[tuple[str, str]], tuple[str, ...]]:
    """The files to publish, checked; what is left out; notes."""
    paths, left_out = outgoing.collect(directory)
    if len(paths) > MAX_FILES:
        raise UnsupportedError(
            f"{len(paths)} files are more than the {MAX_FILES} that one commit takes.",
            fix="Write the checkpoint with larger shards (--max-shard-size).",
            path=directory,
        )
    unscanned = [path.name for path in paths if not outgoing.refuse_leaks(path)]
    files = [LocalFile.read(path) for path in paths]
    outgoing.check_manifest(directory, files)
    notes = [f"Not searched for secrets, since it is larger than 1 MiB: {name}." for name in unscanned]
    if not any(path.name == outgoing.CARD for path in paths):
        notes.append("There is no README.md: the repository's page will be empty.")
    return files, left_out, tuple(notes)


def _start(repository: hub.HubRepository, revision: str | None) -> tuple[str | None, tuple[str, ...]]:
    """The commit to build on, and what has to be made first."""
    main = repository.find()
    if not main.repository:
        if revision and revision.startswith("refs/"):
            raise InputMissingError("There is no such repository.", fix="Check its name.", repository=repository.url)
        return None, ("repository", *(["branch"] if revision not in {None, "main"} else []))
    start = main if revision in {None, "main"} else repository.find(revision)
    if start.commit is None and revision and revision.startswith("refs/"):
        raise InputMissingError("There is no such pull request.", fix="Check its number.", revision=revision)
    return start.commit or main.commit, ("branch",) if start.commit is None else ()


def _keeps_remote_card(
    repository: hub.HubRepository, parent: str, there: Mapping[str, RemoteFile], files: Sequence[LocalFile]
) -> bool:
    """Whether the local card is as we wrote it, and the one in the repository is somebody's own text."""
    card = next((file for file in files if file.name == outgoing.CARD), None)
    remote = there.get(outgoing.CARD)
    if card is None or remote is None or remote.same_as(card) or not is_generated(_text(card.path)):
        return False
    if remote.bytes > _MAX_CARD_BYTES:
        return True
    with tempfile.TemporaryDirectory() as directory:
        repository.download(remote, parent, Path(directory))
        return not is_generated(_text(Path(directory) / outgoing.CARD))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def push(
    path: Path | str,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    listener: Listener = ignore,
) -> PushReport:
    """Publish a directory in one commit and read it back; a second run with nothing new commits nothing.

    Args:
        path: the directory.
        repo_id: `owner/name`; made if it is not there.
        private: make the repository, where it is not there yet, private.
        create_pr: open a pull request instead of committing to the branch.
        revision: the branch (made from `main` if it is not there), or `refs/pr/N`.
        message: the commit's first line.
        listener: told the stages.

    Raises:
        LoratoolsError: as `plan_push`; or the Hub refused, or holds other bytes than were sent.
    """
    plan = plan_push(
        path, repo_id, private=private, create_pr=create_pr, revision=revision, message=message, listener=listener
    )
    listener(Started("push", len(plan.upload), sum(file.bytes for file in plan.upload)))
    repository = hub.open_repository(repo_id)
    found = _existing(repository, plan)
    listener(Stage("uploading"))
    done = found or _commit(repository, plan, message or MESSAGE)
    listener(Stage("reading back"))
    _read_back(repository, plan, done)
    notes = {
        (True, False): ("Nothing was committed: these files are already there.",),
        (False, False): ("The Hub's answer was lost; the commit was found by reading the branch.",),
    }.get((found is not None, done.answered), ())
    return PushReport(plan=plan, commit=done.oid, pull_request=done.pull_request, changed=found is None, notes=notes)


def _read_back(repository: hub.HubRepository, plan: PushPlan, done: hub.Commit) -> None:
    if plan.files and (differing := repository.differing(done.oid, plan.files)):
        raise HubError(
            "The Hub does not hold what was sent: this file is missing there, or differs.",
            fix="See whether a .gitignore in the repository excludes it, then run the same command again.",
            file=differing[0],
            commit=done.oid,
        )


def _existing(repository: hub.HubRepository, plan: PushPlan) -> hub.Commit | None:
    """The commit that makes this run unnecessary, if there is one."""
    if not plan.upload and plan.parent and not plan.creates:
        return hub.Commit(plan.parent, answered=False)
    return repository.find_pull_request(plan.files) if plan.create_pr and plan.parent else None


def _commit(repository: hub.HubRepository, plan: PushPlan, message: str) -> hub.Commit:
    parent = plan.parent
    if "repository" in plan.creates:
        repository.create(private=plan.private)
        parent = repository.resolve()
    if parent is None:
        raise HubError("The repository has no main branch.", fix="Make it again.", repository=plan.url)
    if "branch" in plan.creates and plan.revision:
        repository.create_branch(plan.revision, parent)
    if not plan.upload:
        return hub.Commit(parent)
    return repository.commit(
        plan.upload, parent=parent, message=message, revision=plan.revision, create_pr=plan.create_pr
    )
