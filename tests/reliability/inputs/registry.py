"""All hostile inputs, in the order of their numbers."""

from tests.reliability.inputs import adapters, headers, indexes, kinds, odd, pairs, paths, pickles

MODULES = (headers, odd, indexes, paths, adapters, kinds, pairs, pickles)
TITLES = dict(sorted(item for module in MODULES for item in module.TITLES.items()))
CASES = tuple(sorted((case for module in MODULES for case in module.CASES), key=lambda case: case.number))

OPEN = {
    31: (("1 MB long",), "a key of a rank pattern that is a long plain name is taken for an expression"),
    38: (("C:model",), "a drive letter is taken for a missing file"),
    39: (("",), "a link out of the directory is followed"),
    50: (("",), "shards whose names differ only in case are taken"),
}
PENDING = {
    case.name: OPEN[case.number][1]
    for case in CASES
    if case.number in OPEN and case.variant.startswith(OPEN[case.number][0])
}
"""Name of a case → why the package does not answer as it should yet."""
