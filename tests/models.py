"""Tiny real models of transformers, their fine-tunes, and what tests measure on files."""

import contextlib
import copy
import hashlib
import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
VOCABULARY = 100


def _llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def _qwen(**changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True}
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes}))


def _gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 32}
    sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **changes}))


def _bert_config(**changes):
    from transformers import BertConfig

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertConfig(**{**sizes, "vocab_size": VOCABULARY, **changes})


def _bert(**changes):
    from transformers import BertModel

    return BertModel(_bert_config(**changes))


def _bert_classifier(**changes):
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config(num_labels=3, **changes))


BUILDERS = {"llama": _llama, "qwen": _qwen, "gpt2": _gpt2, "bert": _bert, "bert-classifier": _bert_classifier}
FAMILIES = ("llama", "qwen", "gpt2", "bert")
CONV1D = {"gpt2"}
TIED = {"qwen", "gpt2"}
SHARDED = {"llama": "60KB"}


def build(family, dtype="fp32", seed=0, **changes):
    """A random model in evaluation mode with no parameter at zero or one."""
    torch.manual_seed(seed)
    model = BUILDERS[family](**changes).to(DTYPES[dtype]).eval()
    return disturbed(model, 0.02, seed=seed + 1)


def disturbed(model, size, *, seed=7, only=lambda name: True, rank=None):
    """`model` with noise added in place to the parameters that `only` names; of low rank where one is given."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not only(name):
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if rank is not None and parameter.dim() == 2:
                left = torch.randn(parameter.shape[0], rank, generator=generator)
                noise = left @ torch.randn(rank, parameter.shape[1], generator=generator) / rank**0.5
            parameter.add_((size * noise).to(parameter.dtype))
    return model


def tuned_from(model, size=0.02, **how):
    """A fine-tune of `model`: a copy with noise (see `disturbed`)."""
    return disturbed(copy.deepcopy(model), size, **how).eval()


def save(model, path, **options):
    """Save as transformers does, without its progress bars; the path."""
    with quiet():
        model.save_pretrained(path, **options)
    return Path(path)


def save_family(family, model, path):
    """Save, sharded where the family is the sharded one."""
    return save(model, path, **({"max_shard_size": SHARDED[family]} if family in SHARDED else {}))


def load(path, cls=None, **options):
    """Load what was saved with the class that its configuration names, or with `cls`."""
    import transformers

    if cls is None:
        cls = getattr(transformers, json.loads((Path(path) / "config.json").read_text())["architectures"][0])
    with quiet():
        return cls.from_pretrained(path, dtype="auto", **options).eval()


@contextlib.contextmanager
def quiet():
    """Without the progress bars and notices of transformers."""
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)


def output_of(model, length=12, vocabulary=VOCABULARY):
    """The logits, or the last hidden state, in float64 for one fixed input."""
    ids = (torch.arange(length)[None] * 7 + 3) % vocabulary
    with torch.no_grad():
        answer = model(input_ids=ids)
    found = answer.logits if "logits" in answer else answer.last_hidden_state
    return found.double()


def tensors_of(directory, stem="model"):
    """Every tensor of a checkpoint on disk, by name; read by the safetensors library, not by us."""
    found = {}
    for file in sorted(Path(directory).glob(f"{stem}*.safetensors")):
        found |= load_file(file)
    return found


def factors_of(directory):
    """Every tensor of an adapter on disk."""
    return load_file(Path(directory) / "adapter_model.safetensors")


def config_of(directory, name="adapter_config.json"):
    return json.loads((Path(directory) / name).read_text())


def file_hashes(path):
    """SHA-256 of a file, or of every file below a directory."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {str(each.relative_to(path.parent)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def tensor_hashes(directory, stem="model"):
    """SHA-256 of dtype, shape and bytes of every tensor of a checkpoint."""
    found = {}
    for name, tensor in tensors_of(directory, stem).items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()
    return found


def header_names(file):
    """Tensor names of one safetensors file, in file order."""
    with safe_open(file, "pt") as handle:
        return list(handle.offset_keys())


def write_checkpoint(directory, tensors, config=None):
    """A checkpoint by hand: one file, and a configuration."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config or {}))
    return directory


def write_adapter(directory, tensors, config):
    """An adapter by hand, in PEFT's two files."""
    directory = Path(directory)
    directory.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()},
              directory / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return directory


def ulp(tensor, dtype):
    """The spacing of `dtype` at |tensor|, in float64; written independently of loratools.linalg."""
    info = torch.finfo(dtype)
    size = tensor.double().abs().clamp_min(info.tiny)
    return torch.pow(2.0, torch.floor(torch.log2(size))) * info.eps
