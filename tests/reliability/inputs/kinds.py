"""H64: kinds of adapter. A kind that starts to work moves from one table to the other, and nothing else changes."""

from functools import partial

from tests.reliability.inputs.cases import Accepted, Case, Refused, Run, as_adapter
from tests.reliability.inputs.world import PREFIX, Q, factors, normal, write_adapter

TITLES = {64: "other kinds of adapter"}

LABELS = ("inspect", "merge", "merge two", "stack", "rescale", "unmerge")
YES, NO_BIAS = Accepted(), Refused(65, "mismatch", "a bias, which the base")
NOT_MERGED, MIXED = Refused(65, "mismatch", "merged"), Refused(65, "unsupported", "cannot hold")
NO_SUM = Refused(65, "unsupported", "(?i)merge (it )?into (the base|it)")
READ = {"inspect": YES, "merge": YES, "merge two": YES, "unmerge": NOT_MERGED}
SCALED = READ | {"stack": NO_SUM, "rescale": YES}
MERGED = READ | {"stack": NO_SUM, "rescale": NO_SUM}
SUMMED = READ | {"stack": YES, "rescale": YES}
WORKS: dict[str, dict[str, Accepted | Refused]] = {
    "LOHA": SUMMED,
    "LOKR": SUMMED,
    "ADALORA": SUMMED,
    "VERA": SUMMED,
    "MISS": SUMMED,
    "TRAINABLE_TOKENS": MERGED | {"stack": YES},
    **dict.fromkeys(("IA3", "BOFT", "HRA"), MERGED),
    **dict.fromkeys(("FOURIERFT", "C3A"), SCALED),
    "LN_TUNING": MERGED | {"stack": YES},
    "OFT": dict.fromkeys(LABELS, Refused(65, "unsupported", "peft_version")),
    "SHIRA": dict.fromkeys(LABELS, Refused(65, "malformed", "incomplete")),
    "DoRA": MERGED,
    "DoRA on one module": MERGED,
    "lora_bias": {"inspect": YES, "merge": NO_BIAS, "merge two": NO_BIAS, "stack": MIXED, "rescale": MIXED,
                  "unmerge": NOT_MERGED},
    "QALoRA": SUMMED,
    "target_parameters": SUMMED,
    "block-diagonal LoRA": SUMMED,
    "trainable tokens": MERGED | {"stack": YES},
}  # fmt: skip
"""Kind → what the commands say to it that do not refuse the kind by name, as all do that are not in here."""

M, EMBEDDING = f"{PREFIX}{Q}", "model.embed_tokens"


def low_rank(**more):
    """LoRA's own factors, and something beside them."""
    return factors() | {f"{M}.{role}": tensor for role, tensor in more.items()}


def roles(**tensors):
    """Tensors of one module."""
    return {f"{M}.{role.replace('__', '.')}": tensor for role, tensor in tensors.items()}


def pooled():
    """LoRA on inputs that are averaged in groups of sixteen."""
    return {key: value[:, :1] if ".lora_A" in key else value for key, value in factors().items()}


LOHA = roles(hada_w1_a=normal(1, 16, 2), hada_w1_b=normal(2, 2, 16), hada_w2_a=normal(3, 16, 2),
             hada_w2_b=normal(4, 2, 16))  # fmt: skip
LOKR = roles(lokr_w1=normal(1, 4, 4), lokr_w2_a=normal(2, 4, 2), lokr_w2_b=normal(3, 2, 4))
VERA = roles(vera_lambda_b=normal(1, 16), vera_lambda_d=normal(2, 2)) | {
    "base_model.vera_A": normal(3, 2, 16), "base_model.vera_B": normal(4, 16, 2)}  # fmt: skip
MAGNITUDES = {key.replace("lora_B.weight", "lora_magnitude_vector"): abs(normal(1, value.shape[0]))
              for key, value in factors().items() if ".lora_B" in key}  # fmt: skip
