"""`demo`: a true story told with the other verbs, on this machine, in seconds."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loratools.engine.plan import canonical
from loratools.errors import UsageError
from loratools.storage.outputs import OutputDirectory
from loratools.storage.writer import write_bytes_durably

if TYPE_CHECKING:
    from loratools.demo.adapt import AdaptResult, Step, Verbs

STORIES: Final = ("adapt",)
REPORT_NAME: Final = "loratools.json"


@dataclasses.dataclass(frozen=True, slots=True)
class DemoReport:
    """What a demo showed.

    Attributes:
        story: its name.
        result: its figures.
        output: the directory that holds its files, if they were kept.
    """

    story: str
    result: AdaptResult
    output: Path | None = None

    def to_json(self) -> dict[str, object]:
        """The JSON document; it names no path."""
        return {"schema": "loratools/demo/1", "story": self.story, "result": self.result.to_json()}

    def table(self) -> list[tuple[str, ...]]:
        """The rows to print, the heading first."""
        return self.result.table()


def demo(
    story: str = "adapt",
    output: Path | str | None = None,
    *,
    seed: int = 0,
    on_event: Callable[[Step], None] | None = None,
) -> DemoReport:
    """Run a story; nothing is downloaded.

    Args:
        story: `adapt`: train a small network, fine-tune it, extract adapters of several ranks, merge and unmerge them.
        output: a new directory for the story's files; without it they are deleted at the end.
        seed: decides everything that is random.
        on_event: called as each step begins.

    Raises:
        UsageError: there is no such story.
        OutputExistsError: something is at `output` already.
        OutputError: `output` cannot be made.
        AccessError: writing there is not permitted.
    """
    if story not in STORIES:
        raise UsageError("There is no such demo.", fix=f"The demos are: {', '.join(STORIES)}.", demo=story)
    from loratools.demo.adapt import adapt

    with _workdir(None if output is None else Path(output)) as workdir:
        report = DemoReport(story, adapt(workdir, _verbs(), seed=seed, on_event=on_event))
        write_bytes_durably(workdir / REPORT_NAME, canonical(report.to_json()).encode())
    return dataclasses.replace(report, output=None if output is None else Path(output))


def _verbs() -> Verbs:
    from loratools.demo.adapt import Verbs
    from loratools.verbs.extract import extract
    from loratools.verbs.inspect import inspect
    from loratools.verbs.merge import merge
    from loratools.verbs.unmerge import unmerge

    return Verbs(extract=extract, merge=merge, unmerge=unmerge, inspect=inspect)


@contextmanager
def _workdir(output: Path | None) -> Iterator[Path]:
    """A directory to work in, that becomes `output` at the end or goes away."""
    if output is None:
        with tempfile.TemporaryDirectory(prefix="loratools-demo-") as name:
            yield Path(name)
        return
    OutputDirectory.check(output, False, (), 0)
    with OutputDirectory(output) as out:
        yield out.path
        out.publish()
