"""Safetensors files that are one to three edits away from valid ones: the same for the same seed.

A draft is a header in pieces of JSON text, so that an edit can leave the language of JSON, or that of safetensors, at
any place. Most edits know what they touch; the last ones know only bytes.
"""

import dataclasses
import json
import random

BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
        "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64}  # fmt: skip
NAMES = ("a", "b", "model.layers.0.q_proj.weight", "layer", "Layer", "", ".", "..", "../../x", "/etc/passwd", "C:\\x",
         "__class__", "a\0b", "a\nb", "\x1b[31m", "\u202ex", "é", "e\u0301", "☃", "😀", "x" * 300, "__metadata_",
         "dtype", "-0", "1", " a", "a ", '"', "\\", "[[{{", ",:,", "\x7f", "\ufeff", "\u2028",
         "\ud7ff", "\U0010ffff")  # fmt: skip
SPACES = (" ", "\n", "\t", "\r", "  ", "\r\n", "\x0b", "\x0c", "\xa0", "\0", "\ufeff", "\u3000", "/**/", "//\n")
NUMBERS = ("0", "1", "2", "3", "-0", "-1", "00", "01", "+1", "1.0", "1e0", "1E2", "0.0", "-0.0", ".5", "1.", "1e",
           "0x1", "true", "false", "null", '"1"', "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "[]",
           "{}", "[1]", "4", "8", "12", "16", "127", "255", "256", "4294967295", "4294967296", "9007199254740993",
           "4611686018427387904", "9223372036854775807", "9223372036854775808", "18446744073709551615",
           "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "9" * 30, "9" * 308,
           "1" + "0" * 308, "9" * 309, "9" * 4000, "9" * 5000, "1_0", "１", "٣", "''")  # fmt: skip
VALUES = (*NUMBERS, '"F32"', '"x"', '"\\ud800"', '"\\ud83d\\ude00"', '"\\u0000"', '"a\nb"', '"a\tb"', '"\\x41"',
          '"\\/"', '"\\u00e9"', '"\\uD83D"', '"\\udc00\\ud83d"', '"\x7f"', '{"a":1}', '{"a":1,"a":2}',
          '{"a":{"b":[1,{"c":null}]}}', "[1,2,]", "[,]", "{,}", '{"a":1,}', "{1:2}", "{null:1}", '{"F32":null}',
          '{"F32":[]}', '{"F32":{}}', '{"F32":1}',
          *("[" * depth + "]" * depth for depth in (3, 100, 124, 125, 126, 127, 128, 129, 200)),
          *('{"a":' * depth + "1" + "}" * depth for depth in (100, 125, 126, 127, 128, 129)))  # fmt: skip
PIECES = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1", b"8", b".", b"e5", b"null", b"true", b" ", b"\\",
          b"\0", b"\\u0041", b"\\ud800", b"\\n", b"\xc3\xa9", b"\xff", b"\xc0\x80", b"\xed\xa0\x80",
          b"\xf4\x90\x80\x80", b"\x80", b"\xef\xbb\xbf", b"a", b'"a":1,', b"\n", b"\x1f", b"\x7f", b"F16",
          b"//")  # fmt: skip


@dataclasses.dataclass
class Draft:
    """A file in pieces: entries are name and fields (or any text), both as JSON text."""

    entries: list[list]
    data: bytearray
    before: str = ""
    after: str = ""
    spaces: tuple[str, ...] = ("",)
    length: int = 0
    length_is: int | None = None


def valid(chance):
    """A draft that any reader takes."""
    entries, reached = [], 0
    for name in chance.sample(NAMES, chance.randint(0, 4)):
        dtype = chance.choice(("F32", "U8", "F16", "F4", *BITS))
        shape = chance.choice(([], [1], [2], [3, 2], [0], [0, 5], [4, 0, 7], [1, 1, 1], [8], [2, 2, 2]))
        if BITS[dtype] < 8:
            shape = [4 * size for size in shape] or [8]
        size = BITS[dtype]
        for each in shape:
            size *= each
        end = reached + size // 8
        fields = [["dtype", json.dumps(dtype)], ["shape", json.dumps(shape)], ["data_offsets", f"[{reached},{end}]"]]
        chance.shuffle(fields)
        entries.append([json.dumps(name, ensure_ascii=chance.random() < 0.5), [[json.dumps(k), v] for k, v in fields]])
        reached = end
    chance.shuffle(entries)
    if chance.random() < 0.4:
        entries.insert(chance.randint(0, len(entries)), ['"__metadata__"', chance.choice((
            "{}", '{"format":"pt"}', '{"a":"b","é":"\\u00fc","":""}', "null"))])  # fmt: skip
    return Draft(entries, bytearray(at % 251 for at in range(reached)), after=" " * chance.choice((0, 0, 1, 7)))


