"""Files on their way to the Hub and back: names, sizes, hashes. No network, no client."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from loratools.errors import MalformedError, UsageError
from loratools.storage.files import ReadOnlyFile, blocks, sha256_of

PICKLE_SUFFIXES: Final = frozenset({".bin", ".ckpt", ".dill", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})

_MAX_REPO_ID: Final = 96
_MAX_NAME_BYTES: Final = 255
_PART: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_REPO_ID: Final = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_DRIVE: Final = re.compile(r"[A-Za-z]:")


@dataclasses.dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to publish: its name in the repository, where it lies, its size and SHA-256."""

    name: str
    path: Path
    bytes: int
    sha256: str

    @classmethod
    def read(cls, path: Path) -> LocalFile:
        """Hash the file at `path`.

        Raises:
            LoratoolsError: it cannot be read; see `ReadOnlyFile`.
        """
        with ReadOnlyFile(path) as file:
            return cls(path.name, path, file.size, sha256_of(file))


@dataclasses.dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a commit: `sha256` is known of LFS files; `blob_id`, git's SHA-1, names other files' bytes."""

    name: str
    bytes: int
    blob_id: str
    sha256: str | None

    def holds(self, path: Path) -> bool:
        """Whether the file at `path` has exactly this content."""
        with ReadOnlyFile(path) as file:
            if file.size != self.bytes:
                return False
            if self.sha256 is not None:
                return sha256_of(file) == self.sha256
            digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
            for view in blocks(file, 0, file.size):
                digest.update(view)
            return digest.hexdigest() == self.blob_id

    def same_as(self, local: LocalFile) -> bool:
        """As `holds`, from the hash of `local` where that is enough."""
        if self.sha256 is not None:
            return (self.bytes, self.sha256) == (local.bytes, local.sha256)
        return self.holds(local.path)


def check_repo_id(repo_id: str, *, owner: bool) -> None:
    """Refuse what cannot be the name of a repository.

    Args:
        repo_id: `owner/name`.
        owner: the owner may not be left out (as old repositories without one allow).

    Raises:
        UsageError: it is not such a name.
    """
    bad = len(repo_id) > _MAX_REPO_ID or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git")
    if bad or not _REPO_ID.fullmatch(repo_id) or (owner and "/" not in repo_id):
        raise UsageError("This is not the name of a repository.", fix="Write owner/name.", repository=repo_id)


def check_revision(revision: str | None) -> None:
    """Refuse what git does not allow as a revision.

    Raises:
        UsageError: it is none.
    """
    if revision is not None and (not re.fullmatch(r"[\w.+/@-]+", revision) or ".." in revision):
        raise UsageError("This is not a revision.", fix="Name a branch, a tag or a commit.", revision=revision)


def check_names(names: Iterable[str]) -> None:
    """Refuse names that would be written elsewhere than below the directory, or that collide.

    Raises:
        MalformedError: a name is absolute, climbs, holds control characters, or equals another
            one on a file system that folds case.
    """
    seen: dict[str, str] = {}
    for name in names:
        if reason := _hostile(name):
            raise MalformedError(
                f"A file name in this repository {reason}.", fix="Nothing was written; do not trust it.", file=name
            )
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise MalformedError("Two names differ only by case or accents.", fix="Rename one.", file=name, other=other)


def _hostile(name: str) -> str | None:
    """Why `name` may not be written, or None."""
    parts = name.split("/")
    if any(unicodedata.category(character) in {"Cc", "Cs", "Cf", "Zl", "Zp"} for character in name):
        return "holds control characters"
    if "\\" in name or _DRIVE.match(name):
        return "is a path of Windows"
    if any(part in {"", ".", ".."} for part in parts):
        return "leads out of the directory"
    if any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        return "is too long"
    return None


def left_out_reason(name: str) -> str | None:
    """Why a file of this name is neither published nor fetched, or None."""
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if name.endswith(".partial"):
        return "a partial file of an interrupted run"
    if Path(name).suffix.lower() in PICKLE_SUFFIXES:
        return "may be a pickle, which can run code when it is loaded"
    return None
