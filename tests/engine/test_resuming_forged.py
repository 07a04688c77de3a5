"""Work directories that were damaged, mixed up or made up: refused with the reason, or done again; never believed."""

import hashlib
import json
import os
import re
import shutil
import time
import tracemalloc

import pytest
import torch

from loratools.errors import LoratoolsError, MalformedError, MismatchError
from loratools.storage.work import JOURNAL, MANIFEST
from tests.engine.test_resuming import ended, flipped, went_on, whole
from tests.tiny import llama, normal, sha256, state, write_checkpoint

pytestmark = pytest.mark.usefixtures("every_unit")
DONE = 8


@pytest.fixture(scope="module")
def plain(home, tmp_path_factory):
    """What comes out when nobody interrupts."""
    out = tmp_path_factory.mktemp("plain") / "out"
    whole(home, out)
    return state(out)


@pytest.fixture
def work(home, tmp_path):
    """A work directory in which eight units are recorded, beside something that is nobody's business."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("secret")
    ended(whole, home, tmp_path, DONE)
    return tmp_path / "work"


class Signed:
    """A journal as (document, section), written again with checksums that are right: as by somebody who knows how."""

    def __init__(self, work):
        self.path = work / JOURNAL
        manifest = json.loads((work / MANIFEST).read_text())
        identity = {key: value for key, value in manifest.items() if key != "made"}
        self.seed = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
        self.records, data = [], self.path.read_bytes()
        while data:
            line, data = data.split(b"\n", 1)
            checksum, size, text = line.split(b" ", 2)
            section, data = data[: int(size)], data[int(size) :]
            assert hashlib.sha256(self.seed + line[65:] + b"\n" + section).hexdigest().encode() == checksum
            self.records.append((json.loads(text), section))

    def write(self, records):
        with self.path.open("wb") as file:
            for document, section in records:
                rest = f"{len(section)} {json.dumps(document)}\n".encode() + section
                file.write(hashlib.sha256(self.seed + rest).hexdigest().encode() + b" " + rest)


def gone_on(home, work, plain):
    """Go on: the units that ran, once everything else was found to be as it has to."""
    ran, report = went_on(whole, home, work.parent, threads=1)
    assert state(work.parent / "out") == plain
    assert (work.parent / "outside" / "secret").read_text() == "secret"
    assert sorted(path.name for path in work.parent.iterdir()) == ["out", "outside"]
    return ran, report


def test_a_journal_that_is_written_again_as_it_is(home, work, plain):
    """What the others change is what is believed otherwise: all eight units are taken over."""
    signed = Signed(work)
    assert len(signed.records) == 1 + DONE
    signed.write(signed.records)
    ran, report = gone_on(home, work, plain)
    assert any(f"{DONE} of {DONE + len(ran)} units" in note for note in report.notes)
    assert not any("done again" in note for note in report.notes)


def changed(record, **fields):
    return record[0] | fields, record[1]


def of_outcome(record, **fields):
    return changed(record, outcome=record[0]["outcome"] | fields)


MERGE = {"changed": 3, "entries": 7}
ODD = {
    "another tensor's hash": lambda one, other: changed(one, sha256=other[0].get("sha256", "0" * 64)),
    "a hash of nothing": lambda one, other: changed(one, sha256=hashlib.sha256(b"").hexdigest()),
    "a hash in capitals": lambda one, other: changed(one, sha256=str(one[0].get("sha256")).upper()),
    "no hash": lambda one, other: changed(one, sha256=None),
    "a list as hash": lambda one, other: changed(one, sha256=[one[0].get("sha256")]),
    "a path above": lambda one, other: changed(one, target="../outside/secret"),
    "an absolute path": lambda one, other: changed(one, target="/etc/passwd"),
    "a target that is no text": lambda one, other: changed(one, target={"a": 1}),
    "another target": lambda one, other: changed(one, target=other[0]["target"]),
    "another operation": lambda one, other: changed(one, operation="hash"),
    "an operation that there is not": lambda one, other: changed(one, operation="__import__"),
    "another number": lambda one, other: changed(one, unit=other[0]["unit"]),
    "a number below": lambda one, other: changed(one, unit=-1),
    "a number beyond": lambda one, other: changed(one, unit=10**30),
    "a fraction": lambda one, other: changed(one, unit=one[0]["unit"] + 0.0),
    "a text": lambda one, other: changed(one, unit=str(one[0]["unit"])),
    "no outcome": lambda one, other: changed(one, outcome=None),
    "an outcome that is a list": lambda one, other: changed(one, outcome=[1]),
    "a word": lambda one, other: of_outcome(one, what="\x1b[2J"),
    "no facts": lambda one, other: of_outcome(one, facts={}),
    "negative facts": lambda one, other: of_outcome(one, facts={"changed": -1, "entries": 7}),
    "true facts": lambda one, other: of_outcome(one, facts={"changed": True, "entries": 7, "count": True}),
    "more facts": lambda one, other: of_outcome(one, facts=one[0]["outcome"]["facts"] | {"name": "/etc/passwd"}),
    "huge facts": lambda one, other: of_outcome(one, facts={"changed": 1e300, "entries": 7}),
    "no receipt": lambda one, other: of_outcome(one, receipt=None),
    "a receipt that is a text": lambda one, other: of_outcome(one, receipt="kept"),
    "another receipt": lambda one, other: of_outcome(one, receipt=other[0]["outcome"]["receipt"]),
    "no section": lambda one, other: (one[0], b""),
    "a longer section": lambda one, other: (one[0], one[1] + b"x"),
    "another section": lambda one, other: (one[0], bytes(len(one[1]))),
}
SAME = {"no section", "another section"}
"""Copies have none, so that nothing is changed."""
ONLY_HASHED = {"another tensor's hash", "a hash of nothing", "a hash in capitals", "no hash", "a list as hash"}
"""Copies are compared with their source, and not by a hash."""


@pytest.mark.parametrize("odd", ODD)
def test_records_that_cannot_be(home, work, plain, odd):
    """With right checksums, one at a time: that unit is done again, or not known to be done; the others stay."""
    signed = Signed(work)
    merged = next(at for at, each in enumerate(signed.records) if each[0].get("operation") == "merge")
    copied = next(at for at, each in enumerate(signed.records) if each[0].get("operation") == "copy")
    number, place = 0, work.parent
    shutil.copytree(place, place.parent / f"{place.name}-kept")
    for one, other in ((merged, copied), (copied, merged)):
        if one == copied and odd in SAME | ONLY_HASHED:
            continue
        shutil.rmtree(place)
        shutil.copytree(place.parent / f"{place.name}-kept", place)
        records = list(signed.records)
        records[one] = ODD[odd](records[one], records[other])
        signed.write(records)
        ran, _ = gone_on(home, work, plain)
        assert signed.records[one][0]["target"] in ran, odd
        number += 1
    assert number


def test_the_order_of_records(home, work, plain):
    """Of units it does not matter; what stands before the hashes of the inputs counts for nothing."""
    signed = Signed(work)
    first, *units = signed.records
    signed.write([first, *units[::-1]])
    shutil.copytree(work.parent, work.parent.parent / "other")
    _, report = gone_on(home, work, plain)
    assert any(f"{DONE} of" in note for note in report.notes)
    other = work.parent.parent / "other" / "work"
    signed.path = other / JOURNAL
    signed.write([*units[:5], first, *units[5:]])
    ran, report = gone_on(home, other, plain)
    assert any(f"{DONE - 5} of" in note for note in report.notes)
    assert {each[0]["target"] for each in units[:5]} <= set(ran)


def test_records_that_are_there_twice(home, work, plain):
    """The same twice: taken over once. The last of unlike ones counts; it is wrong here, so the unit is done again."""
    signed = Signed(work)
    merged = next(each for each in signed.records if each[0].get("operation") == "merge")
    signed.write([*signed.records, *signed.records[1:], changed(merged, sha256="0" * 64)])
    ran, report = gone_on(home, work, plain)
    assert any(f"{DONE - 1} of" in note for note in report.notes)
    assert ran.count(merged[0]["target"]) == 1


@pytest.mark.parametrize(
    "inputs", [{}, {"base/config.json": "0" * 64}, {"../secret": "0" * 64}, {"base/config.json": 7}]
)
def test_hashes_of_inputs_that_are_not_theirs(home, work, inputs):
    """Refused; nothing appears, and the work stays."""
    signed = Signed(work)
    kept = signed.records[0][0]["inputs"]
    signed.write([({"inputs": {**kept, **inputs} if inputs else {}}, b""), *signed.records[1:]])
    if "../secret" in inputs:  # nobody asks for it
        went_on(whole, home, work.parent)
        return
    with pytest.raises(MismatchError, match="not the one that the work directory was begun with"):
        whole(home, work.parent / "out", resume=work)
    assert not (work.parent / "out").exists()
    assert (work / JOURNAL).stat().st_size


def test_a_journal_of_other_work(home, tmp_path, work, plain):
    """Of the same inputs with other weights: not a record of it is read. Its manifest is refused by name."""
    place = tmp_path / "another"
    place.mkdir()
    ended(whole, home, place, DONE, weights=[1, 2])
    shutil.copy(place / "work" / JOURNAL, work / JOURNAL)
    shutil.rmtree(place / "out", ignore_errors=True)
    kept = place / "work"
    shutil.move(kept, tmp_path.parent / f"{tmp_path.name}-other")
    place.rmdir()
    _, report = gone_on(home, work, plain)
    assert any("0 of" in note for note in report.notes)
    with pytest.raises(MismatchError, match="other options, weights"):
        whole(home, tmp_path / "again", resume=tmp_path.parent / f"{tmp_path.name}-other")


def swapped(parts):
    one, other = (part.read_bytes() for part in parts[:2])
    parts[0].write_bytes(other)
    parts[1].write_bytes(one)


PARTS = {
    "swapped": swapped,
    "empty": lambda parts: [os.truncate(part, 0) for part in parts],
    "short by a byte": lambda parts: [os.truncate(part, part.stat().st_size - 1) for part in parts],
    "longer by a byte": lambda parts: [part.write_bytes(part.read_bytes() + b"x") for part in parts],
    "a bit of the header": lambda parts: [flipped(part, 20) for part in parts],
    "a bit of the length": lambda parts: [flipped(part, 0) for part in parts],
    "a bit in the middle": lambda parts: [flipped(part, part.stat().st_size // 2) for part in parts],
    "nothing but zeros": lambda parts: [part.write_bytes(bytes(part.stat().st_size)) for part in parts],
    "zeros after the header": lambda parts: [_zeros(part) for part in parts],
    "gone": lambda parts: [part.unlink() for part in parts],
}


def _zeros(part):
    data = part.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    part.write_bytes(data[:start] + bytes(len(data) - start))


@pytest.mark.parametrize("spoil", PARTS)
def test_weights_that_are_not_what_was_recorded(home, work, plain, spoil):
    """In every file at once: what is not as recorded is done again, and said."""
    PARTS[spoil](sorted(work.glob("*.part")))
    _, report = gone_on(home, work, plain)
    assert any("had to be done again" in note for note in report.notes), report.notes


def test_every_bit_of_a_file_is_looked_at(home, work, plain):
    """One at a time, over the first file: whatever is flipped, the result is that of an uninterrupted run."""
    place, kept = work.parent, work.parent.parent / f"{work.parent.name}-kept"
    shutil.copytree(place, kept)
    [part, *_] = sorted(work.glob("*.part"))
    for at in range(0, part.stat().st_size, 97):
        shutil.rmtree(place)
        shutil.copytree(kept, place)
        flipped(part, at)
        gone_on(home, work, plain)


@pytest.mark.parametrize(
    "fill",
    [
        lambda file: file.truncate(1 << 40),
        lambda file: file.write(b"0" * (64 << 20)),
        lambda file: file.write(b"0" * 64 + b" 999999999999999999 {}\n"),
        lambda file: file.write(b"0" * 64 + b" 0 " + b"[" * (8 << 20) + b"\n"),
        lambda file: file.write(b"\n" * (8 << 20)),
    ],
)
def test_a_huge_journal(home, work, plain, fill):
    """Behind what is whole: neither time nor memory goes into it, and it is cut off."""
    with (work / JOURNAL).open("ab") as file:
        fill(file)
    begun = time.monotonic()
    tracemalloc.start()
    ran, report = gone_on(home, work, plain)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20
    assert time.monotonic() - begun < 20
    assert any(f"{DONE} of {DONE + len(ran)}" in note for note in report.notes)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff", b"null", b"7", b'{"a": 1, "a": 2}', b"[" * 100_000, b"PK\x03\x04"]
)
@pytest.mark.parametrize("name", [MANIFEST, JOURNAL])
def test_what_is_no_document(home, work, plain, name, data):
    """A manifest is refused as no document, or as another's; a journal says that nothing was done."""
    (work / name).write_bytes(data)
    if name == JOURNAL:
        _, report = gone_on(home, work, plain)
        assert any("0 of" in note for note in report.notes)
        return
    before = state(work)
    with pytest.raises((MalformedError, MismatchError), match=re.escape(work.name)):
        whole(home, work.parent / "out", resume=work)
    assert state(work) == before


