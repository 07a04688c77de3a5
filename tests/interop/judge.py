"""The judge: stock PEFT loads an adapter without a missing key, an unexpected key, or a word."""

import contextlib
import logging
import warnings


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
