"""`pull`: fetch a repository at one commit into a directory, every byte checked."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from loratools.engine.events import Advanced, Listener, Started, ignore
from loratools.engine.reports import AbstractReport, version
from loratools.errors import InputMissingError
from loratools.storage import hub, hub_files
from loratools.storage.files import sha256_of
from loratools.storage.hub_files import LocalFile, RemoteFile
from loratools.storage.outputs import OutputDirectory


@dataclasses.dataclass(frozen=True, slots=True)
class PullPlan:
    """What `pull` will fetch.

    Attributes:
        repo_id: the repository.
        revision: what was asked for; None is `main`.
        commit: the commit that it means now.
        files: what will be fetched.
        left_out: name and reason of every other file of that commit.
    """

    repo_id: str
    revision: str | None
    commit: str
    files: tuple[RemoteFile, ...]
    left_out: tuple[tuple[str, str], ...]

    @property
    def bytes(self) -> int:
        """The size of the output."""
        return sum(file.bytes for file in self.files)

    def to_json(self) -> dict[str, object]:
        """The JSON document; it names no local path."""
        files = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in self.files]
        return {"schema": "loratools/plan/1", "verb": "pull", **_origin_json(self), "files": files}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PullReport(AbstractReport):
    """What `pull` fetched.

    Attributes:
        plan: what was decided.
        files: what lies in the output, with the hashes of the bytes on disk.
    """

    plan: PullPlan
    files: tuple[LocalFile, ...]

    @property
    def verb(self) -> str:
        """See `AbstractReport.verb`."""
        return "pull"

    def to_json(self) -> dict[str, object]:
        """The JSON document; it names no local path."""
        files = [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in self.files]
        return {"schema": "loratools/pull/1", **_origin_json(self.plan), "files": files}


def _origin_json(plan: PullPlan) -> dict[str, object]:
    return {
        "loratools": version(),
        "repo_id": plan.repo_id,
        "revision": plan.revision or "main",
        "commit": plan.commit,
        "hub": f"{plan.repo_id}@{plan.commit}",
        "bytes": plan.bytes,
        "left_out": [{"name": name, "reason": reason} for name, reason in plan.left_out],
    }


def plan_pull(repo_id: str, output: Path | str, *, revision: str | None = None, overwrite: bool = False) -> PullPlan:
    """List what `pull` would fetch, and refuse what it would have to refuse; writes nothing.

    Args:
        repo_id: `owner/name`.
        output: the directory to make.
        revision: a branch, tag, commit or `refs/pr/N`.
        overwrite: replace the directory if it exists.
        listener: not used; listing is quick.

    Raises:
        InputMissingError: there is no such repository or revision, or nothing in it to fetch.
        MalformedError: a file name in it is hostile.
        LoratoolsError: the output cannot be made, or the Hub did not answer.
    """
    hub_files.check_repo_id(repo_id, owner=False)
    hub_files.check_revision(revision)
    OutputDirectory.check(Path(output), overwrite, (), 0)
    repository = hub.open_repository(repo_id)
    commit = repository.resolve(revision)
    there = repository.files(commit)
    hub_files.check_names(there)
    left_out = tuple((name, reason) for name in sorted(there) if (reason := hub_files.left_out_reason(name)))
    excluded = dict(left_out)
    files = tuple(there[name] for name in sorted(there) if name not in excluded)
    if not files:
        raise InputMissingError(
            "There is nothing in this repository to fetch.",
            fix="A repository that holds only pickles cannot be used here.",
            repository=repo_id,
            commit=commit,
        )
    plan = PullPlan(repo_id, revision, commit, files, left_out)
    OutputDirectory.check(Path(output), overwrite, (), plan.bytes)
    return plan


def pull(
    repo_id: str,
    output: Path | str,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    listener: Listener = ignore,
) -> PullReport:
    """Fetch a repository at one commit; the directory appears complete and checked, or not at all.

    Args:
        repo_id: `owner/name`.
        output: the directory to make.
        revision: a branch, tag, commit or `refs/pr/N`.
        overwrite: replace the directory if it exists.
        listener: told how many bytes there are, and after each file.

    Raises:
        LoratoolsError: as `plan_pull`; or a download failed, or did not have its hash.
    """
    plan = plan_pull(repo_id, output, revision=revision, overwrite=overwrite)
    listener(Started("pull", len(plan.files), plan.bytes))
    repository = hub.open_repository(repo_id)
    done: list[LocalFile] = []
    with OutputDirectory(Path(output), overwrite=overwrite) as out:
        for file in plan.files:
            repository.download(file, plan.commit, out.path)
            path = out.path / file.name
            sha256 = file.sha256 or sha256_of(path)
            done.append(LocalFile(file.name, Path(os.path.abspath(output)) / file.name, file.bytes, sha256))  # noqa: PTH100
            listener(Advanced(file.bytes, file.name))
        hub.forget_downloads(out.path)
        out.publish()
    return PullReport(plan=plan, files=tuple(done))
