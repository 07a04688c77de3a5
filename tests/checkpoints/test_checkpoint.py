import pytest

from loratools.files import open_checkpoint
from tests.tiny import CONFIG, GPT2, gpt2, llama, write_checkpoint


def test_a_checkpoint_is_a_mapping_of_unread_tensors(tmp_path):
    """Names in file order, shapes and dtypes from headers; sharding changes nothing of it."""
    one = open_checkpoint(write_checkpoint(tmp_path / "one"))
    many = open_checkpoint(write_checkpoint(tmp_path / "many", shards=3))
    assert set(one) == set(many) == set(llama())
    assert {name: (ref.dtype, ref.shape) for name, ref in one.items()} == {
        name: ("BF16", tuple(tensor.shape)) for name, tensor in llama().items()
    }
    assert one.nbytes == many.nbytes == sum(tensor.nbytes for tensor in llama().values())
    assert [shard.name for shard in many.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert (one.index_name, many.index_name) == (None, "model.safetensors.index.json")
    assert "<Checkpoint 'many'" in repr(many)


def test_companions_are_what_travels_with_the_weights(tmp_path):
    """Tokenizer, generation config and code; no weights, no hidden files, nothing of our own."""
    travel = {"tokenizer.json": b"{}", "modeling_x.py": b"import os", "chat_template.jinja": b"{{ 1 }}"}
    stay = {
        "pytorch_model.bin": b"\x80", "README.md": b"#", ".gitattributes": b"", "loratools.json": b"{}",
        "loratools.receipt": b"", "model.gguf": b"", "model.onnx": b"", "tf_model.h5": b"",
    }  # fmt: skip
    found = open_checkpoint(write_checkpoint(tmp_path / "m", companions=travel | stay))
    assert [path.name for path in found.companions] == sorted(travel)
    assert {path.name for path in found.files} == {"model.safetensors", "config.json"}


@pytest.mark.parametrize(("tensors", "config", "tied"), [
    (llama(), CONFIG, None),
    (llama(head=False), CONFIG | {"tie_word_embeddings": True}, ("model.embed_tokens.weight", "lm_head.weight")),
    (gpt2(), GPT2, ("wte.weight", "lm_head.weight")),
])  # fmt: skip
def test_tied_heads(tmp_path, tensors, config, tied):
    """From the opened checkpoint, as the families say."""
    assert open_checkpoint(write_checkpoint(tmp_path / "m", tensors, config)).tied_head == tied
