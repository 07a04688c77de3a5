"""Where storage meets formats: open a checkpoint, load an adapter, save one."""

from loratools.files._load_adapter import adapter_of, contents_of, load_adapter
from loratools.files._open_activations import Activations, Entry, open_activations
from loratools.files._open_checkpoint import open_checkpoint
from loratools.files._save import (
    encode_adapter,
    files_behind,
    save,
    scaled_exactly,
    settled,
    write_weights,
)

__all__ = [
    "Activations",
    "Entry",
    "adapter_of",
    "contents_of",
    "encode_adapter",
    "files_behind",
    "load_adapter",
    "open_activations",
    "open_checkpoint",
    "save",
    "scaled_exactly",
    "settled",
    "write_weights",
]
