"""What a disk may hold after a power cut: a run's calls replayed in thought, with everything lost that may be lost.

A cut comes after any call. What was written into a file and not flushed is lost or half there; a name that was made,
moved or removed, and whose directory was not flushed, is there as before or as after, each independently of the others.
"""

import dataclasses
import itertools
import re

SYNCS = {"fsync", "fdatasync"}
WRITES = {"pwrite64", "copy_file_range", "fallocate", "ftruncate"}
NAMES = {"mkdir", "openat", "renameat2", "rename", "link", "unlink", "unlinkat", "rmdir"}
_EXHAUSTIVE = 9
_LINE = re.compile(r"^(?P<thread>\d+)\s+(?:<\.\.\. (?P<resumed>\w+) resumed>|(?P<name>\w+)\()(?P<rest>.*)$")
_QUOTED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"([^"]*)"')
_DESCRIPTOR = re.compile(r"\d+<([^>]*)>")


@dataclasses.dataclass(eq=False)
class File:
    """Counts of writes: all, and those that a flush has seen."""

    old: bool = False
    written: int = 0
    flushed: int = 0

    @property
    def safe(self):
        return self.written == self.flushed


@dataclasses.dataclass(eq=False)
class Directory:
    """Live entries, and those at the beginning."""

    old: bool = False
    entries: dict = dataclasses.field(default_factory=dict)
    first: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(eq=False)
class Change:
    """Names that one call set, in which directories; `flushed` once that of the last one was."""

    sets: list
    flushed: bool = False


def calls(text):
    """(name, arguments and result) in order; a flush counts from its end, everything else from its beginning."""
    pending = {}
    for line in text.splitlines():
        if (found := _LINE.match(line)) is None:
            continue
        if found["resumed"]:
            name, rest = found["resumed"], pending.pop(found["thread"], "") + found["rest"]
            if name in SYNCS:
                yield name, rest
        elif found["rest"].endswith("<unfinished ...>"):
            pending[found["thread"]] = found["rest"]
            if found["name"] not in SYNCS:
                yield found["name"], found["rest"]
        elif " = -1 E" not in found["rest"]:
            yield found["name"], found["rest"]


class Disk:
    """The directory `root` as a run found it, and all that it did to it so far."""

    def __init__(self, root):
        self.root, self.changes = str(root), []
        self.top = self._read(root)

    def _read(self, path):
        if not path.is_dir():
            return File(old=True)
        entries = {each.name: self._read(each) for each in path.iterdir()}
        return Directory(old=True, entries=dict(entries), first=entries)

    def _node(self, path):
        node = self.top
        for part in path[len(self.root) :].strip("/").split("/"):
            node = node.entries.get(part) if part else node
            if node is None:
                return None
        return node

    def _place(self, path):
        parent, _, name = path.rpartition("/")
        return self._node(parent), name

    def _set(self, *pairs):
        sets = [(*self._place(path), node) for path, node in pairs]
        for directory, name, node in sets:
            if node is None:
                directory.entries.pop(name, None)
            else:
                directory.entries[name] = node
        self.changes.append(Change(sets))

    def _inside(self, path):
        return path == self.root or path.startswith(self.root + "/")

    def apply(self, name, rest):
        """Do what a call does; whether it had to do with this directory."""
        if name in NAMES:
            named = _QUOTED.findall(rest)
            paths = [text if text.startswith("/") else f"{at or self.root}/{text}" for at, text in named]
            return all(map(self._inside, paths)) and bool(paths) and self._rename(name, rest, paths)
        paths = [path for path in _DESCRIPTOR.findall(rest) if self._inside(path)]
        node = self._node(paths[-1]) if paths else None
        if node is None:
            return False
        if name in WRITES:
            node.written += 1
        elif name in SYNCS and isinstance(node, File):
            node.flushed = node.written
        elif name in SYNCS:
            for change in self.changes:
                change.flushed |= change.sets[-1][0] is node
        return name in WRITES | SYNCS

    def _rename(self, name, rest, paths):
        if name == "openat" and "O_CREAT" not in rest:
            return False
        if name in {"openat", "mkdir"}:
            self._set((paths[0], File() if name == "openat" else Directory()))
        elif name in {"unlink", "unlinkat", "rmdir"}:
            self._set((paths[0], None))
        elif name == "link":
            self._set((paths[1], self._node(paths[0])))
        elif "RENAME_EXCHANGE" in rest:
            self._set((paths[0], self._node(paths[1])), (paths[1], self._node(paths[0])))
        else:
            self._set((paths[0], None), (paths[1], self._node(paths[0])))
        return True

    def states(self):
        """Every directory that may be found after a cut now: name → node, as a function of a directory."""
        open_changes = [change for change in self.changes if not change.flushed]
        for kept in _subsets(open_changes):
            yield self._after({id(change) for change in kept})

    def _after(self, kept):
        found = {}
        for change in self.changes:
            if change.flushed or id(change) in kept:
                for directory, name, node in change.sets:
                    found.setdefault(id(directory), dict(directory.first))[name] = node
        return lambda directory: {
            name: node for name, node in found.get(id(directory), directory.first).items() if node is not None
        }


def _subsets(items):
    """All of them; where those are too many, every beginning, each one alone, and all but each one."""
    if len(items) <= _EXHAUSTIVE:
        for size in range(len(items) + 1):
            yield from itertools.combinations(items, size)
        return
    for number in range(len(items)):
        yield items[:number]
        yield items[number : number + 1]
        yield items[:number] + items[number + 1 :]
    yield items
