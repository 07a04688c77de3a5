import pytest

from loratools.checkpoints import families

CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("names", "config", "expected"),
    [
        ([EMBEDDING], CAUSAL | {"tie_word_embeddings": True}, (EMBEDDING, HEAD)),
        ([EMBEDDING, HEAD], CAUSAL | {"tie_word_embeddings": True}, (EMBEDDING, HEAD)),
        ([EMBEDDING, HEAD], CAUSAL | {"tie_word_embeddings": False}, None),
        ([EMBEDDING, HEAD], CAUSAL, None),
        (["wte.weight"], {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ("wte.weight", HEAD)),
        (["wte.weight"], {"architectures": ["GPT2Model"], "model_type": "gpt2"}, None),
        ([EMBEDDING], {"tie_word_embeddings": True, "architectures": ["LlamaModel"]}, None),
        ([HEAD], CAUSAL | {"tie_word_embeddings": True}, None),
        ([EMBEDDING], {}, None),
        ([EMBEDDING], {"tie_word_embeddings": "yes", "architectures": [7]}, None),
    ],
)
def test_heads_are_tied_where_the_config_or_the_family_says_so(names, config, expected):
    """And only in models that have a head; a config that is odd ties nothing."""
    assert families.tied_head(names, config) == expected


def test_the_input_embedding_is_the_most_telling_name():
    """Word embeddings rather than positions; two candidates of one name are none."""
    names = ["bert.embeddings.position_embeddings.weight", "bert.embeddings.word_embeddings.weight"]
    assert families.input_embedding(names) == names[1]
    assert families.input_embedding(["a.embed_tokens.weight", "b.embed_tokens.weight"]) is None
    assert families.input_embedding(["x.weight"]) is None


def test_a_head_is_found_by_its_suffix_at_a_dot():
    """`cls.predictions.decoder` in a BERT; never a name that only ends alike."""
    assert families.head(["bert.x.weight", "cls.predictions.decoder.weight"]) == "cls.predictions.decoder.weight"
    assert families.head(["my_lm_head.weight"]) is None


def test_prefixes_are_what_transformers_has():
    """Where transformers is installed, its own `base_model_prefix` is the judge of our table."""
    transformers = pytest.importorskip("transformers")
    checked = 0
    for family, prefix in families.BASE_PREFIX.items():
        try:
            config = transformers.AutoConfig.for_model(family)
            model = transformers.MODEL_MAPPING[type(config)]
        except (KeyError, ValueError, ImportError):
            continue
        model = model[0] if isinstance(model, tuple) else model
        assert model.base_model_prefix == prefix, family
        checked += 1
    assert checked > 30
