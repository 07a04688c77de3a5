"""What of a directory may leave this machine: its files, if they are what their report says and tell no secret."""

from __future__ import annotations

import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from loratools.errors import (
    AccessError,
    InputDataError,
    InputMissingError,
    MalformedError,
    MismatchError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from loratools.storage.files import ReadOnlyFile
from loratools.storage.hub_files import LocalFile, check_names, left_out_reason
from loratools.storage.safetensors import open_safetensors
from loratools.storage.strict_json import read_report

CARD: Final = "README.md"
REPORT: Final = "loratools.json"
RECEIPT: Final = ".receipt"
MAX_SCANNED_BYTES: Final = 1 << 20
MAX_MANIFEST_BYTES: Final = 1 << 26

_WEIGHTS: Final = frozenset({".gguf", ".safetensors"})
_TEXTS: Final = frozenset({".json", ".md", ".txt"})
_SECRETS: Final = (
    ("a Hub token", re.compile(rb"hf_[A-Za-z0-9]{20,}")),
    ("an AWS access key", re.compile(rb"\bA(?:KIA|SIA)[0-9A-Z]{16}\b")),
    ("a GitHub token", re.compile(rb"\bgh[oprsu]_[A-Za-z0-9]{36}|\bgithub_pat_[A-Za-z0-9_]{22,}")),
    ("a private key", re.compile(rb"-----BEGIN (?:[A-Z]+ ){0,3}PRIVATE KEY")),
)
_HOME: Final = re.compile(
    rb"(?<![\w.~-])(?:/(?:home|Users)/[\w.-]+|/root/[\w.-]+)|(?<![A-Za-z])[A-Za-z]:(?:\\{1,2}|/)Users\b"
)
_ROOTED: Final = rb"(?:/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\])"
_BASE: Final = re.compile(
    rb'"(?:base_model_name_or_path|_name_or_path)"\s*:\s*"'
    + _ROOTED
    + rb"|\bbase_model:(?:\w+:)?\s*(?:-\s*)?[\"']?"
    + _ROOTED
)


def collect(directory: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files directly inside `directory` that are published, and name and reason of all else in it.

    Raises:
        InputDataError: a name or link is hostile, or the weights are only there as a pickle.
        InputMissingError: there is no such directory, or nothing in it.
        UsageError: it is not a directory.
    """
    if not directory.is_dir():
        if directory.exists():
            raise UsageError("A directory is published, and this is a file.", fix="Name its directory.", path=directory)
        raise InputMissingError("There is no such directory.", fix="Check the path.", path=directory)
    try:
        entries = sorted(directory.iterdir())
    except PermissionError as error:
        raise AccessError("The directory cannot be read.", fix="Change its permissions.", path=directory) from error
    except OSError as error:
        raise StorageError(f"The directory cannot be read: {error.strerror}.", path=directory) from error
    left_out = [(entry.name, reason) for entry in entries if (reason := _reason(entry))]
    excluded = {name for name, _ in left_out}
    paths = [entry for entry in entries if entry.name not in excluded]
    check_names(path.name for path in paths)
    if not paths:
        raise InputMissingError("There is nothing in this directory to publish.", fix="Check the path.", path=directory)
    if any("pickle" in reason for _, reason in left_out) and not any(path.suffix in _WEIGHTS for path in paths):
        raise UnsupportedError(
            "The weights are here only as a pickle, which is not published.",
            fix="Save them as safetensors first.",
            path=directory,
        )
    return paths, left_out


def _reason(entry: Path) -> str | None:
    """Why `entry` stays here, or None; a link that leaves the directory is refused, not left out."""
    if reason := left_out_reason(entry.name):
        return reason
    try:
        mode = entry.stat().st_mode
        inside = entry.resolve().is_relative_to(entry.parent.resolve())
    except (OSError, RuntimeError) as error:
        raise MalformedError("This file cannot be reached.", fix="Mend or remove the link.", file=entry) from error
    if stat.S_ISDIR(mode):
        return "a directory: only files directly inside are published"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    if not inside:
        raise UnsupportedError(
            "This link leads out of the directory.", fix="Put a copy of the file in its place.", file=entry.name
        )
    return None


def check_manifest(directory: Path, files: Sequence[LocalFile]) -> None:
    """Compare `files` with the sizes and hashes in the report beside them, if there is one.

    The card is not compared: it is the one file that people are expected to edit.

    Raises:
        MismatchError: a file is missing, or is not the one that was written.
        MalformedError: the report is not one of ours.
    """
    found = {file.name: file for file in files}
    if REPORT not in found:
        return
    report = read_report(directory / REPORT)
    rows = report.get("files") if isinstance(report, dict) else None
    if not isinstance(rows, list):
        raise MalformedError("This report lists no files.", fix="Write the output again.", file=REPORT)
    for row in rows:
        name, size, sha256 = _manifest_row(row)
        if name == CARD:
            continue
        if name not in found:
            raise MismatchError("The report lists a file that is not here.", fix="Write the output again.", file=name)
        if (found[name].bytes, found[name].sha256) != (size, sha256):
            raise MismatchError(
                "This file is not the one that was written: its SHA-256 differs from the report's.",
                fix="Write the output again; if the change is meant, remove loratools.json, which vouches for it.",
                file=name,
            )


def _manifest_row(row: object) -> tuple[str, int, str]:
    values = [row.get(key) for key in ("name", "bytes", "sha256")] if isinstance(row, Mapping) else []
    match values:
        case [str(name), int(size), str(sha256)]:
            return name, size, sha256
        case _:
            raise MalformedError("This report's list of files is damaged.", fix="Write the output again.", file=REPORT)


def refuse_leaks(path: Path) -> bool:
    """Refuse a text, or a receipt with configurations in it, that has a credential or names a place on this machine.

    Vocabularies are full of words that look like paths, so that these are looked for only in
    Markdown, configurations and our own report.

    Returns:
        Whether it was looked at, if it is text by its name; True for all others.

    Raises:
        InputDataError: it leaks; the message has the line, never the text.
    """
    if path.suffix.lower() not in _TEXTS | {RECEIPT}:
        return True
    data = _manifest(path) if path.suffix.lower() == RECEIPT else _text(path)
    if data is None:
        return False
    for kind, pattern in _SECRETS:
        _refuse_match(
            pattern, data, path, f"This file holds what looks like {kind}.", "Remove it, and revoke it if it is real."
        )
    if path.suffix.lower() in {".md", RECEIPT} or path.name.endswith(("config.json", REPORT)):
        what = "This file names a path of this machine, which means nothing elsewhere and tells who you are."
        for pattern in (_HOME, _BASE):
            _refuse_match(pattern, data, path, what, "Put the base's owner/name there, or remove it.")
    return True


def _text(path: Path) -> bytearray | None:
    with ReadOnlyFile(path) as file:
        if file.size > MAX_SCANNED_BYTES:
            return None
        data = bytearray(file.size)
        file.read_into(memoryview(data), 0)
        return data


def _manifest(path: Path) -> bytearray | None:
    """The text in a receipt; see docs/formats/receipt.md."""
    held = open_safetensors(path).tensors.get("manifest")
    return held.read() if held is not None and held.nbytes <= MAX_MANIFEST_BYTES else None


def _refuse_match(pattern: re.Pattern[bytes], data: bytearray, path: Path, what: str, fix: str) -> None:
    if found := pattern.search(data):
        line = data.count(b"\n", 0, found.start()) + 1
        raise InputDataError(f"{what} Nothing was sent.", fix=fix, file=path.name, line=line)
