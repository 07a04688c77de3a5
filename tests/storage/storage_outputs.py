"""Outputs of both kinds, made whole."""

from loratools.storage.outputs import OutputDirectory, OutputFiles
from loratools.storage.writer import SafetensorsWriter, write_bytes_durably
from tests.storage.storage_samples import DATA, SPECS


def fill(path, text):
    with SafetensorsWriter(path, SPECS, {"text": text}) as writer:
        for spec in SPECS:
            writer.write(spec.name, DATA[spec.name])
        writer.finish()


def make_directory(path, text, overwrite=False):
    with OutputDirectory(path, overwrite=overwrite) as out:
        fill(out.path / "model.safetensors", text)
        write_bytes_durably(out.path / "text", text.encode())
        out.publish()


def make_files(path, text, overwrite=False):
    with OutputFiles(path, overwrite=overwrite) as out:
        fill(out.file, text)
        write_bytes_durably(out.sibling(".loratools.json"), text.encode())
        out.publish()


def names(path):
    return sorted(entry.name for entry in path.iterdir())


def state(path):
    """Every file below `path` but in partials, with its bytes."""
    return {
        str(each.relative_to(path)): each.read_bytes()
        for each in sorted(path.rglob("*"))
        if each.is_file() and ".partial" not in str(each)
    }
