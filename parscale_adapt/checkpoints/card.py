"""Model cards with the metadata that the hub reads."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..version import __version__


_PAPER = "[Parallel Scaling Law for Language Models](https://arxiv.org/abs/2505.10475)"
_US = f"parscale_adapt {__version__}"
_TAGS = ["parscale", "parallel-scaling", "arxiv:2505.10475"]


def adapter_card(source: str, backbone: str | None, num_streams: int) -> ModelCard:
    """The card of an adapter that was imported from a published checkpoint."""
    loading = (
        f'backbone = AutoModelForCausalLM.from_pretrained("{backbone}", dtype="auto")'
        if backbone
        else "backbone = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))  # its weights come along"
    )
    text = f"""
# ParScale adapter with {num_streams} streams

Import `parscale_adapt` before loading it: without it PEFT doesn't know the method and stops with
`KeyError: 'PARSCALE'`.

Imported from `{source}`, a checkpoint of {_PAPER}, by {_US}.

```python
import parscale_adapt  # registers the method with PEFT
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

{loading}
model = PeftModel.from_pretrained(backbone, FOLDER)
```
"""
    return new_card("peft", backbone or source, text)


def export_card(backbone: str | None, format: str, num_streams: int) -> ModelCard:
    """The card of an exported checkpoint."""
    how = "plain" if num_streams == 1 else format
    first, imports, option = {
        "plain": ("It loads as any model of transformers.", "", ""),
        "standalone": (
            "Load it with `trust_remote_code=True`: its code is in `modeling_parscale.py` and needs torch and\n"
            "transformers alone.",
            "",
            ", trust_remote_code=True",
        ),
        "published": (
            "Import `parscale_adapt` before loading it: without it transformers doesn't know the model type\n"
            "`qwen2_parscale`.",
            "import parscale_adapt  # registers the model type\n",
            "",
        ),
    }[how]
    of = f" of `{backbone}`" if backbone else ""
    what = (
        f"{num_streams} streams{of} run side by side and are mixed for every token"
        if num_streams > 1
        else (f"One stream{of}, which is a plain model, to compare with several")
    )
    text = f"""
# ParScale model with {num_streams} {"streams" if num_streams > 1 else "stream"}

{first}

{what} ({_PAPER}). Exported by {_US}.

```python
{imports}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{option})
```

`parscale verify FOLDER` compares it with what is kept of its source in `reference_logits.safetensors`.
"""
    return new_card("transformers", backbone, text, **({"custom_code": True} if how == "standalone" else {}))


def new_card(library: str, base_model: str | None, text: str, **metadata: Any) -> ModelCard:
    """A card with the metadata that all of ours have.

    Args:
        library: that loads the model.
        base_model: its backbone; left out unless it is a repository on the hub.
        text: what the card says.
        metadata: more fields.
    """
    # The hub knows its own repositories only.
    is_hub_name = (
        base_model is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists()
    )
    data = ModelCardData(
        base_model=base_model if is_hub_name else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=_TAGS,
        **metadata,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")