def written(draft, chance):
    """The file."""
    space = (lambda: chance.choice(draft.spaces)) if len(draft.spaces) > 1 else str
    entries = []
    for name, fields in draft.entries:
        value = fields
        if not isinstance(fields, str):
            value = f",{space()}".join(f"{space()}{key}{space()}:{space()}{text}{space()}" for key, text in fields)
            value = f"{{{value}}}"
        entries.append(f"{space()}{name}{space()}:{space()}{value}{space()}" if name is not None else value)
    text = f"{draft.before}{{{','.join(entries)}{space()}}}{draft.after}"
    header = text.encode("utf-8", "surrogatepass")
    length = len(header) + draft.length if draft.length_is is None else draft.length_is
    return (length % 2**64).to_bytes(8, "little") + header + draft.data


def _entry(draft, chance):
    """One of the entries that are still made of fields, or None."""
    usable = [entry for entry in draft.entries if isinstance(entry[1], list) and entry[1]]
    return chance.choice(usable) if usable else None


def _field(draft, chance, *names):
    entry = _entry(draft, chance)
    fields = [field for field in entry[1] if not names or field[0].strip('"') in names] if entry else []
    return chance.choice(fields) if fields else None


def repeat_entry(draft, chance):
    if draft.entries:
        name, value = chance.choice(draft.entries)
        kept = value if isinstance(value, str) else [list(field) for field in value]
        if name is not None and chance.random() < 0.3:
            name = "".join(f"\\u{ord(each):04x}" if each.isalpha() and ord(each) < 256 else each for each in name)
        draft.entries.insert(chance.randint(0, len(draft.entries)), [name, kept])


def remove_entry(draft, chance):
    if draft.entries:
        draft.entries.pop(chance.randrange(len(draft.entries)))


def rename_entry(draft, chance):
    if draft.entries:
        draft.entries[chance.randrange(len(draft.entries))][0] = chance.choice(
            (json.dumps(chance.choice(NAMES)), '"\\ud800"', '"\\udc00x"', '"a\nb"', '"\\q"', "a", "1", "null",
             '"__metadata__"', '"__metadat\\u0061__"', '"\\u005f_metadata__"'))  # fmt: skip


def replace_entry(draft, chance):
    """The entry as something else: a list of the values (which serde takes for a struct), a number, …"""
    entry = _entry(draft, chance)
    if entry:
        values = dict((key.strip('"'), text) for key, text in entry[1])  # noqa: C402  keys may be anything
        row = [values.get(key, "0") for key in ("dtype", "shape", "data_offsets")]
        entry[1] = chance.choice((f"[{','.join(row)}]", f"[{','.join(row[:2])}]", f"[{','.join([*row, '1'])}]",
                                  f"[{','.join(row[::-1])}]", chance.choice(VALUES)))  # fmt: skip


def add_entry(draft, chance):
    name = json.dumps(chance.choice(NAMES))
    draft.entries.insert(chance.randint(0, len(draft.entries)), [name, chance.choice(VALUES)])


def add_empty_tensor(draft, chance):
    """No bytes at any offset that is there, with sizes of all sorts beside the zero."""
    at = chance.choice((0, len(draft.data), chance.randint(0, len(draft.data) + 1)))
    sizes = [chance.choice(("1", "3", "2147483648", *NUMBERS[-20:])) for _ in range(chance.randint(0, 3))]
    sizes.insert(chance.randint(0, len(sizes)), "0")
    dtype = f'"{chance.choice(tuple(BITS))}"'
    draft.entries.insert(chance.randint(0, len(draft.entries)), [json.dumps(chance.choice(NAMES)), [
        ['"dtype"', dtype], ['"shape"', f"[{','.join(sizes)}]"], ['"data_offsets"', f"[{at},{at}]"]]])  # fmt: skip


def metadata(draft, chance):
    value = chance.choice(('{"a":1}', '{"a":null}', '{"a":"b","a":"c"}', "[]", '"x"', "1", "true", '{"a":{"b":"c"}}',
                           "{}", "null", '{"\\ud800":"x"}', '{"a":"\\ud800"}', '{"a":"\\u0000"}', '{"dtype":"F32"}',
                           '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}', '[["a","b"]]'))  # fmt: skip
    draft.entries.insert(chance.randint(0, len(draft.entries)), ['"__metadata__"', value])


def repeat_field(draft, chance):
    entry = _entry(draft, chance)
    if entry:
        field = list(chance.choice(entry[1]))
        if chance.random() < 0.3:
            field[0] = field[0].replace("d", "\\u0064", 1).replace("s", "\\u0073", 1)
        entry[1].insert(chance.randint(0, len(entry[1])), field)


def remove_field(draft, chance):
    entry = _entry(draft, chance)
    if entry:
        entry[1].pop(chance.randrange(len(entry[1])))


def reorder(draft, chance):
    chance.shuffle(draft.entries)
    for _, fields in draft.entries:
        if isinstance(fields, list):
            chance.shuffle(fields)


