"""H48 and H49: outputs that are inputs."""

from tests.reliability.inputs.cases import Case, Refused, all_of

TITLES = {
    48: "an output that is an input",
    49: "an output that is a link to an input",
}


def commands(base, adapter):
    """Every command that writes, with these outputs."""
    return [
        ("merge", "base", "adapter", "-o", base),
        ("merge", "base", "adapter", "-o", adapter),
        ("extract", "base", "tuned", "-o", base),
        ("unmerge", "merged", "adapter", "-o", adapter),
        ("unmerge", "merged", "--base", "base", "-o", base),
        ("stack", "adapter", "other", "-o", adapter),
        ("rescale", "adapter", "--by", "2", "-o", adapter),
    ]


def runs(base, adapter):
    """With and without `--overwrite`."""
    plain = commands(base, adapter)
    return all_of([*plain, *((*each, "--overwrite") for each in plain)], Refused(73, "output", "input"))


def links(directory):
    """Links to directories and to their files."""
    (directory / "to-base").symlink_to("base")
    (directory / "to-adapter").symlink_to(directory / "adapter")
    (directory / "soft.safetensors").symlink_to("base/model.safetensors")
    (directory / "hard.safetensors").hardlink_to(directory / "base" / "model.safetensors")


FILES = [
    ("merge", "base", "adapter", "-o", name, "--overwrite")
    for name in ("base/model.safetensors", "soft.safetensors", "hard.safetensors", "base/x.safetensors")
]

CASES = (
    Case(48, "the directory itself", lambda _: None, runs("base", "adapter")),
    Case(48, "inside it", lambda _: None, runs("base/out", "adapter/out")),
    Case(48, "by a detour", lambda _: None, runs("made/../base", "./adapter/../adapter/")),
    Case(48, "what holds it", lambda _: None, runs(".", ".")),
    Case(49, "directories", links, runs("to-base", "to-adapter")),
    Case(49, "inside a link", links, runs("to-base/out", "to-adapter/out")),
    Case(49, "files", links, all_of(FILES, Refused(73, "output", "input"))),
)