PROMPT = {"prompt_embeddings": normal(1, 8, 16)}
TYPES = {
    "LOHA": (LOHA, {"r": 2, "alpha": 4}),
    "LOKR": (LOKR, {"r": 2, "alpha": 4, "decompose_factor": -1, "decompose_both": False}),
    "ADALORA": (roles(lora_A=normal(1, 2, 16), lora_B=normal(2, 16, 2), lora_E=normal(3, 2, 1)),
                {"init_r": 2, "target_r": 2, "rank_pattern": None}),
    "VERA": (VERA, {"r": 2, "projection_prng_key": 0, "save_projection": True}),
    "IA3": (roles(ia3_l=normal(1, 16, 1)), {"feedforward_modules": []}),
    "OFT": (roles(oft_R__weight=normal(1, 4, 6)), {"oft_block_size": 4, "r": 0}),
    "BOFT": (roles(boft_R=normal(1, 1, 4, 4, 4), boft_s=normal(2, 16, 1)), {"boft_block_size": 4}),
    "HRA": (roles(hra_u=normal(1, 16, 2)), {"r": 2}),
    "MISS": (roles(miss_block=normal(1, 2, 16)), {"r": 2}),
    "BONE": (roles(bone_block=normal(1, 2, 16)), {"r": 2}),
    "FOURIERFT": (roles(fourierft_spectrum=normal(1, 10)), {"n_frequency": 10}),
    "RANDLORA": (roles(randlora_lambda=normal(1, 2, 4), randlora_gamma=normal(2, 4, 16)), {"r": 2}),
    "SHIRA": (roles(shira_weight=normal(1, 4)), {"r": 2}),
    "C3A": (roles(c3a_kernel=normal(1, 2, 2, 8)), {"block_size": 8}),
    "ROAD": (roles(road_theta=normal(1, 8), road_alpha=normal(2, 8)), {"variant": "road_1"}),
    "VBLORA": (roles(vblora_logits_A=normal(1, 2, 4, 8)), {"r": 2}),
    "HIRA": (roles(hira_A=normal(1, 2, 16), hira_B=normal(2, 16, 2)), {"r": 2}),
    "WAVEFT": (roles(waveft_spectrum=normal(1, 10)), {"n_frequency": 10}),
    "DELORA": (roles(delora_A=normal(1, 2, 16), delora_B=normal(2, 16, 2), delora_lambda=normal(3, 1)), {"r": 2}),
    "GRALORA": (roles(gralora_A=normal(1, 2, 16), gralora_B=normal(2, 16, 2)), {"r": 2}),
    "OSF": (roles(osf_U_low=normal(1, 16, 2)), {}),
    "XLORA": ({"xlora_classifier.layers.0.weight": normal(1, 4, 16)}, {"adapters": {"0": "../evil"}}),
    "POLY": (roles(poly_lora_A=normal(1, 1, 1, 16, 2)), {"r": 2}),
    "LN_TUNING": ({f"{PREFIX}model.norm.weight": normal(1, 16)}, {"target_modules": ["norm"]}),
    "TRAINABLE_TOKENS": ({f"{PREFIX}{EMBEDDING}.trainable_tokens_delta": normal(1, 2, 16)},
                         {"token_indices": [0, 1], "target_modules": ["embed_tokens"]}),
    "PROMPT_TUNING": (PROMPT, {"num_virtual_tokens": 8}),
    "MULTITASK_PROMPT_TUNING": (PROMPT, {"num_virtual_tokens": 8}),
    "P_TUNING": (PROMPT, {"num_virtual_tokens": 8}),
    "PREFIX_TUNING": (PROMPT, {"num_virtual_tokens": 8}),
    "CPT": (PROMPT, {"cpt_token_ids": [1]}),
    "ADAPTION_PROMPT": (roles(adaption_prompt=normal(1, 1, 8, 16)), {"adapter_len": 8}),
    "a type of 2031": (factors(), {}),
    "\x1b[2Jlora\u202e": (factors(), {}),
    "LORA ": (factors(), {}),
}  # fmt: skip
"""peft_type → tensors and fields, as PEFT writes them."""

VARIANTS = {
    "DoRA": (factors() | MAGNITUDES, {"use_dora": True}),
    "DoRA on one module": (low_rank(lora_magnitude_vector=normal(1, 16)), {}),
    "lora_bias": (low_rank(**{"lora_B.bias": normal(1, 16)}), {"lora_bias": True}),
    "QALoRA": (pooled(), {"use_qalora": True, "qalora_group_size": 16}),
    "block-diagonal LoRA": (factors(), {"use_bdlora": {"nblocks": 2}}),
    "layer replication": (factors(), {"layer_replication": [[0, 2], [1, 2]]}),
    "target_parameters": (factors(), {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "trainable tokens": (factors() | {f"{PREFIX}{EMBEDDING}.token_adapter.trainable_tokens_delta": normal(1, 1, 16)},
                         {"trainable_token_indices": [1]}),
    "KaSA": (factors(), {"kasa_config": {"beta": 1}}),
    "Arrow": (factors(), {"arrow_config": {"top_k": 1}}),
    "activated LoRA": (factors(), {"alora_invocation_tokens": [1]}),
    "PiSSA": (factors(), {"init_lora_weights": "pissa_niter_4"}),
    "OLoRA": (factors(), {"init_lora_weights": "olora"}),
    "CorDA": (factors(), {"init_lora_weights": "corda", "corda_config": {"cache_file": "/etc/passwd"}}),
    "LoftQ": (factors(), {"init_lora_weights": "loftq"}),
    "LoHa called LoRA": (factors() | LOHA, {}),
    "LoKr called LoRA": (factors() | LOKR, {}),
    "VeRA called LoRA": (factors() | VERA, {}),
    "prompts called LoRA": (factors() | {f"{PREFIX}prompt_embeddings": normal(1, 8, 16)}, {}),
    "a raw state dict": ({f"{M}.lora_A.default.weight": normal(1, 2, 16)}, {}),
}  # fmt: skip
"""What a LORA adapter can be besides LoRA → tensors and fields."""


def kind(directory, tensors, fields):
    """An adapter of that kind."""
    write_adapter(directory / "bad-adapter", tensors, **fields)


REFUSED = Refused(65, "unsupported", "not read|read yet|valid only|raw state dict|depends on the base")


def runs(name):
    """What each command says to a kind."""
    known = WORKS.get(name, {})
    labelled = zip(LABELS, as_adapter(REFUSED), strict=True)
    return tuple(Run(run.arguments, known.get(label, run.answer)) for label, run in labelled)


CASES = (
    *(Case(64, name, partial(kind, tensors=tensors, fields={"peft_type": name, **fields}), runs(name))
      for name, (tensors, fields) in TYPES.items()),
    *(Case(64, name, partial(kind, tensors=tensors, fields=fields), runs(name))
      for name, (tensors, fields) in VARIANTS.items()),
    Case(64, "no type", lambda directory: kind(directory, factors(), {"peft_type": None}),
         as_adapter(Refused(65, "malformed", "peft_type"))),
    Case(64, "a type that is a list", lambda directory: kind(directory, factors(), {"peft_type": ["LORA"]}),
         as_adapter(Refused(65, "malformed", "peft_type"))),
)  # fmt: skip