def add_field(draft, chance):
    entry = _entry(draft, chance)
    if entry:
        key = json.dumps(chance.choice(("x", "", "Dtype", "shape ", "device", "data_offset", "é", "\0")))
        entry[1].insert(chance.randint(0, len(entry[1])), [key, chance.choice(VALUES)])


def replace_value(draft, chance):
    field = _field(draft, chance)
    if field:
        field[1] = chance.choice(VALUES)


def change_dtype(draft, chance):
    field = _field(draft, chance, "dtype")
    if field:
        known = chance.choice(tuple(BITS))
        field[1] = chance.choice((f'"{known}"', f'"{known.lower()}"', f'"{known} "', '"F31"', '""',
                                  f'{{"{known}":null}}', f'{{"{known}":[]}}', f'["{known}"]', '"F\\u00332"', "7",
                                  '"\\u0000"'))  # fmt: skip


def change_number(draft, chance):
    """One size or offset becomes another number, or no number at all; or the list gets longer or shorter."""
    field = _field(draft, chance, "shape", "data_offsets")
    if field and field[1].startswith("["):
        parts = [part for part in field[1][1:-1].split(",") if part.strip()]
        at = chance.randrange(len(parts)) if parts else 0
        how = chance.random()
        if how < 0.4 and parts and parts[at].strip().isascii() and parts[at].strip().isdigit() and len(parts[at]) < 30:
            parts[at] = str(int(parts[at]) + chance.choice((-8, -4, -2, -1, 1, 2, 4, 8)))
        elif how < 0.7 and parts:
            parts[at] = chance.choice(NUMBERS)
        elif how < 0.85:
            parts.insert(at, chance.choice(("0", "1", "2", *NUMBERS)))
        elif parts:
            parts.pop(at)
        field[1] = f"[{','.join(parts)}]"


def swap_offsets(draft, chance):
    one, two = _field(draft, chance, "data_offsets"), _field(draft, chance, "data_offsets")
    if one and two:
        one[1], two[1] = two[1], one[1]


def whitespace(draft, chance):
    odd = [chance.choice(SPACES)] if chance.random() < 0.3 else []
    draft.spaces = ("", "", *chance.choices(SPACES[:6], k=2), *odd)


def around(draft, chance):
    """Something before the brace or behind it."""
    text = "".join(chance.choices((*SPACES, "{}", "x", ",", "\0" * 7), k=chance.randint(1, 3)))
    if chance.random() < 0.5:
        draft.before += text
    else:
        draft.after += text


def data(draft, chance):
    how = chance.random()
    if how < 0.4:
        del draft.data[chance.randint(0, len(draft.data)) :]
    else:
        draft.data += bytes(chance.choice((1, 2, 4, 8, 64)))


def prefix(draft, chance):
    if chance.random() < 0.7:
        draft.length = chance.choice((-8, -2, -1, 1, 2, 8, 100))
    else:
        draft.length_is = chance.choice((0, 1, 2, 100_000_000, 100_000_001, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1))


EDITS = (repeat_entry, remove_entry, rename_entry, replace_entry, add_entry, add_empty_tensor, metadata, repeat_field,
         remove_field, reorder, add_field, replace_value, change_dtype, change_number, change_number, change_number,
         swap_offsets, whitespace, around, data, prefix)  # fmt: skip


def bytewise(file, chance):
    """Edits that know nothing: pieces put in, bytes taken out or flipped, the end cut off."""
    made = bytearray(file)
    for _ in range(chance.randint(1, 2)):
        in_header = len(made) > 8 and chance.random() < 0.9
        at = chance.randrange(8, len(made)) if in_header else chance.randrange(len(made) + 1)
        how = chance.random()
        if how < 0.5:
            made[at : at + chance.randint(0, 2)] = chance.choice(PIECES)
        elif how < 0.7:
            del made[at : at + chance.randint(1, 4)]
        elif how < 0.9 and at < len(made):
            made[at] ^= 1 << chance.randrange(8)
        else:
            del made[at:]
    if chance.random() < 0.6 and len(made) >= 8:  # the length is made to fit again, where the data did not change
        length = int.from_bytes(file[:8], "little") + len(made) - len(file)
        made[:8] = (length % 2**64).to_bytes(8, "little")
    return bytes(made)


def mutants(seed):
    """(names of the edits, file) without end."""
    chance = random.Random(seed)
    while True:
        draft = valid(chance)
        edits = chance.sample(EDITS, chance.choice((0, 1, 1, 1, 2, 2, 3)))
        for edit in edits:
            edit(draft, chance)
        names = tuple(edit.__name__ for edit in edits)
        file = written(draft, chance)
        if chance.random() < 0.2:
            yield (*names, "bytewise"), bytewise(file, chance)
        else:
            yield names, file
