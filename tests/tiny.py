"""Tiny checkpoints and adapters, written with the safetensors library: what the tests of this package work on."""

import hashlib
import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
Q, K, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"
SHAPES = {Q: (16, 16), K: (8, 16), DOWN: (16, 24)}


def normal(seed, *shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def llama(dtype=torch.bfloat16, seed=0, head=True):
    """Two layers of a Llama: 16 wide, 32 words."""
    shapes = {"model.embed_tokens.weight": (32, 16)}
    for layer in (0, 1):
        path = f"model.layers.{layer}"
        shapes |= {f"{path}.self_attn.{name}_proj.weight": (16 if name in "qo" else 8, 16) for name in "qkvo"}
        shapes |= {f"{path}.mlp.gate_proj.weight": (24, 16), f"{path}.mlp.down_proj.weight": (16, 24)}
        shapes |= {f"{path}.input_layernorm.weight": (16,)}
    shapes |= {"model.norm.weight": (16,)} | ({"lm_head.weight": (32, 16)} if head else {})
    return {
        name: normal(seed * 1000 + index, *shape, dtype=dtype, scale=0.1)
        for index, (name, shape) in enumerate(shapes.items())
    }


def gpt2(dtype=torch.float32, seed=0):
    """Two square-free and one square Conv1D, (in, out) on disk, and tied embeddings."""
    shapes = {"wte.weight": (32, 16), "wpe.weight": (8, 16)}
    shapes |= {"h.0.attn.c_attn.weight": (16, 48), "h.0.attn.c_attn.bias": (48,)}
    shapes |= {"h.0.attn.c_proj.weight": (16, 16), "h.0.attn.c_proj.bias": (16,), "ln_f.weight": (16,)}
    return {
        name: normal(seed * 1000 + i, *shape, dtype=dtype, scale=0.1) for i, (name, shape) in enumerate(shapes.items())
    }


GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 32}


def write_checkpoint(directory, tensors=None, config=CONFIG, shards=1, companions=None):
    """A model directory; with several shards, an index."""
    tensors = llama() if tensors is None else tensors
    directory.mkdir(parents=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config, indent=1))
    for name, data in (companions or {}).items():
        (directory / name).write_bytes(data)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    names = list(tensors)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[shard * size : (shard + 1) * size]
        save_file({name: tensors[name] for name in mine}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def factors(rank=4, seed=1, dtype=torch.float32, modules=None, scale=0.1):
    """Module → (A, B)."""
    return {
        path: (
            normal(seed * 100 + i, rank, n, dtype=dtype),
            normal(seed * 100 + i + 50, m, rank, dtype=dtype, scale=scale),
        )
        for i, (path, (m, n)) in enumerate((modules or SHAPES).items())
    }


def adapter_config(**fields):
    return {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "down_proj"]} | fields


def lora_tensors(pairs):
    """PEFT's keys."""
    tensors = {}
    for path, (lora_A, lora_B) in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = lora_A
        tensors[f"{PREFIX}{path}.lora_B.weight"] = lora_B
    return tensors


def write_adapter(directory, tensors=None, config=None, **fields):
    """A PEFT adapter directory; `tensors` by key, or nothing for factors on three modules."""
    directory.mkdir(parents=True)
    tensors = lora_tensors(factors()) if tensors is None else tensors
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    document = adapter_config(**fields) if config is None else config
    (directory / "adapter_config.json").write_text(document if isinstance(document, str) else json.dumps(document))
    return directory


def tensors_of(path):
    """Every tensor below `path` (a file, or all weights of a directory)."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def metadata_of(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def report_of(path):
    return json.loads((path / "loratools.json").read_text())


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(root):
    """Everything below `root`: relative name → hash, link target, or `directory`."""
    found = {}
    for path in sorted(root.rglob("*")):
        what = f"-> {path.readlink()}" if path.is_symlink() else "directory" if path.is_dir() else sha256(path)
        found[str(path.relative_to(root))] = what
    return found


def equal_bits(one, other):
    """Same dtype, shape and bits (NaN and −0 included)."""
    same = one.dtype == other.dtype and one.shape == other.shape
    return same and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def rounded(exact, dtype):
    """Float64 to `dtype`, once, to nearest even: by comparing both neighbours, nothing of ours in it."""
    if dtype in (torch.float64, torch.float32):
        return exact.to(dtype)
    guess = exact.to(torch.float32).to(dtype)
    bits = guess.view(torch.int16).to(torch.int32)
    best, best_error = guess.clone(), (guess.double() - exact).abs()
    for step in (-1, 1):
        near = (bits + step).to(torch.int16).view(dtype)
        error = (near.double() - exact).abs()
        even = (near.view(torch.int16) & 1) == 0
        better = (near.double() * guess.double() >= 0) & ((error < best_error) | ((error == best_error) & even))
        best, best_error = torch.where(better, near, best), torch.where(better, error, best_error)
    return best