@pytest.mark.parametrize("change", [
    {"schema": "loratools/resume/2"}, {"verb": "stack"}, {"loratools": "../../etc"}, {"work": None}, {"inputs": []},
    {"output": {"../outside/secret": "0"}}, {"options": {"weights": [1, 1]}},
])  # fmt: skip
def test_a_manifest_that_says_something_else(home, work, change):
    """Refused with what differs, whichever field it is; no name in it becomes a path."""
    document = json.loads((work / MANIFEST).read_text())
    (work / MANIFEST).write_text(json.dumps(document | change))
    before = state(work.parent)
    with pytest.raises(MismatchError, match=f"begun with other {next(iter(change))}"):
        whole(home, work.parent / "out", resume=work)
    assert state(work.parent) == before


def other_base(home, place):
    """Of the same shapes: one weight is another one."""
    tensors = llama(torch.float32)
    tensors["model.norm.weight"] = normal(99, 16)
    write_checkpoint(place / "base", tensors, shards=3, companions={"tokenizer.json": b"{}"})
    for name in ("a", "b"):
        shutil.copytree(home / name, place / name)
    return place


def test_another_base_of_the_same_shapes(home, work, tmp_path):
    """Its file is named; what was done stays, for the base that it was done with."""
    place = other_base(home, tmp_path / "outside")
    with pytest.raises(MismatchError, match=r"not the one that the work directory was begun with.*model-00003-of"):
        whole(place, tmp_path / "out", resume=work)
    assert not (tmp_path / "out").exists()
    _, report = went_on(whole, home, tmp_path)
    assert any(f"{DONE} of" in note for note in report.notes)


@pytest.mark.parametrize("receipt", ["lean", "none"])
def test_another_receipt(home, work, receipt):
    """It would be another file."""
    before = state(work)
    with pytest.raises(MismatchError, match=f'options, receipt: "full" there, "{receipt}" now'):
        whole(home, work.parent / "out", resume=work, receipt=receipt)
    assert state(work) == before


def test_whatever_a_journal_is_damaged_into(home, work, plain):
    """Cut, or with a byte changed, at a hundred places: the same result, or an error of ours; never other weights."""
    data, place = (work / JOURNAL).read_bytes(), work.parent
    kept = place.parent / f"{place.name}-kept"
    shutil.copytree(place, kept)
    for at in range(0, len(data), len(data) // 50):
        for spoilt in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            shutil.rmtree(place)
            shutil.copytree(kept, place)
            (work / JOURNAL).write_bytes(spoilt)
            try:
                gone_on(home, work, plain)
            except LoratoolsError:
                assert not (place / "out").exists()
    assert sha256(kept / "work" / JOURNAL) == hashlib.sha256(data).hexdigest()
