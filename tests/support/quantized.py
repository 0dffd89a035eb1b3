"""4-bit backbones on the CPU."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from parscale_adapt.hf.engines import keep_unpacked


def load_in_4bit(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    nested: bool = True,
    auto_class: type = AutoModelForCausalLM,
    full_precision: list[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """A backbone in NF4, but for the modules named in `full_precision`.

    Where the processor knows AVX512-BF16, bitsandbytes can't pack layers as narrow as ours.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=full_precision,
    )
    model = auto_class.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map="cpu", **options
    )
    keep_unpacked(model)
    return model
