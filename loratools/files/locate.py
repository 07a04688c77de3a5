"""What a SOURCE string points at."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

from loratools.errors import (
    AccessError,
    InputMissingError,
    LoratoolsError,
    MalformedError,
    StorageError,
    UnsupportedError,
    UsageError,
)
from loratools.formats.peft.config import CONFIG_FILE as ADAPTER_CONFIG
from loratools.storage.strict_json import read_json, read_report

Source = str | os.PathLike[str]
REPORT_FILE: Final = "loratools.json"
MODEL_STEMS: Final = ("model", "diffusion_pytorch_model")
ADAPTER_STEMS: Final = ("adapter_model",)
_FILE_SUFFIXES: Final = (".safetensors", ".gguf")
_MAX_CONFIG_BYTES: Final = 64 * 1024 * 1024


@contextmanager
def readable(source: Source) -> Iterator[None]:
    """What the operating system says against looking at an input, as our own errors.

    Raises:
        AccessError: it is not permitted.
        StorageError: anything else: a name that is too long, a disk that fails.
    """
    try:
        yield
    except LoratoolsError:
        raise
    except PermissionError as error:
        raise AccessError(
            "The input may not be read.", fix="Change its permissions.", path=error.filename or source
        ) from error
    except OSError as error:
        raise StorageError(f"The input cannot be read: {error.strerror}.", path=error.filename or source) from error


def local(source: Source) -> Path:
    """The path that a source names.

    Raises:
        UnsupportedError: it is on the Hub, which is not read in place yet.
        InputMissingError: nothing is there.
    """
    text = os.fspath(source)
    if not text:
        raise InputMissingError("The source is an empty name.", fix="Is a shell variable unset?")
    if text.startswith("hf://"):
        raise UnsupportedError(
            "hf:// sources are not read in place yet.", fix="`loratools pull` fetches a repository.", source=text
        )
    path = Path(text)
    if not path.exists() and not path.is_symlink():
        raise InputMissingError("There is no such file or directory.", path=text)
    return path


def kind_of(source: Source) -> Literal["checkpoint", "adapter"]:
    """Whether a source is an adapter, told by names in a directory and by keys in a single file.

    Raises:
        MalformedError: a directory holds both, or several adapters and nothing else.
    """
    with readable(source):
        return _kind(local(source))


def _kind(path: Path) -> Literal["checkpoint", "adapter"]:
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        model = any(name.startswith(MODEL_STEMS) and name.endswith((".safetensors", ".index.json")) for name in names)
        adapter = ADAPTER_CONFIG in names or any(name.startswith(ADAPTER_STEMS) for name in names)
        if model and adapter:
            raise MalformedError(
                "The directory holds a checkpoint and an adapter.", fix="Name the weights file itself.", path=path
            )
        return "adapter" if adapter or (not model and several_adapters(path)) else "checkpoint"
    named = path.name.startswith(ADAPTER_STEMS)
    beside = not path.name.startswith(MODEL_STEMS) and (path.parent / ADAPTER_CONFIG).exists()
    return "adapter" if named or beside else "checkpoint"


def require_directory_name(output: Path) -> None:
    """Refuse to make a directory that is called as a weights file is.

    Raises:
        UsageError: it is.
    """
    if output.suffix in _FILE_SUFFIXES:
        raise UsageError("A PEFT adapter is a directory.", fix="Give -o a directory.", output=output.name)


def several_adapters(directory: Path) -> list[str]:
    """Names of the adapters that lie in sub-directories, as PEFT saves all but the default one."""
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir() and (entry / ADAPTER_CONFIG).is_file())


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an empty one where nothing has that name.

    Raises:
        MalformedError: it is not an object, or not even a regular file.
        LoratoolsError: it cannot be read; see `ReadOnlyFile`.
    """
    return _object(path, read_json(path, max_bytes=_MAX_CONFIG_BYTES)) if os.path.lexists(path) else {}


def read_report_of(output: Path) -> dict[str, Any]:
    """The report of an output of ours, empty where there is none; raises as `read_object`."""
    path = report_path(output)
    return _object(path, read_report(path)) if os.path.lexists(path) else {}


def _object(path: Path, document: object) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise MalformedError("A JSON object is expected here.", file=path.name)
    return document


def report_path(path: Path) -> Path:
    """Where the report of an output lies: inside a directory, beside a single file."""
    return path / REPORT_FILE if path.is_dir() else path.with_name(f"{path.stem}.{REPORT_FILE}")
