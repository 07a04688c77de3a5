"""Checkpoints as values: tensors by name, the module tree, and the facts that names and config give away."""

from loratools.checkpoints.checkpoint import Checkpoint, ShardInfo
from loratools.checkpoints.modules import Module, modules_of, owner

__all__ = ["Checkpoint", "Module", "ShardInfo", "modules_of", "owner"]
