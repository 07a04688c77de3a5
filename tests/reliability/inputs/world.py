"""The harmless files that hostile ones are used with, and writers of harmless and of broken files; no torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHTS, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
ADAPTER = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]}


def normal(seed, *shape):
    """Float32 numbers that are always the same."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def llama(seed=0):
    """A Llama of two layers: name → array."""
    shapes = {"model.embed_tokens.weight": (32, 16)}
    for layer in (0, 1):
        shapes |= {f"model.layers.{layer}.self_attn.q_proj.weight": (16, 16)}
        shapes |= {f"model.layers.{layer}.mlp.up_proj.weight": (24, 16)}
    shapes |= {"model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    return {name: normal([seed, index], *shape) for index, (name, shape) in enumerate(shapes.items())}


def factors(seed=5, rank=2):
    """PEFT's keys for the projections of the Llama: key → array."""
    found = {}
    for index, (name, weight) in enumerate(llama().items()):
        if "layers" in name:
            path = PREFIX + name.removesuffix(".weight")
            found[f"{path}.lora_A.weight"] = normal([seed, index, 1], rank, weight.shape[1])
            found[f"{path}.lora_B.weight"] = normal([seed, index, 2], weight.shape[0], rank)
    return found


def write_checkpoint(directory, tensors=None, config=CONFIG):
    """A model in one file."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(llama() if tensors is None else tensors, directory / "model.safetensors", {"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_shards(directory, tensors=None):
    """A model in two files with a correct index; returns the index as a value."""
    tensors = llama() if tensors is None else tensors
    directory.mkdir(parents=True, exist_ok=True)
    names = list(tensors)
    halves = {ONE: names[: len(names) // 2], TWO: names[len(names) // 2 :]}
    for file, mine in halves.items():
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    weight_map = {name: file for file, mine in halves.items() for name in mine}
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    return index


def write_adapter(directory, tensors=None, config=None, **fields):
    """A PEFT adapter; `config` is text or bytes in place of the usual configuration with `fields`."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(factors() if tensors is None else tensors, directory / WEIGHTS, {"format": "pt"})
    text = json.dumps({**ADAPTER, **fields}) if config is None else config
    (directory / CONFIG_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    return directory


def write_world(directory):
    """`base`, `tuned`, `adapter` and `other`; `merged` is made by whoever tests merging."""
    base = llama()
    tuned = {name: weight + np.float32(0.1) * normal([9, index], *weight.shape) if weight.ndim == 2 else weight
             for index, (name, weight) in enumerate(base.items())}  # fmt: skip
    write_checkpoint(directory / "base", base)
    write_checkpoint(directory / "tuned", tuned)
    write_adapter(directory / "adapter")
    write_adapter(directory / "other", factors(seed=6))


def packed(header, data=b""):
    """A safetensors file from a header (a JSON value, or bytes) and the bytes behind it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    """One tensor of a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def place(directory, name, raw):
    """A file of these bytes as the weights of a checkpoint and of an adapter."""
    for folder, file, config in (
        (directory / name, "model.safetensors", CONFIG),
        (directory / f"{name}-adapter", WEIGHTS, ADAPTER),
    ):
        folder.mkdir()
        (folder / file).write_bytes(raw)
        (folder / ("config.json" if config is CONFIG else CONFIG_FILE)).write_text(json.dumps(config))


def sparse(path, start, size):
    """A file of `size` bytes that begins with `start` and holds nothing else: it takes no room on the disk."""
    with Path(path).open("wb") as file:
        file.write(start)
        file.truncate(size)


def stored(file):
    """Name → (dtype, shape, bytes) of every tensor of a valid file, read without any library."""
    raw = Path(file).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return {
        name: (each["dtype"], tuple(each["shape"]), raw[8 + length :][slice(*each["data_offsets"])])
        for name, each in header.items()
    }


def join(tensors):
    """A valid file from name → (dtype, shape, bytes), in this order and without any padding."""
    header, at = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = entry(dtype, shape, (at, at + len(data)))
        at += len(data)
    return packed(header, b"".join(data for _, _, data in tensors.values()))


def plain(arrays):
    """Float32 arrays as `join` wants them."""
    return {name: ("F32", array.shape, array.tobytes()) for name, array in arrays.items()}


def copy_world(source, target):
    """A fresh copy of the harmless files, and the empty directory for outputs."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    (target / "made").mkdir()
    return target
