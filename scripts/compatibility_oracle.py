"""The output of P streams by brute force, for any architecture: one plain forward per stream, mixed in numpy.

Each forward runs on a fresh backbone with stock eager attention, in whose place stands a function that puts one
stream's prefix in front of keys and values. Nothing is shared with the package; prefixes and aggregator are read by
their names from the file of a saved adapter.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from tiny_architectures import answer_of
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel


Prefixes = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]
_EAGER = "eager_attention_forward"


class SavedAdapter:
    """The tensors of an adapter folder: prefixes by attention module, the aggregator, where it stands, and a head."""

    def __init__(self, folder: Path):
        config = json.loads((folder / "adapter_config.json").read_text())
        self.num_streams: int = config["num_streams"]
        self.smoothing: float = config["aggregator_smoothing"]
        tensors = load_file(folder / "adapter_model.safetensors")
        self.tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
        (weight,) = (name for name in self.tensors if name.endswith("parscale_aggregator.0.weight"))
        self.decoder_name = weight.removesuffix("parscale_aggregator.0.weight").removesuffix(".")
        self.head = {name: tensor for name, tensor in self.tensors.items() if "parscale_" not in name}

    def prefixes(self, backbone: nn.Module, stream: int) -> Prefixes:
        """Keys and values `[1, heads, n, size]` of one stream by the attention module that they belong to."""
        found = {}
        for name, module in backbone.named_modules():
            key = self.tensors.get(f"{name}.parscale_prefix_k")
            if key is not None:
                found[module] = (
                    key[stream : stream + 1],
                    self.tensors[f"{name}.parscale_prefix_v"][stream : stream + 1],
                )
        return found

    def mix(self, hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """`P` hidden states `[B, T, H]` to `[B, T, H]` (paper, section 2), in float64."""
        weight = {
            name.partition("parscale_aggregator.")[2]: tensor.double().numpy() for name, tensor in self.tensors.items()
        }
        streams = np.stack([states.double().numpy() for states in hidden_states], axis=-1)
        features = streams.reshape(*streams.shape[:2], -1)
        hidden = features @ weight["0.weight"].T + weight["0.bias"]
        logits = (hidden / (1 + np.exp(-hidden))) @ weight["2.weight"].T + weight["2.bias"]
        shares = np.exp(logits - logits.max(-1, keepdims=True))
        shares = shares / shares.sum(-1, keepdims=True) * (1 - self.smoothing) + self.smoothing / self.num_streams
        return torch.from_numpy(np.einsum("bthp,btp->bth", streams, shares)).to(hidden_states[0].dtype)


def _with_prefix(stock: Callable, prefixes: Prefixes, called: set[nn.Module]) -> Callable:
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        if module in prefixes:
            called.add(module)
            prefix_key, prefix_value = (prefix.expand(key.shape[0], -1, -1, -1) for prefix in prefixes[module])
            key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
            columns = (prefix_key.shape[2], 0)
            if attention_mask is not None:
                attention_mask = F.pad(attention_mask, columns)
            if kwargs.get("position_bias") is not None:
                kwargs["position_bias"] = F.pad(kwargs["position_bias"], columns)
        return stock(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


@contextmanager
def _prefixes_in_eager_attention(prefixes: Prefixes) -> Iterator[None]:
    """Replace the eager attention function in every modeling file of transformers that has one."""
    called: set[nn.Module] = set()
    patches = [
        patch.object(module, _EAGER, _with_prefix(getattr(module, _EAGER), prefixes, called))
        for name, module in list(sys.modules.items())
        if name.startswith("transformers.models.") and ".modeling_" in name and _EAGER in vars(module)
    ]
    for one in patches:
        one.start()
    try:
        yield
    finally:
        for one in patches:
            one.stop()
    if called != set(prefixes):
        raise RuntimeError(f"{len(prefixes) - len(called)} attention modules never called their eager function.")


@torch.no_grad()
def logits_by_brute_force(backbone: PreTrainedModel, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the adapter saved in `folder` on `backbone`, a plain model with eager attention."""
    adapter = SavedAdapter(folder)
    backbone.load_state_dict(adapter.head, strict=False)
    decoder = backbone.get_submodule(adapter.decoder_name)
    hidden_states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple, output) -> None:
        hidden_states.append(output[0])

    def replace(module: nn.Module, args: tuple, output):
        mixed = adapter.mix(hidden_states)
        if isinstance(output, tuple):
            return (mixed, *output[1:])
        output["last_hidden_state"] = mixed
        return output

    hook = decoder.register_forward_hook(keep)
    for stream in range(adapter.num_streams):
        with _prefixes_in_eager_attention(adapter.prefixes(backbone, stream)):
            backbone(**inputs, use_cache=False)
    hook.remove()
    hook = decoder.register_forward_hook(replace)
    logits = answer_of(backbone(**inputs, use_cache=False))
    hook.remove()
    return logits
