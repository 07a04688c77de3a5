"""MiniLM reads English: its inputs' RMS from hooks, a fine-tune on the text, and errors of layers on held-out text.

The 64 sentences of `tests/english.txt` were written for this; the first 40 are for tuning and gathering, the last 24
are seen by nothing but the judge.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests import models

SENTENCES = (Path(__file__).parent / "english.txt").read_text(encoding="utf-8").splitlines()
STEPS = 20
SEEN, HELD_OUT = SENTENCES[:40], SENTENCES[40:]


def batches(directory, sentences, size=8):
    """Padded batches of token ids, as MiniLM's own tokenizer makes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    for first in range(0, len(sentences), size):
        yield dict(tokenizer(sentences[first : first + size], padding=True, return_tensors="pt"))


def inputs_of(model, tokens):
    """Linear module path → (tokens, in), the inputs at tokens that are no padding."""
    found, handles = {}, []
    mask = tokens["attention_mask"].bool()

    def record(name):
        def hook(module, inputs):
            x = inputs[0].detach()
            found[name] = (x[mask] if x.shape[:2] == mask.shape else x.reshape(-1, x.shape[-1])).double()

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            handles.append(module.register_forward_pre_hook(record(name)))
    with torch.no_grad():
        model(**tokens)
    for handle in handles:
        handle.remove()
    return found


def moments(model, directory, sentences):
    """Linear module path → E[x xᵀ], (in, in) float64, and the number of tokens."""
    sums, counts = {}, {}
    for tokens in batches(directory, sentences):
        for name, x in inputs_of(model, tokens).items():
            sums[name] = sums.get(name, 0) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)
    return {name: total / counts[name] for name, total in sums.items()}


def gather(model, directory, file):
    """The RMS of every Linear's inputs over the text that may be seen, as `--activations` takes it."""
    found = moments(model, directory, SEEN)
    save_file({name: each.diagonal().sqrt().float().contiguous() for name, each in found.items()}, file)
    return file


def tune(source, target, *, steps=STEPS, rate=5e-5):
    """AdamW on every parameter towards unlike embeddings of unlike sentences, with dropout; saved by transformers."""
    torch.manual_seed(0)
    model = models.load(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    rounds = [tokens for _ in range(-(-steps // 5)) for tokens in batches(source, SEEN)][:steps]
    for tokens in rounds:
        first, second = (embedded(model, tokens) for _ in range(2))
        loss = torch.nn.functional.cross_entropy(first @ second.T / 0.05, torch.arange(len(first)))
        loss = loss + 0.01 * model(**tokens).pooler_output.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return models.save(model.eval(), target)


def embedded(model, tokens):
    """Mean over tokens, of length one."""
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)


def output_errors(adapter, base, tuned, held_out):
    """Module → ‖(ΔW − Δ̂)X‖/‖ΔW X‖ on held-out text, in float64, for what an adapter (PEFT directory) has."""
    import loratools as lt

    before, after = models.tensors_of(base), models.tensors_of(tuned)
    found = {}
    for name, update in lt.load_adapter(adapter).items():
        if name in held_out and update.terms:
            moved = after[f"{name}.weight"].double() - before[f"{name}.weight"].double()
            left = moved - update.delta_weight().double()
            energy = [float((each @ held_out[name] * each).sum()) for each in (left, moved)]
            found[name] = (energy[0] / energy[1]) ** 0.5
    return found
