"""The format of Hugging Face PEFT: `adapter_model.safetensors` and `adapter_config.json`."""

from loratools.formats.peft.codec import PeftCodec

__all__ = ["PeftCodec"]
