"""What an index may name: it comes from a stranger, and must not be able to reach any other file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from loratools.errors import MalformedError

_PLAIN: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,240}\.safetensors")
_BLOB: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""The name of a file in the Hub client's cache: what it holds, hashed."""

_FIX: Final = "Do not trust this model: such names are used to reach other files. Get it from its publisher."


def require_plain(names: Iterable[str], index: Path) -> None:
    """Refuse names that are no plain file names, or that a file system which folds case takes for one.

    Raises:
        MalformedError: letters, digits, `.`, `_` and `-` before `.safetensors` are what a name may have.
    """
    folded: dict[str, str] = {}
    for name in names:
        if not _PLAIN.fullmatch(name):
            raise MalformedError(
                "The index names a shard that is not a plain `.safetensors` name in its own directory.",
                fix=_FIX,
                file=index,
                shard=name,
            )
        other = folded.setdefault(name.lower(), name)
        if other != name:
            raise MalformedError(
                "The index names two shards that are one file where case does not count.",
                fix="Rename one of them, in the index too.",
                file=index,
                shard=name,
                other=other,
            )


def require_inside(names: Iterable[str], index: Path) -> None:
    """Refuse shards that are links out of the index's directory, except into the cache of the Hub client.

    There a snapshot's files are links to `blobs/<hash of the content>`: who can write such a link knows what it leads
    to. Links within the directory are followed, and so is a link to the whole directory, which the user named.

    Raises:
        MalformedError: a shard leads out.
    """
    home = os.path.realpath(index.parent)
    for name in names:
        target = os.path.realpath(os.path.join(home, name))  # noqa: PTH118  as long as the link says, whatever it says
        if os.path.commonpath([home, target]) == home:
            continue
        folder, file = os.path.split(target)
        if os.path.basename(folder) == "blobs" and _BLOB.fullmatch(file):  # noqa: PTH119
            continue
        raise MalformedError(
            "The index names a shard that is a link to somewhere outside of its directory.",
            fix="If you made the link yourself: copy the file, or name the directory in which all shards lie.",
            file=index,
            shard=name,
            link_to=target,
        )
